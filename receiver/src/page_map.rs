//! What the receiver knows of the image: the digest of every page, which are present, and where a digest lies.
//!
//! A page is *known* when its digest is that of the bytes in memory now, *present* when the sender has stated it and
//! the statement holds. Of an agreed base the digests are known before the bytes are: such a page is *claimed* until it
//! is read. The index is built when the first reference needs it: an image without duplicates pays nothing.

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::limits::SUBTREE_PAGES;
use pagewire_protocol::page::{Layout, PageRange, Place, RegionId};
use pagewire_protocol::tree::{DigestTree, image_root};
use pagewire_store::{DigestIndex, TagIndex};
use std::ops::Range;

/// Digests and states of all pages of an image.
#[derive(Debug)]
pub struct PageMap {
    layout: Layout,
    trees: Vec<DigestTree>,
    known: PageBitmap,
    present: PageBitmap,
    /// Pages that have a digest by an agreed manifest alone.
    claimed: PageBitmap,
    index: Option<DigestIndex>,
    /// Where the base had contents that are not in the image any more, if it can still be read.
    left: Option<TagIndex>,
    /// Pages that come when the guest runs.
    absent: PageBitmap,
    seed: u64,
}

/// Where a content lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// In the image as it is.
    Image(RegionId, u64),
    /// In the base as it was; perhaps.
    Base(RegionId, u64),
}

impl PageMap {
    /// The map of an image of which nothing is known, or, if `zero`, that all of it is zero.
    pub fn new(layout: Layout, hasher: &PageHasher, seed: u64, zero: bool) -> Self {
        let trees = layout.regions().iter().map(|region| DigestTree::new(hasher, region.pages())).collect();
        let (mut known, present) = (PageBitmap::new(layout.pages()), PageBitmap::new(layout.pages()));
        if zero {
            known.insert_range(0..layout.pages());
        }
        let (claimed, absent) = (PageBitmap::new(layout.pages()), PageBitmap::new(layout.pages()));
        Self { layout, trees, known, present, claimed, index: None, left: None, absent, seed }
    }

    /// The same over a base of so many first pages of each region, which can be read until the session ends if it `stays`:
    /// then contents stay reachable when their page is overwritten.
    #[must_use]
    pub fn over_base(mut self, base: &[u64], stays: bool) -> Self {
        for (region, &pages) in (0..).map(RegionId).zip(base) {
            // What is there is unknown until it is read, even if all beyond it is zero.
            self.known.remove_range(self.places(region, 0..pages));
        }
        self.left = stays.then(|| TagIndex::new(self.seed));
        self
    }

    /// The digests of the first `held` pages of each region are those of a manifest, and those `kept` are here: they
    /// are trusted to have them, or have yet to prove it.
    pub fn claim(&mut self, trees: Vec<DigestTree>, kept: &PageBitmap, held: &[u64], trusted: bool) {
        self.trees = trees;
        let state = if trusted { &mut self.known } else { &mut self.claimed };
        for (region, &held) in (0..).map(RegionId).zip(held) {
            let first = u64::from(self.layout.place(region, 0).0);
            kept.runs(first..first.saturating_add(held)).for_each(|run| {
                state.insert_range(run);
            });
        }
    }

    /// The bytes of a page were read and have `digest`: false if another one was claimed of it.
    pub fn confirm(&mut self, region: RegionId, page: u64, digest: &Digest) -> bool {
        let place = u64::from(self.layout.place(region, page).0);
        let fits = self.tree(region).is_some_and(|tree| tree.leaf(page) == *digest);
        let claimed = self.claimed.remove(place);
        if fits {
            self.known.insert(place);
        }
        fits || !claimed
    }

    /// Appends the digests of pages: as the sender means them if the base is agreed, else as far as they are known.
    pub fn digests(&self, region: RegionId, pages: Range<u64>, out: &mut Vec<Digest>) {
        if let Some(tree) = self.tree(region) {
            tree.copy_to(pages, out);
        }
    }

    /// Whether the bytes of all these pages are known.
    pub fn knows(&self, region: RegionId, pages: Range<u64>) -> bool {
        self.known.gaps(self.places(region, pages)).next().is_none()
    }

