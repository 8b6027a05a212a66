//! FILL: the first frame of a session that brings what a guest still lacks that runs at the receiver.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..32 | transcript | the transcript digest over both hellos |
//! | 32..48 | session | random: the id of this session, which JOIN names |
//! | 48 | lanes | bulk lanes asked for, 1 to 8 |
//! | 49 | single_stream | 1 if all lanes travel on the control connection, else 0 |
//! | 50..56 | reserved | zero |
//! | 56..200 | binding | the hand-over that left the pages behind |

use crate::coding::{Reader, Writer};
use crate::error::DecodeError;
use crate::handover::Handover;
use crate::limits::BULK_LANES_MAX;
use alloc::vec::Vec;

/// What the sender wants to fill, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The transcript digest over both hellos.
    pub transcript: [u8; 32],
    /// The session's id, random.
    pub session: [u8; 16],
    /// Bulk lanes asked for, 1 to 8.
    pub lanes: u8,
    /// All lanes travel on the control connection.
    pub single_stream: bool,
    /// The hand-over that left the pages behind.
    pub handover: Handover,
}

impl Fill {
    /// Bytes of the body.
    pub const SIZE_MAX: u32 = 200;

    /// Judges a body.
    ///
    /// # Errors
    /// Another length, no or too many lanes, a flag above 1, reserved bytes, or a binding that is none.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let (transcript, session) = (reader.array("transcript")?, reader.array("session")?);
        let (lanes, flag) = (reader.u8("lanes")?, reader.u8("single_stream")?);
        let reserved: [u8; 6] = reader.array("reserved")?;
        // SPEC 13.4
        if lanes == 0 || lanes > BULK_LANES_MAX {
            return Err(DecodeError::limit("lanes (from 1)", u64::from(lanes), u64::from(BULK_LANES_MAX)));
        }
        if flag > 1 || reserved != [0; 6] {
            return Err(DecodeError::Unknown { field: "flag or reserved bytes of FILL", value: u64::from(flag) });
        }
        let handover = Handover::decode(reader.rest())?;
        Ok(Self { transcript, session, lanes, single_stream: flag == 1, handover })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut writer = Writer(out);
        writer.bytes(&self.transcript).bytes(&self.session).u8(self.lanes).u8(u8::from(self.single_stream));
        writer.bytes(&[0; 6]);
        self.handover.encode(out);
    }
}
