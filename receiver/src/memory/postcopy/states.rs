//! Which pages are there, and which are just being put in: bits that several loaders and the reader of messages share.

use pagewire_protocol::bitmap::PageBitmap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const BITS: u64 = u64::BITS as u64;

/// A set of places that anybody changes at any time.
#[derive(Debug)]
pub(super) struct SharedBits(Box<[AtomicU64]>);

impl SharedBits {
    pub(super) fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(BITS)).unwrap_or(usize::MAX);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, place: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(place / BITS).ok()?)
    }

    pub(super) fn contains(&self, place: u64) -> bool {
        self.word(place).is_some_and(|word| word.load(Ordering::Acquire) & (1 << (place % BITS)) != 0)
    }

    /// Whether it was not there before: then the caller alone put it there.
    pub(super) fn insert(&self, place: u64) -> bool {
        let bit = 1 << (place % BITS);
        self.word(place).is_some_and(|word| word.fetch_or(bit, Ordering::AcqRel) & bit == 0)
    }

    pub(super) fn remove(&self, place: u64) {
        if let Some(word) = self.word(place) {
            word.fetch_and(!(1 << (place % BITS)), Ordering::AcqRel);
        }
    }

    /// Gives how many of them were not there before.
    pub(super) fn insert_range(&self, range: Range<u64>) -> u64 {
        let mut added: u64 = 0;
        for (at, bits) in masks(range) {
            let before = self.word(at).map_or(u64::MAX, |word| word.fetch_or(bits, Ordering::AcqRel));
            added = added.saturating_add(u64::from((bits & !before).count_ones()));
        }
        added
    }

    /// The runs of places in `range` that are there, or that are not.
    pub(super) fn runs(&self, range: Range<u64>, there: bool) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (at, bits) in masks(range) {
            let word = self.word(at).map_or(0, |word| word.load(Ordering::Acquire));
            let mut found = if there { word & bits } else { !word & bits };
            let base = at.saturating_sub(at % BITS);
            while found != 0 {
                let skip = found.trailing_zeros();
                let len = (found >> skip).trailing_ones();
                let start = base.saturating_add(u64::from(skip));
                let end = start.saturating_add(u64::from(len));
                match runs.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => runs.push(start..end),
                }
                found = if skip.saturating_add(len) >= u64::BITS { 0 } else { found & (u64::MAX << (skip + len)) };
            }
        }
        runs
    }

    /// As it is just now.
    pub(super) fn bitmap(&self, len: u64) -> PageBitmap {
        let mut bitmap = PageBitmap::new(len);
        self.runs(0..len, true).into_iter().for_each(|run| {
            bitmap.insert_range(run);
        });
        bitmap
    }
}

/// The words that a range touches: a place in each, and the bits of the range in it.
fn masks(range: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let words = range.start / BITS..if range.is_empty() { range.start / BITS } else { range.end.div_ceil(BITS) };
    words.map(move |word| {
        let (start, end) = (word.saturating_mul(BITS), word.saturating_add(1).saturating_mul(BITS));
        let low = range.start.saturating_sub(start).min(BITS - 1);
        let high = end.saturating_sub(range.end).min(BITS - 1);
        (start.max(range.start), (u64::MAX << low) & (u64::MAX >> high))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_a_set_of_places(steps in prop::collection::vec((0u64..200, 0u64..140, 0u8..3), 0..20), from in 0u64..200, len in 0u64..200) {
            let (shared, mut twin) = (SharedBits::new(340), PageBitmap::new(340));
            for (first, count, step) in steps {
                match step {
                    0 => prop_assert_eq!(shared.insert(first), twin.insert(first)),
                    1 => {
                        shared.remove(first);
                        twin.remove(first);
                    }
                    _ => prop_assert_eq!(shared.insert_range(first..first + count), twin.insert_range(first..first + count)),
                }
            }
            let range = from..(from + len).min(340);
            prop_assert_eq!(shared.runs(range.clone(), true), twin.runs(range.clone()).collect::<Vec<_>>());
            prop_assert_eq!(shared.runs(range.clone(), false), twin.gaps(range).collect::<Vec<_>>());
            prop_assert_eq!(shared.bitmap(340).bytes(), twin.bytes());
            prop_assert!((0..340).all(|place| shared.contains(place) == twin.contains(place)));
        }
    }

    #[test]
    fn places_outside_are_never_there_and_never_ours() {
        let shared = SharedBits::new(64);
        assert!(!shared.insert(64) && !shared.contains(64) && !shared.insert(u64::MAX));
        assert_eq!(shared.insert_range(60..200), 4);
        assert_eq!(shared.runs(10..10, false), []);
    }
}
