//! Dedup domains: whose pages may be matched with each other.
//!
//! A domain is a secret key. Everything that is hashed for it is keyed by it, one subkey a purpose, so digests of two
//! domains never compare equal and a digest of one purpose never stands for another. The public domain has a key that
//! everybody knows: it is for links without authentication, and claims no privacy.

use crate::digest::Key;

/// The keys of one dedup domain.
#[derive(Clone)]
pub struct DedupDomain {
    pub(crate) page: Key,
    pub(crate) node: Key,
    pub(crate) batch: Key,
    pub(crate) root: Key,
}

impl DedupDomain {
    /// The domain of `key`.
    pub fn new(key: &[u8; 32]) -> Self {
        let subkey = |purpose| Key::new(blake3::derive_key(purpose, key));
        Self {
            page: subkey("pagewire 1 page digest"),
            node: subkey("pagewire 1 tree node"),
            batch: subkey("pagewire 1 batch"),
            root: subkey("pagewire 1 root"),
        }
    }

    /// The domain whose key is thirty-two zero bytes.
    pub fn public() -> Self {
        Self::new(&[0; 32])
    }
}

impl core::fmt::Debug for DedupDomain {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("DedupDomain(..)")
    }
}
