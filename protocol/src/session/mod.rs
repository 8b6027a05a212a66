//! What a session is to those who drive it, and what is legal when.
//!
//! An engine is a [`Machine`]: frames, timeouts and finished jobs go in, frames, jobs and events come out. It never
//! blocks and never asks the time. Whoever drives it (the tokio pump, the simulator, a fuzzer) moves bytes, runs jobs
//! and tells the time.

mod endpoint;
mod liveness;
mod negotiate;
mod table;

pub use endpoint::{Endpoint, Greeted};
pub use liveness::Liveness;
pub use negotiate::{Agreement, FEATURE_LIVE, FEATURE_POST_COPY, Policy, VERSION, negotiate};
pub use table::{Agreed, Phase, check};

use crate::error::{PeerError, Violation};
use crate::frame::{Frame, FrameKind, Join, LaneId};
use crate::page_buffer::PageBuffer;
use crate::time::{Span, Time};
use alloc::vec::Vec;
use core::ops::Range;

/// A frame on its way out: the head is its header and everything before the payload.
#[derive(Debug, Default)]
pub struct Outgoing {
    /// Header and fields.
    pub head: Vec<u8>,
    /// What follows it, borrowed from a page buffer without copying.
    pub payload: Payload,
}

impl Outgoing {
    /// A frame without a separate payload.
    pub fn frame(frame: &Frame<'_>, lane: LaneId) -> Self {
        let mut head = Vec::new();
        frame.encode(lane, &mut head);
        Self { head, payload: Payload::default() }
    }

    /// Bytes on the wire.
    pub fn len(&self) -> usize {
        self.head.len().saturating_add(self.payload.len())
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces to write, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let payload =
            self.payload.ranges.iter().map(|range| self.payload.buffer.get(range.clone()).unwrap_or_default());
        core::iter::once(self.head.as_slice()).chain(payload)
    }
}

/// Parts of a page buffer that follow a frame's head.
#[derive(Debug, Default)]
pub struct Payload {
    /// The buffer; given back to the machine when it is written.
    pub buffer: PageBuffer,
    /// The parts of it, in order.
    pub ranges: Vec<Range<usize>>,
}

impl Payload {
    /// Bytes of all parts.
    pub fn len(&self) -> usize {
        self.ranges.iter().fold(0, |sum, range| sum.saturating_add(range.len()))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Work that may run on another thread: pure computation, or a wait for a disk.
pub trait Job: Send + 'static {
    /// What it yields.
    type Output: Send + 'static;

    /// Does it.
    fn run(self) -> Self::Output;
}

/// The work of a machine that has nothing to compute.
#[derive(Debug)]
pub enum NoJob {}

impl Job for NoJob {
    type Output = ();

    fn run(self) {
        match self {}
    }
}

/// One side of a session, without senses of its own.
pub trait Machine {
    /// Work it hands out.
    type Job: Job;
    /// What it tells whoever embeds it.
    type Event;

    /// A whole frame arrived. A machine that cannot go on says so by [`is_over`](Self::is_over).
    fn handle_frame(&mut self, lane: LaneId, kind: FrameKind, body: &[u8], now: Time);

    /// A frame under way on `lane` made progress, in either direction: a slow link is not a dead one.
    fn handle_progress(&mut self, lane: LaneId, now: Time);

    /// The transport cannot go on: a connection ended or broke, or bytes on it are no frame.
    fn handle_peer_error(&mut self, error: PeerError, now: Time);

    /// The time that [`poll_timeout`](Self::poll_timeout) named has come.
    fn handle_timeout(&mut self, now: Time);

    /// A job is finished, which took `spent` of one processor; jobs come back in the order they went out.
    fn handle_job(&mut self, output: <Self::Job as Job>::Output, spent: Span, now: Time);

    /// A connection asks to carry `lane`; `join` is the first frame it sent.
    ///
    /// # Errors
    /// It may not; the session goes on without it.
    fn handle_join(&mut self, lane: LaneId, join: &Join, now: Time) -> Result<(), Violation>;

    /// A connection that this side opened carries `lane` from now on.
    fn handle_lane_open(&mut self, lane: LaneId, now: Time);

    /// Takes one bounded step of its own, reading or writing memory; false if there is nothing to do now.
    fn work(&mut self, now: Time) -> bool;

    /// The next frame for `lane`, if there is one and it may go now. Called when the lane can take it.
    fn poll_frame(&mut self, lane: LaneId, now: Time) -> Option<Outgoing>;

    /// The next job to run.
    fn poll_job(&mut self) -> Option<Self::Job>;

    /// The next thing to tell.
    fn poll_event(&mut self) -> Option<Self::Event>;

    /// When [`handle_timeout`](Self::handle_timeout) is due.
    fn poll_timeout(&self) -> Option<Time>;

    /// A page buffer whose frame has been written, to be used again.
    fn recycle(&mut self, buffer: PageBuffer);

    /// Whether the session has ended and only frames that are queued remain to be sent.
    fn is_over(&self) -> bool;
}
