//! What the sending host knows of an earlier image of the guest: its manifest, and perhaps its bytes.

use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::page::{Layout, RegionId};
use pagewire_protocol::tree::DigestTree;
use std::io;

/// An earlier image of the guest, which the receiver may hold too. Only one that has
/// [pages in common](pagewire_protocol::page::common_pages) with the memory that is sent can be named. Bytes and digests
/// are guesses: nothing wrong can be installed because of them.
pub trait Base: Send + std::fmt::Debug + 'static {
    /// The root over its digests and layout.
    fn root(&self) -> Digest;

    /// Its regions.
    fn layout(&self) -> &Layout;

    /// The session that brought the image here, or took it away.
    fn session(&self) -> [u8; 16];

    /// Its digests, region by region, with this root.
    ///
    /// # Errors
    /// They cannot be read or have another root; the session goes on without them.
    fn trees(&mut self, hasher: &PageHasher) -> io::Result<Vec<DigestTree>>;

    /// Whether its bytes are here too.
    fn has_pages(&self) -> bool;

    /// Reads its pages.
    ///
    /// # Errors
    /// They cannot be read; the session goes on without the base's bytes, or, if one of these pages is
    /// [not there](io::ErrorKind::NotFound), without these.
    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()>;
}
