//! Frames: one kind, one file, one shape. This file holds the header, the lanes and the one table of kinds.
//!
//! | bytes | header field | |
//! |---|---|---|
//! | 0..4 | length | bytes of the body, little endian; at most the kind's `SIZE_MAX` |
//! | 4 | kind | zero is invalid |
//! | 5 | flags | bit 0: ignorable, legal only on kinds this version does not know; others zero |
//! | 6 | lane | 0 control, 1–8 bulk, 9 urgent |
//! | 7 | reserved | zero |

mod accept;
mod ack;
mod blob;
mod close;
mod done;
mod entry;
mod fault;
mod fill;
mod have;
mod hello;
mod join;
mod lack;
mod name;
mod open;
mod pages;
mod ping;
mod root;
mod round;

pub use accept::Accept;
pub use ack::{Ack, Want};
pub use blob::Blob;
pub use close::Close;
pub use done::Done;
pub use entry::{ABSENT_DIGEST, Codec, EntryKind, Run, SKIPPED_DIGEST};
pub use fault::{Fault, Urgency};
pub use fill::Fill;
pub use have::Have;
pub use hello::{Extension, Hello, HelloBody, Role};
pub use join::Join;
pub use lack::{Lack, Lacking};
pub use name::ImageName;
pub use open::{LiveOpen, Open, RegionSpec};
pub use pages::{Pages, PagesHead};
pub use ping::Ping;
pub use root::Root;
pub use round::RoundEnd;

use crate::coding::Writer;
use crate::error::DecodeError;
use crate::handover::{Message, Word};
use crate::limits::{BULK_LANES_MAX, CONTROL_BODY_MAX, PAGES_BODY_MAX};
use alloc::vec::Vec;

/// Bytes of the header that begins every frame.
pub const HEADER_BYTES: usize = 8;

/// What a frame is. Zero is no kind.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameKind(pub u8);

macro_rules! frame_kinds {
    ($($(#[$doc:meta])* $konst:ident = $value:literal, $size:expr;)*) => {
        impl FrameKind {
            $($(#[$doc])* pub const $konst: Self = Self($value);)*

            /// All kinds of this version, in order and without a gap.
            pub const ALL: &[Self] = &[$(Self($value)),*];

            /// The kind's name in SPEC; `unknown` for one of a later version.
            pub const fn name(self) -> &'static str {
                match self.0 { $($value => stringify!($konst),)* _ => "unknown" }
            }

            /// The largest legal body.
            pub const fn size_max(self) -> u32 {
                match self.0 { $($value => $size,)* _ => CONTROL_BODY_MAX }
            }

            /// Whether this version knows the kind.
            pub const fn is_known(self) -> bool {
                Self::ALL.len() >= self.0 as usize && self.0 != 0
            }
        }
    };
}

frame_kinds! {
    /// Who speaks which versions, both ways at once.
    HELLO = 1, CONTROL_BODY_MAX;
    /// What the sender wants to send.
    OPEN = 2, CONTROL_BODY_MAX;
    /// On which terms the receiver takes it.
    ACCEPT = 3, CONTROL_BODY_MAX;
    /// A further connection joins the session.
    JOIN = 4, Join::SIZE_MAX;
    /// Digests of what the receiver holds.
    HAVE = 5, Have::SIZE_MAX;
    /// The statement of pages.
    PAGES = 6, PAGES_BODY_MAX;
    /// What was applied, and what is wanted.
    ACK = 7, Ack::SIZE_MAX;
    /// The end of a round on a lane.
    ROUND = 8, RoundEnd::SIZE_MAX;
    /// The root of the whole image.
    ROOT = 9, Root::SIZE_MAX;
    /// Everything is there, and its acknowledgement.
    DONE = 10, Done::SIZE_MAX;
    /// A sign of life, asked for or given.
    PING = 11, Ping::SIZE_MAX;
    /// The end of the session and why.
    CLOSE = 12, CONTROL_BODY_MAX;
    /// A part of a blob: device state and the like.
    BLOB = 13, Blob::SIZE_MAX;
    /// Receiver: all that the guest needs is here and verified.
    READY = 14, Message::SIZE_MAX;
    /// Sender: the guest is the receiver's.
    COMMIT = 15, Message::SIZE_MAX;
    /// Receiver: it runs the guest.
    STARTED = 16, Message::SIZE_MAX;
    /// Receiver: it will never start the guest.
    REJECT = 17, Message::SIZE_MAX;
    /// Sender: its copy of the guest is gone.
    GONE = 18, Message::SIZE_MAX;
    /// Sender: it brings what the guest still lacks.
    FILL = 19, Fill::SIZE_MAX;
    /// Receiver: on these terms.
    LACK = 20, Lack::SIZE_MAX;
    /// Which pages the guest lacks.
    LACKING = 21, Lacking::SIZE_MAX;
    /// Pages that the guest waits for.
    FAULT = 22, Fault::SIZE_MAX;
}

impl core::fmt::Display for FrameKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.is_known() { f.write_str(self.name()) } else { write!(f, "unknown ({})", self.0) }
    }
}

impl core::fmt::Debug for FrameKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// One ordered byte stream of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId(u8);

impl LaneId {
    /// The control lane.
    pub const CONTROL: Self = Self(0);
    /// The urgent lane.
    pub const URGENT: Self = Self(BULK_LANES_MAX + 1);
    /// Lanes there can be.
    pub const COUNT: usize = BULK_LANES_MAX as usize + 2;

    /// The bulk lane of index `index`, counted from zero.
    pub const fn bulk(index: u8) -> Self {
        Self(1 + if index < BULK_LANES_MAX { index } else { BULK_LANES_MAX - 1 })
    }

    /// The lane of a byte from the wire.
    ///
    /// # Errors
    /// No lane has this number.
    pub fn from_wire(value: u8) -> Result<Self, DecodeError> {
        if value > Self::URGENT.0 {
            return Err(DecodeError::limit("lane", u64::from(value), u64::from(Self::URGENT.0)));
        }
        Ok(Self(value))
    }

    /// The number on the wire.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The lane as an index into an array of [`COUNT`](Self::COUNT).
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The index among bulk lanes, if it is one.
    pub const fn bulk_index(self) -> Option<u8> {
        if self.0 >= 1 && self.0 <= BULK_LANES_MAX { Some(self.0 - 1) } else { None }
    }

    /// What kind of lane it is: `control`, `bulk` or `urgent`.
    pub const fn kind(self) -> &'static str {
        match self.0 {
            0 => "control",
            n if n <= BULK_LANES_MAX => "bulk",
            _ => "urgent",
        }
    }
}

