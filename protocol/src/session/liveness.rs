//! Signs of life, lane by lane, the same on every transport.
//!
//! A lane that is silent for [`PING_AFTER`] is asked; one that stays silent for [`SILENCE_MAX`] has lost its peer. Whole
//! frames count as life, and so does a frame under way of which enough moves.

use crate::frame::{Frame, LaneId, Ping};
use crate::limits::{PING_AFTER, SILENCE_MAX};
use crate::time::Time;

#[derive(Clone, Copy, Debug)]
struct LaneLife {
    heard: Time,
    asked: Time,
    answer: Option<u64>,
}

/// When each lane was last heard of.
#[derive(Debug, Default)]
pub struct Liveness {
    lanes: [Option<LaneLife>; LaneId::COUNT],
}

impl Liveness {
    /// Starts to watch `lane`.
    pub fn open(&mut self, lane: LaneId, now: Time) {
        if let Some(slot) = self.lanes.get_mut(lane.index()) {
            *slot = Some(LaneLife { heard: now, asked: now, answer: None });
        }
    }

    /// Stops to watch `lane`.
    pub fn close(&mut self, lane: LaneId) {
        if let Some(slot) = self.lanes.get_mut(lane.index()) {
            *slot = None;
        }
    }

    /// Whether `lane` is watched: somebody carries it.
    pub fn is_open(&self, lane: LaneId) -> bool {
        self.lanes.get(lane.index()).is_some_and(Option::is_some)
    }

    /// A whole frame arrived on `lane`.
    pub fn heard(&mut self, lane: LaneId, now: Time) {
        if let Some(life) = self.lane(lane) {
            life.heard = now;
        }
    }

    // SPEC 4.18
    /// A PING arrived: a question is to be answered, an answer is life enough.
    pub fn handle_ping(&mut self, lane: LaneId, ping: Ping) {
        if let Some(life) = self.lane(lane).filter(|_| !ping.answer) {
            life.answer = Some(ping.token);
        }
    }

    /// The PING to send on `lane` now, if one is due.
    pub fn poll_ping(&mut self, lane: LaneId, now: Time) -> Option<Frame<'static>> {
        let life = self.lane(lane)?;
        if let Some(token) = life.answer.take() {
            return Some(Frame::Ping(Ping { token, answer: true }));
        }
        if now < life.heard.max(life.asked) + PING_AFTER {
            return None;
        }
        life.asked = now;
        Some(Frame::Ping(Ping { token: now.as_nanos(), answer: false }))
    }

    /// Whether a PING is due on `lane`, without taking it.
    pub fn is_due(&self, lane: LaneId, now: Time) -> bool {
        let life = self.lanes.get(lane.index()).copied().flatten();
        life.is_some_and(|life| life.answer.is_some() || now >= life.heard.max(life.asked) + PING_AFTER)
    }

    // SPEC 9.4
    /// The first lane whose peer is lost.
    pub fn lost(&self, now: Time) -> Option<&'static str> {
        self.lanes.iter().flatten().any(|life| now >= life.heard + SILENCE_MAX).then_some("nothing heard for 15 s")
    }

    /// When something is due next.
    pub fn next(&self) -> Option<Time> {
        self.lanes
            .iter()
            .flatten()
            .map(|life| (life.heard.max(life.asked) + PING_AFTER).min(life.heard + SILENCE_MAX))
            .min()
    }

    fn lane(&mut self, lane: LaneId) -> Option<&mut LaneLife> {
        self.lanes.get_mut(lane.index())?.as_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Span;

    #[test]
    fn asks_then_gives_up() {
        let mut life = Liveness::default();
        let at = |secs| Time::ZERO + Span::from_secs(secs);
        life.open(LaneId::CONTROL, at(0));
        assert_eq!((life.poll_ping(LaneId::CONTROL, at(4)), life.next()), (None, Some(at(5))));
        assert!(life.poll_ping(LaneId::CONTROL, at(5)).is_some());
        assert!(life.poll_ping(LaneId::CONTROL, at(6)).is_none());
        assert!(life.lost(at(14)).is_none() && life.lost(at(15)).is_some());
        life.heard(LaneId::CONTROL, at(14));
        assert!(life.lost(at(28)).is_none());
    }

    #[test]
    fn answers_a_question_once_and_never_an_answer() {
        let mut life = Liveness::default();
        life.open(LaneId::CONTROL, Time::ZERO);
        life.handle_ping(LaneId::CONTROL, Ping { token: 7, answer: true });
        assert!(life.poll_ping(LaneId::CONTROL, Time::ZERO).is_none());
        life.handle_ping(LaneId::CONTROL, Ping { token: 7, answer: false });
        assert_eq!(life.poll_ping(LaneId::CONTROL, Time::ZERO), Some(Frame::Ping(Ping { token: 7, answer: true })));
        assert!(life.poll_ping(LaneId::CONTROL, Time::ZERO).is_none());
    }
}
