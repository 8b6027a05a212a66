//! Why a session failed at the sender. The guest is here, unharmed, after each of them.

use pagewire_protocol::error::{CloseCode, GuestAt, PeerError};
use std::io;
use thiserror::Error;

/// A failed session.
#[derive(Debug)]
pub struct SenderError {
    /// What happened.
    pub kind: ErrorKind,
    /// Where the guest is.
    pub guest_at: GuestAt,
}

impl std::fmt::Display for SenderError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kind.fmt(f)
    }
}

impl std::error::Error for SenderError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

/// What happened.
#[derive(Debug, Error)]
pub enum ErrorKind {
    /// The peer did.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The memory could not be read, or changed.
    #[error("source: {0}")]
    Source(io::Error),
    /// The local machine lacks something.
    #[error("{what}")]
    Local {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// It took longer than it was allowed to.
    #[error("not complete after {0:?}, as --deadline asks")]
    Deadline(std::time::Duration),
    /// The guest cannot be stopped for as short as it should.
    #[error(
        "the guest was not moved: {reason}, at {dirty_rate:.0} changed pages a second; allow a longer downtime, slow it \
         down, or switch over all the same"
    )]
    NotConverging {
        /// Which limit was reached.
        reason: crate::converge::Reason,
        /// Pages that the guest changed, a second.
        dirty_rate: f64,
    },
    /// Post-copy was asked for and is not possible.
    #[error(
        "the receiver cannot run a guest before all of its memory is there; send it in rounds, or receive it into memory that can wait for pages"
    )]
    NoPostCopy,
    /// The guest could not be paused.
    #[error("the guest cannot be paused: {0}")]
    Pause(String),
    /// The receiver did not get ready.
    #[error("the receiver was not ready {0:?} after it had been told everything")]
    Late(std::time::Duration),
    /// Whoever had the last word did not let it go.
    #[error("the guest was not handed over: {0}")]
    NotApproved(String),
    /// The receiver has everything and will not start the guest.
    #[error("the receiver rejected the guest")]
    Rejected,
    /// The guest was handed over, and the receiver has not said what became of it.
    #[error("the guest was handed over, and the receiver has not answered: it may run there, and stays paused here")]
    InDoubt,
    /// The guest runs at the receiver and lacks pages that are here alone.
    #[error(
        "the guest runs at the receiver and lacks {pages} pages that are here alone ({why}): keep its memory, and bring them by `pagewire resume`"
    )]
    Split {
        /// How many, at most.
        pages: u64,
        /// Why they were not brought.
        why: String,
    },
    /// The guest's hand-over was refused on this host.
    #[error("hand-over: {0}")]
    Handover(String),
    /// It was stopped here.
    #[error("cancelled")]
    Cancelled,
}

impl ErrorKind {
    pub(crate) fn close_code(&self) -> CloseCode {
        match self {
            Self::Peer(error) => error.close_code(),
            Self::Source(_) => CloseCode::SOURCE,
            Self::Local { .. } => CloseCode::INTERNAL,
            Self::Cancelled
            | Self::Deadline(_)
            | Self::NotConverging { .. }
            | Self::NoPostCopy
            | Self::Pause(_)
            | Self::Late(_)
            | Self::NotApproved(_)
            | Self::Rejected
            | Self::InDoubt
            | Self::Split { .. }
            | Self::Handover(_) => CloseCode::CANCELLED,
        }
    }

    /// Whether the peer needs to be told: not if it said so itself, or is not there any more.
    pub(crate) fn tells_peer(&self) -> bool {
        !matches!(self, Self::Peer(PeerError::Closed { .. } | PeerError::Broken { lane: 0, .. }))
    }
}

impl From<pagewire_protocol::error::Violation> for ErrorKind {
    fn from(violation: pagewire_protocol::error::Violation) -> Self {
        Self::Peer(violation.into())
    }
}
