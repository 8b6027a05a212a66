//! Where received pages go: the trait and its kinds.

mod file;

pub use file::FileSink;

use pagewire_protocol::page::RegionId;
use std::io;

/// Memory of a guest that arrives. Page numbers are inside the region; `bytes` are whole pages, the last of a region
/// padded with zeros.
pub trait GuestSink: Send + 'static {
    /// How many first pages of a region hold something worth comparing.
    fn base_pages(&self, region: RegionId) -> u64;

    /// Whether everything beyond the base reads as zeros without being told so.
    fn starts_zero(&self) -> bool;

    /// Reads base pages, in ascending order and each once, before they are stated; they become part of the new image.
    ///
    /// # Errors
    /// They cannot be read or kept.
    fn read_base(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Reads pages as they are now.
    ///
    /// # Errors
    /// They cannot be read.
    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes pages.
    ///
    /// # Errors
    /// They cannot be written.
    fn install(&mut self, region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes pages zero.
    ///
    /// # Errors
    /// They cannot be written.
    fn zero(&mut self, region: RegionId, first: u64, count: u64) -> io::Result<()>;

    /// Makes everything last and visible. May block as long as a disk does.
    ///
    /// # Errors
    /// It could not be made to last.
    fn finish(&mut self) -> io::Result<()>;
}
