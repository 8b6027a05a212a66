//! BLOB: a part of a named, versioned blob of the embedder's: device state, or what else must be there before the guest
//! starts. ROOT covers all of them; what is in them is the embedder's to judge.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..4 | version | of the blob's content; the embedder's |
//! | 4..8 | length | bytes of the whole blob, at most 16 MiB |
//! | 8..12 | offset | of this part |
//! | 12 | N | bytes of the name, 1 to 64 |
//! | 13..16 | reserved | zero |
//! | 16..16+N | name | as an image's name |
//! | 16+N.. | part | 1 to 32768 bytes; none if the blob is empty |

use crate::coding::{Reader, Writer};
use crate::error::DecodeError;
use crate::frame::ImageName;
use crate::limits::{BLOB_BYTES_MAX, BLOB_PART_BYTES_MAX, NAME_BYTES_MAX};
use alloc::string::ToString;
use alloc::vec::Vec;

/// A part of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob<'a> {
    /// What it is called.
    pub name: ImageName,
    /// Which version of it.
    pub version: u32,
    /// Bytes of the whole blob.
    pub length: u32,
    /// Where in it the part begins.
    pub offset: u32,
    /// The part.
    pub part: &'a [u8],
}

const FIXED_BYTES: usize = 16;
const _: () = assert!(Blob::SIZE_MAX as usize == FIXED_BYTES + NAME_BYTES_MAX + BLOB_PART_BYTES_MAX as usize);

impl<'a> Blob<'a> {
    /// Most bytes of a body.
    pub const SIZE_MAX: u32 = 16 + 64 + 32 * 1024;

    /// Judges a body.
    ///
    /// # Errors
    /// A name, a length or a part outside its limits, a part that is not inside the blob, or reserved bytes.
    pub fn decode(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let (version, length, offset) = (reader.u32("version")?, reader.u32("length")?, reader.u32("offset")?);
        let name_bytes = reader.u8("name length")?;
        if reader.array("reserved")? != [0; 3] {
            return Err(DecodeError::Unknown { field: "reserved bytes of BLOB", value: 1 });
        }
        let name = reader.bytes("name", usize::from(name_bytes))?;
        let name = core::str::from_utf8(name).map_err(|_| DecodeError::Name("not UTF-8".to_string()))?;
        let name = ImageName::new(name)?;
        let part = reader.rest();
        // SPEC 12.2
        if length > BLOB_BYTES_MAX {
            return Err(DecodeError::limit("blob length", u64::from(length), u64::from(BLOB_BYTES_MAX)));
        }
        let bytes = part.len() as u64;
        if bytes > u64::from(BLOB_PART_BYTES_MAX) || (bytes == 0) != (length == 0) {
            return Err(DecodeError::limit("part of blob (from 1)", bytes, u64::from(BLOB_PART_BYTES_MAX)));
        }
        let end = u64::from(offset).saturating_add(bytes);
        if end > u64::from(length) {
            return Err(DecodeError::limit("end of part of blob", end, u64::from(length)));
        }
        Ok(Self { name, version, length, offset, part })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let name = self.name.as_str().as_bytes();
        let name_bytes = u8::try_from(name.len()).unwrap_or(u8::MAX);
        let mut writer = Writer(out);
        writer.u32(self.version).u32(self.length).u32(self.offset).u8(name_bytes).bytes(&[0; 3]);
        writer.bytes(name).bytes(self.part);
    }
}
