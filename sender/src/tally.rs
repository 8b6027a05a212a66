//! Which way each page was stated last: a byte a page, so that a page that is stated again is never counted twice.

use crate::report::Counts;
use pagewire_protocol::frame::EntryKind;
use std::ops::Range;

/// Not stated yet.
const NONE: usize = 0;
const ZERO: usize = 1;
const BASE: usize = 2;
const REFERENCE: usize = 3;
const INLINE: usize = 4;
const DELTA: usize = 5;
const ABSENT: usize = 6;

/// The last way of every page, by its place in the image.
#[derive(Debug)]
pub(crate) struct Tally {
    ways: Vec<u8>,
    counts: [u64; 7],
}

impl Tally {
    /// No page of `pages` is stated.
    pub(crate) fn new(pages: u64) -> Self {
        Self { ways: vec![0; usize::try_from(pages).unwrap_or(usize::MAX)], counts: [0; 7] }
    }

    /// The pages at these places are stated as `kind` now.
    pub(crate) fn state(&mut self, places: Range<u64>, kind: EntryKind) {
        let way = match kind {
            EntryKind::ZERO => ZERO,
            EntryKind::BASE => BASE,
            EntryKind::INLINE => INLINE,
            EntryKind::ABSENT => ABSENT,
            _ => REFERENCE,
        };
        self.change(places, way, |_| true);
    }

    /// Those of the pages whose bytes went inline did so as a delta.
    pub(crate) fn delta(&mut self, places: Range<u64>) {
        self.change(places, DELTA, |way| way == INLINE);
    }

    fn change(&mut self, places: Range<u64>, way: usize, which: impl Fn(usize) -> bool) {
        let range = |end: u64| usize::try_from(end).unwrap_or(usize::MAX).min(self.ways.len());
        let range = range(places.start)..range(places.end);
        let slots = self.ways.get_mut(range).unwrap_or_default();
        if which(NONE) && slots.iter().all(|&slot| usize::from(slot) == NONE) {
            // The first statement of all of them, as for nearly every page.
            slots.fill(u8::try_from(way).unwrap_or(0));
            if let Some(count) = self.counts.get_mut(way) {
                *count = count.saturating_add(slots.len() as u64);
            }
            return;
        }
        for slot in slots {
            let old = usize::from(*slot);
            if !which(old) {
                continue;
            }
            *slot = u8::try_from(way).unwrap_or(0);
            if let Some(count) = self.counts.get_mut(old).filter(|_| old != NONE) {
                *count = count.saturating_sub(1);
            }
            if let Some(count) = self.counts.get_mut(way) {
                *count = count.saturating_add(1);
            }
        }
    }

    /// Whether the page at a place has been stated.
    pub(crate) fn is_stated(&self, place: u64) -> bool {
        let way = usize::try_from(place).ok().and_then(|place| self.ways.get(place));
        way.is_some_and(|&way| usize::from(way) != NONE)
    }

    /// Pages stated so far.
    pub(crate) fn stated(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Puts the pages by their ways into `counts`.
    pub(crate) fn fill(&self, counts: &mut Counts) {
        let [_, zero, base, reference, inline, delta, absent] = self.counts;
        *counts = Counts { zero, base, reference, inline, delta, absent, ..*counts };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_counts_the_way_it_was_stated_last() {
        let mut tally = Tally::new(10);
        tally.state(0..8, EntryKind::INLINE);
        tally.state(2..4, EntryKind::ZERO);
        tally.delta(0..6);
        tally.state(5..6, EntryKind::SHIFTED);
        let mut counts = Counts { wants: 7, ..Counts::default() };
        tally.fill(&mut counts);
        assert_eq!(counts, Counts { zero: 2, reference: 1, inline: 2, delta: 3, wants: 7, ..Counts::default() });
        assert_eq!(tally.stated(), 8);
    }
}
