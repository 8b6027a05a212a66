//! What a session did, counted, and what it decided and why.

use pagewire_protocol::time::{Span, Time};

/// Pages by the way they were stated last: these five make up the image.
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
    /// As what differs from a page of the base.
    pub delta: u64,
    /// As coming later, when the guest runs at the receiver.
    pub absent: u64,
    /// Of the unchanged ones, those that memory knew to be so and nobody read.
    pub unread: u64,
    /// Those that memory knew to be unchanged and that were read all the same, and were.
    pub sampled: u64,
    /// Asked for by the receiver.
    pub wants: u64,
    /// Bytes of inline pages before and after compression.
    pub inline_bytes: u64,
    /// Their bytes on the wire.
    pub payload_bytes: u64,
}

/// What went out to a guest that runs at the receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FillCounts {
    /// Pages whose digest went ahead.
    pub announced: u64,
    /// Pages that went with their bytes.
    pub inline: u64,
    /// Pages that went because the guest waited for them.
    pub faults: u64,
    /// Pages that went with their bytes before others because the guest was to touch them: a trace said so, or it had
    /// touched what lies before them. One frame's after each fault.
    pub prepaged: u64,
    /// Pages asked for by the receiver because they were not found, or not right.
    pub wants: u64,
    /// Bytes of background pages before compression.
    pub inline_bytes: u64,
    /// Their bytes on the wire.
    pub payload_bytes: u64,
}

/// One round of a live session.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundReport {
    /// Counted from 0.
    pub number: u32,
    /// Pages that had to be looked at.
    pub pages: u64,
    /// Of these, those that were stated.
    pub stated: u64,
    /// Bytes of PAGES frames.
    pub bytes: u64,
    /// From its first page to its judgement.
    pub spent: Span,
    /// Pages that it left to the next.
    pub dirty: u64,
    /// Pages that the guest changed, a second.
    pub dirty_rate: f64,
    /// Bytes a second that reached the receiver.
    pub rate: f64,
    /// The downtime that a switchover after it would have had; none for the last.
    pub predicted: Option<Span>,
}

/// A switch that was thrown, with its inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// When.
    pub at: Time,
    /// What was decided, and the figures that it rests on.
    pub what: String,
}
