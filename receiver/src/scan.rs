//! Reads the base, region by region, and announces what is there: one digest a subtree, some of them a frame.
//!
//! One step reads one subtree (1 MiB), digests it while it is hot, and leaves its digest for the next HAVE. Of an agreed
//! base a step that a frame asks for ends with the frame and leaves out what the frame replaces: of such a page nobody
//! needs the old bytes but who has them in the base that stays, or as the prefix of a delta, and its new ones are proven.

use crate::memory::GuestSink;
use crate::page_map::PageMap;
use crate::report::Counts;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::frame::Have;
use pagewire_protocol::limits::{PAGE_BYTES, SUBTREE_BYTES, SUBTREE_PAGES};
use pagewire_protocol::page::{PageRange, RegionId};
use pagewire_protocol::page_buffer::PageBuffer;
use std::io;
use std::ops::Range;

/// Digests that wait before a HAVE goes out: few enough that the sender starts soon, enough to hide the header.
const HAVE_AFTER: usize = 16;
/// The share of the pages that frames have spoken of lately that they must have replaced for the scan to wait for them.
/// A page that was read, digested and copied for nothing costs more than one gains that is read early.
const WAIT_SHARE: u64 = 4;
/// Lately is so many pages (64 MiB) to twice as many: longer than a frame, shorter than what differs in kind.
const LATELY_PAGES: u64 = 16 << 10;

