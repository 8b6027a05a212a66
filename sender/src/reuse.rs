//! Sending on top of a base whose manifest both sides know.
//!
//! A page with the digest that it had is base and costs a share of a run. Of the others, those that the base has
//! elsewhere are stated by where they were, and the rest travels as a delta against the page that was there before,
//! where this host still has it. Pages that memory itself knows to be unchanged are not even read.

use crate::base::Base;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::frame::EntryKind;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, PageRange, RegionId, common_pages, shifted};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::tree::DigestTree;
use pagewire_store::MovedPages;
use std::ops::Range;

/// Of the pages known to be unchanged one in so many is read all the same.
const SAMPLE_EVERY: u64 = 256;
/// Changed pages before anybody looks for them elsewhere in the base.
const CHANGED_MIN: u64 = 256;
/// And the share of the pages that they must be: looking costs an index over all of the base.
const CHANGED_SHARE: u64 = 32;
/// The share of a batch that has changed where much has.
const BUSY_SHARE: usize = 8;

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
    /// The shift that fitted last, for each region.
    shifts: Vec<i64>,
    stated: u64,
    changed: u64,
    /// The last batch had changed pages: the next one is small enough to stay in a core's cache with its old bytes.
    busy: bool,
    unchanged: Option<PageBitmap>,
    sample: u64,
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
            shifts: vec![0; layout.regions().len()],
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

    /// The parts of a range that are read, and those that are known: neighbours alike are one part.
    pub(crate) fn parts(&self, layout: &Layout, range: PageRange) -> Vec<(Range<u64>, bool)> {
        let Some(unchanged) = &self.unchanged else { return vec![(range.numbers(), true)] };
        let mut parts: Vec<(Range<u64>, bool)> = Vec::new();
        for page in range.numbers() {
            let place = u64::from(layout.place(range.region, page).0);
            let read =
                page >= self.held(range.region) || !unchanged.contains(place) || place % SAMPLE_EVERY == self.sample;
            match parts.last_mut() {
                Some((part, same)) if *same == read => part.end = page.saturating_add(1),
                _ => parts.push((page..page.saturating_add(1), read)),
            }
        }
        parts
    }

    /// Whether memory said that a page is unchanged.
    pub(crate) fn is_hinted(&self, layout: &Layout, region: RegionId, page: u64) -> bool {
        let place = u64::from(layout.place(region, page).0);
        self.unchanged.as_ref().is_some_and(|unchanged| unchanged.contains(place))
    }

    /// How the pages of a batch with these digests are stated; `trees` still have the base's. Inline is what is left.
    pub(crate) fn classify(
        &mut self,
        range: PageRange,
        digests: &[Digest],
        hasher: &PageHasher,
        (layout, trees): (&Layout, &[DigestTree]),
    ) -> Stated {
        let region = range.region;
        let tree = trees.get(usize::from(region.0));
        let held = self.held(region);
        let kind = |(page, digest): (u64, &Digest)| match tree {
            Some(tree) if page < held && tree.leaf(page) == *digest => EntryKind::BASE,
            _ if *digest == hasher.zero() => EntryKind::ZERO,
            _ => EntryKind::INLINE,
        };
        let mut kinds: Vec<EntryKind> = range.numbers().zip(digests).map(kind).collect();
        let rest = range.numbers().zip(digests).zip(&kinds).filter(|(_, kind)| **kind == EntryKind::INLINE);
        let changed: Vec<(u64, Digest)> = rest.map(|((page, &digest), _)| (page, digest)).collect();
        self.stated = self.stated.saturating_add(u64::from(range.count));
        self.changed = self.changed.saturating_add(changed.len() as u64);
        self.busy = changed.len() >= digests.len() / BUSY_SHARE;
        let worth = self.changed >= CHANGED_MIN && self.changed.saturating_mul(CHANGED_SHARE) >= self.stated;
        if self.stays && worth && self.moved.is_none() {
            self.moved = Some(MovedPages::new(layout, trees, &hasher.zero()));
        }
        let Some(shift) = self.shifts.get_mut(usize::from(region.0)) else { return Stated { kinds, shift: 0 } };
        let Some(moved) = self.moved.as_ref().filter(|_| !changed.is_empty()) else {
            return Stated { kinds, shift: *shift };
        };
        *shift = moved.better_shift(layout, region, *shift, &changed).unwrap_or(*shift);
        for ((page, digest), kind) in range.numbers().zip(digests).zip(&mut kinds) {
            if *kind == EntryKind::INLINE {
                *kind = if moved.fits(layout, region, page, *shift, digest) {
                    EntryKind::SHIFTED
                } else if moved.find(digest).is_some() {
                    EntryKind::REFERENCE
                } else {
                    EntryKind::INLINE
                };
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

    /// What pages were in the base, one after the other, for runs of them; `None` if it cannot be read any more.
    // SPEC 5.14
    pub(crate) fn old_pages(
        &mut self,
        region: RegionId,
        runs: &[Range<u64>],
        shift: i64,
        mut buffer: PageBuffer,
    ) -> Option<PageBuffer> {
        let held = self.held(region);
        let parts: Vec<Range<u64>> = runs.iter().map(|run| shifted(run.clone(), shift, held)).collect();
        let bytes = |part: &Range<u64>| {
            usize::try_from(part.end.saturating_sub(part.start)).unwrap_or(0).saturating_mul(PAGE_BYTES)
        };
        buffer.resize(parts.iter().map(bytes).sum());
        let mut at = 0usize;
        for part in parts.iter().filter(|part| !part.is_empty()) {
            let end = at.saturating_add(bytes(part));
            if self.base.read(region, part.start, buffer.get_mut(at..end)?).is_err() {
                self.deltas = false;
                return None;
            }
            at = end;
        }
        Some(buffer)
    }
}
