//! One session that fills a guest which runs here: greets, hears which guest it is about, says what that lacks, takes it.
//!
//! ```text
//! Greeting ─HELLO→ Waiting ─FILL→ Deciding ─accept()→ Filling ─nothing lacking, DONE→ Parting ─GONE→ Over
//! ```

use super::Incomplete;
use super::filling::Filling;
use crate::error::ErrorKind;
use crate::memory::GuestSink;
use pagewire_protocol::compress::Decompressor;
use pagewire_protocol::digest::{join_proof, proofs_equal};
use pagewire_protocol::error::{CloseCode, PeerError, Violation, chain};
use pagewire_protocol::frame::{Done, Fill, Frame, FrameKind, Join, Lack, LaneId, Role};
use pagewire_protocol::handover::Message;
use pagewire_protocol::limits::{HANDSHAKE_SPAN_MAX, STALL_SPAN_MAX};
use pagewire_protocol::page::{Place, RegionId};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::{Endpoint, FEATURE_LIVE, FEATURE_POST_COPY, Machine, NoJob, Outgoing, Phase, Policy};
use pagewire_protocol::time::{Span, Time};
use std::collections::VecDeque;
use std::io;

/// On which terms a guest is filled.
#[derive(Clone, Debug)]
pub struct FillTerms {
    /// Bulk lanes granted at most.
    pub lanes: u8,
    /// Unacknowledged bytes a bulk lane may have. What is under way there goes before what the guest waits for, as far
    /// as both share a link.
    pub window: u64,
    /// Random: the secret that further connections prove.
    pub secret: [u8; 32],
    /// Pages that the guest will touch, by their places in the image and in this order, if that is known from another
    /// time: they are brought first. What it does not lack is left out.
    pub ahead: Vec<Place>,
}

/// What the engine tells whoever embeds it.
#[derive(Clone, Debug)]
pub enum FillEvent {
    /// Decide: [`FillEngine::accept`] or [`FillEngine::refuse`].
    Asked(Box<Fill>),
    /// Nothing is lacking any more.
    Filled,
    /// The sender says this of a hand-over: its memory is gone.
    Said(Message),
}

/// The receiving side of one session that fills a guest.
#[derive(Debug)]
pub struct FillEngine<S> {
    endpoint: Endpoint,
    asked: Option<Fill>,
    secret: [u8; 32],
    joined: [bool; LaneId::COUNT],
    joined_until: Time,
    filling: Option<Box<Filling<S>>>,
    /// The guest, if it came to a session that could not take it any more.
    spare: Option<Box<Incomplete<S>>>,
    /// When pages came last, or all had come.
    moved: Time,
    events: VecDeque<FillEvent>,
    outcome: Option<Result<(), ErrorKind>>,
}

impl<S: GuestSink> FillEngine<S> {
    /// A session that greets; `nonce` must be random.
    pub fn new(policy: &Policy, nonce: [u8; 16], now: Time) -> Self {
        let mut policy = policy.clone();
        policy.features_offered |= FEATURE_LIVE | FEATURE_POST_COPY;
        Self {
            endpoint: Endpoint::new(Role::Receiver, &policy, nonce, now),
            asked: None,
            secret: [0; 32],
            joined: [false; LaneId::COUNT],
            joined_until: now,
            filling: None,
            spare: None,
            moved: now,
            events: VecDeque::new(),
            outcome: None,
        }
    }

    /// Goes on with a session that has greeted and whose first word was `fill`.
    pub fn answering(endpoint: Endpoint, fill: Fill, now: Time) -> Self {
        let nothing = Self::new(&Policy::default(), [0; 16], now);
        let mut engine = Self { endpoint, ..nothing };
        // It may have ended behind that word.
        let asked = if engine.is_over() { Ok(()) } else { engine.handle_fill(fill) };
        if let Err(kind) = asked {
            engine.fail(kind);
        }
        engine
    }