    /// Splits pages into those whose bytes are known and the others.
    pub fn split(&self, region: RegionId, pages: Range<u64>) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        let places = self.places(region, pages.clone());
        let page = |place: u64| place.saturating_sub(places.start).saturating_add(pages.start);
        let of_pages = |run: Range<u64>| page(run.start)..page(run.end);
        let known = self.known.runs(places.clone()).map(of_pages).collect();
        (known, self.known.gaps(places.clone()).map(of_pages).collect())
    }

    fn places(&self, region: RegionId, pages: Range<u64>) -> Range<u64> {
        let first = u64::from(self.layout.place(region, pages.start).0);
        first..first.saturating_add(pages.end.saturating_sub(pages.start))
    }

    /// The regions and their digests.
    pub fn into_parts(self) -> (Layout, Vec<DigestTree>) {
        (self.layout, self.trees)
    }

    /// The regions.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The digest of a page as far as it is known.
    pub fn digest(&self, region: RegionId, page: u64) -> Option<Digest> {
        let known = self.known.contains(u64::from(self.layout.place(region, page).0));
        known.then(|| self.tree(region).map(|tree| tree.leaf(page))).flatten()
    }

    /// The bytes of a page in memory have `digest` from now on.
    pub fn set(&mut self, region: RegionId, page: u64, digest: Digest) {
        let place = self.layout.place(region, page);
        let known = self.known.contains(u64::from(place.0)) || self.claimed.remove(u64::from(place.0));
        if let Some(left) = self.left.as_mut().filter(|_| known && !self.present.contains(u64::from(place.0))) {
            let old = digest_at(&self.layout, &self.trees, place);
            if old != digest {
                left.insert(&old, place);
            }
        }
        if let Some(index) = &mut self.index {
            if known {
                index.remove(&digest_at(&self.layout, &self.trees, place), place);
            }
            if let Some(tree) = self.trees.get_mut(usize::from(region.0)) {
                tree.set(page, digest);
            }
            index.insert(&digest, place, |place| digest_at(&self.layout, &self.trees, place));
        } else if let Some(tree) = self.trees.get_mut(usize::from(region.0)) {
            tree.set(page, digest);
        }
        self.known.insert(u64::from(place.0));
    }

    /// A page of the base was read and has `digest`. One that was left at the sender before stays so, and what the base
    /// has there can be found.
    pub fn note_base(&mut self, region: RegionId, page: u64, digest: Digest) {
        let place = self.layout.place(region, page);
        if !self.absent.contains(u64::from(place.0)) {
            return self.set(region, page, digest);
        }
        if let Some(left) = &mut self.left {
            left.insert(&digest, place);
        }
    }

    /// What is in memory at a page is not known any more.
    pub fn forget(&mut self, region: RegionId, page: u64) {
        let place = self.layout.place(region, page);
        if let Some(index) = &mut self.index {
            index.remove(&digest_at(&self.layout, &self.trees, place), place);
        }
        self.known.remove(u64::from(place.0));
        self.claimed.remove(u64::from(place.0));
    }

    /// The pages are as the sender means them; says how many were not before.
    pub fn mark_present(&mut self, region: RegionId, pages: Range<u64>) -> u64 {
        self.present.insert_range(self.places(region, pages))
    }

    /// The page was stated anew and is not there yet.
    pub fn mark_absent(&mut self, region: RegionId, page: u64) -> bool {
        self.present.remove(u64::from(self.layout.place(region, page).0))
    }

    /// The page comes when the guest runs; what the base had there stays reachable if the base does.
    pub fn leave(&mut self, region: RegionId, pages: Range<u64>) {
        let reachable = if self.left.is_some() || self.index.is_some() { pages.clone() } else { 0..0 };
        for page in reachable {
            let place = self.layout.place(region, page);
            let old = digest_at(&self.layout, &self.trees, place);
            let at = u64::from(place.0);
            let known = self.known.contains(at) || self.claimed.contains(at);
            if let Some(left) = self.left.as_mut().filter(|_| known && !self.present.contains(u64::from(place.0))) {
                left.insert(&old, place);
            }
            if let Some(index) = self.index.as_mut().filter(|_| known) {
                index.remove(&old, place);
            }
        }
        let places = self.places(region, pages.clone());
        if let Some(tree) = self.trees.get_mut(usize::from(region.0)) {
            tree.set_absent(pages);
        }
        self.known.remove_range(places.clone());
        self.claimed.remove_range(places.clone());
        self.present.remove_range(places.clone());
        self.absent.insert_range(places);
    }

    /// The pages are stated: they are absent no more.
    pub fn unleave(&mut self, region: RegionId, pages: Range<u64>) {
        if self.absent.count() > 0 {
            let places = self.places(region, pages);
            self.absent.remove_range(places);
        }
    }

    /// Pages that come when the guest runs.
    pub fn absent(&self) -> &PageBitmap {
        &self.absent
    }

    /// A page has come while the guest runs, which may write to it from now on: its digest is what it was.
    pub fn arrive(&mut self, region: RegionId, page: u64, digest: Digest) {
        let place = u64::from(self.layout.place(region, page).0);
        if let Some(tree) = self.trees.get_mut(usize::from(region.0)) {
            tree.set(page, digest);
        }
        self.absent.remove(place);
        self.present.insert(place);
    }

    /// Whether the page is as the sender means it.
    pub fn is_present(&self, region: RegionId, page: u64) -> bool {
        self.present.contains(u64::from(self.layout.place(region, page).0))
    }

    /// A page whose content has `digest`: of the image as it is now, else of the base as it was.
    pub fn find(&mut self, digest: &Digest) -> Option<Found> {
        let (layout, trees, claimed) = (&self.layout, &self.trees, &self.claimed);
        let of = |place| digest_at(layout, trees, place);
        let index = self.index.get_or_insert_with(|| {
            let mut index = DigestIndex::new(self.seed);
            index.reserve(usize::try_from(self.known.count()).unwrap_or(0).min(INDEX_START_MAX), of);
            for place in self.known.runs(0..layout.pages()).chain(claimed.runs(0..layout.pages())).flatten() {
                let place = Place(u32::try_from(place).unwrap_or(u32::MAX));
                index.insert(&of(place), place, of);
            }
            index
        });
        let found = index.find(digest, of);
        let (place, here) = match found {
            Some(place) => (place, !claimed.contains(u64::from(place.0))),
            None => (self.left.as_ref()?.find(digest)?, false),
        };
        let (region, page) = layout.locate(place);
        Some(if here || self.left.is_none() { Found::Image(region, page.0) } else { Found::Base(region, page.0) })
    }

    /// Where the image has the content `digest` now.
    pub fn place_of(&mut self, digest: &Digest) -> Option<Place> {
        match self.find(digest)? {
            Found::Image(region, page) => Some(self.layout.place(region, page)),
            Found::Base(..) => None,
        }
    }

    /// These pages were stated: nodes over whole subtrees are hashed while others wait, not when all wait for the root.
    pub fn note_stated(&mut self, range: PageRange) {
        let Some(tree) = self.trees.get_mut(usize::from(range.region.0)) else { return };
        let pages = range.numbers();
        tree.hash_subtrees(pages.start / SUBTREE_PAGES as u64..pages.end / SUBTREE_PAGES as u64);
    }

    /// Hashes up to `most` of those nodes that are left in each region; says whether there were any.
    pub fn hash_some(&mut self, most: u64) -> bool {
        self.trees.iter_mut().any(|tree| tree.hash_some(most) > 0)
    }

    /// The digest over the first pages of a subtree as they are known.
    pub fn subtree(&mut self, region: RegionId, index: u64) -> Digest {
        self.trees.get_mut(usize::from(region.0)).map(|tree| tree.subtree(index)).unwrap_or_default()
    }

    /// Pages that are as the sender means them.
    pub fn present_pages(&self) -> u64 {
        self.present.count()
    }

    /// The root over the whole image.
    pub fn root(&mut self, hasher: &PageHasher) -> Digest {
        image_root(hasher.domain(), &self.layout, &mut self.trees)
    }

    fn tree(&self, region: RegionId) -> Option<&DigestTree> {
        self.trees.get(usize::from(region.0))
    }
}

