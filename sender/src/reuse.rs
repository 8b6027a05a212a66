//! Sending on top of a base whose manifest both sides know.
//!
//! A page with the digest that it had is base and costs a share of a run. Of the others, those that the base has
//! elsewhere are stated by where they were, and the rest travels as a delta against the page that was there before,
//! where this host still has it. Pages that memory itself knows to be unchanged are not even read.

use crate::base::Base;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::frame::EntryKind;
use pagewire_protocol::limits::{BATCH_PAGES_MAX, COVER_PAGES_MAX};
use pagewire_protocol::page::{Layout, PageRange, RegionId, common_pages, fill_old};
use pagewire_protocol::tree::DigestTree;
use pagewire_store::MovedPages;
use std::ops::Range;

/// Of the pages known to be unchanged one in so many is read all the same.
const SAMPLE_EVERY: u64 = 256;
/// Changed pages before anybody looks for them elsewhere in the base.
const CHANGED_MIN: u64 = 256;
/// And the share of the pages that they must be: looking costs an index over all of the base.
const CHANGED_SHARE: u64 = 32;
/// Changed pages in a row of which none was where the shift says, after which it is believed no more: they travel whole, as
/// what lay there says nothing about them.
pub const STRAY_MAX: u64 = 512;
/// The share of a batch that has changed where much has.
const BUSY_SHARE: u64 = 8;

/// The agreed base, and what was learned of it.
#[derive(Debug)]
pub(crate) struct Reuse {
    base: Box<dyn Base>,
    /// First pages of each region that are part of it.
    held: Vec<u64>,
    /// The receiver can read all of it until the end.
    stays: bool,
    /// Changed pages may travel as deltas.
    deltas: bool,
    moved: Option<MovedPages>,
    /// The shift that fitted last, for each region, and changed pages since.
    shifts: Vec<(i64, u64)>,
    stated: u64,
    changed: u64,
    /// The last batch had changed pages: the next one is small enough to stay in a core's cache with its old bytes.
    busy: bool,
    unchanged: Option<PageBitmap>,
    sample: u64,
}

/// What of `pages` lies between the `known` parts of it.
pub(crate) fn between(pages: Range<u64>, known: &[Range<u64>]) -> impl Iterator<Item = Range<u64>> {
    let starts = std::iter::once(pages.start).chain(known.iter().map(|part| part.end));
    let ends = known.iter().map(|part| part.start).chain([pages.end]);
    starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| start..end)
}

/// How the pages of a batch are stated.
#[derive(Debug)]
pub(crate) struct Stated {
    pub(crate) kinds: Vec<EntryKind>,
    pub(crate) shift: i64,
}

impl Reuse {
    pub(crate) fn new(base: Box<dyn Base>, layout: &Layout, stays: bool, deltas: bool, seed: u64) -> Self {
        Self {
            deltas: deltas && base.has_pages(),
            held: common_pages(base.layout(), layout).unwrap_or_default(),
            base,
            stays,
            moved: None,
            shifts: vec![(0, 0); layout.regions().len()],
            stated: 0,
            changed: 0,
            busy: false,
            unchanged: None,
            sample: seed % SAMPLE_EVERY,
        }
    }

    /// The root and session that a hint of unchanged pages must be bound to.
    pub(crate) fn identity(&self) -> (Digest, [u8; 16]) {
        (self.base.root(), self.base.session())
    }

    /// Memory knows that these pages are as they were in the base.
    pub(crate) fn hint(&mut self, unchanged: Option<PageBitmap>) {
        self.unchanged = unchanged;
    }

    /// First pages of a region that the base has.
    fn held(&self, region: RegionId) -> u64 {
        self.held.get(usize::from(region.0)).copied().unwrap_or(0)
    }

    /// The parts of a range that are known, in order; what lies between them is read.
    pub(crate) fn known_parts(&self, layout: &Layout, range: PageRange) -> Vec<Range<u64>> {
        let Some(unchanged) = &self.unchanged else { return Vec::new() };
        let start = u64::from(layout.place(range.region, 0).0);
        let (first, end) = (range.first.0, range.numbers().end.min(self.held(range.region)));
        let mut parts = Vec::new();
        for run in unchanged.runs(start.saturating_add(first)..start.saturating_add(end)) {
            let mut next = run.start;
            while next < run.end {
                // One place in so many is read all the same.
                let ahead = self.sample.saturating_add(SAMPLE_EVERY).saturating_sub(next % SAMPLE_EVERY) % SAMPLE_EVERY;
                let stop = run.end.min(next.saturating_add(ahead));
                if stop > next {
                    parts.push(next.saturating_sub(start)..stop.saturating_sub(start));
                }
                next = stop.saturating_add(1);
            }
        }
        parts
    }

