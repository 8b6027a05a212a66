//! LACK and LACKING: on which terms the receiver takes what its guest lacks, and which pages these are.
//!
//! | bytes of LACK | field | |
//! |---|---|---|
//! | 0..32 | transcript | the transcript digest over both hellos |
//! | 32..64 | secret | random: what JOIN proves |
//! | 64..72 | window | bytes that may be under way on a bulk lane without acknowledgement |
//! | 72..80 | pages | how many pages are lacking |
//! | 80 | lanes | bulk lanes granted, 1 to what was asked for |
//! | 81 | holds | 1 if pages may be brought from here by their digests, else 0 |
//! | 82..88 | reserved | zero |
//!
//! | bytes of LACKING | field | |
//! |---|---|---|
//! | 0..8 | first | place of the first page in the image, a multiple of 8 |
//! | 8.. | bits | 1 to 32768 bytes: bit n of byte k is set if the page at place `first` + 8k + n is lacking |

use crate::coding::{Reader, Writer};
use crate::error::DecodeError;
use crate::limits::{BULK_LANES_MAX, LACKING_BYTES_MAX, WINDOW_BYTES};
use alloc::vec::Vec;

/// The receiver's terms of a fill session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// The transcript digest over both hellos.
    pub transcript: [u8; 32],
    /// What further connections prove to join.
    pub secret: [u8; 32],
    /// Bytes that may be under way on a bulk lane without acknowledgement.
    pub window: u64,
    /// How many pages are lacking.
    pub pages: u64,
    /// Bulk lanes granted, 1 to what was asked for.
    pub lanes: u8,
    /// Pages may be brought from what the receiver holds, if their digests come first.
    pub holds: bool,
}

impl Lack {
    /// Bytes of the body.
    pub const SIZE_MAX: u32 = 88;

    /// Judges a body.
    ///
    /// # Errors
    /// Another length, lanes or window outside their limits, a flag above 1, or reserved bytes.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let (transcript, secret) = (reader.array("transcript")?, reader.array("secret")?);
        let (window, pages) = (reader.u64("window")?, reader.u64("pages")?);
        let (lanes, flag) = (reader.u8("lanes")?, reader.u8("holds")?);
        let reserved: [u8; 6] = reader.array("reserved")?;
        reader.end()?;
        // SPEC 13.5
        if lanes == 0 || lanes > BULK_LANES_MAX {
            return Err(DecodeError::limit("lanes (from 1)", u64::from(lanes), u64::from(BULK_LANES_MAX)));
        }
        if window == 0 || window > WINDOW_BYTES {
            return Err(DecodeError::limit("window (from 1)", window, WINDOW_BYTES));
        }
        if flag > 1 || reserved != [0; 6] {
            return Err(DecodeError::Unknown { field: "flag or reserved bytes of LACK", value: u64::from(flag) });
        }
        Ok(Self { transcript, secret, window, pages, lanes, holds: flag == 1 })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut writer = Writer(out);
        writer.bytes(&self.transcript).bytes(&self.secret).u64(self.window).u64(self.pages);
        writer.u8(self.lanes).u8(u8::from(self.holds)).bytes(&[0; 6]);
    }
}

/// A part of the bitmap of lacking pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lacking<'a> {
    /// Place of the first page in the image.
    pub first: u64,
    /// A bit a page.
    pub bits: &'a [u8],
}

impl<'a> Lacking<'a> {
    /// Most bytes of a body.
    pub const SIZE_MAX: u32 = 8 + LACKING_BYTES_MAX;

    /// Judges a body; that it continues the part before it is the session's to check.
    ///
    /// # Errors
    /// A cut head, a place that is no multiple of 8, or no bits.
    pub fn decode(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let (first, bits) = (reader.u64("first place")?, reader.rest());
        // SPEC 13.6
        if !first.is_multiple_of(8) || bits.is_empty() {
            return Err(DecodeError::Unknown { field: "first place or bits of LACKING", value: first });
        }
        Ok(Self { first, bits })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer(out).u64(self.first).bytes(self.bits);
    }
}