    /// Fills `guest`, which is the one that was asked for. A session that has ended meanwhile stays ended; the guest is
    /// kept for [`into_incomplete`](Self::into_incomplete).
    pub fn accept(&mut self, guest: Incomplete<S>, terms: FillTerms, now: Time) {
        let asked = self.asked.take_if(|_| self.endpoint.phase() == Phase::Deciding);
        let (Some(fill), Some(greeted)) = (asked, self.endpoint.greeted()) else {
            self.spare = Some(Box::new(guest));
            return;
        };
        let decompressor = match Decompressor::new() {
            Ok(decompressor) => decompressor,
            Err(source) => {
                self.spare = Some(Box::new(guest));
                return self.fail(ErrorKind::Destination { what: "zstd cannot start", source });
            }
        };
        let lanes = terms.lanes.clamp(1, fill.lanes);
        let lack = Lack {
            transcript: greeted.transcript,
            secret: terms.secret,
            window: terms.window,
            pages: guest.pages(),
            lanes,
            holds: guest.holds,
        };
        let with = (lanes, terms.window, greeted.agreement.codecs);
        self.filling = Some(Box::new(Filling::new(guest, decompressor, with, &terms.ahead)));
        self.asked = Some(fill);
        self.secret = terms.secret;
        (self.moved, self.joined_until) = (now, now + HANDSHAKE_SPAN_MAX);
        self.endpoint.enter(Phase::Filling);
        if self.asked.as_ref().is_some_and(|fill| fill.single_stream) {
            (0..lanes).map(LaneId::bulk).chain([LaneId::URGENT]).for_each(|lane| self.open(lane, now));
        }
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Lack(lack));
    }

    /// Refuses to fill the guest that was asked for.
    pub fn refuse(&mut self, code: CloseCode, reason: &str) {
        self.close(ErrorKind::Refused(reason.to_owned()), code);
    }

    /// What the guest has touched is asked for.
    ///
    /// # Errors
    /// What was touched cannot be had.
    pub fn gather(&mut self) -> io::Result<()> {
        let Some(filling) = &mut self.filling else { return Ok(()) };
        let mut touched = Vec::new();
        filling.guest.sink.gather(&mut touched)?;
        touched.into_iter().for_each(|(region, page)| filling.touch(region, page));
        Ok(())
    }

    /// The guest waits for a page.
    pub fn touch(&mut self, region: RegionId, page: u64) {
        if let Some(filling) = &mut self.filling {
            filling.touch(region, page);
        }
    }

    /// The sender has let go of the guest: the session ends.
    pub fn release(&mut self) {
        if self.endpoint.phase() == Phase::Parting {
            self.endpoint.finish();
            self.outcome = Some(Ok(()));
        }
    }

    /// Stops the session; the guest goes on to lack what it lacks.
    pub fn cancel(&mut self) {
        self.stop(ErrorKind::Cancelled);
    }

    /// Stops the session, for the reason that `kind` names.
    pub fn stop(&mut self, kind: ErrorKind) {
        self.fail(kind);
    }

    /// The guest as the session leaves it.
    pub fn into_incomplete(self) -> Option<Incomplete<S>> {
        self.filling.map(|filling| filling.guest).or_else(|| self.spare.map(|guest| *guest))
    }

    /// The guest as it is now.
    pub fn guest(&self) -> Option<&Incomplete<S>> {
        self.filling.as_ref().map(|filling| &filling.guest).or(self.spare.as_deref())
    }

    /// How the session ended, once it has.
    pub fn outcome(&mut self) -> Option<Result<(), ErrorKind>> {
        self.outcome.take()
    }

    fn open(&mut self, lane: LaneId, now: Time) {
        if let Some(joined) = self.joined.get_mut(lane.index()) {
            *joined = true;
        }
        self.endpoint.open_lane(lane, now);
    }

    fn fail(&mut self, kind: ErrorKind) {
        let code = kind.close_code();
        self.close(kind, code);
    }

    fn close(&mut self, kind: ErrorKind, code: CloseCode) {
        if self.endpoint.phase() == Phase::Over {
            return;
        }
        self.endpoint.close(code, &chain(&kind), kind.tells_peer());
        self.outcome = Some(Err(kind));
    }

    fn handle(&mut self, lane: LaneId, kind: FrameKind, body: &[u8], now: Time) -> Result<(), ErrorKind> {
        let Some(frame) = self.endpoint.judge(lane, kind, body, now)? else { return Ok(()) };
        match frame {
            Frame::Fill(fill) => self.handle_fill(fill),
            Frame::Handover(message) => {
                self.events.push_back(FillEvent::Said(message));
                Ok(())
            }
            // SPEC 13.10: what crossed the end on its way.
            Frame::Pages(_) if self.endpoint.phase() == Phase::Parting => Ok(()),
            Frame::Pages(pages) => {
                self.moved = now;
                let Some(filling) = self.filling.as_mut() else { return Ok(()) };
                filling.handle_pages(lane, &pages, body.len() as u64, now)
            }
            _ => Err(Violation::Live(kind.name(), "fills a guest").into()),
        }
    }

    fn handle_fill(&mut self, fill: Fill) -> Result<(), ErrorKind> {
        // SPEC 4.9
        if self.endpoint.greeted().is_none_or(|greeted| greeted.transcript != fill.transcript) {
            return Err(Violation::Transcript.into());
        }
        self.endpoint.enter(Phase::Deciding);
        self.events.push_back(FillEvent::Asked(Box::new(fill.clone())));
        self.asked = Some(fill);
        Ok(())
    }

    /// Until when lanes may join, if some have not.
    fn joining_until(&self) -> Option<Time> {
        let filling = self.filling.as_ref().filter(|_| self.endpoint.phase() == Phase::Filling)?;
        let mut lanes = (0..filling.bulk_lanes).map(LaneId::bulk).chain([LaneId::URGENT]);
        let missing = lanes.any(|lane| self.joined.get(lane.index()).is_some_and(|joined| !joined));
        missing.then_some(self.joined_until)
    }

    /// When a sender that is alive has brought nothing, or has left DONE unanswered, for too long.
    // SPEC 9.8
    fn stalled_at(&self) -> Option<Time> {
        matches!(self.endpoint.phase(), Phase::Filling | Phase::Parting).then(|| self.moved + STALL_SPAN_MAX)
    }
}

