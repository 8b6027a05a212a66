//! What a session did, counted, and what it decided and why.

use pagewire_protocol::time::Time;

/// Pages by the way they were stated last: these four make up the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// As zero.
    pub zero: u64,
    /// As unchanged since the base.
    pub base: u64,
    /// By digest.
    pub reference: u64,
    /// With their bytes.
    pub inline: u64,
    /// Asked for by the receiver.
    pub wants: u64,
    /// Bytes of inline pages before and after compression.
    pub inline_bytes: u64,
    /// Their bytes on the wire.
    pub payload_bytes: u64,
}

impl Counts {
    /// A page is about to be stated anew: it is counted the last way alone.
    pub(crate) fn take_back(&mut self, zero: bool, inline: bool) {
        let first = match (zero, inline) {
            (true, _) => &mut self.zero,
            (_, true) => &mut self.inline,
            _ => &mut self.reference,
        };
        // A page that was stated as base and is wanted all the same is as likely as a damaged disk.
        let count = if *first > 0 { first } else { &mut self.base };
        *count = count.saturating_sub(1);
    }
}

/// A switch that was thrown, with its inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// When.
    pub at: Time,
    /// What was decided, and the figures that it rests on.
    pub what: String,
}