/// The progress through the base.
#[derive(Debug)]
pub(crate) struct Scan {
    held: Vec<u64>,
    /// The digests are those of a manifest that the sender knows: they are checked, not announced.
    agreed: bool,
    region: u16,
    /// The next page of the region: the first of a subtree, unless the base is agreed.
    next: u64,
    /// Pages of the base that frames have spoken of lately, and those of them that they replaced.
    stated: u64,
    replaced: u64,
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
            stated: 0,
            replaced: 0,
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
        first >= held || region.0 < self.region || (region.0 == self.region && end <= self.next)
    }

    /// Whether frames replace so much of the base that reading ahead of them would often be in vain: then the next one
    /// says first what it replaces.
    pub(crate) fn waits(&self) -> bool {
        self.agreed && self.replaced.saturating_mul(WAIT_SHARE) > self.stated
    }

    /// A frame over `range` is there, and of its pages those of the `replaced` runs are not what the base has.
    pub(crate) fn note(&mut self, range: PageRange, replaced: &[Range<u64>]) {
        if self.stated > LATELY_PAGES {
            (self.stated, self.replaced) = (self.stated / 2, self.replaced / 2);
        }
        self.stated = self.stated.saturating_add(u64::from(range.count));
        let pages = replaced.iter().map(|run| run.end.saturating_sub(run.start));
        self.replaced = pages.fold(self.replaced, u64::saturating_add);
    }

    /// The pages of the next step: up to the border of the subtree, or to the end of the frame that asks for it.
    fn next_pages(&self, frame: Option<PageRange>) -> Range<u64> {
        let region = RegionId(self.region);
        let border = (self.next / SUBTREE_PAGES as u64).saturating_add(1).saturating_mul(SUBTREE_PAGES as u64);
        let end = border.min(self.held(region));
        let frame = frame.filter(|frame| self.agreed && frame.region == region);
        self.next..frame.map_or(end, |frame| end.min(frame.numbers().end).max(self.next))
    }

    /// Reads and digests one subtree; returns a HAVE when enough of them wait, unless their digests are agreed. For a
    /// frame it goes no further than that, and leaves the runs out that the frame replaces; they are in order.
    pub(crate) fn step<S: GuestSink>(
        &mut self,
        frame: Option<(PageRange, &[Range<u64>])>,
        (map, sink): (&mut PageMap, &mut S),
        hasher: &PageHasher,
        counts: &mut Counts,
    ) -> io::Result<Option<Have>> {
        let region = RegionId(self.region);
        let frame = frame.filter(|(range, _)| self.agreed && range.region == region);
        let pages = self.next_pages(frame.map(|(range, _)| range));
        self.buffer.resize(SUBTREE_BYTES);
        let (mut filled, mut read) = (0usize, Vec::new());
        for part in spared(pages.clone(), frame.map_or(&[], |(_, replaced)| replaced)) {
            let count = usize::try_from(part.end.saturating_sub(part.start)).unwrap_or(0);
            let end = filled.saturating_add(count.saturating_mul(PAGE_BYTES));
            sink.read_base(region, part.start, self.buffer.get_mut(filled..end).unwrap_or_default())?;
            filled = end;
            read.push(part);
        }
        self.digests.clear();
        let bytes = self.buffer.get(..filled).unwrap_or_default();
        hasher.digest_nonzero(bytes.as_chunks().0, &mut self.digests);
        counts.scanned = counts.scanned.saturating_add(self.digests.len() as u64);
        let read = read.into_iter().flatten().zip(&self.digests);
        if self.agreed {
            let damaged = read.filter(|(page, digest)| !map.confirm(region, *page, digest)).count();
            counts.damaged = counts.damaged.saturating_add(damaged as u64);
        } else {
            read.for_each(|(page, digest)| map.note_base(region, page, *digest));
            self.pending.digests.push(map.subtree(region, pages.start / SUBTREE_PAGES as u64));
        }
        self.next = pages.end;
        Ok(self.announce(self.held(region)).filter(|_| !self.agreed))
    }

    fn announce(&mut self, held: u64) -> Option<Have> {
        let region_ends = self.next >= held;
        if self.pending.digests.len() < HAVE_AFTER && !region_ends {
            return None;
        }
        let first = self.next / SUBTREE_PAGES as u64;
        let have = std::mem::replace(&mut self.pending, Have { region: self.region, first, digests: Vec::new() });
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

/// What of `pages` lies outside the `replaced` runs.
fn spared(pages: Range<u64>, replaced: &[Range<u64>]) -> impl Iterator<Item = Range<u64>> {
    let (first, last) = (pages.start, pages.end);
    let clamp = move |page: u64| page.clamp(first, last);
    let starts = std::iter::once(first).chain(replaced.iter().map(move |run| clamp(run.end)));
    let ends = replaced.iter().map(move |run| clamp(run.start)).chain([last]);
    starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| start..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::domain::DedupDomain;
    use pagewire_protocol::page::{InstallSize, Layout, PageNumber, Region};
    use pagewire_protocol::tree::DigestTree;

    const PAGES: u64 = 600;

    /// A base of which page `n` is full of the byte `n % 251 + 1`, and the pages that were read from it.
    struct Watched(Vec<u64>);

    impl GuestSink for Watched {
        fn base_pages(&self, _: RegionId) -> u64 {
            PAGES
        }
        fn starts_zero(&self) -> bool {
            true
        }
        fn read_base(&mut self, _: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
            for (page, bytes) in (first..).zip(bytes.as_chunks_mut::<PAGE_BYTES>().0) {
                bytes.fill((page % 251) as u8 + 1);
                self.0.push(page);
            }
            Ok(())
        }
        fn read(&mut self, _: RegionId, _: u64, _: &mut [u8]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn install(&mut self, _: RegionId, _: u64, _: &[u8]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn zero(&mut self, _: RegionId, _: u64, _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn finish(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn frame(first: u64, count: u32) -> PageRange {
        PageRange { region: RegionId(0), first: PageNumber(first), count }
    }

    /// A scan over the base, whose manifest is right, and the map that it fills.
    fn agreed(hasher: &PageHasher) -> (Scan, PageMap) {
        let layout = Layout::new(vec![Region { bytes: PAGES * PAGE_BYTES as u64, install_size: InstallSize::KIB_4 }]);
        let mut map = PageMap::new(layout.unwrap(), hasher, 1, true).over_base(&[PAGES], true);
        let mut tree = DigestTree::new(hasher, PAGES);
        let pages: Vec<_> = (0..PAGES).map(|page| [(page % 251) as u8 + 1; PAGE_BYTES]).collect();
        let mut digests = Vec::new();
        hasher.digest_nonzero(&pages, &mut digests);
        (0..).zip(digests).for_each(|(page, digest)| tree.set(page, digest));
        let kept = pagewire_protocol::bitmap::PageBitmap::full(PAGES);
        map.claim(vec![tree], &kept, &[PAGES], false);
        (Scan::new(vec![PAGES], true), map)
    }

    #[test]
    fn what_a_frame_replaces_is_not_read_and_everything_else_is_read_once() {
        let hasher = PageHasher::new(&DedupDomain::public());
        let ((mut scan, mut map), mut sink, mut counts) = (agreed(&hasher), Watched(Vec::new()), Counts::default());
        // Frames that begin and end inside subtrees, with runs at their borders, side by side, and none.
        let frames: [(PageRange, &[Range<u64>]); 4] = [
            (frame(0, 100), &[0..3, 50..60, 60..61, 99..100]),
            (frame(100, 300), &[100..250, 250..400]),
            (frame(400, 1), &[]),
            (frame(401, 199), &[500..501, 501..600]),
        ];
        for (range, replaced) in frames {
            while !scan.is_finished() && !scan.has_read(range.region, range.first.0, range.count) {
                scan.step(Some((range, replaced)), (&mut map, &mut sink), &hasher, &mut counts).unwrap();
            }
        }
        let replaced = |page: &u64| frames.iter().any(|(_, runs)| runs.iter().any(|run| run.contains(page)));
        let expected: Vec<u64> = (0..PAGES).filter(|page| !replaced(page)).collect();
        assert_eq!(sink.0, expected);
        assert_eq!((counts.scanned, counts.damaged), (expected.len() as u64, 0));
        assert!(scan.is_finished());
        for page in 0..PAGES {
            assert_eq!(map.digest(RegionId(0), page).is_none(), replaced(&page), "page {page}");
        }
    }

    #[test]
    fn holdings_that_are_announced_are_read_whole_whatever_a_frame_says() {
        let hasher = PageHasher::new(&DedupDomain::public());
        let ((_, mut map), mut sink, mut counts) = (agreed(&hasher), Watched(Vec::new()), Counts::default());
        let mut scan = Scan::new(vec![PAGES], false);
        let runs = [0..1, 1..PAGES];
        let mut announced = 0;
        while !scan.is_finished() {
            let frame = Some((frame(0, 1), runs.as_slice()));
            let have = scan.step(frame, (&mut map, &mut sink), &hasher, &mut counts).unwrap();
            announced += have.map_or(0, |have| have.digests.len());
        }
        assert_eq!((sink.0.len() as u64, announced), (PAGES, 3));
        scan.note(frame(0, 100), &[0..99, 99..100]);
        assert!(!scan.waits());
    }

    #[test]
    fn it_waits_for_frames_while_they_replace_much() {
        let (mut scan, _) = agreed(&PageHasher::new(&DedupDomain::public()));
        assert!(!scan.waits(), "before the first it reads ahead");
        scan.note(frame(0, 100), &[]);
        scan.note(frame(100, 100), &[100..150, 150..200]);
        assert!(scan.waits());
        (0..1000).for_each(|at| scan.note(frame(200 + at * 64, 64), &[]));
        assert!(!scan.waits(), "what was long ago does not count");
    }
}
