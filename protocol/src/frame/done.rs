//! DONE: from the receiver, every page is present, verified and, for files, synced; from the sender, that it knows.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..8 | pages | pages of the image |
//! | 8..40 | root | the image root |
//!
//! Nothing else means success. Only the receiver's DONE frees the sender's copy; the sender's DONE lets the receiver
//! forget the session.

use crate::coding::{Reader, Writer};
use crate::digest::Digest;
use crate::error::DecodeError;
use alloc::vec::Vec;

/// Everything is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Pages of the image.
    pub pages: u64,
    /// The image root.
    pub root: Digest,
}

impl Done {
    /// Bytes of the body.
    pub const SIZE_MAX: u32 = 40;

    /// Judges a body.
    ///
    /// # Errors
    /// Another length.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let frame = Self { pages: reader.u64("pages")?, root: Digest(reader.array("root")?) };
        // SPEC 5.13
        reader.end().map(|()| frame)
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer(out).u64(self.pages).bytes(&self.root.0);
    }
}
