//! ROOT: the root of the whole image as the sender has stated it. The receiver's DONE or CLOSE answers it.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..4 | round | the last round |
//! | 4..8 | reserved | zero |
//! | 8..16 | pages | pages of the image |
//! | 16..48 | digest | the image root |

use crate::coding::{Reader, Writer};
use crate::digest::Digest;
use crate::error::DecodeError;
use alloc::vec::Vec;

/// The whole image in one digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// The last round.
    pub round: u32,
    /// Pages of the image.
    pub pages: u64,
    /// The image root.
    pub digest: Digest,
}

impl Root {
    /// Bytes of the body.
    pub const SIZE_MAX: u32 = 48;

    /// Judges a body.
    ///
    /// # Errors
    /// Another length, or reserved bytes.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let (round, reserved) = (reader.u32("round")?, reader.u32("reserved")?);
        if reserved != 0 {
            return Err(DecodeError::Unknown { field: "reserved bytes of ROOT", value: u64::from(reserved) });
        }
        let frame = Self { round, pages: reader.u64("pages")?, digest: Digest(reader.array("digest")?) };
        // SPEC 5.13
        reader.end().map(|()| frame)
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer(out).u32(self.round).u32(0).u64(self.pages).bytes(&self.digest.0);
    }
}
