//! HELLO: the first frame of a session, both ways at once. Its layout never changes in any version.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..8 | magic | `pagewire` |
//! | 8..10 | version_min | lowest version spoken, not zero |
//! | 10..12 | version_max | highest, not below version_min |
//! | 12 | role | 1 sender, 2 receiver |
//! | 13..16 | reserved | zero |
//! | 16.. | body | bincode: features offered, features required, codecs, install sizes, nonce, agent, extensions |

use crate::coding::{Reader, Writer, decode_body, encode_body};
use crate::error::DecodeError;
use crate::limits::{AGENT_BYTES_MAX, EXTENSION_BYTES_MAX, EXTENSIONS_MAX};
use alloc::string::String;
use alloc::vec::Vec;

const MAGIC: [u8; 8] = *b"pagewire";

/// Which side of the session a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// It has the image.
    Sender,
    /// It gets the image.
    Receiver,
}

impl Role {
    /// `sender` or `receiver`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sender => "sender",
            Self::Receiver => "receiver",
        }
    }
}

/// Something a later version says in HELLO; skipped unless required.
#[derive(Clone, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Extension {
    /// What it is.
    pub tag: u16,
    /// Whether a peer that does not know it must give up.
    pub required: bool,
    /// Its content.
    pub data: Vec<u8>,
}

/// What a peer speaks and offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Lowest protocol version spoken.
    pub version_min: u16,
    /// Highest protocol version spoken.
    pub version_max: u16,
    /// Which side it is.
    pub role: Role,
    /// What else it says.
    pub body: HelloBody,
}

// SPEC 10.1
/// The part of HELLO that every version encodes alike behind the fixed fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct HelloBody {
    /// Features it can use.
    pub features_offered: u64,
    /// Features without which it will not go on; a subset of the offered ones.
    pub features_required: u64,
    /// Bit n: it can decode codec n.
    pub codecs: u32,
    /// Bit n: it can install 4 KiB << n at once.
    pub install_sizes: u32,
    /// Random, so that no two transcripts are alike.
    pub nonce: [u8; 16],
    /// Program and version, for logs.
    pub agent: String,
    /// For later versions.
    pub extensions: Vec<Extension>,
}

impl Hello {
    /// Judges a body.
    ///
    /// # Errors
    /// Another magic, an empty or zero version range, an unknown role, or anything over its limit.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        // SPEC 4.2
        let magic = reader.array("magic")?;
        if magic != MAGIC {
            return Err(DecodeError::Magic(magic));
        }
        let (version_min, version_max) = (reader.u16("version_min")?, reader.u16("version_max")?);
        if version_min == 0 || version_max < version_min {
            let (value, limit) = (u64::from(version_min), u64::from(version_max));
            return Err(DecodeError::Limit { field: "version_min (from 1)", value, limit });
        }
        let role = match reader.u8("role")? {
            1 => Role::Sender,
            2 => Role::Receiver,
            value => return Err(DecodeError::Unknown { field: "role", value: u64::from(value) }),
        };
        if reader.array("reserved")? != [0; 3] {
            return Err(DecodeError::Unknown { field: "reserved bytes of HELLO", value: 1 });
        }
        let body: HelloBody = decode_body(reader.rest())?;
        if body.features_required & !body.features_offered != 0 {
            return Err(DecodeError::Unknown {
                field: "required feature that is not offered",
                value: body.features_required,
            });
        }
        at_most("agent bytes", body.agent.len(), AGENT_BYTES_MAX)?;
        at_most("extensions", body.extensions.len(), EXTENSIONS_MAX)?;
        for extension in &body.extensions {
            at_most("extension bytes", extension.data.len(), EXTENSION_BYTES_MAX)?;
            // SPEC 4.4
            if extension.required {
                return Err(DecodeError::Unknown { field: "required extension", value: u64::from(extension.tag) });
            }
        }
        Ok(Self { version_min, version_max, role, body })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let role = if self.role == Role::Sender { 1 } else { 2 };
        Writer(out).bytes(&MAGIC).u16(self.version_min).u16(self.version_max).u8(role).bytes(&[0; 3]);
        encode_body(&self.body, out);
    }
}

fn at_most(field: &'static str, value: usize, limit: usize) -> Result<(), DecodeError> {
    if value > limit { Err(DecodeError::limit(field, value as u64, limit as u64)) } else { Ok(()) }
}
