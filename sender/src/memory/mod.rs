//! Where sent pages come from: the trait and its kinds.

mod bitmap;
mod boxed;
mod file;
mod mapped;
mod raw;

pub use bitmap::{BitmapMemory, DirtyBitmap};
pub use file::FileMemory;
pub use mapped::MappedMemory;
pub use raw::{MappedRegion, Mapping};

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::page::{Layout, RegionId};
use std::io;

/// What is known of writes to memory while it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// There must be none: [`check_unchanged`](GuestMemory::check_unchanged) says if there were.
    AtRest,
    /// Which pages were written is known to [`harvest`](GuestMemory::harvest).
    Dirty,
    /// Nothing: whoever wants to know has to read all of it again and compare.
    Unknown,
}

/// Memory of a guest that leaves.
///
/// While the guest runs, a session calls [`start_tracking`](Self::start_tracking) once, then reads all of it, and from
/// then on [`harvest`](Self::harvest) before it reads what a round sends: a page that is written while it is read is
/// dirty in the next harvest. A session that fails gives back by [`put_back`](Self::put_back) what it harvested and the
/// receiver does not have for certain, and ends with [`stop_tracking`](Self::stop_tracking).
pub trait GuestMemory: Send + 'static {
    /// The regions. Never changes.
    fn layout(&self) -> &Layout;

    /// Copies pages out. `bytes` is a whole number of pages inside the region; what lies beyond the region's end comes
    /// as zeros. A page that is written meanwhile may come as a mixture of its bytes before and after.
    ///
    /// # Errors
    /// They cannot be read, or memory is not there any more.
    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// What is known of writes to it.
    fn tracking(&self) -> Tracking {
        Tracking::AtRest
    }

    /// Starts to watch for writes, if that is not under way: a write after this call is in the next harvest.
    ///
    /// # Errors
    /// Writes cannot be watched.
    fn start_tracking(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Adds to `dirty` the pages, by their places in the image, that were written since tracking started or since the
    /// last harvest, and forgets them: take and clear. Called where [`Tracking::Dirty`] is.
    ///
    /// # Errors
    /// It cannot be told; pages may have been forgotten then, so all of them count as dirty.
    fn harvest(&mut self, _dirty: &mut PageBitmap) -> io::Result<()> {
        Ok(())
    }

    /// Undoes a harvest: these pages are dirty again for the next one, be it another session's.
    fn put_back(&mut self, _dirty: &PageBitmap) {}

    /// Writes need not be watched any more. What is dirty, or was put back, stays so for who starts again.
    fn stop_tracking(&mut self) {}

    /// Pages whose content does not matter now, such as those in a balloon: they go as zeros unless they are written
    /// later. Asked once, after tracking started.
    fn free_pages(&mut self) -> Option<PageBitmap> {
        None
    }

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
