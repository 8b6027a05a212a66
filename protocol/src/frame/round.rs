//! ROUND: every page of a round that travels on this lane has been stated. Sent on each bulk lane.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..4 | round | |
//! | 4..8 | reserved | zero |
//! | 8..16 | frames | PAGES frames sent on this lane so far |
//!
//! Answers to wants may follow it.

use crate::coding::{Reader, Writer};
use crate::error::DecodeError;
use alloc::vec::Vec;

/// The end of a round on a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundEnd {
    /// The round that ends.
    pub round: u32,
    /// PAGES frames sent on this lane so far.
    pub frames: u64,
}

impl RoundEnd {
    /// Bytes of the body.
    pub const SIZE_MAX: u32 = 16;

    /// Judges a body.
    ///
    /// # Errors
    /// Another length, or reserved bytes.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let (round, reserved) = (reader.u32("round")?, reader.u32("reserved")?);
        if reserved != 0 {
            return Err(DecodeError::Unknown { field: "reserved bytes of ROUND", value: u64::from(reserved) });
        }
        let frame = Self { round, frames: reader.u64("frames")? };
        // SPEC 5.13
        reader.end().map(|()| frame)
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer(out).u32(self.round).u32(0).u64(self.frames);
    }
}