/// The header of a frame, judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of the body.
    pub length: u32,
    /// What it is; may be unknown if the sender marked it ignorable.
    pub kind: FrameKind,
    /// The lane it belongs to.
    pub lane: LaneId,
}

impl FrameHeader {
    const IGNORABLE: u8 = 1;

    /// Judges a header.
    ///
    /// # Errors
    /// Kind zero, an unknown kind that is not marked ignorable, a known one that is, reserved bits, no such lane, or a
    /// body over the kind's limit; with the kind that the header names.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, (FrameKind, DecodeError)> {
        let [l0, l1, l2, l3, kind, flags, lane, reserved] = *bytes;
        let kind = FrameKind(kind);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let expected = if kind.is_known() { 0 } else { Self::IGNORABLE };
        // SPEC 2.4, 2.5
        let fault = if kind.0 == 0 || (!kind.is_known() && flags == 0) {
            DecodeError::Unknown { field: "frame kind", value: u64::from(kind.0) }
        } else if flags != expected {
            DecodeError::Mismatch { field: "frame flags", value: u64::from(flags), expected: u64::from(expected) }
        } else if reserved != 0 {
            DecodeError::Mismatch { field: "reserved byte of header", value: u64::from(reserved), expected: 0 }
        } else if length > kind.size_max() {
            DecodeError::limit("frame length", u64::from(length), u64::from(kind.size_max()))
        } else {
            let lane = LaneId::from_wire(lane).map_err(|error| (kind, error))?;
            return Ok(Self { length, kind, lane });
        };
        Err((kind, fault))
    }

    /// Bytes of the frame, header included.
    pub const fn frame_bytes(&self) -> usize {
        HEADER_BYTES + self.length as usize
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        [l0, l1, l2, l3, self.kind.0, 0, self.lane.number(), 0]
    }
}

