//! CLOSE: the end of the session and why. bincode: code, retry, reason.
//!
//! The reason is text for people; it is escaped when it is judged, so no peer writes control characters into a log.

use crate::coding::{decode_body, encode_body};
use crate::error::{CloseCode, DecodeError};
use crate::limits::REASON_BYTES_MAX;
use alloc::string::String;
use alloc::vec::Vec;

#[derive(bincode::Encode, bincode::Decode)]
struct Body {
    code: u16,
    retry: bool,
    reason: String,
}

/// Why the session ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// The stable code, not zero.
    pub code: CloseCode,
    /// Whether the same attempt may succeed later.
    pub retry: bool,
    /// For people; printable ASCII.
    pub reason: String,
}

impl Close {
    /// A CLOSE with the code's own advice on trying again; the reason is escaped and cut to its limit.
    pub fn new(code: CloseCode, reason: &str) -> Self {
        Self { code, retry: code.retry(), reason: printable(reason) }
    }

    /// Judges a body.
    ///
    /// # Errors
    /// Code zero, or a reason over its limit.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let Body { code, retry, reason } = decode_body(body)?;
        if code == 0 {
            return Err(DecodeError::Unknown { field: "close code", value: 0 });
        }
        if reason.len() > REASON_BYTES_MAX {
            return Err(DecodeError::limit("reason bytes", reason.len() as u64, REASON_BYTES_MAX as u64));
        }
        // SPEC 8.3
        Ok(Self { code: CloseCode(code), retry, reason: printable(&reason) })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_body(&Body { code: self.code.0, retry: self.retry, reason: self.reason.clone() }, out);
    }
}

// SPEC 8.4
fn printable(text: &str) -> String {
    let escaped = |c: char| {
        let plain = c == ' ' || c.is_ascii_graphic();
        let (keep, escape) = if plain { (Some(c), None) } else { (None, Some(c.escape_default())) };
        keep.into_iter().chain(escape.into_iter().flatten())
    };
    text.chars().flat_map(escaped).take(REASON_BYTES_MAX).collect()
}
