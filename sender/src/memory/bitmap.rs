//! A dirty bitmap that the embedder fills, and memory that is tracked by one.
//!
//! A VMM that knows itself which pages were written (from its own log, its device models, a dirty ring it drains) marks
//! them in a [`DirtyBitmap`]; [`BitmapMemory`] reads from any other memory and harvests from that bitmap. Marking is one
//! atomic instruction for each 64 pages, takes no lock and never waits.

use super::{GuestMemory, Tracking};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::page::{Layout, RegionId};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Which pages of an image were written: any thread marks, the session takes. Clones are handles of the same bitmap.
///
/// The order is *write, then mark*: a mark that is taken before the write could let the page be read too early. Marks
/// are releases and taking acquires, so who takes a mark sees the write before it. A mark is always carried out, even
/// where the bit seems to be set: a look before it could be overtaken by a harvest that the write itself was not in.
#[derive(Clone, Debug)]
pub struct DirtyBitmap {
    words: Arc<[AtomicU64]>,
    pages: u64,
}

impl DirtyBitmap {
    /// A bitmap over the pages of `layout`, by their places, with no mark.
    pub fn new(layout: &Layout) -> Self {
        let words = (0..layout.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, pages: layout.pages() }
    }

    /// Marks pages that have just been written. Places beyond the image are none.
    pub fn mark(&self, places: Range<u64>) {
        let (mut place, end) = (places.start, places.end.min(self.pages));
        while place < end {
            let next = end.min((place / 64).saturating_add(1).saturating_mul(64));
            let count = next.saturating_sub(place);
            let mask = (u64::MAX >> 64u64.saturating_sub(count)) << (place % 64);
            if let Some(word) = usize::try_from(place / 64).ok().and_then(|at| self.words.get(at)) {
                word.fetch_or(mask, Ordering::Release);
            }
            place = next;
        }
    }

    /// Marks every page: nobody knows which were written.
    pub fn mark_all(&self) {
        self.mark(0..self.pages);
    }

    /// Marks all of `dirty`, so that the next to take has them.
    pub fn put_back(&self, dirty: &PageBitmap) {
        dirty.runs(0..self.pages).for_each(|run| self.mark(run));
    }

    /// Moves all marks into `dirty`. Each mark comes out once, whoever marks meanwhile.
    pub fn take(&self, dirty: &mut PageBitmap) {
        for (word, first) in self.words.iter().zip((0..).step_by(64)) {
            // A look is enough here: a mark that this load does not see yet is one for the next harvest.
            if word.load(Ordering::Relaxed) != 0 {
                dirty.insert_bits(first, word.swap(0, Ordering::Acquire));
            }
        }
    }
}

/// Memory `M` whose writes its embedder marks in a [`DirtyBitmap`].
///
/// `M` gives regions and bytes; what it may know of writes itself is not asked for. Marks count from the beginning of
/// the bitmap on, whether a session is there or not.
#[derive(Debug)]
pub struct BitmapMemory<M> {
    memory: M,
    dirty: DirtyBitmap,
}

impl<M: GuestMemory> BitmapMemory<M> {
    /// Memory with a bitmap of its own: [`dirty`](Self::dirty) gives the handle to mark.
    pub fn new(memory: M) -> Self {
        let dirty = DirtyBitmap::new(memory.layout());
        Self { memory, dirty }
    }

    /// Memory over a bitmap that was there before, for another attempt: what an earlier session put back is in it.
    ///
    /// # Errors
    /// The bitmap has not as many pages as the memory.
    pub fn over(memory: M, dirty: DirtyBitmap) -> io::Result<Self> {
        if dirty.pages != memory.layout().pages() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the bitmap is not of this memory"));
        }
        Ok(Self { memory, dirty })
    }

    /// A handle to mark written pages with.
    pub fn dirty(&self) -> DirtyBitmap {
        self.dirty.clone()
    }
}

impl<M: GuestMemory> GuestMemory for BitmapMemory<M> {
    fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.memory.read(region, first, bytes)
    }

    fn tracking(&self) -> Tracking {
        Tracking::Dirty
    }

    fn harvest(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        self.dirty.take(dirty);
        Ok(())
    }

    fn put_back(&mut self, dirty: &PageBitmap) {
        self.dirty.put_back(dirty);
    }

    fn free_pages(&mut self) -> Option<PageBitmap> {
        self.memory.free_pages()
    }

    fn unchanged_since(&mut self, root: &Digest, session: &[u8; 16]) -> Option<PageBitmap> {
        self.memory.unchanged_since(root, session)
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::page::{InstallSize, Region};

    fn bitmap(pages: u64) -> DirtyBitmap {
        let region = Region { bytes: pages * 4096, install_size: InstallSize::KIB_4 };
        DirtyBitmap::new(&Layout::new(vec![region]).unwrap())
    }

    #[test]
    fn takes_each_mark_once_and_what_was_put_back_again() {
        for pages in [1, 63, 64, 65, 200] {
            let dirty = bitmap(pages);
            let mut expected = PageBitmap::new(pages);
            for run in [0..1, 5..6, 62..66, 60..130, 199..300, 7..7, 300..u64::MAX] {
                dirty.mark(run.clone());
                expected.insert_range(run);
            }
            let mut taken = PageBitmap::new(pages);
            dirty.take(&mut taken);
            assert_eq!(taken, expected);
            let mut again = PageBitmap::new(pages);
            dirty.take(&mut again);
            assert_eq!(again.count(), 0);
            dirty.put_back(&taken);
            dirty.take(&mut again);
            assert_eq!(again, expected);
        }
    }

    #[test]
    fn rejects_a_bitmap_of_another_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, [1; 3 * 4096]).unwrap();
        let open = || crate::memory::FileMemory::open_live(&path, InstallSize::KIB_4).unwrap();
        assert!(BitmapMemory::over(open(), bitmap(2)).is_err() && BitmapMemory::over(open(), bitmap(4)).is_err());
        let dirty = bitmap(3);
        let mut memory = BitmapMemory::over(open(), dirty.clone()).unwrap();
        dirty.mark(1..2);
        let mut taken = PageBitmap::new(3);
        memory.harvest(&mut taken).unwrap();
        assert!(taken.contains(1) && taken.count() == 1);
    }

    #[test]
    fn marking_all_marks_every_page_and_no_other() {
        let dirty = bitmap(130);
        dirty.mark_all();
        let mut taken = PageBitmap::new(130);
        dirty.take(&mut taken);
        assert_eq!(taken, PageBitmap::full(130));
    }

    #[test]
    fn a_bitmap_outlives_the_memory_that_a_session_took() {
        let mapping = std::sync::Arc::new(crate::memory::Mapping::private(3 * 4096).unwrap());
        let memory = || {
            let region = crate::memory::MappedRegion::of(mapping.clone(), InstallSize::KIB_4);
            crate::memory::MappedMemory::new(vec![region]).unwrap()
        };
        let mut first = BitmapMemory::new(memory());
        let dirty = first.dirty();
        dirty.mark(1..2);
        let mut taken = PageBitmap::new(3);
        first.harvest(&mut taken).unwrap();
        first.put_back(&taken);
        drop(first);
        let mut again = PageBitmap::new(3);
        BitmapMemory::over(memory(), dirty).unwrap().harvest(&mut again).unwrap();
        assert_eq!(again, taken);
        assert!(BitmapMemory::over(memory(), bitmap(4)).is_err());
    }
}