impl<S: GuestSink> Machine for FillEngine<S> {
    type Job = NoJob;
    type Event = FillEvent;

    fn handle_frame(&mut self, lane: LaneId, kind: FrameKind, body: &[u8], now: Time) {
        if self.is_over() {
            return;
        }
        if let Err(kind) = self.handle(lane, kind, body, now) {
            self.fail(kind);
        }
    }

    fn handle_progress(&mut self, lane: LaneId, now: Time) {
        self.endpoint.note_progress(lane, now);
    }

    fn handle_peer_error(&mut self, error: PeerError, _now: Time) {
        // All has come: the sender ends, and its lanes may be seen to end before its last word, on lane 0, is.
        let of_lane = matches!(&error, PeerError::EndOfStream { lane } | PeerError::Broken { lane, .. } if *lane != 0);
        if of_lane && self.endpoint.phase() == Phase::Parting {
            return;
        }
        self.fail(error.into());
    }

    fn handle_timeout(&mut self, now: Time) {
        let passed = |until: Option<Time>| until.is_some_and(|until| now >= until);
        let late = if passed(self.joining_until()) {
            Err(PeerError::Timeout("a granted lane was not joined within 10 s"))
        } else if passed(self.stalled_at()) {
            Err(PeerError::Timeout(match self.endpoint.phase() {
                Phase::Parting => "DONE came to nothing for 120 s",
                _ => "no page came for 120 s",
            }))
        } else {
            self.endpoint.handle_timeout(now)
        };
        if let Err(error) = late {
            self.fail(error.into());
        }
    }

    fn handle_job(&mut self, _output: (), _spent: Span, _now: Time) {}

    fn handle_join(&mut self, lane: LaneId, join: &Join, now: Time) -> Result<(), Violation> {
        let refuse = |why| Violation::Join { lane: lane.number(), why };
        let (Some(filling), Some(fill)) = (self.filling.as_ref(), self.asked.as_ref()) else {
            return Err(refuse("no guest is being filled"));
        };
        let expected = join_proof(&self.secret, &fill.session, lane.number());
        // SPEC 3.8, 4.16
        if join.session != fill.session || !proofs_equal(&join.proof, &expected) {
            return Err(refuse("wrong session or proof"));
        }
        let granted = lane == LaneId::URGENT || lane.bulk_index().is_some_and(|index| index < filling.bulk_lanes);
        if !granted || fill.single_stream {
            return Err(refuse("not granted"));
        }
        if self.joined.get(lane.index()).is_none_or(|joined| *joined) {
            return Err(refuse("joined already"));
        }
        self.open(lane, now);
        Ok(())
    }

    fn handle_lane_open(&mut self, _lane: LaneId, _now: Time) {}

    fn work(&mut self, now: Time) -> bool {
        if self.endpoint.phase() != Phase::Filling {
            return false;
        }
        let Some(filling) = self.filling.as_mut().filter(|filling| filling.is_complete()) else { return false };
        // SPEC 13.11
        let root = filling.guest.map.root(&filling.guest.hasher);
        if let Err(source) = filling.guest.sink.finish() {
            self.fail(ErrorKind::Destination { what: "cannot be finished", source });
            return true;
        }
        let pages = filling.guest.layout().pages();
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Done(Done { pages, root }));
        self.endpoint.enter(Phase::Parting);
        self.moved = now;
        self.events.push_back(FillEvent::Filled);
        true
    }

    fn poll_frame(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        let queued = self.endpoint.poll_frame(lane, now);
        if queued.is_some() || self.endpoint.phase() != Phase::Filling {
            return queued;
        }
        let filling = self.filling.as_mut()?;
        match lane {
            LaneId::CONTROL => filling.next_lacking(),
            LaneId::URGENT => filling.next_fault(),
            _ => filling.poll_ack(lane, now),
        }
    }

    fn poll_job(&mut self) -> Option<NoJob> {
        None
    }

    fn poll_event(&mut self) -> Option<FillEvent> {
        self.events.pop_front()
    }

    fn poll_timeout(&self) -> Option<Time> {
        let acks = self.filling.as_ref().filter(|_| self.endpoint.phase() == Phase::Filling);
        let acks = acks.and_then(|filling| filling.ack_due());
        acks.into_iter().chain(self.endpoint.poll_timeout()).chain(self.joining_until()).chain(self.stalled_at()).min()
    }

    fn recycle(&mut self, _buffer: PageBuffer) {}

    fn is_over(&self) -> bool {
        self.endpoint.phase() == Phase::Over
    }
}
