//! FAULT: pages that the receiver's guest waits for, or will touch soon. Travels on the urgent lane.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0 | urgency | 1 the guest waits for them, 2 it will touch them in this order |
//! | 1..8 | reserved | zero |
//! | 8.. | pages | 16 bytes each, 1 to 1024: region u16, reserved u16, count u32, first u64 |

use crate::coding::{Reader, Writer};
use crate::error::DecodeError;
use crate::frame::Want;
use crate::frame::ack::{decode_wants, encode_wants};
use alloc::vec::Vec;

/// How soon pages are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Urgency(u8);

impl Urgency {
    /// The guest waits for them.
    pub const NOW: Self = Self(1);
    /// It will touch them, in this order.
    pub const AHEAD: Self = Self(2);
}

/// Pages that are needed before others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// How soon.
    pub urgency: Urgency,
    /// Which, at least one.
    pub pages: Vec<Want>,
}

impl Fault {
    /// Most bytes of a body.
    pub const SIZE_MAX: u32 = 8 + 16 * 1024;

    /// Judges a body.
    ///
    /// # Errors
    /// An unknown urgency, reserved bytes, a cut page, none or too many.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let (urgency, reserved): (u8, [u8; 7]) = (reader.u8("urgency")?, reader.array("reserved")?);
        // SPEC 13.9
        if !(1..=2).contains(&urgency) || reserved != [0; 7] {
            return Err(DecodeError::Unknown {
                field: "urgency or reserved bytes of FAULT",
                value: u64::from(urgency),
            });
        }
        let pages = decode_wants(reader.rest())?;
        if pages.is_empty() {
            return Err(DecodeError::limit("pages of FAULT (from 1)", 0, 0));
        }
        Ok(Self { urgency: Urgency(urgency), pages })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer(out).u8(self.urgency.0).bytes(&[0; 7]);
        encode_wants(&self.pages, out);
    }
}
