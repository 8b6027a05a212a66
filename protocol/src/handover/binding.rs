//! What names a hand-over, and the five words that two hosts say about it.
//!
//! A hand-over is bound to the guest, the session, the epoch, the root of what was stated, and both hosts: a message
//! that differs in one of them is about something else. It is bound to no connection, so it outlives all of them.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..16 | lineage | which guest; not zeros |
//! | 16..32 | session | the session's id |
//! | 32..40 | epoch | the hand-over's number in the guest's life, from 1 |
//! | 40..72 | root | the root of ROOT |
//! | 72..104 | sender | identity of the sender's host |
//! | 104..136 | receiver | identity of the receiver's host, another one |
//! | 136 | arbiter | 1 if an arbiter has to be asked before anybody starts the guest, else 0 |
//! | 137 | post_copy | 1 if pages of the guest are absent at the receiver when it starts, else 0 |
//! | 138..144 | reserved | zero |

use crate::coding::{Reader, Writer};
use crate::digest::Digest;
use crate::domain::LineageId;
use crate::error::DecodeError;
use crate::frame::FrameKind;
use alloc::vec::Vec;

/// The count of hand-overs of a guest. It never goes back, and each number stands for at most one hand-over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

impl Epoch {
    /// Of a guest that nobody has handed over yet.
    pub const ZERO: Self = Self(0);

    /// The epoch of this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    pub const fn number(self) -> u64 {
        self.0
    }

    /// The one after it, unless the numbers are used up.
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

impl core::fmt::Display for Epoch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.fmt(f)
    }
}

/// Who a host is, as its connections prove it: the digest of its public key, or what its journal calls it where nothing
/// is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub [u8; 32]);

/// One hand-over of one guest from one host to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handover {
    /// The guest.
    pub lineage: LineageId,
    /// The session that carried its pages.
    pub session: [u8; 16],
    /// Its number.
    pub epoch: Epoch,
    /// What was stated.
    pub root: Digest,
    /// Whose guest it was.
    pub sender: HostId,
    /// Whose it is to be.
    pub receiver: HostId,
    /// An arbiter grants the guest to one of them before it starts anywhere.
    pub arbiter: bool,
    /// Pages of the guest are absent when it starts: the sender keeps its memory and serves them until there are none.
    pub post_copy: bool,
}

impl Handover {
    /// Bytes of a binding.
    pub const BYTES: usize = 144;

    /// Judges a binding.
    ///
    /// # Errors
    /// Another length, no guest, no epoch, one host on both sides, a bit that is none, or reserved bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let binding = Self {
            lineage: LineageId(reader.array("lineage")?),
            session: reader.array("session")?,
            epoch: Epoch(reader.u64("epoch")?),
            root: Digest(reader.array("root")?),
            sender: HostId(reader.array("sender")?),
            receiver: HostId(reader.array("receiver")?),
            arbiter: bit(&mut reader, "arbiter")?,
            post_copy: bit(&mut reader, "post_copy")?,
        };
        let reserved: [u8; 6] = reader.array("reserved")?;
        reader.end()?;
        // SPEC 11.4
        if binding.lineage == LineageId([0; 16]) || binding.epoch == Epoch::ZERO {
            return Err(DecodeError::Unknown { field: "lineage or epoch of a hand-over", value: 0 });
        }
        if binding.sender == binding.receiver {
            return Err(DecodeError::Unknown { field: "receiver, which is the sender", value: 0 });
        }
        if reserved != [0; 6] {
            return Err(DecodeError::Unknown { field: "reserved bytes of a hand-over", value: 1 });
        }
        Ok(binding)
    }

    /// Appends the binding.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut writer = Writer(out);
        writer.bytes(&self.lineage.0).bytes(&self.session).u64(self.epoch.0).bytes(&self.root.0);
        writer.bytes(&self.sender.0).bytes(&self.receiver.0);
        writer.u8(u8::from(self.arbiter)).u8(u8::from(self.post_copy)).bytes(&[0; 6]);
    }
}

// SPEC 11.4
fn bit(reader: &mut Reader<'_>, field: &'static str) -> Result<bool, DecodeError> {
    match reader.u8(field)? {
        value @ (0 | 1) => Ok(value == 1),
        value => Err(DecodeError::Unknown { field, value: u64::from(value) }),
    }
}

/// The five words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Word {
    /// Receiver: all that the guest needs is here and verified.
    Ready,
    /// Sender: the guest is yours. It never runs here again unless you reject it.
    Commit,
    /// Receiver: it is mine and runs.
    Started,
    /// Receiver: I will never start it.
    Reject,
    /// Sender: my copy is gone, as you lack nothing; you may forget that I ask.
    Gone,
}

impl Word {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Ready, Self::Commit, Self::Started, Self::Reject, Self::Gone];

    /// Whether the sender says it; else the receiver does.
    pub const fn is_senders(self) -> bool {
        matches!(self, Self::Commit | Self::Gone)
    }

    /// What SPEC calls it.
    pub const fn name(self) -> &'static str {
        self.frame_kind().name()
    }

    /// The kind of its frame.
    pub const fn frame_kind(self) -> FrameKind {
        match self {
            Self::Ready => FrameKind::READY,
            Self::Commit => FrameKind::COMMIT,
            Self::Started => FrameKind::STARTED,
            Self::Reject => FrameKind::REJECT,
            Self::Gone => FrameKind::GONE,
        }
    }
}

/// A word about a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Message {
    /// What is said.
    pub word: Word,
    /// What it is said of.
    pub handover: Handover,
}

impl Message {
    /// Bytes of the body.
    pub const SIZE_MAX: u32 = 144;

    /// Judges the body of a frame that says `word`.
    ///
    /// # Errors
    /// See [`Handover::decode`].
    pub fn decode(word: Word, body: &[u8]) -> Result<Self, DecodeError> {
        Handover::decode(body).map(|handover| Self { word, handover })
    }
}

const _: () = assert!(Message::SIZE_MAX as usize == Handover::BYTES);
