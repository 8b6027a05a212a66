//! Bytes to numbers and back: `Reader` and `Writer` for page frames, bincode for control bodies, nothing else.
//!
//! A Reader checks every length against what remains before anything is allocated. bincode runs with fixed-width
//! little-endian integers and a limit set before it decodes (without one a claimed length panics), and trailing bytes,
//! which it ignores, are an error here.

use crate::error::DecodeError;
use crate::limits::CONTROL_BODY_MAX;
use alloc::format;
use alloc::vec::Vec;

/// Reads fields of a body in order.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    total: usize,
}

impl<'a> Reader<'a> {
    /// A reader at the start of `body`.
    pub fn new(body: &'a [u8]) -> Self {
        Self { rest: body, total: body.len() }
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// Fewer than `len` bytes are left.
    pub fn bytes(&mut self, field: &'static str, len: usize) -> Result<&'a [u8], DecodeError> {
        let Some((head, rest)) = self.rest.split_at_checked(len) else {
            let offset = self.total.saturating_sub(self.rest.len());
            return Err(DecodeError::Truncated { field, offset, needed: len, left: self.rest.len() });
        };
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes, by value.
    ///
    /// # Errors
    /// Fewer than `N` bytes are left.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let bytes = self.bytes(field, N)?;
        Ok(bytes.first_chunk().copied().unwrap_or([0; N]))
    }

    /// The next byte.
    ///
    /// # Errors
    /// Nothing is left.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.array(field).map(u8::from_le_bytes)
    }

    /// The next two bytes, little endian.
    ///
    /// # Errors
    /// Fewer than two bytes are left.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.array(field).map(u16::from_le_bytes)
    }

    /// The next four bytes, little endian.
    ///
    /// # Errors
    /// Fewer than four bytes are left.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.array(field).map(u32::from_le_bytes)
    }

    /// The next eight bytes, little endian.
    ///
    /// # Errors
    /// Fewer than eight bytes are left.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Nothing may be left.
    ///
    /// # Errors
    /// Bytes are left.
    pub fn end(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.rest.len())) }
    }
}

/// Appends fields to a body.
#[derive(Debug)]
pub struct Writer<'a>(pub &'a mut Vec<u8>);

impl Writer<'_> {
    /// Appends bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    /// Appends two bytes, little endian.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends four bytes, little endian.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends eight bytes, little endian.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
}

const BINCODE: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Fixint,
    bincode::config::Limit<{ CONTROL_BODY_MAX as usize }>,
> = bincode::config::standard().with_fixed_int_encoding().with_limit();

/// Decodes a control body, all of it.
///
/// # Errors
/// bincode refuses it, or bytes are left over.
pub fn decode_body<T: bincode::Decode<()>>(body: &[u8]) -> Result<T, DecodeError> {
    // SPEC 1.4
    let (value, used) =
        bincode::decode_from_slice(body, BINCODE).map_err(|error| DecodeError::Body(format!("{error}")))?;
    match body.len().saturating_sub(used) {
        0 => Ok(value),
        left => Err(DecodeError::Trailing(left)),
    }
}

/// Appends a control body. Local values are inside their limits by construction, so nothing can fail.
pub fn encode_body<T: bincode::Encode>(value: &T, out: &mut Vec<u8>) {
    struct Sink<'a>(&'a mut Vec<u8>);
    impl bincode::enc::write::Writer for Sink<'_> {
        fn write(&mut self, bytes: &[u8]) -> Result<(), bincode::error::EncodeError> {
            self.0.extend_from_slice(bytes);
            Ok(())
        }
    }
    // The limit guards decoding; encoding into memory has no way to fail.
    let done = bincode::encode_into_writer(value, Sink(out), BINCODE);
    debug_assert!(done.is_ok(), "encoding into memory cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_was_written_and_says_where_it_ends() {
        let mut bytes = Vec::new();
        Writer(&mut bytes).u8(1).u16(2).u32(3).u64(4).bytes(b"xy");
        let mut reader = Reader::new(&bytes);
        assert_eq!((reader.u8("a"), reader.u16("b"), reader.u32("c"), reader.u64("d")), (Ok(1), Ok(2), Ok(3), Ok(4)));
        let error = reader.clone().bytes("e", 3).unwrap_err();
        assert_eq!(error, DecodeError::Truncated { field: "e", offset: 15, needed: 3, left: 2 });
        assert_eq!(reader.clone().end(), Err(DecodeError::Trailing(2)));
        assert_eq!(reader.rest(), b"xy");
    }

    #[test]
    fn rejects_claimed_lengths_without_allocating() {
        for claimed in [1u64, 65_535, 65_536, u64::from(u32::MAX), 1 << 63, u64::MAX] {
            let mut body = claimed.to_le_bytes().to_vec();
            assert!(decode_body::<Vec<u8>>(&body).is_err(), "{claimed}");
            assert!(decode_body::<Vec<[u64; 4]>>(&body).is_err(), "{claimed}");
            body.push(0);
            assert_eq!(decode_body::<Vec<u8>>(&body).is_ok(), claimed == 1);
        }
        assert_eq!(decode_body::<u16>(&[1, 0, 0]), Err(DecodeError::Trailing(1)));
    }
}
