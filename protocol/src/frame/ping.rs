//! PING: a sign of life on any lane, asked for (`answer` 0) or given (`answer` 1, same token).
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..8 | token | returned unchanged |
//! | 8 | answer | 0 or 1 |
//! | 9..16 | reserved | zero |

use crate::coding::{Reader, Writer};
use crate::error::DecodeError;
use alloc::vec::Vec;

/// A sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ping {
    /// Returned unchanged.
    pub token: u64,
    /// Whether this is the answer.
    pub answer: bool,
}

impl Ping {
    /// Bytes of the body.
    pub const SIZE_MAX: u32 = 16;

    /// Judges a body.
    ///
    /// # Errors
    /// Another length, an answer that is neither 0 nor 1, or reserved bytes.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let token = reader.u64("token")?;
        let rest: [u8; 8] = reader.array("answer")?;
        let value = u64::from_le_bytes(rest);
        if value > 1 {
            return Err(DecodeError::Unknown { field: "answer", value });
        }
        // SPEC 5.13
        reader.end().map(|()| Self { token, answer: value == 1 })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer(out).u64(self.token).u64(u64::from(self.answer));
    }
}
