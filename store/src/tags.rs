//! Content to place where digests are not kept: eight bytes an entry, and a find is a guess.
//!
//! An entry is a place and 32 bits of the digest, folded with a random seed. Whoever finds a place here has to look
//! whether its bytes have the digest: a wrong guess must cost time at most.

use crate::index::fold;
use hashbrown::HashTable;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::page::Place;

/// Finds pages by a part of their digest.
#[derive(Debug)]
pub struct TagIndex {
    table: HashTable<(u32, Place)>,
    seed: u64,
}

impl TagIndex {
    /// An empty index; `seed` must be random.
    pub fn new(seed: u64) -> Self {
        Self { table: HashTable::new(), seed }
    }

    /// Makes room for `pages` more entries.
    pub fn reserve(&mut self, pages: usize) {
        self.table.reserve(pages, |&(tag, _)| spread(tag));
    }

    /// Remembers that the content `digest` is at `place`, unless a place is known for its tag.
    pub fn insert(&mut self, digest: &Digest, place: Place) {
        let tag = self.tag(digest);
        self.table.entry(spread(tag), |&(known, _)| known == tag, |&(tag, _)| spread(tag)).or_insert((tag, place));
    }

    /// A place that may have the content `digest`.
    pub fn find(&self, digest: &Digest) -> Option<Place> {
        let tag = self.tag(digest);
        self.table.find(spread(tag), |&(known, _)| known == tag).map(|&(_, place)| place)
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    fn tag(&self, digest: &Digest) -> u32 {
        let hash = fold(self.seed, digest);
        u32::try_from((hash ^ (hash >> 32)) & u64::from(u32::MAX)).unwrap_or(0)
    }
}

/// A tag over all 64 bits that the table looks at.
fn spread(tag: u32) -> u64 {
    u64::from(tag).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::digest::page_digest;
    use pagewire_protocol::domain::DedupDomain;

    #[test]
    fn finds_the_first_place_of_each_content() {
        let domain = DedupDomain::public();
        let digest = |number: u32| page_digest(&domain, &std::array::from_fn(|at| number.to_le_bytes()[at % 4]));
        let mut index = TagIndex::new(3);
        for number in 0..5000 {
            index.insert(&digest(number), Place(number));
            index.insert(&digest(number), Place(number + 5000));
        }
        assert_eq!(index.len(), 5000);
        assert!((0..5000).all(|number| index.find(&digest(number)) == Some(Place(number))));
        assert!((5000..9000).all(|number| index.find(&digest(number)).is_none()));
    }
}
