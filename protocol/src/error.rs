//! Errors by blame, and the one map from each to the code that CLOSE carries.
//!
//! `DecodeError`: bytes that are no frame. `Violation`: a frame at the wrong time, or a claim that does not hold.
//! `Incompatible`: two honest peers with nothing in common. Messages name the thing, the limit and what came, are lower
//! case, and never repeat page bytes. What the local side did wrong is in the crates that can do wrong.

use crate::blobs::BlobError;
use crate::digest::Digest;
use crate::frame::FrameKind;
use alloc::string::{String, ToString};
use thiserror::Error;

/// Bytes that do not make a legal frame.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The body ended before the field did.
    #[error("{field}: {needed} bytes needed at offset {offset}, {left} left")]
    Truncated {
        /// The field that was being read.
        field: &'static str,
        /// Where in the body it begins.
        offset: usize,
        /// Bytes it needs.
        needed: usize,
        /// Bytes there are.
        left: usize,
    },
    /// Bytes after the last field.
    #[error("{0} bytes too many after the last field")]
    Trailing(usize),
    /// A number over its limit.
    #[error("{field}: {value} > {limit}")]
    Limit {
        /// The field.
        field: &'static str,
        /// What came.
        value: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// A value that means nothing here.
    #[error("{field}: {value} is not a known value")]
    Unknown {
        /// The field.
        field: &'static str,
        /// What came.
        value: u64,
    },
    /// A field that must agree with another and does not.
    #[error("{field}: {value}, expected {expected}")]
    Mismatch {
        /// The field.
        field: &'static str,
        /// What came.
        value: u64,
        /// What the rest of the frame asks for.
        expected: u64,
    },
    /// A connection that does not speak pagewire at all.
    #[error("not a pagewire peer: magic {0:02x?}")]
    Magic([u8; 8]),
    /// Pages that are not in the region.
    #[error("region {region} has {pages} pages, {count} from {first} are not inside")]
    OutsideRegion {
        /// The region's index.
        region: u16,
        /// First page named.
        first: u64,
        /// Pages named.
        count: u32,
        /// Pages there are.
        pages: u64,
    },
    /// A border inside an install page.
    #[error("region {region}: {count} pages from {first} cut an install page of {step} pages")]
    Unaligned {
        /// The region's index.
        region: u16,
        /// First page named.
        first: u64,
        /// Pages named.
        count: u32,
        /// Pages installed at once.
        step: u64,
    },
    /// A name outside `[A-Za-z0-9._-]{1,64}`, or `.` or `..`.
    #[error("image name \"{0}\" is not 1 to 64 of A-Z a-z 0-9 . _ - (and not . or ..)")]
    Name(String),
    /// A control body that bincode refuses.
    #[error("malformed body: {0}")]
    Body(String),
    /// A compressed payload that is not what its frame says.
    #[error("compressed payload: {0}")]
    Compressed(String),
}

impl DecodeError {
    /// A number over its limit.
    pub const fn limit(field: &'static str, value: u64, limit: u64) -> Self {
        Self::Limit { field, value, limit }
    }
}

