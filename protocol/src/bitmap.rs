//! One bit a page, in words of 64, with its runs.
//!
//! Owns no meaning: callers say what a set bit stands for. Memory is 1/8 byte a page and comes zeroed, so a bitmap over
//! a large sparse image costs only what was touched.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// A set of page indices below a fixed length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    len: u64,
    ones: u64,
}

impl PageBitmap {
    /// An empty set over indices `0..len`.
    pub fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], len, ones: 0 }
    }

    /// The full set over indices `0..len`.
    pub fn full(len: u64) -> Self {
        let mut bitmap = Self::new(len);
        bitmap.insert_range(0..len);
        bitmap
    }

    /// The set that [`bytes`](Self::bytes) gave; `None` if there are too many or too few, or one names no index.
    pub fn from_bytes(len: u64, bytes: &[u8]) -> Option<Self> {
        if bytes.len() as u64 != len.div_ceil(8) {
            return None;
        }
        let mut bitmap = Self::new(len);
        for (word, part) in bitmap.words.iter_mut().zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole.iter_mut().zip(part).for_each(|(byte, &from)| *byte = from);
            *word = u64::from_le_bytes(whole);
            bitmap.ones = bitmap.ones.saturating_add(u64::from(word.count_ones()));
        }
        let used = len % 64;
        let stray = bitmap.words.last().is_some_and(|last| used != 0 && last >> used != 0);
        (!stray).then_some(bitmap)
    }

    /// One bit an index, the lowest bit of the first byte first; unused bits are zero.
    pub fn bytes(&self) -> Vec<u8> {
        let bytes = usize::try_from(self.len.div_ceil(8)).unwrap_or(usize::MAX);
        self.words.iter().flat_map(|word| word.to_le_bytes()).take(bytes).collect()
    }

    /// One more than the largest index.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no index at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        self.ones
    }

    /// Whether `index` is set; false beyond the end.
    pub fn contains(&self, index: u64) -> bool {
        self.word(index).is_some_and(|word| word & bit(index) != 0)
    }

    /// Sets `index`; says whether it was clear. Beyond the end nothing happens.
    pub fn insert(&mut self, index: u64) -> bool {
        self.change(index, true)
    }

    /// Clears `index`; says whether it was set.
    pub fn remove(&mut self, index: u64) -> bool {
        self.change(index, false)
    }

    /// Sets every index of `range` that lies below the end; says how many were clear.
    pub fn insert_range(&mut self, range: Range<u64>) -> u64 {
        let before = self.ones;
        self.change_range(range, true);
        self.ones.saturating_sub(before)
    }

    /// Sets `first` and the indices behind it for which `bits` has a bit, the lowest first; as far as they lie below the
    /// end.
    pub fn insert_bits(&mut self, first: u64, bits: u64) {
        let mut left = bits;
        while left != 0 {
            let start = left.trailing_zeros();
            let end = start.saturating_add((left >> start).trailing_ones());
            self.insert_range(first.saturating_add(u64::from(start))..first.saturating_add(u64::from(end)));
            left &= u64::MAX.checked_shl(end).unwrap_or(0);
        }
    }

    /// Clears every index of `range`; says how many were set.
    pub fn remove_range(&mut self, range: Range<u64>) -> u64 {
        let before = self.ones;
        self.change_range(range, false);
        before.saturating_sub(self.ones)
    }

    fn change_range(&mut self, range: Range<u64>, on: bool) {
        let (mut index, end) = (range.start, range.end.min(self.len));
        while index < end {
            let next = end.min((index / 64).saturating_add(1).saturating_mul(64));
            let count = next.saturating_sub(index);
            let mask = (u64::MAX >> 64u64.saturating_sub(count).min(63)) << (index % 64);
            let Some(word) = usize::try_from(index / 64).ok().and_then(|at| self.words.get_mut(at)) else { return };
            let was = u64::from((*word & mask).count_ones());
            *word = if on { *word | mask } else { *word & !mask };
            let ones = self.ones.saturating_sub(was);
            self.ones = if on { ones.saturating_add(count) } else { ones };
            index = next;
        }
    }

    /// The runs of set bits inside `within`, in order.
    pub fn runs(&self, within: Range<u64>) -> Runs<'_> {
        Runs { bitmap: self, next: within.start, end: within.end.min(self.len), on: true }
    }

    /// The runs of clear bits inside `within`, in order; below the end.
    pub fn gaps(&self, within: Range<u64>) -> Runs<'_> {
        Runs { on: false, ..self.runs(within) }
    }

    /// How many indices are set here and not in `other`.
    pub fn count_without(&self, other: &Self) -> u64 {
        let pairs = self.words.iter().zip(other.words.iter().chain(core::iter::repeat(&0)));
        pairs.fold(0, |sum, (ours, theirs)| sum.saturating_add(u64::from((ours & !theirs).count_ones())))
    }

    /// Sets every index that is set in `other` and lies below the end.
    pub fn insert_all(&mut self, other: &Self) {
        let (used, last) = (self.len % 64, self.words.len().saturating_sub(1));
        for (at, (ours, theirs)) in self.words.iter_mut().zip(&other.words).enumerate() {
            let mask = if at == last && used != 0 { !(u64::MAX << used) } else { u64::MAX };
            let new = theirs & mask & !*ours;
            *ours |= new;
            self.ones = self.ones.saturating_add(u64::from(new.count_ones()));
        }
    }

    fn word(&self, index: u64) -> Option<u64> {
        if index >= self.len {
            return None;
        }
        self.words.get(usize::try_from(index / 64).ok()?).copied()
    }

    fn change(&mut self, index: u64, on: bool) -> bool {
        if index >= self.len {
            return false;
        }
        let Some(word) = usize::try_from(index / 64).ok().and_then(|at| self.words.get_mut(at)) else { return false };
        let was = *word & bit(index) != 0;
        if was == on {
            return false;
        }
        *word ^= bit(index);
        self.ones = if on { self.ones.saturating_add(1) } else { self.ones.saturating_sub(1) };
        true
    }

    /// The first index at or after `from` and before `end` whose bit is `on`, or `end`.
    fn find(&self, from: u64, end: u64, on: bool) -> u64 {
        let mut index = from;
        while index < end {
            let word = self.word(index).unwrap_or(0);
            let word = (if on { word } else { !word }) >> (index % 64);
            if word != 0 {
                return end.min(index.saturating_add(u64::from(word.trailing_zeros())));
            }
            index = (index / 64).saturating_add(1).saturating_mul(64);
        }
        end
    }
}

