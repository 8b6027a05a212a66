//! Reads the base, region by region, and announces what is there: one digest a subtree, some of them a frame.
//!
//! One step reads one subtree (1 MiB), digests it while it is hot, and leaves its digest for the next HAVE.

use crate::memory::GuestSink;
use crate::page_map::PageMap;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::frame::Have;
use pagewire_protocol::limits::{PAGE_BYTES, SUBTREE_BYTES, SUBTREE_PAGES};
use pagewire_protocol::page::RegionId;
use pagewire_protocol::page_buffer::PageBuffer;
use std::io;

/// Digests that wait before a HAVE goes out: few enough that the sender starts soon, enough to hide the header.
const HAVE_AFTER: usize = 16;

/// The progress through the base.
#[derive(Debug)]
pub(crate) struct Scan {
    held: Vec<u64>,
    region: u16,
    /// The next subtree of the region.
    next: u64,
    pending: Have,
    buffer: PageBuffer,
    digests: Vec<Digest>,
}

impl Scan {
    /// A scan of the first `held` pages of each region.
    pub(crate) fn new(held: Vec<u64>) -> Self {
        let mut scan = Self {
            held,
            region: 0,
            next: 0,
            pending: Have { region: 0, first: 0, digests: Vec::new() },
            buffer: PageBuffer::default(),
            digests: Vec::new(),
        };
        scan.skip_finished();
        scan
    }

    /// Whether there is nothing left to read.
    pub(crate) fn is_finished(&self) -> bool {
        usize::from(self.region) >= self.held.len()
    }

    /// Whether all of `count` pages from `first` either are not held or have been announced.
    pub(crate) fn has_announced(&self, region: RegionId, first: u64, count: u32) -> bool {
        let held = self.held.get(usize::from(region.0)).copied().unwrap_or(0);
        let end = first.saturating_add(u64::from(count)).min(held);
        first >= held
            || region.0 < self.region
            || (region.0 == self.region && end <= self.next.saturating_mul(SUBTREE_PAGES as u64))
    }

    /// Whether a page is held at all.
    pub(crate) fn is_held(&self, region: RegionId, page: u64) -> bool {
        self.held.get(usize::from(region.0)).is_some_and(|&held| page < held)
    }

    /// Reads and digests one subtree; returns a HAVE when enough of them wait.
    pub(crate) fn step<S: GuestSink>(
        &mut self,
        map: &mut PageMap,
        sink: &mut S,
        hasher: &PageHasher,
    ) -> io::Result<Option<Have>> {
        let region = RegionId(self.region);
        let held = self.held.get(usize::from(self.region)).copied().unwrap_or(0);
        let first = self.next.saturating_mul(SUBTREE_PAGES as u64);
        let count = usize::try_from(held.saturating_sub(first)).unwrap_or(usize::MAX).min(SUBTREE_PAGES);
        self.buffer.resize(SUBTREE_BYTES);
        let bytes = self.buffer.get_mut(..count.saturating_mul(PAGE_BYTES)).unwrap_or_default();
        sink.read_base(region, first, bytes)?;
        self.digests.clear();
        hasher.digest_nonzero(bytes.as_chunks().0, &mut self.digests);
        (first..).zip(&self.digests).for_each(|(page, digest)| map.set(region, page, *digest));
        self.pending.digests.push(map.subtree(region, self.next));
        self.next = self.next.saturating_add(1);
        Ok(self.announce(held))
    }

    fn announce(&mut self, held: u64) -> Option<Have> {
        let region_ends = self.next.saturating_mul(SUBTREE_PAGES as u64) >= held;
        if self.pending.digests.len() < HAVE_AFTER && !region_ends {
            return None;
        }
        let have =
            std::mem::replace(&mut self.pending, Have { region: self.region, first: self.next, digests: Vec::new() });
        if region_ends {
            self.region = self.region.saturating_add(1);
            self.next = 0;
            self.skip_finished();
            self.pending.first = 0;
        }
        Some(have)
    }

    fn skip_finished(&mut self) {
        while self.held.get(usize::from(self.region)).is_some_and(|&held| held == 0) {
            self.region = self.region.saturating_add(1);
        }
        self.pending.region = self.region;
        if self.is_finished() {
            self.buffer = PageBuffer::default();
        }
    }
}
