//! What a transfer tells while it runs.

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
