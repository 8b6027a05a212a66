//! The one error of the facade: what happened, and where the guest is.

use pagewire_protocol::error::{DecodeError, GuestAt};
use pagewire_receiver::ReceiverError;
use pagewire_sender::SenderError;
use pagewire_transport::AddressError;
use std::io;
use std::path::PathBuf;

/// A failed transfer.
#[derive(Debug)]
pub struct Error {
    /// What happened.
    pub kind: ErrorKind,
    /// Where the guest is now.
    pub guest_at: GuestAt,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kind.fmt(f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

/// What happened.
#[derive(Debug, thiserror::Error)]
pub enum ErrorKind {
    /// The session failed at the sender.
    #[error(transparent)]
    Sender(pagewire_sender::ErrorKind),
    /// The session failed at the receiver.
    #[error(transparent)]
    Receiver(pagewire_receiver::ErrorKind),
    /// The image cannot be read.
    #[error("{path}")]
    Source {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Both names lead to one file.
    #[error("{0}: is source and destination at once")]
    SameFile(PathBuf),
    /// The destination names no file.
    #[error("{0}: does not name a file")]
    NoName(PathBuf),
    /// The address is wrong.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The listener cannot start.
    #[error("cannot listen at {address}")]
    Listen {
        /// Where.
        address: String,
        /// The system's answer.
        source: io::Error,
    },
    /// An unencrypted transfer over a network.
    #[error(
        "{0} is not on this host and TLS is not there yet: memory would travel in the clear; --insecure-plaintext accepts that"
    )]
    Plaintext(String),
    /// A name that no image can have.
    #[error(transparent)]
    Name(#[from] DecodeError),
    /// The system gives no random bytes.
    #[error("no randomness from the system")]
    Entropy(#[source] io::Error),
    /// The journal of hand-overs cannot be used.
    #[error(transparent)]
    Journal(#[from] crate::journal::JournalError),
    /// The guest has come to the receiver for good, and no record here says so.
    #[error("the guest is at the receiver, and it cannot be recorded that it is gone from here: {0}")]
    Unrecorded(String),
    /// The system gives no sockets or threads.
    #[error("{what}")]
    Local {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

impl ErrorKind {
    /// Whether somebody stopped it on purpose.
    pub fn is_cancelled(&self) -> bool {
        matches!(
            self,
            Self::Sender(pagewire_sender::ErrorKind::Cancelled)
                | Self::Receiver(pagewire_receiver::ErrorKind::Cancelled)
        )
    }

    /// Whether the guest runs at the receiver and lacks pages that are here alone.
    pub fn is_split(&self) -> bool {
        matches!(self, Self::Sender(pagewire_sender::ErrorKind::Split { .. }))
    }

    /// Whether all that is missing is the record of where the guest is.
    pub fn is_unrecorded(&self) -> bool {
        matches!(self, Self::Unrecorded(_))
    }

    /// Whether another command line would have helped.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Address(_) | Self::Plaintext(_) | Self::Name(_) | Self::NoName(_) | Self::SameFile(_))
    }

    /// The error with the guest at the sender.
    pub(crate) fn at_sender(self) -> Error {
        Error { kind: self, guest_at: GuestAt::Sender }
    }
}

impl From<SenderError> for Error {
    fn from(error: SenderError) -> Self {
        Self { kind: ErrorKind::Sender(error.kind), guest_at: error.guest_at }
    }
}

impl From<ReceiverError> for Error {
    fn from(error: ReceiverError) -> Self {
        Self { kind: ErrorKind::Receiver(error.kind), guest_at: error.guest_at }
    }
}
