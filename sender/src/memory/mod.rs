//! Where sent pages come from: the trait and its kinds.

mod file;

pub use file::FileMemory;

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::page::{Layout, RegionId};
use std::io;

/// Memory of a guest that leaves.
pub trait GuestMemory: Send + 'static {
    /// The regions. Never changes.
    fn layout(&self) -> &Layout;

    /// Copies pages out. `bytes` is a whole number of pages inside the region; what lies beyond the region's end comes
    /// as zeros.
    ///
    /// # Errors
    /// They cannot be read, or memory is not there any more.
    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// The pages, by their places in the image, that are known not to have changed since the image with `root` arrived
    /// by `session`; `None` if nobody has watched them since. They are not read but for a sample.
    fn unchanged_since(&mut self, _root: &Digest, _session: &[u8; 16]) -> Option<PageBitmap> {
        None
    }

    /// Called when everything was stated: memory that must not change while it is read says here if it did.
    ///
    /// # Errors
    /// It changed, so what was stated is of no single moment.
    fn check_unchanged(&mut self) -> io::Result<()>;
}
