//! Where sent pages come from: the trait and its kinds.

mod file;

pub use file::FileMemory;

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

    /// Called when everything was stated: memory that must not change while it is read says here if it did.
    ///
    /// # Errors
    /// It changed, so what was stated is of no single moment.
    fn check_unchanged(&mut self) -> io::Result<()>;
}
