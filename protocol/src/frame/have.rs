//! HAVE: digests of the receiver's holdings, one a subtree of 256 pages, streamed while it reads its base.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..2 | region | |
//! | 2..8 | reserved | zero |
//! | 8..16 | first | the first subtree; continues where the region's last HAVE ended |
//! | 16.. | digests | 32 bytes each, 1 to 64 |

use crate::coding::{Reader, Writer};
use crate::digest::Digest;
use crate::error::DecodeError;
use crate::limits::HAVE_DIGESTS_MAX;
use alloc::vec::Vec;

/// What the receiver holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Have {
    /// The region.
    pub region: u16,
    /// The first subtree.
    pub first: u64,
    /// Digests of that and the following subtrees.
    pub digests: Vec<Digest>,
}

const _: () = assert!(Have::SIZE_MAX as usize == 16 + 32 * HAVE_DIGESTS_MAX);

impl Have {
    /// Most bytes of a body.
    pub const SIZE_MAX: u32 = 16 + 32 * 64;

    /// Judges a body.
    ///
    /// # Errors
    /// No digest, a cut one, too many, or reserved bytes.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let region = reader.u16("region")?;
        if reader.array("reserved")? != [0; 6] {
            return Err(DecodeError::Unknown { field: "reserved bytes of HAVE", value: 1 });
        }
        let first = reader.u64("first")?;
        let (digests, tail) = reader.rest().as_chunks::<32>();
        if !tail.is_empty() {
            return Err(DecodeError::Trailing(tail.len()));
        }
        // SPEC 5.2
        if digests.is_empty() || digests.len() > HAVE_DIGESTS_MAX {
            return Err(DecodeError::limit("digests (from 1)", digests.len() as u64, HAVE_DIGESTS_MAX as u64));
        }
        Ok(Self { region, first, digests: digests.iter().copied().map(Digest).collect() })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut writer = Writer(out);
        writer.u16(self.region).bytes(&[0; 6]).u64(self.first);
        self.digests.iter().for_each(|digest| {
            writer.bytes(&digest.0);
        });
    }
}
