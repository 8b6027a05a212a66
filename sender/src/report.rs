//! What a session did, counted, and what it decided and why.

use pagewire_protocol::time::Time;

/// Pages by the way they were stated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// As zero.
    pub zero: u64,
    /// As unchanged since the base.
    pub base: u64,
    /// By digest; those of them that were wanted afterwards are counted as inline too.
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

/// A switch that was thrown, with its inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// When.
    pub at: Time,
    /// What was decided, and the figures that it rests on.
    pub what: String,
}
