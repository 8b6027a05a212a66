//! What becomes of the processes that serve the two sides: killed, stopped by somebody, or standing still for a while.
//!
//! A process that stands still reads nothing, writes nothing and notices nothing; its guest, its peer and the network go on.

use super::World;
use pagewire_protocol::frame::Role;
use pagewire_protocol::handover::{Input, Word};
use pagewire_protocol::session::Machine;
use pagewire_protocol::time::{Span, Time};
use pagewire_sender::ErrorKind as SenderFailure;
use std::time::Duration;

/// How long the sender's driver waits for READY.
const READY_SPAN_MAX: Duration = Duration::from_secs(30);

/// What happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// It is killed: only its host's records stay.
    Dies,
    /// Somebody wants the session to end: a signal, as the drivers take it.
    Stops,
    /// Another session of the same guest is opened at the sender, which has to be refused while this one goes on.
    OpensAgain,
    /// It stands still for `span`; so does its clock, as when a machine sleeps, unless it runs on, as after SIGSTOP.
    Sleeps {
        /// How long.
        span: Span,
        /// Whether its clock has gone on meanwhile.
        clock_runs: bool,
    },
}

/// When it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// So many frames have been written, by both sides.
    Frames(u64),
    /// So many rounds are over.
    Rounds(usize),
    /// The guest was asked to stand still.
    Pausing,
    /// Its hand-over was offered: all of it is stated.
    Offered,
    /// This word was said.
    Said(Word),
}

impl World {
    fn has_come(&self, when: When) -> bool {
        match when {
            When::Frames(count) => self.frames.len() as u64 >= count,
            When::Rounds(count) => self.sender.machine.rounds().len() >= count,
            When::Pausing => self.pausing.is_some() || self.stands_still || self.offered,
            When::Offered => self.offered,
            When::Said(word) => self.words.iter().any(|(_, message)| message.word == word),
        }
    }

    /// Does to each process what is due; a signal waits until its process runs.
    pub(super) fn harm(&mut self) {
        let now = self.now;
        let due = |&(role, when, harm): &(Role, When, Harm)| {
            let is_awake = if role == Role::Sender { self.sender.is_awake(now) } else { self.receiver.is_awake(now) };
            (is_awake || harm == Harm::Dies) && self.has_come(when)
        };
        let Some(at) = self.config.harms.iter().position(due) else { return };
        let (role, _, harm) = self.config.harms.swap_remove(at);
        let is_over = match role {
            Role::Sender => self.sender.machine.is_over(),
            Role::Receiver => self.receiver.machine.is_over(),
        };
        if !is_over {
            self.harmed.push((role, harm));
        }
        match (harm, role) {
            (Harm::Dies, Role::Sender) => self.config.hosts[0].dead = true,
            (Harm::Dies, Role::Receiver) => self.config.hosts[1].dead = true,
            (Harm::Stops, Role::Sender) => self.stop_sender(Input::Cancel, SenderFailure::Cancelled),
            (Harm::Stops, Role::Receiver) => self.receiver.machine.cancel(),
            (Harm::OpensAgain, _) => {
                let mut handovers = self.config.hosts[0].handovers.clone();
                let refused = handovers.open([0xee; 16]).is_err() && handovers == self.config.hosts[0].handovers;
                assert!(refused || is_over, "seed {}: a second session of the guest", self.config.seed);
            }
            (Harm::Sleeps { span, clock_runs }, Role::Sender) => self.sender.sleep(span, clock_runs, now),
            (Harm::Sleeps { span, clock_runs }, Role::Receiver) => self.receiver.sleep(span, clock_runs, now),
        }
    }

    /// READY is late, by the clock of the sender.
    pub(super) fn check_ready(&mut self) {
        let clock = self.sender.clock(self.now);
        if self.sender.is_awake(self.now) && self.ready_until.take_if(|until| *until <= clock).is_some() {
            self.stop_sender(Input::Timeout, SenderFailure::Late(READY_SPAN_MAX));
        }
    }

    /// When the world has to look whether it is.
    pub(super) fn ready_is_late_at(&self) -> Option<Time> {
        let waits = self.sender.is_awake(self.now) && !self.sender.machine.is_over();
        self.ready_until.filter(|_| waits).map(|until| self.sender.world_time(until))
    }

    /// READY is awaited from now on.
    pub(super) fn await_ready(&mut self) {
        let span = Span::from_nanos(READY_SPAN_MAX.as_nanos() as u64);
        self.offered = true;
        self.ready_until = Some(self.sender.clock(self.now) + span);
    }

    /// A session whose guest is offered ends as its host says.
    fn stop_sender(&mut self, input: Input, why: SenderFailure) {
        if self.offered {
            let actions = self.config.hosts[0].handle(input);
            self.act_at_sender(actions, why);
        } else {
            self.sender.machine.cancel(why);
        }
    }
}
