//! Digest to place: which page of an image has a given content.
//!
//! Four bytes an entry in an open-addressed table; digests themselves stay in the trees, and a hit is compared in full.
//! Guests choose page contents, so the table's hash is seeded at random and nobody outside can aim at one bucket.

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::page::Place;

/// Finds pages by content.
#[derive(Debug)]
pub struct DigestIndex {
    table: HashTable<u32>,
    seed: u64,
}

impl DigestIndex {
    /// An empty index; `seed` must be random.
    pub fn new(seed: u64) -> Self {
        Self { table: HashTable::new(), seed }
    }

    /// Makes room for `pages` pages in all, so that growing does not hold two tables at once.
    pub fn reserve(&mut self, pages: usize, digest_of: impl Fn(Place) -> Digest) {
        let seed = self.seed;
        let more = pages.saturating_sub(self.table.len());
        self.table.reserve(more, |&place| fold(seed, &digest_of(Place(place))));
    }

    /// A page whose digest is `digest` now.
    pub fn find(&self, digest: &Digest, digest_of: impl Fn(Place) -> Digest) -> Option<Place> {
        let found = self.table.find(fold(self.seed, digest), |&place| digest_of(Place(place)) == *digest);
        found.map(|&place| Place(place))
    }

    /// Has the processor fetch where these digests lie, before they are looked for: side by side, and not each when the one
    /// before it is done with. Of a large index none is in cache, and remembering a page takes a third of the time.
    pub fn fetch(&self, digests: &[Digest]) {
        // No page has the last number, but only who looks knows that none is found.
        let none = |&place: &u32| place == u32::MAX;
        let found = digests.iter().filter(|digest| self.table.find(fold(self.seed, digest), none).is_some()).count();
        std::hint::black_box(found);
    }

    /// Remembers that `place` has `digest`, unless a page with it is known; returns the one that is.
    pub fn insert(&mut self, digest: &Digest, place: Place, digest_of: impl Fn(Place) -> Digest) -> Option<Place> {
        self.insert_hashed(fold(self.seed, digest), place, |known| digest_of(known) == *digest, &digest_of)
    }

    /// Forgets that `place` has `digest`. Must be called before the page's digest changes.
    pub fn remove(&mut self, digest: &Digest, place: Place) {
        if let Ok(entry) = self.table.find_entry(fold(self.seed, digest), |&known| known == place.0) {
            entry.remove();
        }
    }

    /// What selects a digest's bucket, for [`insert_hashed`](Self::insert_hashed).
    pub(crate) fn hash(&self, digest: &Digest) -> u64 {
        fold(self.seed, digest)
    }

    /// Sorts hashes by bucket: inserting many in this order walks through memory instead of jumping.
    pub(crate) fn sort(&self, order: &mut [(u64, u32)]) {
        let mask = (self.table.num_buckets() as u64).saturating_sub(1);
        order.sort_unstable_by_key(|(hash, _)| hash & mask);
    }

    /// As [`insert`](Self::insert), by a digest's hash, for who can tell `same` without reading digests.
    pub(crate) fn insert_hashed(
        &mut self,
        hash: u64,
        place: Place,
        same: impl Fn(Place) -> bool,
        digest_of: impl Fn(Place) -> Digest,
    ) -> Option<Place> {
        let seed = self.seed;
        match self.table.entry(hash, |&known| same(Place(known)), |&known| fold(seed, &digest_of(Place(known)))) {
            Entry::Occupied(known) => Some(Place(*known.get())),
            Entry::Vacant(free) => {
                free.insert(place.0);
                None
            }
        }
    }

    /// Pages known.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.table.allocation_size()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
}

/// A digest is uniform already; the seed and one folded multiplication hide which bits pick the bucket.
pub(crate) fn fold(seed: u64, digest: &Digest) -> u64 {
    let word =
        |at: usize| digest.0.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let product = u128::from(word(0) ^ seed).wrapping_mul(u128::from(word(8) | 1));
    let [low, high] = [product, product >> 64].map(|half| half & u128::from(u64::MAX));
    u64::try_from(low ^ high).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn digest(words: [u64; 4]) -> Digest {
        let mut digest = Digest::default();
        digest.0.as_chunks_mut::<8>().0.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
        digest
    }

    #[test]
    fn an_equal_prefix_of_64_bits_is_a_miss() {
        let known: Vec<Digest> = (0..100).map(|tail| digest([7, tail, 0, tail])).collect();
        let of = |place: Place| known[place.0 as usize];
        let mut index = DigestIndex::new(3);
        (0u32..).zip(&known).for_each(|(place, digest)| assert_eq!(index.insert(digest, Place(place), of), None));
        for (place, known) in (0u32..).zip(&known) {
            assert_eq!(index.find(known, of), Some(Place(place)));
            let mut other = *known;
            other.0[31] ^= 0x80;
            assert_eq!(index.find(&other, of), None);
        }
    }

    #[test]
    fn digests_aimed_at_one_bucket_are_compared_a_constant_number_of_times() {
        // Without a seed the first word of zeros makes every one of these hash to nothing.
        let aimed: Vec<Digest> = (0..8000).map(|at| digest([0, at * 2 + 1, at, 1])).collect();
        assert!(aimed.iter().all(|digest| fold(0, digest) == 0));
        let compared = std::cell::Cell::new(0u32);
        let most = |seed: u64, digests: &[Digest]| {
            let of = |place: Place| {
                compared.set(compared.get() + 1);
                digests[place.0 as usize]
            };
            let mut index = DigestIndex::new(seed);
            index.reserve(digests.len(), of);
            let mut most = 0;
            for (place, digest) in (0u32..).zip(digests) {
                compared.set(0);
                index.insert(digest, Place(place), of);
                index.find(digest, of);
                most = most.max(compared.get());
            }
            most
        };
        assert!(most(0, &aimed[..500]) > 200, "the aim is good");
        for seed in [0x9e37_79b9_7f4a_7c15, 0xdead_beef_0bad_cafe, 3 << 60 | 12_345] {
            assert!(most(seed, &aimed) <= 16, "{}", most(seed, &aimed));
        }
    }

    proptest! {
        /// The slow twin is a map from digest to places.
        #[test]
        fn agrees_with_a_map(ops in proptest::collection::vec((0u32..40, 0u8..12), 0..300)) {
            let mut pages: HashMap<u32, Digest> = HashMap::new();
            let mut index = DigestIndex::new(7);
            for (place, content) in ops {
                if let Some(old) = pages.get(&place).copied() {
                    index.remove(&old, Place(place));
                }
                let digest = Digest([content; 32]);
                pages.insert(place, digest);
                let of = |place: Place| pages.get(&place.0).copied().unwrap_or_default();
                index.fetch(&[digest]);
                index.insert(&digest, Place(place), of);
                let found = index.find(&digest, of).unwrap();
                prop_assert_eq!(pages.get(&found.0), Some(&digest));
                prop_assert!(index.find(&Digest([200; 32]), of).is_none());
            }
        }
    }
}
