//! What a guest will touch, in the order of another time, and how far it is in that.
//!
//! The order is followed from its beginning. A guest that waits for a page of it that is not next goes another way than the
//! last time: what stands around that page goes next then, and the order goes on where it was when that has gone, or
//! somewhere else when the guest waits for another.

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::limits::AHEAD_RUNS_MAX;
use std::collections::BTreeMap;
use std::ops::Range;

/// Of what stands around a page that is waited for, so much goes: before it, as guests differ in small ways more often
/// than in large ones, and behind it.
const BEFORE: usize = 64;
const BEHIND: usize = 192;

/// Runs of pages in the order in which they will be touched, none of them twice.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    order: Vec<Range<u64>>,
    /// Where in the order a run is, by its first place.
    at: BTreeMap<u64, usize>,
    /// The order is done up to here.
    next: usize,
    /// This part of it goes first.
    near: Range<usize>,
    /// Nothing before this part of the order is asked for.
    wanted: usize,
}

impl Ahead {
    /// These will be touched behind all others; nothing of them was said before.
    pub(super) fn push(&mut self, places: Range<u64>) {
        if self.order.len() >= AHEAD_RUNS_MAX {
            return;
        }
        self.at.insert(places.start, self.order.len());
        self.order.push(places);
    }

    /// The guest waits for a page.
    pub(super) fn touch(&mut self, place: u64) {
        let known = self.at.range(..=place).next_back().map(|(_, at)| *at);
        let holds = |at: &usize| self.order.get(*at).is_some_and(|places| places.contains(&place));
        let Some(at) = known.filter(holds) else { return };
        // It is there, or will be in no time.
        let is_next = |part: &Range<usize>| part.contains(&at);
        if is_next(&(self.next..self.next.saturating_add(BEHIND))) || is_next(&self.near) {
            return;
        }
        self.near = at.saturating_sub(BEFORE)..at.saturating_add(BEHIND).min(self.order.len());
    }

    /// The receiver asks for pages that went before, by their digest or damaged.
    pub(super) fn want(&mut self, places: &Range<u64>) {
        let holding = self.at.range(..=places.start).next_back().map_or(places.start, |(first, _)| *first);
        let parts = self.at.range(holding..places.end).map(|(_, at)| *at);
        let overlaps = |at: &usize| self.order.get(*at).is_some_and(|part| part.end > places.start);
        self.wanted = parts.filter(overlaps).fold(self.wanted, usize::min);
    }

    /// Pages that go next: the first of them is lacking.
    pub(super) fn next(&mut self, lacking: &PageBitmap) -> Option<Range<u64>> {
        loop {
            let from = if self.near.is_empty() { &mut self.next } else { &mut self.near.start };
            let places = self.order.get(*from)?;
            match first_of(places, lacking) {
                Some(part) => return Some(part),
                None => *from = from.saturating_add(1),
            }
        }
    }

    /// The same of those that are asked for.
    pub(super) fn next_wanted(&mut self, wants: &PageBitmap) -> Option<Range<u64>> {
        let mut parts = self.order.get(self.wanted..)?.iter();
        let part = parts.find_map(|places| first_of(places, wants));
        self.wanted = self.order.len().saturating_sub(parts.len());
        // It may hold more than what goes now.
        self.wanted = self.wanted.saturating_sub(usize::from(part.is_some()));
        part
    }
}

/// What of `places` is left from the first on that is in `set`.
fn first_of(places: &Range<u64>, set: &PageBitmap) -> Option<Range<u64>> {
    set.runs(places.clone()).next().map(|run| run.start..places.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: u64 = 2000;

    /// Every second page of twice as many, backwards.
    fn backwards() -> (Ahead, PageBitmap) {
        let mut ahead = Ahead::default();
        (0..RUNS).rev().for_each(|run| ahead.push(run * 2..run * 2 + 1));
        (ahead, PageBitmap::full(RUNS * 2))
    }

    fn take(ahead: &mut Ahead, lacking: &mut PageBitmap) -> Option<u64> {
        let places = ahead.next(lacking)?;
        lacking.remove(places.start);
        Some(places.start)
    }

    #[test]
    fn the_order_is_followed_and_a_touch_of_what_is_next_changes_nothing() {
        let (mut ahead, mut lacking) = backwards();
        for run in (0..RUNS).rev() {
            if run % 7 == 0 {
                ahead.touch(run.saturating_sub(20) * 2);
                ahead.touch(run * 2 + 1);
            }
            assert_eq!(take(&mut ahead, &mut lacking), Some(run * 2));
        }
        assert_eq!(take(&mut ahead, &mut lacking), None);
    }

    #[test]
    fn what_is_asked_for_goes_in_the_order_whenever_it_is_asked_for() {
        let (mut ahead, mut lacking) = backwards();
        let mut wants = PageBitmap::new(RUNS * 2);
        while take(&mut ahead, &mut lacking).is_some() {}
        assert_eq!(ahead.next_wanted(&wants), None);
        for places in [100..103, 3000..3001, 7..8, 500..502] {
            wants.insert_range(places.clone());
            ahead.want(&places);
        }
        let mut next = |ahead: &mut Ahead| {
            let places = ahead.next_wanted(&wants)?;
            wants.remove(places.start);
            Some(places)
        };
        assert_eq!(next(&mut ahead), Some(3000..3001));
        assert_eq!(next(&mut ahead), Some(500..501));
        ahead.push(RUNS * 2 - 1..RUNS * 2);
        assert_eq!(
            [(); 3].map(|()| next(&mut ahead)),
            [Some(102..103), Some(100..101), None],
            "7 and 101 are not of it"
        );
        assert_eq!(ahead.wanted, RUNS as usize + 1);
        ahead.want(&(0..RUNS * 2));
        assert_eq!(ahead.wanted, 0);
    }

    #[test]
    fn a_receiver_that_names_everything_is_remembered_in_part() {
        let mut ahead = Ahead::default();
        (0..AHEAD_RUNS_MAX as u64 + 9).for_each(|run| ahead.push(run * 2..run * 2 + 1));
        ahead.touch((AHEAD_RUNS_MAX as u64 + 3) * 2);
        assert_eq!((ahead.order.len(), ahead.at.len(), ahead.near.len()), (AHEAD_RUNS_MAX, AHEAD_RUNS_MAX, 0));
    }

    #[test]
    fn what_stands_around_a_page_that_is_waited_for_goes_next_and_then_the_rest() {
        let (mut ahead, mut lacking) = backwards();
        assert_eq!(take(&mut ahead, &mut lacking), Some(RUNS * 2 - 2));
        // The thousandth of the order.
        lacking.remove(1000 * 2);
        ahead.touch(1000 * 2);
        let around: Vec<u64> = (0..BEFORE + BEHIND - 1).map(|_| take(&mut ahead, &mut lacking).unwrap() / 2).collect();
        assert_eq!((around[0], around[around.len() - 1]), (1000 + BEFORE as u64, 1001 - BEHIND as u64));
        assert_eq!(take(&mut ahead, &mut lacking), Some(RUNS * 2 - 4), "where it was");
        ahead.touch(3 * 2);
        assert_eq!(take(&mut ahead, &mut lacking), Some((3 + BEFORE as u64) * 2));
        ahead.touch(500 * 2);
        let rest = std::iter::from_fn(|| take(&mut ahead, &mut lacking)).count() as u64;
        assert_eq!(rest, RUNS - (BEFORE + BEHIND) as u64 - 3, "each once, and all of them");
    }
}
