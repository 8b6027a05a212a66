//! Where received pages go: the trait and its kinds.

mod beside;
mod file;
mod mapping;
mod postcopy;
mod ram;
pub mod uffd;

pub use beside::Beside;
pub use file::FileSink;
pub use postcopy::{
    Backing, Clock, Fault, FaultTimes, Gathered, HandedRegion, Installed, Odd, PostcopyError, PostcopyMemory,
    PostcopySink, Served, TableError,
};
pub use ram::{GuestRam, RamRegion, RamSink};

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageBytes};
use pagewire_protocol::page::RegionId;
use std::io;
use std::os::fd::BorrowedFd;

/// Pages of other guests of the same dedup domain. What is found is checked before it is used, and used only for a sender
/// that has proved that it has the page.
pub trait OtherPages: std::fmt::Debug + Send + 'static {
    /// Reads a page that may have `digest`; false if none is here.
    fn fetch(&mut self, digest: &Digest, page: &mut PageBytes) -> bool;
}

/// Memory of a guest that arrives. Page numbers are inside the region; `bytes` are whole pages, the last of a region
/// padded with zeros.
pub trait GuestSink: Send + 'static {
    /// How many first pages of a region hold something worth comparing.
    fn base_pages(&self, region: RegionId) -> u64;

    /// Whether everything beyond the base reads as zeros without being told so.
    fn starts_zero(&self) -> bool;

    /// Reads base pages, in ascending order and each once at most, before they are stated; they become part of the new
    /// image. Left out are only those that something else is about to be put in place of.
    ///
    /// # Errors
    /// They cannot be read or kept.
    fn read_base(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Whether the base stays readable by [`read_old`](Self::read_old) until the session ends, whatever is installed.
    fn base_stays(&self) -> bool {
        false
    }

    /// Whether the base is the new image already, so that an unchanged page need not even be read.
    fn base_in_place(&self) -> bool {
        false
    }

    /// Reads pages of the base as they were; called only if it [stays](Self::base_stays).
    ///
    /// # Errors
    /// They cannot be read.
    fn read_old(&mut self, _region: RegionId, _first: u64, _bytes: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

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

    /// Whether a guest may run in it while pages are absent: who touches one waits until it is installed.
    fn can_wait(&self) -> bool {
        false
    }

    /// The guest is about to run, and `absent` pages, by their places, come later: whatever was installed there is
    /// thrown away, and who touches one waits. Called once, and only if guests [can wait](Self::can_wait); from then on
    /// each page is installed once.
    ///
    /// # Errors
    /// The system cannot do that.
    fn arm(&mut self, _absent: &PageBitmap) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// What becomes readable when somebody touches an absent page.
    fn touches(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Adds the pages that were touched since the last call to `touched`; never waits. Whoever touched a page that has
    /// come is woken.
    ///
    /// # Errors
    /// They cannot be had.
    fn gather(&mut self, _touched: &mut Vec<(RegionId, u64)>) -> io::Result<()> {
        Ok(())
    }

    /// All pages that are waited for are gathered once more: whoever was asked for them is gone.
    fn renew_touches(&mut self) {}

    /// How long those waited who touched absent pages.
    fn fault_times(&self) -> Option<FaultTimes> {
        None
    }

    /// Makes everything last and visible. May block as long as a disk does.
    ///
    /// # Errors
    /// It could not be made to last.
    fn finish(&mut self) -> io::Result<()>;
}
