//! ACCEPT: on which terms the receiver takes the image. bincode: transcript, secret, lanes, window, pages held a region,
//! agreed root, whether the base stays, the challenge, the receiver's host, whether it can do post-copy.

use crate::coding::{decode_body, encode_body};
use crate::error::DecodeError;
use crate::limits::{BULK_LANES_MAX, REGIONS_MAX, ROOTS_MAX, WINDOW_BYTES};
use alloc::vec::Vec;

/// The receiver's terms.
#[derive(Clone, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Accept {
    /// The transcript digest over both hellos.
    pub transcript: [u8; 32],
    /// What further connections prove to join; as secret as the connection it travels on.
    pub secret: [u8; 32],
    /// Bulk lanes granted, 1 to what was asked for.
    pub lanes: u8,
    /// Bytes that may be under way on a lane without acknowledgement.
    pub window: u64,
    /// For each region, how many of its first pages the receiver holds something for. Their HAVE will come, unless a
    /// root is agreed.
    pub held_pages: Vec<u64>,
    /// Which of OPEN's known roots is that of the base, counted from 1; 0 for none.
    pub agreed: u8,
    /// The base stays as it is until the session ends: pages may refer to any place of it, whatever was stated there.
    pub base_stays: bool,
    /// Pages of other guests of the domain are here too: any page may be announced by its digest, with its proof under
    /// these random bytes.
    pub challenge: Option<[u8; 32]>,
    /// The receiver's host, if OPEN ends with a hand-over.
    pub host: Option<[u8; 32]>,
    /// The guest may start here before all of its pages have come.
    pub post_copy: bool,
}

impl Accept {
    /// Judges a body.
    ///
    /// # Errors
    /// Lanes, window or regions outside their limits.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let accept: Self = decode_body(body)?;
        // SPEC 4.12
        if accept.lanes == 0 || accept.lanes > BULK_LANES_MAX {
            return Err(DecodeError::limit("lanes (from 1)", u64::from(accept.lanes), u64::from(BULK_LANES_MAX)));
        }
        if accept.window == 0 || accept.window > WINDOW_BYTES {
            return Err(DecodeError::limit("window (from 1)", accept.window, WINDOW_BYTES));
        }
        if accept.held_pages.len() > REGIONS_MAX {
            return Err(DecodeError::limit("regions held", accept.held_pages.len() as u64, REGIONS_MAX as u64));
        }
        if usize::from(accept.agreed) > ROOTS_MAX {
            return Err(DecodeError::limit("agreed root", u64::from(accept.agreed), ROOTS_MAX as u64));
        }
        Ok(accept)
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        encode_body(self, out);
    }
}
