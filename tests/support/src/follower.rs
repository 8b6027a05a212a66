//! A transport without a wire: what a session does to memory that is written meanwhile, and the image that comes of it.
//!
//! The writer it is made for increments one byte in each page, page after page, round after round. Whenever it is
//! stopped, the bytes in the order of the pages step down by one in one place at most. A page whose write was missed is
//! a step more, so the check needs no second look at the memory.

use crate::image::Image;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, PageNumber, Place};
use pagewire_sender::{GuestMemory, Tracking};
use std::io;
use std::ops::Range;

/// How much is read at once.
const READ_PAGES: u64 = 64;

/// An image that follows guest memory by its harvests.
#[derive(Clone, Debug)]
pub struct Follower {
    /// What was copied.
    pub image: Image,
}

impl Follower {
    /// Starts tracking and copies everything.
    ///
    /// # Errors
    /// The memory's.
    pub fn start<M: GuestMemory>(memory: &mut M) -> io::Result<Self> {
        memory.start_tracking()?;
        let mut follower = Self { image: Image::zeros(memory.layout().regions().to_vec()) };
        follower.copy(memory, &PageBitmap::full(memory.layout().pages()))?;
        Ok(follower)
    }

    /// Harvests, and copies what is dirty; returns it. Where nothing is known of writes, all is read and compared.
    ///
    /// # Errors
    /// The memory's.
    pub fn round<M: GuestMemory>(&mut self, memory: &mut M) -> io::Result<PageBitmap> {
        let mut dirty = PageBitmap::new(memory.layout().pages());
        if memory.tracking() == Tracking::Unknown {
            let before = std::mem::replace(self, Self::start(memory)?);
            let changed = |place: &u64| before.page(memory.layout(), *place) != self.page(memory.layout(), *place);
            (0..dirty.len()).filter(changed).for_each(|place| _ = dirty.insert(place));
        } else {
            memory.harvest(&mut dirty)?;
            self.copy(memory, &dirty)?;
        }
        Ok(dirty)
    }

    /// Checks that it holds what `memory` does, which nobody writes any more.
    ///
    /// # Panics
    /// It differs, or cannot be read.
    pub fn check<M: GuestMemory>(&self, memory: &mut M) {
        let now = Self::start(memory).unwrap();
        let stale = 0..memory.layout().pages();
        let stale = stale.filter(|&place| now.page(memory.layout(), place) != self.page(memory.layout(), place));
        assert_eq!(stale.collect::<Vec<_>>(), [], "places whose last write was missed");
    }

    fn page(&self, layout: &Layout, place: u64) -> &[u8] {
        let (region, page) = layout.locate(Place(place as u32));
        self.image.page(usize::from(region.0), page.0)
    }

    /// Copies pages.
    ///
    /// # Errors
    /// The memory's.
    pub fn copy<M: GuestMemory>(&mut self, memory: &mut M, pages: &PageBitmap) -> io::Result<()> {
        let layout = memory.layout().clone();
        for (run, place) in pages.runs(0..pages.len()).flat_map(|run| parts(run, &layout)) {
            let (region, PageNumber(first)) = layout.locate(place);
            let start = first as usize * PAGE_BYTES;
            let bytes = &mut self.image.bytes[usize::from(region.0)][start..][..run as usize * PAGE_BYTES];
            memory.read(region, first, bytes)?;
        }
        Ok(())
    }
}

/// Cuts a run of places into reads inside one region: how many pages from which place.
fn parts(run: Range<u64>, layout: &Layout) -> Vec<(u64, Place)> {
    let (mut next, mut found) = (run.start, Vec::new());
    while next < run.end {
        let place = Place(next as u32);
        let (region, PageNumber(first)) = layout.locate(place);
        let left = layout.region(region).unwrap().pages() - first;
        let count = left.min(run.end - next).min(READ_PAGES);
        found.push((count, place));
        next += count;
    }
    found
}

/// Checks that the bytes at `offset` of all pages could be those of a writer that increments them in order.
///
/// # Panics
/// A page misses a write.
pub fn check_one_edge(image: &Image, offset: usize) {
    let pages = image.bytes.iter().flat_map(|bytes| bytes.chunks(PAGE_BYTES));
    let values: Vec<u8> = pages.map(|page| page[offset]).collect();
    let steps: Vec<usize> = (1..values.len()).filter(|&page| values[page] != values[page - 1]).collect();
    let shown: Vec<_> = steps.iter().take(8).map(|&page| (page, values[page - 1], values[page])).collect();
    assert!(steps.len() <= 1, "{} edges, the first (page, before, after): {shown:?}", steps.len());
    for page in steps {
        assert_eq!(values[page - 1], values[page].wrapping_add(1), "the edge at page {page} is no single step down");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Mix;
    use crate::rng::Rng;

    fn image(values: &[u8]) -> Image {
        let mut image = Image::random(values.len() as u64, Mix::NOISE, &mut Rng::new(1));
        values.iter().zip(0..).for_each(|(&value, page)| image.page_mut(0, page)[5] = value);
        image
    }

    #[test]
    fn accepts_one_step_down_at_most() {
        for values in [&[7, 7, 7, 7][..], &[8, 8, 7, 7], &[0, 255, 255], &[1], &[]] {
            check_one_edge(&image(values), 5);
        }
    }

    #[test]
    fn rejects_a_page_that_missed_a_write() {
        for values in [&[8, 7, 8, 7][..], &[7, 8], &[9, 7], &[8, 8, 7, 8], &[9, 8, 7]] {
            assert!(std::panic::catch_unwind(|| check_one_edge(&image(values), 5)).is_err(), "{values:?}");
        }
    }
}
