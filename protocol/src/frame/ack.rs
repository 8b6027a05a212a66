//! ACK: how much of a lane the receiver has applied, and which pages it wants. Travels on the lane it speaks of.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..8 | frames | PAGES frames of this lane applied so far; never goes back |
//! | 8..16 | settled | those of them, from the first, of which no page waits; never goes back |
//! | 16.. | wants | 16 bytes each, at most 1024: region u16, reserved u16, count u32, first u64 |

use crate::coding::{Reader, Writer};
use crate::error::DecodeError;
use crate::limits::WANTS_MAX;
use alloc::vec::Vec;

/// Neighbouring pages whose bytes the receiver asks for. Held against the image's layout by the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// The region.
    pub region: u16,
    /// The first page.
    pub first: u64,
    /// How many.
    pub count: u32,
}

/// Progress of a lane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// PAGES frames applied on this lane.
    pub frames: u64,
    /// Those of them, from the first, all of whose pages are present or have been wanted.
    pub settled: u64,
    /// Pages whose bytes are asked for.
    pub wants: Vec<Want>,
}

const WANT_BYTES: usize = 16;
const _: () = assert!(Ack::SIZE_MAX as usize == 16 + WANT_BYTES * WANTS_MAX);

impl Ack {
    /// Most bytes of a body.
    pub const SIZE_MAX: u32 = 16 + 16 * 1024;

    /// Judges a body.
    ///
    /// # Errors
    /// More settled than applied; a cut want, too many, an empty one, or reserved bytes.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let (frames, settled) = (reader.u64("frames")?, reader.u64("settled")?);
        // SPEC 5.9
        if settled > frames {
            return Err(DecodeError::limit("settled", settled, frames));
        }
        Ok(Self { frames, settled, wants: decode_wants(reader.rest())? })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer(out).u64(self.frames).u64(self.settled);
        encode_wants(&self.wants, out);
    }
}

/// Judges a list of pages that ends a body.
pub(super) fn decode_wants(bytes: &[u8]) -> Result<Vec<Want>, DecodeError> {
    let (wants, tail) = bytes.as_chunks::<WANT_BYTES>();
    if !tail.is_empty() {
        return Err(DecodeError::Trailing(tail.len()));
    }
    if wants.len() > WANTS_MAX {
        return Err(DecodeError::limit("wants", wants.len() as u64, WANTS_MAX as u64));
    }
    let wants = wants.iter().map(|bytes| {
        let mut reader = Reader::new(bytes);
        let (region, reserved) = (reader.u16("region")?, reader.u16("reserved")?);
        let want = Want { region, count: reader.u32("count")?, first: reader.u64("first")? };
        if reserved != 0 || want.count == 0 {
            return Err(DecodeError::Unknown { field: "want's reserved bytes or count", value: u64::from(reserved) });
        }
        Ok(want)
    });
    wants.collect()
}

/// Appends a list of pages.
pub(super) fn encode_wants(wants: &[Want], out: &mut Vec<u8>) {
    let mut writer = Writer(out);
    for want in wants {
        writer.u16(want.region).u16(0).u32(want.count).u64(want.first);
    }
}