    /// How many pages from `first` on one frame may state where most are known: as many as it may cover, of which no more
    /// may have changed than it may look at. `None` without a hint.
    pub(crate) fn span(&self, layout: &Layout, region: RegionId, first: u64) -> Option<u64> {
        let unchanged = self.unchanged.as_ref().filter(|_| first < self.held(region))?;
        let start = u64::from(layout.place(region, 0).0);
        let mut end = self.held(region).min(first.saturating_add(u64::from(COVER_PAGES_MAX)));
        let mut changed = 0u64;
        for gap in unchanged.gaps(start.saturating_add(first)..start.saturating_add(end)) {
            changed = changed.saturating_add(gap.end.saturating_sub(gap.start));
            if let Some(over) = changed.checked_sub(BATCH_PAGES_MAX as u64) {
                end = gap.end.saturating_sub(over).saturating_sub(start);
                break;
            }
        }
        Some(end.saturating_sub(first))
    }

    /// Whether memory said that a page is unchanged.
    pub(crate) fn is_hinted(&self, layout: &Layout, region: RegionId, page: u64) -> bool {
        let place = u64::from(layout.place(region, page).0);
        self.unchanged.as_ref().is_some_and(|unchanged| unchanged.contains(place))
    }

    /// How those pages of a batch are stated that are not `known`, by their digests; `trees` still have the base's. Inline
    /// is what is left.
    pub(crate) fn classify(
        &mut self,
        range: PageRange,
        digests: &[Digest],
        known: &[Range<u64>],
        hasher: &PageHasher,
        (layout, trees): (&Layout, &[DigestTree]),
    ) -> Stated {
        let region = range.region;
        let mut kinds = vec![EntryKind::BASE; digests.len()];
        let mut changed: Vec<(u64, Digest)> = Vec::new();
        let (held, tree) = (self.held(region), trees.get(usize::from(region.0)));
        let read = between(range.numbers(), known).flatten();
        for ((page, digest), kind) in read.zip(digests).zip(&mut kinds) {
            if page < held && tree.is_some_and(|tree| tree.leaf(page) == *digest) {
                continue;
            }
            *kind = EntryKind::ZERO;
            if *digest != hasher.zero() {
                *kind = EntryKind::INLINE;
                changed.push((page, *digest));
            }
        }
        self.stated = self.stated.saturating_add(u64::from(range.count));
        self.changed = self.changed.saturating_add(changed.len() as u64);
        self.busy = changed.len() as u64 >= u64::from(range.count) / BUSY_SHARE;
        let worth = self.changed >= CHANGED_MIN && self.changed.saturating_mul(CHANGED_SHARE) >= self.stated;
        if self.stays && worth && self.moved.is_none() {
            self.moved = Some(MovedPages::new(layout, trees, &hasher.zero()));
        }
        let slot = self.shifts.get_mut(usize::from(region.0));
        let Some((shift, since)) = slot else { return Stated { kinds, shift: 0 } };
        let Some(moved) = self.moved.as_ref().filter(|_| !changed.is_empty()) else {
            return Stated { kinds, shift: *shift };
        };
        *since = since.saturating_add(changed.len() as u64);
        // Where nothing has moved for long, a page is nearest to what was at its own place.
        *shift =
            moved.better_shift(layout, region, *shift, &changed).unwrap_or(if *since > STRAY_MAX { 0 } else { *shift });
        let inline = kinds.iter_mut().filter(|kind| **kind == EntryKind::INLINE);
        for ((page, digest), kind) in changed.iter().zip(inline) {
            if moved.fits(layout, region, *page, *shift, digest) {
                *kind = EntryKind::SHIFTED;
                *since = 0;
            } else if moved.find(digest).is_some() {
                *kind = EntryKind::REFERENCE;
            }
        }
        Stated { kinds, shift: *shift }
    }

    /// Whether little has changed where the sender is: then it reads more at once.
    pub(crate) fn is_quiet(&self) -> bool {
        !self.busy
    }

    /// Whether changed pages may travel as deltas.
    pub(crate) fn has_deltas(&self) -> bool {
        self.deltas
    }

    /// Fills `space` with what runs of pages were in the base; false if not all of that is here.
    // SPEC 5.14
    pub(crate) fn old_pages(&mut self, region: RegionId, runs: &[Range<u64>], shift: i64, space: &mut [u8]) -> bool {
        let of = (shift, self.held(region));
        let filled = fill_old(runs.iter().cloned(), of, space, |first, space| self.base.read(region, first, space));
        if let Err(error) = &filled {
            self.deltas &= error.kind() == std::io::ErrorKind::NotFound;
        }
        filled.is_ok()
    }
}
