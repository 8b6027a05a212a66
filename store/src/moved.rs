//! Where the contents of an agreed base lay, for pages that have moved.
//!
//! Memory moves in large pieces: what allocators, loaders and interpreters leave behind comes back some pages further.
//! So the shift that fitted last is tried first, and the table is asked where it does not fit. Both know 32 bits of a
//! digest: a guess, which the receiver checks.

use hashbrown::HashTable;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::page::{Layout, Place, RegionId};
use pagewire_protocol::tree::DigestTree;

/// Votes counted for a new shift in one batch.
const VOTES_MAX: usize = 16;
/// Pages of a batch that a new shift must fit. One is chance: with a base of 85 thousand pages and half as many changed
/// ones, 32 bits are equal by accident in every second session; and one page that moved says nothing of its neighbours.
const FITS_MIN: usize = 2;

/// The contents of a base by 32 bits of their digests; nine bytes a page.
#[derive(Debug)]
pub struct MovedPages {
    tags: Vec<u32>,
    table: HashTable<u32>,
    zero: u32,
}

impl MovedPages {
    /// Looks at all pages of a base.
    pub fn new(layout: &Layout, trees: &[DigestTree], zero: &Digest) -> Self {
        let zero = tag(zero);
        let leaves = layout.regions().iter().zip(trees);
        let tags: Vec<u32> =
            leaves.flat_map(|(region, tree)| (0..region.pages()).map(|page| tag(&tree.leaf(page)))).collect();
        let mut table = HashTable::with_capacity(tags.iter().filter(|&&tag| tag != zero).count());
        let of = |place: &u32| tags.get(usize::try_from(*place).unwrap_or(usize::MAX)).copied().unwrap_or(0);
        for (place, &tag) in (0u32..).zip(&tags).filter(|&(_, &tag)| tag != zero) {
            table.entry(spread(tag), |known| of(known) == tag, |known| spread(of(known))).or_insert(place);
        }
        Self { tags, table, zero }
    }

    /// Whether the base has `digest` at `place`.
    pub fn is_at(&self, place: u64, digest: &Digest) -> bool {
        let known = usize::try_from(place).ok().and_then(|place| self.tags.get(place));
        known.is_some_and(|&known| known == tag(digest) && known != self.zero)
    }

    /// A place where the base has `digest`.
    pub fn find(&self, digest: &Digest) -> Option<Place> {
        let wanted = tag(digest);
        let of = |place: &u32| self.tags.get(usize::try_from(*place).unwrap_or(usize::MAX)).copied();
        self.table.find(spread(wanted), |known| of(known) == Some(wanted)).map(|&place| Place(place))
    }

    /// The shift that most of `changed` pages of a region have, if it is another than `known` and fits better; it fits two
    /// pages at least.
    pub fn better_shift(
        &self,
        layout: &Layout,
        region: RegionId,
        known: i64,
        changed: &[(u64, Digest)],
    ) -> Option<i64> {
        let hits = |shift: i64| {
            changed.iter().filter(|(page, digest)| self.fits(layout, region, *page, shift, digest)).count()
        };
        let fits = hits(known);
        let mut votes: Vec<(i64, usize)> = Vec::new();
        let strangers = changed.iter().filter(|(page, digest)| !self.fits(layout, region, *page, known, digest));
        for (page, digest) in strangers.take(VOTES_MAX) {
            let Some(place) = self.find(digest) else { continue };
            let (from, number) = layout.locate(place);
            let shift = i64::try_from(i128::from(number.0).saturating_sub(i128::from(*page))).ok();
            let Some(shift) = shift.filter(|_| from == region) else { continue };
            match votes.iter_mut().find(|(known, _)| *known == shift) {
                Some((_, count)) => *count = count.saturating_add(1),
                None => votes.push((shift, 1)),
            }
        }
        let best = votes.into_iter().max_by_key(|(_, count)| *count)?.0;
        (hits(best) > fits.max(FITS_MIN - 1)).then_some(best)
    }

    /// Whether the base has `digest` at a page of the region and `shift` pages further.
    pub fn fits(&self, layout: &Layout, region: RegionId, page: u64, shift: i64, digest: &Digest) -> bool {
        let Some(from) = page.checked_add_signed(shift) else { return false };
        let pages = layout.region(region).map_or(0, |region| region.pages());
        from < pages && self.is_at(u64::from(layout.place(region, from).0), digest)
    }
}

fn tag(digest: &Digest) -> u32 {
    digest.0.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// A tag over all 64 bits that the table looks at. Digests are keyed: nobody without the key can aim at a bucket.
fn spread(tag: u32) -> u64 {
    u64::from(tag).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::digest::{PageHasher, page_digest};
    use pagewire_protocol::domain::DedupDomain;
    use pagewire_protocol::page::{InstallSize, Region};

    #[test]
    fn finds_the_shift_of_a_piece_that_moved() {
        let hasher = PageHasher::new(&DedupDomain::public());
        let layout = Layout::new(vec![Region { bytes: 600 * 4096, install_size: InstallSize::KIB_4 }]).unwrap();
        let digest =
            |content: u64| page_digest(hasher.domain(), &std::array::from_fn(|at| content.to_le_bytes()[at % 8]));
        let mut tree = DigestTree::new(&hasher, 600);
        (0..600).for_each(|page| tree.set(page, digest(page + 1)));
        let moved = MovedPages::new(&layout, std::slice::from_ref(&tree), &hasher.zero());
        let changed: Vec<(u64, Digest)> = (100..200).map(|page| (page, digest(page + 1 - 37))).collect();
        assert_eq!(moved.better_shift(&layout, RegionId(0), 0, &changed), Some(-37));
        assert_eq!(moved.better_shift(&layout, RegionId(0), -37, &changed), None);
        assert!(changed.iter().all(|(page, digest)| moved.fits(&layout, RegionId(0), *page, -37, digest)));
        assert!(!moved.fits(&layout, RegionId(0), 3, -37, &digest(1)), "before the region");
        assert_eq!(moved.find(&digest(5000)), None);
        let one_moved: Vec<(u64, Digest)> =
            (100..200).map(|page| (page, digest(if page == 150 { 7 } else { 5000 + page }))).collect();
        assert_eq!(moved.better_shift(&layout, RegionId(0), 0, &one_moved), None, "one page may fit by accident");
    }
}
