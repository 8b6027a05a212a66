//! Why a session failed at the receiver. The guest is at the sender after each of them.

use pagewire_protocol::error::{CloseCode, GuestAt, PeerError};
use std::io;
use thiserror::Error;

/// A failed session.
#[derive(Debug)]
pub struct ReceiverError {
    /// What happened.
    pub kind: ErrorKind,
    /// Where the guest is.
    pub guest_at: GuestAt,
}

impl std::fmt::Display for ReceiverError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kind.fmt(f)
    }
}

impl std::error::Error for ReceiverError {
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
    /// Whoever embeds the engine refused the image.
    #[error("refused: {0}")]
    Refused(String),
    /// The destination could not be read or written.
    #[error("destination: {what}")]
    Destination {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// It was stopped here.
    #[error("cancelled")]
    Cancelled,
}

impl ErrorKind {
    pub(crate) fn close_code(&self) -> CloseCode {
        match self {
            Self::Peer(error) => error.close_code(),
            Self::Refused(_) => CloseCode::REFUSED,
            Self::Destination { .. } => CloseCode::DESTINATION,
            Self::Cancelled => CloseCode::CANCELLED,
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
