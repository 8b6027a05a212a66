//! What a transfer tells while it runs.

use crate::report::{Decision, Round};
use pagewire_sender::driver::{LivePhase, Notice};
use pagewire_transport::Progress;
use serde::Serialize;

/// Something that happened.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The transfer began.
    Started {
        /// Bytes of the image.
        bytes_total: u64,
        /// Pages of the image.
        pages_total: u64,
    },
    /// It goes on.
    Progress {
        /// Pages stated or present.
        pages: u64,
        /// Pages of the image; zero until it is known.
        pages_total: u64,
        /// Bytes written to the wire.
        sent_bytes: u64,
        /// Bytes read from it.
        received_bytes: u64,
    },
    /// It has come to here.
    Phase {
        /// When, from the start.
        seconds: f64,
        /// To where.
        #[serde(flatten)]
        phase: Phase,
    },
    /// A round of a guest that runs has ended.
    Round {
        /// Counted from 0; the last has the highest.
        number: u32,
        /// What it did.
        #[serde(flatten)]
        round: Round,
    },
    /// Something was decided.
    Decision(Decision),
}

/// How far a transfer is, at the sender. All but [`Sending`](Self::Sending) are of a guest that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// The receiver has taken it on, and pages go.
    Sending,
    /// The guest is slowed down.
    Throttled {
        /// By so many per cent; 0 is full speed.
        percent: u8,
    },
    /// The guest is being paused.
    Pausing,
    /// It stands still, and the last round goes.
    Paused,
    /// All of it was stated; the receiver verifies it and makes it last.
    Offered,
    /// The receiver has all of it.
    Ready,
    /// The word of [`LiveOptions::pause_before_switchover`](crate::LiveOptions::pause_before_switchover) is awaited.
    Waiting,
    /// It is handed over, and nobody knows more until the receiver answers.
    Handed,
    /// It is the receiver's.
    Started,
    /// It runs at the receiver and lacks pages, which are brought from here.
    Filling {
        /// So many at most.
        pages: u64,
    },
    /// It lacks nothing any more.
    Filled,
    /// It stays here, and was told to run on.
    Stays,
    /// The receiver does not answer, and is asked again and again.
    InDoubt,
}

impl From<LivePhase> for Phase {
    fn from(phase: LivePhase) -> Self {
        match phase {
            LivePhase::Sending => Self::Sending,
            LivePhase::Throttled(percent) => Self::Throttled { percent },
            LivePhase::Pausing => Self::Pausing,
            LivePhase::Paused => Self::Paused,
            LivePhase::Offered => Self::Offered,
            LivePhase::Ready => Self::Ready,
            LivePhase::Waiting => Self::Waiting,
            LivePhase::Handed => Self::Handed,
            LivePhase::Started => Self::Started,
            LivePhase::Stays => Self::Stays,
        }
    }
}

impl From<Notice> for Event {
    fn from(notice: Notice) -> Self {
        match notice {
            Notice::Progress(progress) => progress.into(),
            Notice::Round(round) => Self::Round { number: round.number, round: (&round).into() },
            Notice::Decision(decision) => Self::Decision((&decision).into()),
            Notice::Phase(at, phase) => Self::Phase { seconds: at.as_nanos() as f64 / 1e9, phase: phase.into() },
        }
    }
}

impl From<Progress> for Event {
    fn from(progress: Progress) -> Self {
        let Progress { pages, pages_total, wire } = progress;
        Self::Progress { pages, pages_total, sent_bytes: wire.sent_bytes, received_bytes: wire.received_bytes }
    }
}

/// Is told what happens.
pub trait Observer: Send {
    /// Something happened.
    fn event(&mut self, event: &Event);
}

/// Nobody looks.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn event(&mut self, _event: &Event) {}
}

impl<F: FnMut(&Event) + Send> Observer for F {
    fn event(&mut self, event: &Event) {
        self(event);
    }
}