/// Entries the index starts with at most (64 MiB of them): a sparse image must not cost what a full one does.
const INDEX_START_MAX: usize = 16 << 20;

fn digest_at(layout: &Layout, trees: &[DigestTree], place: Place) -> Digest {
    let (region, page) = layout.locate(place);
    trees.get(usize::from(region.0)).map(|tree| tree.leaf(page.0)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::digest::page_digest;
    use pagewire_protocol::domain::DedupDomain;
    use pagewire_protocol::page::{InstallSize, Region};

    /// SPEC 13.2
    #[test]
    fn a_base_that_is_read_behind_what_was_left_is_found_and_is_not_the_guests() {
        const MAIN: RegionId = RegionId(0);
        let hasher = PageHasher::new(&DedupDomain::public());
        let layout = Layout::new(vec![Region { bytes: 8 * 4096, install_size: InstallSize::KIB_4 }]).unwrap();
        let digest = |byte: u8| page_digest(hasher.domain(), &[byte; 4096]);
        let mut map = PageMap::new(layout, &hasher, 7, true).over_base(&[8], true);
        map.note_base(MAIN, 0, digest(1));
        map.leave(MAIN, 0..4);
        map.note_base(MAIN, 1, digest(2));
        map.note_base(MAIN, 6, digest(3));
        assert_eq!(
            [1, 2, 4].map(|byte| map.find(&digest(byte))),
            [Some(Found::Base(MAIN, 0)), Some(Found::Base(MAIN, 1)), None]
        );
        assert_eq!((map.digest(MAIN, 1), map.digest(MAIN, 6)), (None, Some(digest(3))));
        map.leave(MAIN, 4..8);
        let mut all = PageMap::new(map.layout().clone(), &hasher, 7, true);
        all.leave(MAIN, 0..8);
        assert_eq!((map.root(&hasher), map.absent().count()), (all.root(&hasher), 8));
    }
}