/// A frame of this version, judged. Page bytes are borrowed from the receive buffer.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each variant is the frame of its name")]
pub enum Frame<'a> {
    Hello(Hello),
    Open(Open),
    Accept(Accept),
    Join(Join),
    Have(Have),
    Pages(Pages<'a>),
    Ack(Ack),
    Round(RoundEnd),
    Root(Root),
    Done(Done),
    Ping(Ping),
    Close(Close),
    Blob(Blob<'a>),
    Fill(Fill),
    Lack(Lack),
    Lacking(Lacking<'a>),
    Fault(Fault),
    /// READY, COMMIT, STARTED, REJECT or GONE.
    Handover(Message),
}

impl<'a> Frame<'a> {
    /// Judges the body of a frame of `kind`.
    ///
    /// # Errors
    /// Whatever is wrong with it; an unknown kind, which only a caller that skips ignorable frames may avoid.
    pub fn decode(kind: FrameKind, body: &'a [u8]) -> Result<Self, DecodeError> {
        Ok(match kind {
            FrameKind::HELLO => Self::Hello(Hello::decode(body)?),
            FrameKind::OPEN => Self::Open(Open::decode(body)?),
            FrameKind::ACCEPT => Self::Accept(Accept::decode(body)?),
            FrameKind::JOIN => Self::Join(Join::decode(body)?),
            FrameKind::HAVE => Self::Have(Have::decode(body)?),
            FrameKind::PAGES => Self::Pages(Pages::decode(body)?),
            FrameKind::ACK => Self::Ack(Ack::decode(body)?),
            FrameKind::ROUND => Self::Round(RoundEnd::decode(body)?),
            FrameKind::ROOT => Self::Root(Root::decode(body)?),
            FrameKind::DONE => Self::Done(Done::decode(body)?),
            FrameKind::PING => Self::Ping(Ping::decode(body)?),
            FrameKind::CLOSE => Self::Close(Close::decode(body)?),
            FrameKind::BLOB => Self::Blob(Blob::decode(body)?),
            FrameKind::READY => Self::Handover(Message::decode(Word::Ready, body)?),
            FrameKind::COMMIT => Self::Handover(Message::decode(Word::Commit, body)?),
            FrameKind::STARTED => Self::Handover(Message::decode(Word::Started, body)?),
            FrameKind::REJECT => Self::Handover(Message::decode(Word::Reject, body)?),
            FrameKind::GONE => Self::Handover(Message::decode(Word::Gone, body)?),
            FrameKind::FILL => Self::Fill(Fill::decode(body)?),
            FrameKind::LACK => Self::Lack(Lack::decode(body)?),
            FrameKind::LACKING => Self::Lacking(Lacking::decode(body)?),
            FrameKind::FAULT => Self::Fault(Fault::decode(body)?),
            FrameKind(value) => return Err(DecodeError::Unknown { field: "frame kind", value: u64::from(value) }),
        })
    }

    /// The kind.
    pub fn kind(&self) -> FrameKind {
        match self {
            Self::Hello(_) => FrameKind::HELLO,
            Self::Open(_) => FrameKind::OPEN,
            Self::Accept(_) => FrameKind::ACCEPT,
            Self::Join(_) => FrameKind::JOIN,
            Self::Have(_) => FrameKind::HAVE,
            Self::Pages(_) => FrameKind::PAGES,
            Self::Ack(_) => FrameKind::ACK,
            Self::Round(_) => FrameKind::ROUND,
            Self::Root(_) => FrameKind::ROOT,
            Self::Done(_) => FrameKind::DONE,
            Self::Ping(_) => FrameKind::PING,
            Self::Close(_) => FrameKind::CLOSE,
            Self::Blob(_) => FrameKind::BLOB,
            Self::Handover(message) => message.word.frame_kind(),
            Self::Fill(_) => FrameKind::FILL,
            Self::Lack(_) => FrameKind::LACK,
            Self::Lacking(_) => FrameKind::LACKING,
            Self::Fault(_) => FrameKind::FAULT,
        }
    }

    /// Appends the frame for `lane`, header included.
    pub fn encode(&self, lane: LaneId, out: &mut Vec<u8>) {
        let start = out.len();
        Writer(out).bytes(&[0; HEADER_BYTES]);
        match self {
            Self::Hello(frame) => frame.encode(out),
            Self::Open(frame) => frame.encode(out),
            Self::Accept(frame) => frame.encode(out),
            Self::Join(frame) => frame.encode(out),
            Self::Have(frame) => frame.encode(out),
            Self::Pages(frame) => frame.encode(out),
            Self::Ack(frame) => frame.encode(out),
            Self::Round(frame) => frame.encode(out),
            Self::Root(frame) => frame.encode(out),
            Self::Done(frame) => frame.encode(out),
            Self::Ping(frame) => frame.encode(out),
            Self::Close(frame) => frame.encode(out),
            Self::Blob(frame) => frame.encode(out),
            Self::Handover(message) => message.handover.encode(out),
            Self::Fill(frame) => frame.encode(out),
            Self::Lack(frame) => frame.encode(out),
            Self::Lacking(frame) => frame.encode(out),
            Self::Fault(frame) => frame.encode(out),
        }
        seal(self.kind(), lane, start, 0, out);
    }
}

/// Writes the header of the frame that begins at `start` of `out`, whose body ends `beyond` bytes after `out` does.
pub fn seal(kind: FrameKind, lane: LaneId, start: usize, beyond: usize, out: &mut [u8]) {
    let body = out.len().saturating_sub(start).saturating_sub(HEADER_BYTES).saturating_add(beyond);
    let length = u32::try_from(body).unwrap_or(u32::MAX);
    debug_assert!(length <= kind.size_max(), "own frames respect their limits");
    let header = FrameHeader { length, kind, lane }.encode();
    if let Some(slot) = out.get_mut(start..).and_then(<[u8]>::first_chunk_mut) {
        *slot = header;
    }
}

#[cfg(test)]
mod tests;
