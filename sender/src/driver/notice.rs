//! What an embedder is told while a session goes on: how far it is, and each round, decision and phase once.

use crate::engine::SenderEngine;
use crate::memory::GuestMemory;
use crate::report::{Decision, RoundReport};
use pagewire_protocol::time::Time;
use pagewire_transport::{Progress, Pump};

/// Something to tell.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// How far it is.
    Progress(Progress),
    /// A round of a guest that runs has ended.
    Round(RoundReport),
    /// Something was decided.
    Decision(Decision),
    /// The session, or its guest, has come to here.
    Phase(Time, LivePhase),
}

/// How far a session is; from [`Pausing`](Self::Pausing) on of a guest that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LivePhase {
    /// The receiver has taken it on, and pages go.
    Sending,
    /// The guest is slowed down to so many per cent less.
    Throttled(u8),
    /// The guest is being paused.
    Pausing,
    /// It stands still, and the last round goes.
    Paused,
    /// All of it was stated.
    Offered,
    /// The receiver has all of it, verified and lasting.
    Ready,
    /// Somebody is asked whether to go on.
    Waiting,
    /// That it is handed over is durable, and was said.
    Handed,
    /// It is the receiver's.
    Started,
    /// It stays here, and was told to run on.
    Stays,
}

/// What was told already.
#[derive(Debug, Default)]
pub(super) struct Told {
    rounds: usize,
    decisions: usize,
    phases: Vec<LivePhase>,
}

impl Told {
    /// To be told next, after the rounds and decisions that led to it.
    pub(super) fn note(&mut self, phase: LivePhase) {
        self.phases.push(phase);
    }

    /// Tells what is new.
    pub(super) fn tell<M: GuestMemory>(&mut self, pump: &mut Pump<SenderEngine<M>>, observe: &mut impl FnMut(Notice)) {
        let now = pump.now();
        let engine = pump.machine();
        let rounds = engine.rounds().get(self.rounds..).unwrap_or_default();
        self.rounds = self.rounds.saturating_add(rounds.len());
        rounds.iter().for_each(|round| observe(Notice::Round(round.clone())));
        let decisions = engine.decisions().get(self.decisions..).unwrap_or_default();
        self.decisions = self.decisions.saturating_add(decisions.len());
        decisions.iter().for_each(|decision| observe(Notice::Decision(decision.clone())));
        self.phases.drain(..).for_each(|phase| observe(Notice::Phase(now, phase)));
    }
}