/// A legal frame at the wrong time, or a claim that turned out wrong.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Violation {
    /// A frame that the session's phase does not allow.
    #[error("{kind} is not expected on the {lane} lane while {phase}")]
    Unexpected {
        /// What came.
        kind: FrameKind,
        /// Which lane.
        lane: &'static str,
        /// The phase of the session.
        phase: &'static str,
    },
    /// A frame on another connection than its lane's.
    #[error("frame for lane {lane} on a connection that does not carry it")]
    WrongLane {
        /// The lane the frame names.
        lane: u8,
    },
    /// The hellos as the peer saw them are not as they were sent.
    #[error("hello transcript differs: somebody changed the negotiation on the way")]
    Transcript,
    /// A joining connection without the session's secret, or for a lane already joined.
    #[error("lane {lane} cannot be joined: {why}")]
    Join {
        /// The lane.
        lane: u8,
        /// The reason.
        why: &'static str,
    },
    /// Terms that were not offered, or that the image does not allow.
    #[error("{what}: {got}, expected {expected}")]
    Terms {
        /// Which of them.
        what: &'static str,
        /// What came.
        got: u64,
        /// What is possible.
        expected: u64,
    },
    /// Pages that do not have the digest their frame states.
    #[error("digest mismatch in {count} pages from page {first} of region {region}")]
    PageDigest {
        /// The region's index.
        region: u16,
        /// First page of the batch.
        first: u64,
        /// Pages of the batch.
        count: u32,
    },
    /// A page on a lane that does not carry it.
    #[error("page {first} of region {region} does not travel on lane {lane}")]
    PageLane {
        /// The region's index.
        region: u16,
        /// First page of the batch.
        first: u64,
        /// The lane it came on.
        lane: u8,
    },
    /// An entry that rests on something that does not exist.
    #[error("{what} for page {first} of region {region}")]
    Entry {
        /// What is wrong with it.
        what: &'static str,
        /// The region's index.
        region: u16,
        /// First page of the batch.
        first: u64,
    },
    /// A round that goes back, or is counted wrong.
    #[error("round {got}, expected {expected}")]
    Round {
        /// What came.
        got: u32,
        /// What was due.
        expected: u32,
    },
    /// Holdings that do not continue where the last ones ended.
    #[error("holdings of region {region} from subtree {got}, expected {expected}")]
    Have {
        /// The region's index.
        region: u16,
        /// What came.
        got: u64,
        /// What was due.
        expected: u64,
    },
    /// An acknowledgement of more than was sent.
    #[error("{got} frames acknowledged, {sent} sent")]
    Ack {
        /// What came.
        got: u64,
        /// Frames sent on that lane.
        sent: u64,
    },
    /// The same pages wanted again and again.
    #[error("{wants} wants for {pages} pages: the peer cannot keep what it gets")]
    WantFlood {
        /// Wants so far.
        wants: u64,
        /// Pages of the image.
        pages: u64,
    },
    /// What a guest lacks is not what its sender has left behind.
    #[error("{what} {place}")]
    Lacking {
        /// What is wrong, up to the number.
        what: &'static str,
        /// The page's place in the image, or the count.
        place: u64,
    },
    /// The same pages asked for again and again.
    #[error("{faults} pages named in faults, of {pages}: the peer asks for what it has been sent")]
    FaultFlood {
        /// Pages named so far.
        faults: u64,
        /// Pages of the image.
        pages: u64,
    },
    /// A page's proof that is not that of the page: the peer knows its digest alone.
    #[error("the proof of page {page} of region {region} is wrong: the sender does not have its bytes")]
    Proof {
        /// The region's index.
        region: u16,
        /// The page.
        page: u64,
    },
    /// A frame of a hand-over in a session that has none, or terms without one in a session that has.
    #[error("{0}, in a session that {1}")]
    Live(&'static str, &'static str),
    /// A part of a blob that does not belong there.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The whole image, or its count of pages, is not what the peer says.
    #[error("root mismatch: {theirs} over {their_pages} pages there, {ours} over {our_pages} here")]
    Root {
        /// The peer's root.
        theirs: Digest,
        /// The peer's count.
        their_pages: u64,
        /// The local root.
        ours: Digest,
        /// The local count.
        our_pages: u64,
    },
}

/// Two honest peers that cannot talk.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Incompatible {
    /// No version in common.
    #[error("no common protocol version: {ours_min}-{ours_max} here, {theirs_min}-{theirs_max} there")]
    Version {
        /// Lowest spoken here.
        ours_min: u16,
        /// Highest spoken here.
        ours_max: u16,
        /// Lowest spoken there.
        theirs_min: u16,
        /// Highest spoken there.
        theirs_max: u16,
    },
    /// One side insists on something the other lacks.
    #[error("required features {required:#x} are not all offered: {offered:#x}")]
    Feature {
        /// What one side requires.
        required: u64,
        /// What the other offers.
        offered: u64,
    },
    /// Both are senders, or both receivers.
    #[error("both sides are {0}s")]
    Role(&'static str),
    /// An install size or codec only one side has.
    #[error("{what} {value} is not supported there")]
    Unsupported {
        /// What kind of thing.
        what: &'static str,
        /// Which one.
        value: u64,
    },
}

/// Why a session ends: a stable code, its name and whether trying again can help. SPEC §8 lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CloseCode(pub u16);

