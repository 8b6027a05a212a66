//! Memory of a kind that is chosen while the program runs.

use super::{GuestMemory, Tracking};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::page::{Layout, RegionId};
use std::io;

impl GuestMemory for Box<dyn GuestMemory> {
    fn layout(&self) -> &Layout {
        (**self).layout()
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        (**self).read(region, first, bytes)
    }

    fn tracking(&self) -> Tracking {
        (**self).tracking()
    }

    fn start_tracking(&mut self) -> io::Result<()> {
        (**self).start_tracking()
    }

    fn harvest(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        (**self).harvest(dirty)
    }

    fn put_back(&mut self, dirty: &PageBitmap) {
        (**self).put_back(dirty);
    }

    fn stop_tracking(&mut self) {
        (**self).stop_tracking();
    }

    fn free_pages(&mut self) -> Option<PageBitmap> {
        (**self).free_pages()
    }

    fn unchanged_since(&mut self, root: &Digest, session: &[u8; 16]) -> Option<PageBitmap> {
        (**self).unchanged_since(root, session)
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        (**self).check_unchanged()
    }
}
