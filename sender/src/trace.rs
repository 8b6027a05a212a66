//! Whom a live session shows what its guest wrote.

use pagewire_protocol::trace::TraceRecord;
use std::fmt;

/// Sees what a guest that runs is found to have written, as it is found; it changes nothing and must not block.
pub trait Trace: fmt::Debug + Send {
    /// Memory that knows was harvested, or a round ended that read memory of which nobody knows.
    fn seen(&mut self, record: TraceRecord);
}
