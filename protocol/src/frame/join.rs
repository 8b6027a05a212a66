//! JOIN: the first frame of a further connection, which carries one bulk lane or the urgent lane.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..16 | session | the session's id |
//! | 16..48 | proof | keyed BLAKE3 of `pagewire 1 join`, session and lane under the session's secret |
//!
//! The lane is that of the header. Each lane is joined once.

use crate::coding::{Reader, Writer};
use crate::digest::Digest;
use crate::error::DecodeError;
use alloc::vec::Vec;

/// A connection that wants to carry a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// The session's id.
    pub session: [u8; 16],
    /// What shows that the peer knows the secret.
    pub proof: Digest,
}

impl Join {
    /// Bytes of the body.
    pub const SIZE_MAX: u32 = 48;

    /// Judges a body.
    ///
    /// # Errors
    /// Another length.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let frame = Self { session: reader.array("session")?, proof: Digest(reader.array("proof")?) };
        // SPEC 5.13
        reader.end().map(|()| frame)
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer(out).bytes(&self.session).bytes(&self.proof.0);
    }
}
