//! Dedup domains: whose pages may be matched with each other.
//!
//! A domain is a secret key. Everything that is hashed for it is keyed by it, one subkey a purpose, so digests of two
//! domains never compare equal and a digest of one purpose never stands for another. The public domain has a key that
//! everybody knows: it is for links without authentication, and claims no privacy.

use crate::digest::{Digest, Key};

/// One guest through all its hosts and visits: a random number made when it first leaves a host that keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LineageId(pub [u8; 16]);

/// What a domain is called where its key must not be seen, in the names of files for instance.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(pub [u8; 16]);

impl core::fmt::Display for DomainId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl core::fmt::Debug for DomainId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// The keys of one dedup domain.
#[derive(Clone)]
pub struct DedupDomain {
    pub(crate) page: Key,
    pub(crate) subtree: Key,
    pub(crate) node: Key,
    pub(crate) batch: Key,
    pub(crate) root: Key,
    pub(crate) live: Key,
    seal: Key,
    id: DomainId,
}

impl DedupDomain {
    /// The domain of `key`.
    pub fn new(key: &[u8; 32]) -> Self {
        let subkey = |purpose| Key::new(blake3::derive_key(purpose, key));
        Self {
            page: subkey("pagewire 1 page digest"),
            subtree: subkey("pagewire 1 subtree"),
            node: subkey("pagewire 1 tree node"),
            batch: subkey("pagewire 1 batch"),
            root: subkey("pagewire 1 root"),
            live: subkey("pagewire 1 live root"),
            seal: subkey("pagewire 1 store seal"),
            id: DomainId(half(blake3::derive_key("pagewire 1 domain id", key))),
        }
    }

    /// The key of the domain that operators call `name`, on every host.
    ///
    /// Whoever knows the name knows the key: it keeps guests of two domains apart, and no secret.
    pub fn named_key(name: &str) -> [u8; 32] {
        blake3::derive_key("pagewire 1 named domain", name.as_bytes())
    }

    /// Its id, from which nobody learns the key.
    pub fn id(&self) -> DomainId {
        self.id
    }

    /// The seal of what a store keeps for this domain: of the concatenation of `parts`. It equals no digest of a page.
    pub fn seal(&self, parts: &[&[u8]]) -> Digest {
        self.seal.hash(parts.iter().copied())
    }

    /// The domain whose key is thirty-two zero bytes.
    pub fn public() -> Self {
        Self::new(&[0; 32])
    }
}

/// The first half of 32 bytes.
fn half(bytes: [u8; 32]) -> [u8; 16] {
    bytes.first_chunk().copied().unwrap_or_default()
}

impl core::fmt::Debug for DedupDomain {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("DedupDomain(..)")
    }
}
