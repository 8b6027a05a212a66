//! Reads the base, region by region, and announces what is there: one digest a subtree, some of them a frame.
//!
//! One step reads one subtree (1 MiB), digests it while it is hot, and leaves its digest for the next HAVE.

use crate::memory::GuestSink;
use crate::page_map::PageMap;
use crate::report::Counts;
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
    /// The digests are those of a manifest that the sender knows: they are checked, not announced.
    agreed: bool,
    region: u16,
    /// The next subtree of the region.
    next: u64,
    pending: Have,
    buffer: PageBuffer,
    digests: Vec<Digest>,
}

impl Scan {
    /// A scan of the first `held` pages of each region.
    pub(crate) fn new(held: Vec<u64>, agreed: bool) -> Self {
        let mut scan = Self {
            held,
            agreed,
            region: 0,
            next: 0,
            pending: Have { region: 0, first: 0, digests: Vec::new() },
            buffer: PageBuffer::default(),
            digests: Vec::new(),
        };
        scan.skip_finished();
        scan
    }

    /// A scan that takes all pages of an agreed base on trust.
    pub(crate) fn trusting(held: Vec<u64>) -> Self {
        let region = u16::try_from(held.len()).unwrap_or(u16::MAX);
        Self { region, ..Self::new(held, true) }
    }

    /// First pages of a region that are held.
    pub(crate) fn held(&self, region: RegionId) -> u64 {
        self.held.get(usize::from(region.0)).copied().unwrap_or(0)
    }

    /// Whether anything is held at all.
    pub(crate) fn holds_any(&self) -> bool {
        self.held.iter().any(|&held| held > 0)
    }

    /// Whether there is nothing left to read.
    pub(crate) fn is_finished(&self) -> bool {
        usize::from(self.region) >= self.held.len()
    }

    /// Whether all of `count` pages from `first` either are not held or have been read.
    pub(crate) fn has_read(&self, region: RegionId, first: u64, count: u32) -> bool {
        let held = self.held(region);
        let end = first.saturating_add(u64::from(count)).min(held);
        first >= held
            || region.0 < self.region
            || (region.0 == self.region && end <= self.next.saturating_mul(SUBTREE_PAGES as u64))
    }

    /// Reads and digests one subtree; returns a HAVE when enough of them wait, unless their digests are agreed.
    pub(crate) fn step<S: GuestSink>(
        &mut self,
        map: &mut PageMap,
        sink: &mut S,
        hasher: &PageHasher,
        counts: &mut Counts,
    ) -> io::Result<Option<Have>> {
        let region = RegionId(self.region);
        let held = self.held(region);
        let first = self.next.saturating_mul(SUBTREE_PAGES as u64);
        let count = usize::try_from(held.saturating_sub(first)).unwrap_or(usize::MAX).min(SUBTREE_PAGES);
        self.buffer.resize(SUBTREE_BYTES);
        let bytes = self.buffer.get_mut(..count.saturating_mul(PAGE_BYTES)).unwrap_or_default();
        sink.read_base(region, first, bytes)?;
        self.digests.clear();
        hasher.digest_nonzero(bytes.as_chunks().0, &mut self.digests);
        counts.scanned = counts.scanned.saturating_add(count as u64);
        if self.agreed {
            let damaged =
                (first..).zip(&self.digests).filter(|(page, digest)| !map.confirm(region, *page, digest)).count();
            counts.damaged = counts.damaged.saturating_add(damaged as u64);
        } else {
            (first..).zip(&self.digests).for_each(|(page, digest)| map.set(region, page, *digest));
            self.pending.digests.push(map.subtree(region, self.next));
        }
        self.next = self.next.saturating_add(1);
        Ok(self.announce(held).filter(|_| !self.agreed))
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
