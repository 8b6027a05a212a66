//! The report of a transfer: one JSON object, `"schema": "pagewire.report/1"`. Scripts build on its names.

use crate::error::Error;
use pagewire_protocol::error::{GuestAt, chain};
use pagewire_protocol::time::Span;
use pagewire_receiver::driver::FillSummary;
use pagewire_transport::Wire;
use serde::Serialize;

/// Which side reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It had the image.
    Sender,
    /// It got the image.
    Receiver,
}

/// Pages by the way they were stated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pages {
    /// All bytes zero.
    pub zero: u64,
    /// Unchanged since the base.
    pub base: u64,
    /// Held by the receiver, found by digest.
    pub reference: u64,
    /// Sent with their bytes.
    pub inline: u64,
    /// Sent as a difference to a version both sides hold.
    pub delta: u64,
}

impl Pages {
    /// The two engines count by the same five ways: zero, base, reference, inline, delta.
    pub(crate) fn new([zero, base, reference, inline, delta]: [u64; 5]) -> Self {
        Self { zero, base, reference, inline, delta }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        [self.zero, self.base, self.reference, self.inline, self.delta].iter().sum()
    }
}

/// Bytes on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WireBytes {
    /// Written.
    pub sent_bytes: u64,
    /// Read.
    pub received_bytes: u64,
}

impl From<Wire> for WireBytes {
    fn from(wire: Wire) -> Self {
        Self { sent_bytes: wire.sent_bytes, received_bytes: wire.received_bytes }
    }
}

/// What of a base was used, and what of it was looked at; at the sender the first two, at the receiver the
/// others; what is kept of it afterwards, at both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReuseCounts {
    /// Pages that memory knew to be unchanged since the base, and that nobody read.
    pub unread: u64,
    /// Pages that memory knew to be unchanged and that were read to see whether they were.
    pub sampled: u64,
    /// Pages of the base that were read and digested.
    pub scanned: u64,
    /// Unchanged pages that were taken on trust: never verified.
    pub unverified: u64,
    /// Pages of the base that were not what its manifest says.
    pub damaged: u64,
    /// Pages that another guest of the domain had.
    pub others: u64,
    /// Pages that the kept visit lacks: they were written to before they were copied.
    pub unkept: u64,
    /// Pages that the kept visit lacks because the guest wrote them all the time until it left.
    pub hot: u64,
}

/// Which image of a guest: what a hint of unchanged pages has to be bound to. Written as hex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageId {
    /// The root over its digests and regions.
    pub root: [u8; 32],
    /// The session that moved it.
    pub session: [u8; 16],
}

impl Serialize for ImageId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut id = serializer.serialize_struct("ImageId", 2)?;
        id.serialize_field("root", &hex(&self.root))?;
        id.serialize_field("session", &hex(&self.session))?;
        id.end()
    }
}

/// One round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Round {
    /// Pages stated in it.
    pub pages: u64,
    /// Their bytes on the wire.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Pages dirtied a second meanwhile; zero for memory at rest.
    pub dirty_rate: f64,
    /// Of a guest that runs, pages that had to be looked at for it.
    pub looked_at: u64,
    /// Pages that it left to the next.
    pub dirty: u64,
    /// Bytes a second that reached the receiver.
    pub rate: f64,
    /// The downtime that a switchover after it was expected to have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_downtime_seconds: Option<f64>,
}

impl From<&pagewire_sender::RoundReport> for Round {
    fn from(round: &pagewire_sender::RoundReport) -> Self {
        Self {
            pages: round.stated,
            bytes: round.bytes,
            seconds: round.spent.as_secs_f64(),
            dirty_rate: round.dirty_rate,
            looked_at: round.pages,
            dirty: round.dirty,
            rate: round.rate,
            predicted_downtime_seconds: round.predicted.map(|span| span.as_secs_f64().min(f64::MAX)),
        }
    }
}

/// A thread of the guest that waited for pages: a vCPU, or whoever else touches its memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ThreadWaits {
    /// Its id on the receiver's host.
    pub thread: u32,
    /// How often.
    pub count: u64,
    /// For how long together.
    pub seconds: f64,
}

/// What came while the guest ran at the receiver: of a post-copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Faults {
    /// Pages that the guest touched before they had come.
    pub count: u64,
    /// Pages that were found at the receiver by their digests.
    pub local: u64,
    /// Pages that the guest touched and that came over the network.
    pub remote: u64,
    /// Half of the threads that touched an absent page waited no longer than this, in microseconds; at the receiver.
    pub p50_us: f64,
    /// 99 of 100 waited no longer.
    pub p99_us: f64,
    /// None waited longer.
    pub max_us: f64,
    /// All of them together, in seconds.
    pub blocked_seconds: f64,
    /// Pages that went with their bytes before others because the guest was to touch them; at the sender.
    pub prepaged: u64,
    /// Each of them, where the kernel tells which, of the first 256; at the receiver.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub threads: Vec<ThreadWaits>,
    /// Pages that came in the background.
    pub background: u64,
    /// Pages that the guest lacks still.
    pub lacking: u64,
    /// Sessions that it took.
    pub sessions: u64,
    /// From the first of them to the end of the last; at the receiver of the last one alone.
    pub seconds: f64,
}