macro_rules! close_codes {
    ($($(#[$doc:meta])* $konst:ident = $code:literal, $name:literal, $retry:literal;)*) => {
        impl CloseCode {
            $($(#[$doc])* pub const $konst: Self = Self($code);)*

            /// All codes of this version.
            pub const ALL: &[Self] = &[$(Self($code)),*];

            /// The code's name in SPEC; `unknown` for one of a later version.
            pub const fn name(self) -> &'static str {
                match self.0 { $($code => $name,)* _ => "unknown" }
            }

            /// Whether the same attempt may succeed later without anybody changing anything.
            pub const fn retry(self) -> bool {
                match self.0 { $($code => $retry,)* _ => false }
            }
        }
    };
}

close_codes! {
    /// Everything is done and acknowledged.
    DONE = 1, "done", false;
    /// The user or embedder stopped it.
    CANCELLED = 2, "cancelled", true;
    /// Bytes that are no legal frame.
    MALFORMED = 3, "malformed", false;
    /// A frame at the wrong time, or a false claim.
    VIOLATION = 4, "violation", false;
    /// Nothing in common.
    INCOMPATIBLE = 5, "incompatible", false;
    /// The hellos were changed on the way.
    TRANSCRIPT = 6, "transcript", false;
    /// Pages, or the whole image, do not have their digest.
    DIGEST = 7, "digest", true;
    /// Something took longer than its limit.
    TIMEOUT = 8, "timeout", true;
    /// The image is being received by another session.
    BUSY = 9, "busy", true;
    /// The image, its name or its size is not accepted.
    REFUSED = 10, "refused", false;
    /// The sender's memory cannot be read, or changed while it should not.
    SOURCE = 11, "source", true;
    /// The receiver's file or memory cannot be written.
    DESTINATION = 12, "destination", true;
    /// The local program failed.
    INTERNAL = 13, "internal", false;
}

impl core::fmt::Display for CloseCode {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

/// What the peer did to end the session.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PeerError {
    /// Bytes that are no legal frame.
    #[error("malformed {kind} frame")]
    Decode {
        /// Which frame.
        kind: FrameKind,
        /// What is wrong with it.
        #[source]
        source: DecodeError,
    },
    /// A frame at the wrong time, or a false claim.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// Nothing in common.
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
    /// It said CLOSE.
    #[error("the peer ended the session: {code}: {reason}")]
    Closed {
        /// Its code.
        code: CloseCode,
        /// Its words, escaped.
        reason: String,
    },
    /// A connection ended before the session did. End of stream never means success.
    #[error("the connection of lane {lane} ended before the transfer was complete")]
    EndOfStream {
        /// Which lane.
        lane: u8,
    },
    /// It cannot be reached.
    #[error("cannot connect to {address}: {reason}")]
    Connect {
        /// Where.
        address: String,
        /// What the operating system said.
        reason: String,
    },
    /// The transport under a lane broke.
    #[error("the connection of lane {lane} broke: {reason}")]
    Broken {
        /// Which lane.
        lane: u8,
        /// What the operating system said.
        reason: String,
    },
    /// It said nothing, or too little, for too long.
    #[error("the peer is too slow: {0}")]
    Timeout(&'static str),
}

impl PeerError {
    // SPEC 1.6
    /// The code that tells the peer.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Decode { .. } => CloseCode::MALFORMED,
            Self::Violation(Violation::Transcript) => CloseCode::TRANSCRIPT,
            Self::Violation(Violation::PageDigest { .. } | Violation::Root { .. }) => CloseCode::DIGEST,
            Self::Violation(_) => CloseCode::VIOLATION,
            Self::Incompatible(_) => CloseCode::INCOMPATIBLE,
            Self::Closed { code, .. } => *code,
            Self::EndOfStream { .. } | Self::Broken { .. } | Self::Connect { .. } => CloseCode::VIOLATION,
            Self::Timeout(_) => CloseCode::TIMEOUT,
        }
    }
}

/// Where the guest is when a session has ended: what every top-level error must say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestAt {
    /// At the sender, unharmed; the transfer can be tried again.
    Sender,
    /// At the receiver, complete.
    Receiver,
    /// Handed over, and no answer yet: at one of the two, and nobody runs it here until that is known.
    InDoubt,
}

impl GuestAt {
    /// `sender`, `receiver` or `in doubt`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sender => "sender",
            Self::Receiver => "receiver",
            Self::InDoubt => "in doubt",
        }
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn core::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
