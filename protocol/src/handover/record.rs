//! Records: what a host must still know of a hand-over after a crash, one file each, of fixed size.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..8 | magic | `pwhando` and a zero byte |
//! | 8..10 | version | 1 |
//! | 10 | kind | 1 HANDED, 2 STARTED, 3 REJECTED, 4 RETURNED, 5 GONE |
//! | 11..16 | reserved | zero |
//! | 16..160 | hand-over | its binding |
//! | 160..192 | check | BLAKE3's derive-key mode with context `pagewire 1 hand-over record` over bytes 0..160 |
//!
//! The check finds torn writes and damaged disks. It is no proof of who wrote: whoever can write a host's journal can
//! start its guests.

use super::{Epoch, Handover};
use crate::coding::{Reader, Writer};
use crate::digest::record_check;
use crate::error::DecodeError;
use alloc::vec::Vec;
use thiserror::Error;

const MAGIC: [u8; 8] = *b"pwhando\0";
const VERSION: u16 = 1;
/// Bytes before the check.
const CHECKED_BYTES: usize = 16 + Handover::BYTES;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKind {
    /// Sender: the guest was handed over. Only an answer, an arbiter or an operator gives it back.
    Handed,
    /// Receiver: the guest was started here.
    Started,
    /// Receiver: it will never be started here.
    Rejected,
    /// Sender: it came back, or never left.
    Returned,
    /// Both: it is the receiver's for good.
    Gone,
}

impl RecordKind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Handed, Self::Started, Self::Rejected, Self::Returned, Self::Gone];

    /// Its number in a file.
    pub const fn number(self) -> u8 {
        match self {
            Self::Handed => 1,
            Self::Started => 2,
            Self::Rejected => 3,
            Self::Returned => 4,
            Self::Gone => 5,
        }
    }
}

/// What a host must still know of a hand-over after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Record {
    /// What.
    pub kind: RecordKind,
    /// Of which hand-over.
    pub handover: Handover,
}

/// A file that is no record. What it was the record of is not known: nothing may be decided on it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// Not as long as a record.
    #[error("a hand-over record has {expected} bytes, not {0}", expected = Record::BYTES)]
    Length(usize),
    /// Something else.
    #[error("not a hand-over record")]
    Magic,
    /// Of a later version.
    #[error("hand-over record of version {0}, only 1 is known")]
    Version(u16),
    /// Torn or damaged.
    #[error("hand-over record is damaged: its check does not fit")]
    Check,
    /// Whole, and yet nothing that this version writes.
    #[error("hand-over record is malformed")]
    Malformed(#[from] DecodeError),
    /// A record that this host cannot have written.
    #[error("the record of hand-over {0} is not one of this guest and this host")]
    Foreign(Epoch),
    /// Two records of one hand-over.
    #[error("two records of one hand-over {0}")]
    Twice(Epoch),
}

impl Record {
    /// Bytes of a record.
    pub const BYTES: usize = CHECKED_BYTES + 32;

    // SPEC 11.17
    /// Judges a file.
    ///
    /// # Errors
    /// Whatever is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let (checked, check) = bytes.split_at_checked(CHECKED_BYTES).ok_or(RecordError::Length(bytes.len()))?;
        if check.len() != 32 {
            return Err(RecordError::Length(bytes.len()));
        }
        let mut reader = Reader::new(checked);
        if reader.array("magic")? != MAGIC {
            return Err(RecordError::Magic);
        }
        let version = reader.u16("version")?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        if record_check(checked) != check {
            return Err(RecordError::Check);
        }
        let number = reader.u8("kind")?;
        let unknown = DecodeError::Unknown { field: "record kind", value: u64::from(number) };
        let kind = RecordKind::ALL.into_iter().find(|kind| kind.number() == number).ok_or(unknown)?;
        if reader.array("reserved")? != [0; 5] {
            return Err(DecodeError::Unknown { field: "reserved bytes of a record", value: 1 }.into());
        }
        Ok(Self { kind, handover: Handover::decode(reader.rest())? })
    }

    /// The file.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        Writer(&mut bytes).bytes(&MAGIC).u16(VERSION).u8(self.kind.number()).bytes(&[0; 5]);
        self.handover.encode(&mut bytes);
        let check = record_check(&bytes);
        bytes.extend_from_slice(&check);
        bytes
    }
}