/// Something that was decided.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// When, from the start.
    pub seconds: f64,
    /// What, and the figures behind it.
    pub what: String,
}

impl From<&pagewire_sender::Decision> for Decision {
    fn from(decision: &pagewire_sender::Decision) -> Self {
        Self { seconds: decision.at.as_nanos() as f64 / 1e9, what: decision.what.clone() }
    }
}

/// What a transfer did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `pagewire.report/1`.
    pub schema: &'static str,
    /// Which side reports.
    pub role: Role,
    /// `done`, `failed` or `cancelled`.
    pub outcome: &'static str,
    /// Where the guest is: `sender` or `receiver`.
    pub guest_at: &'static str,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The image's name.
    pub name: String,
    /// From the first connection to the end.
    pub seconds: f64,
    /// Zero for memory at rest.
    pub downtime_seconds: f64,
    /// Bytes of the image.
    pub bytes_total: u64,
    /// Pages of the image.
    pub pages_total: u64,
    /// By the way they were stated.
    pub pages: Pages,
    /// Pages the receiver had to ask for.
    pub wants: u64,
    /// Bytes on the wire, frames and their headers.
    pub wire: WireBytes,
    /// The rounds.
    pub rounds: Vec<Round>,
    /// Of a post-copy.
    pub faults: Faults,
    /// What was moved, if all of it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageId>,
    /// What was decided and why.
    pub decisions: Vec<Decision>,
    /// What of the base was used, and how.
    pub reuse: ReuseCounts,
    /// What did not go as it should and did no harm.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A report, and whether it is one of success.
#[derive(Debug)]
pub struct Outcome {
    /// What was done, also when it failed.
    pub report: Report,
    /// Why it failed.
    pub error: Option<Error>,
}

impl Outcome {
    /// The report of a success.
    ///
    /// # Errors
    /// It failed.
    pub fn into_result(self) -> Result<Report, Error> {
        match self.error {
            None => Ok(self.report),
            Some(error) => Err(error),
        }
    }
}

impl Report {
    /// A report of nothing done yet.
    pub(crate) fn new(role: Role, name: String) -> Self {
        Self {
            schema: "pagewire.report/1",
            role,
            outcome: "failed",
            guest_at: GuestAt::Sender.name(),
            error: None,
            name,
            seconds: 0.0,
            downtime_seconds: 0.0,
            bytes_total: 0,
            pages_total: 0,
            pages: Pages::default(),
            wants: 0,
            wire: WireBytes::default(),
            rounds: Vec::new(),
            faults: Faults::default(),
            image: None,
            decisions: Vec::new(),
            reuse: ReuseCounts::default(),
            warnings: Vec::new(),
        }
    }

    /// What of a guest came while it ran here.
    pub(crate) fn note_filled(&mut self, filled: &FillSummary) {
        let counts = filled.counts;
        let micros = |span: Span| span.as_secs_f64() * 1e6;
        (self.bytes_total, self.pages_total) = filled.size;
        let faults = &mut self.faults;
        faults.seconds = self.seconds;
        (faults.count, faults.local, faults.remote) = (counts.faults, counts.local, counts.answers);
        faults.background = counts.inline.saturating_add(counts.zero).saturating_sub(counts.answers);
        if let Some(times) = &filled.times {
            faults.p50_us = micros(times.quantile(500));
            faults.p99_us = micros(times.quantile(990));
            faults.max_us = micros(times.longest());
            faults.blocked_seconds = times.total().as_secs_f64();
            let waits =
                |(thread, count, span): (u32, u64, Span)| ThreadWaits { thread, count, seconds: span.as_secs_f64() };
            faults.threads = times.threads().map(waits).collect();
        }
    }

    /// Closes the report with how it ended.
    pub(crate) fn close(mut self, error: Option<Error>) -> Outcome {
        self.outcome = match &error {
            None => "done",
            Some(error) if error.kind.is_cancelled() => "cancelled",
            Some(_) => "failed",
        };
        self.guest_at = error.as_ref().map_or(GuestAt::Receiver, |error| error.guest_at).name();
        self.error = error.as_ref().map(|error| chain(error));
        Outcome { report: self, error }
    }
}
