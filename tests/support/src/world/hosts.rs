//! The hosts of a world: what engines and hosts tell each other, and what becomes of their words.

use super::{TO_RECEIVER, TO_SENDER, World};
use crate::host::Action;
use pagewire_protocol::error::PeerError;
use pagewire_protocol::handover::{Input, Message, Record, RecordKind};
use pagewire_protocol::session::Machine;
use pagewire_sender::{ErrorKind as SenderFailure, Event as SenderEvent};

/// What becomes of a word on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It never arrives, and the connection stays.
    Lost,
    /// It arrives twice.
    Twice,
    /// It never arrives, and the connection breaks.
    Broken,
}

impl World {
    pub(super) fn run_guest(&mut self) {
        let Some(guest) = &self.config.guest else { return };
        guest.run_until(self.now);
        if self.pausing.take_if(|due| *due <= self.now).is_some() {
            guest.state().pause();
            self.stands_still = true;
        }
        // Whoever asked for it may stand still, too, or be gone.
        if self.sender.is_awake(self.now) && std::mem::take(&mut self.stands_still) {
            let clock = self.sender.clock(self.now);
            self.sender.machine.paused(Ok(self.config.blobs.clone()), clock);
        }
    }

    pub(super) fn handle_guest(&mut self, event: &SenderEvent) {
        let Some(guest) = self.config.guest.clone() else { return };
        if self.config.hosts[0].dead {
            // Nobody is there who could do anything.
            return;
        }
        match event {
            SenderEvent::Pause => self.pausing = Some(self.now + self.config.pause_span),
            SenderEvent::Resume => {
                self.pausing = None;
                self.stands_still = false;
                guest.state().resume();
            }
            SenderEvent::Throttle(percent) => guest.state().throttled = *percent,
            SenderEvent::Offer(handover) => {
                self.config.hosts[0].offer(*handover);
                self.await_ready();
            }
            SenderEvent::Said(message) => {
                let actions = self.config.hosts[0].hear(self.config.hosts[1].id, *message);
                if !actions.is_empty() {
                    self.ready_until = None;
                }
                self.act_at_sender(actions, SenderFailure::Rejected);
            }
            _ => {}
        }
    }

    /// `why` is what the session has failed of if the guest runs on.
    pub(super) fn act_at_sender(&mut self, actions: Vec<Action>, why: SenderFailure) {
        let mut why = Some(why);
        for action in actions {
            match action {
                Action::Say(message) => self.say(TO_RECEIVER, message),
                Action::Release => self.sender.machine.release(),
                Action::Fill(_) => self.sender.machine.release(),
                Action::Run => {
                    self.config.guest.iter().for_each(|guest| guest.state().resume());
                    self.sender.machine.cancel(why.take().unwrap_or(SenderFailure::Rejected));
                }
            }
        }
    }

    pub(super) fn act_at_receiver(&mut self, actions: Vec<Action>) {
        for action in actions {
            if let Action::Say(message) = action {
                self.say(TO_SENDER, message);
            }
        }
        // A hand-over that is settled needs no session.
        let session = self.config.sender.session;
        let is_settled = |record: &Record| record.kind == RecordKind::Gone && record.handover.session == session;
        if self.config.hosts[1].records.iter().any(is_settled) {
            self.receiver.machine.release();
        }
        // Nor does one of a guest that runs and lacks pages: others bring them.
        let has_started = |record: &Record| {
            record.kind == RecordKind::Started && record.handover.session == session && record.handover.post_copy
        };
        if self.config.hosts[1].records.iter().any(has_started) {
            self.receiver.machine.split();
        }
    }

    /// A host says a word, on the way `way`.
    fn say(&mut self, way: usize, message: Message) {
        self.words.push((way == TO_RECEIVER, message));
        let at = self.config.fates.iter().position(|(word, _)| *word == message.word);
        let fate = at.map(|at| self.config.fates.swap_remove(at).1);
        let times = match fate {
            None => 1,
            Some(Fate::Twice) => 2,
            Some(Fate::Lost) => 0,
            Some(Fate::Broken) => {
                self.break_connections();
                0
            }
        };
        for _ in 0..times {
            if way == TO_RECEIVER {
                self.sender.machine.say(message);
            } else {
                self.receiver.machine.say(message);
            }
        }
    }

    fn break_connections(&mut self) {
        let now = self.now;
        self.connections.iter_mut().flat_map(|connection| &mut connection.pipes).for_each(|pipe| pipe.reset(now));
    }

    /// A host that has crashed has no session any more, and its connections break.
    pub(super) fn bury(&mut self) {
        let crashed = || PeerError::Broken { lane: 0, reason: "the host has crashed".to_owned() };
        let [one, other] = [0, 1].map(|at| self.config.hosts[at].dead);
        if one && !self.sender.machine.is_over() {
            self.break_connections();
            let clock = self.sender.clock(self.now);
            self.sender.machine.handle_peer_error(crashed(), clock);
        }
        if other && !self.receiver.machine.is_over() {
            self.break_connections();
            let clock = self.receiver.clock(self.now);
            self.receiver.machine.handle_peer_error(crashed(), clock);
        }
    }

    /// A session that failed leaves its guest to what the hosts know of its hand-over.
    pub(super) fn settle_hosts(&mut self, sender: bool, receiver: bool) {
        if !sender {
            self.config.hosts[0].handovers.close(self.config.sender.session);
            let actions = self.config.hosts[0].handle(Input::Timeout);
            self.act_at_sender(actions, SenderFailure::Cancelled);
        }
        if !receiver {
            self.config.hosts[1].handle(Input::Timeout);
        }
    }
}