const fn bit(index: u64) -> u64 {
    1 << (index % 64)
}

/// Iterator over runs of bits alike; see [`PageBitmap::runs`] and [`PageBitmap::gaps`].
#[derive(Debug)]
pub struct Runs<'a> {
    bitmap: &'a PageBitmap,
    next: u64,
    end: u64,
    on: bool,
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.bitmap.find(self.next, self.end, self.on);
        if start >= self.end {
            return None;
        }
        let stop = self.bitmap.find(start, self.end, !self.on);
        self.next = stop;
        Some(start..stop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// The slow twin is a set of numbers.
        #[test]
        fn agrees_with_a_set_of_numbers(len in 1u64..400, ops in proptest::collection::vec((any::<bool>(), 0u64..450), 0..300), from in 0u64..400, fill in (0u64..400, 0u64..200), clear in (0u64..400, 0u64..100), word in (0u64..450, any::<u64>())) {
            let mut bitmap = PageBitmap::new(len);
            let mut twin = BTreeSet::new();
            for (on, index) in ops {
                let changed = if on { index < len && twin.insert(index) } else { twin.remove(&index) };
                let got = if on { bitmap.insert(index) } else { bitmap.remove(index) };
                prop_assert_eq!(got, changed);
            }
            let before = twin.len();
            let new = bitmap.insert_range(fill.0..fill.0 + fill.1);
            twin.extend((fill.0..fill.0 + fill.1).filter(|&index| index < len));
            prop_assert_eq!(new, (twin.len() - before) as u64);
            bitmap.insert_bits(word.0, word.1);
            twin.extend((0..64).filter(|bit| word.1 >> bit & 1 == 1).map(|bit| word.0 + bit).filter(|&index| index < len));
            let gone = bitmap.remove_range(clear.0..clear.0 + clear.1);
            let before = twin.len();
            twin.retain(|index| !(clear.0..clear.0 + clear.1).contains(index));
            prop_assert_eq!(gone, (before - twin.len()) as u64);
            let gaps: Vec<u64> = bitmap.gaps(from..len + 9).flatten().collect();
            prop_assert_eq!(gaps, (from..len).filter(|index| !twin.contains(index)).collect::<Vec<_>>());
            prop_assert_eq!(bitmap.count(), twin.len() as u64);
            let from_runs: Vec<u64> = bitmap.runs(from..len + 9).flatten().collect();
            let from_twin: Vec<u64> = twin.range(from..).copied().collect();
            prop_assert_eq!(from_runs, from_twin);
            let mut other = PageBitmap::new(len + 70);
            other.insert_range(fill.0..fill.0 + fill.1);
            let others = fill.0..(fill.0 + fill.1).min(len + 70);
            let without = twin.iter().filter(|index| !others.contains(index)).count() as u64;
            prop_assert_eq!(bitmap.count_without(&other), without);
            let mut both = bitmap.clone();
            both.insert_all(&other);
            let union: BTreeSet<u64> = twin.iter().copied().chain(others).filter(|&index| index < len).collect();
            prop_assert_eq!(both.count(), union.len() as u64);
            prop_assert_eq!(both.runs(0..len).flatten().collect::<BTreeSet<u64>>(), union);
            let mut bytes = bitmap.bytes();
            prop_assert_eq!(PageBitmap::from_bytes(len, &bytes), Some(bitmap));
            prop_assert_eq!(PageBitmap::from_bytes(len + 8, &bytes), None);
            if len % 8 != 0 {
                *bytes.last_mut().unwrap() |= 0x80;
                prop_assert_eq!(PageBitmap::from_bytes(len, &bytes), None);
            }
        }
    }
}
