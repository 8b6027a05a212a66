//! Which pages were dirty in the last harvests: a bit a harvest, a byte a page. Of memory of which nobody knows, a round
//! that compares counts as one.
//!
//! A page that was dirty in most of the last few will be dirty again when the guest stops, whatever is sent of it before:
//! it is *hot*, and waits for the last round. How often harvests come decides what hot means, not how long rounds take.

use pagewire_protocol::bitmap::PageBitmap;

/// Harvests that are looked at.
const WINDOW: u32 = 4;
/// Of these a hot page was dirty in so many.
const HOT_LEAST: u32 = 3;

/// The last eight harvests of every page.
#[derive(Debug)]
pub(crate) struct History {
    /// The lowest bit is the last harvest.
    seen: Vec<u8>,
}

impl History {
    /// No harvest of `pages` pages yet.
    pub(crate) fn new(pages: u64) -> Self {
        Self { seen: vec![0; usize::try_from(pages).unwrap_or(usize::MAX)] }
    }

    /// A harvest found these pages dirty.
    pub(crate) fn note(&mut self, dirty: &PageBitmap) {
        self.seen.iter_mut().for_each(|seen| *seen <<= 1);
        for place in dirty.runs(0..dirty.len()).flatten() {
            let seen = usize::try_from(place).ok().and_then(|place| self.seen.get_mut(place));
            seen.into_iter().for_each(|seen| *seen |= 1);
        }
    }

    /// A round found these pages changed by reading all but those that `waited`: of them it learnt nothing.
    pub(crate) fn note_compared(&mut self, changed: &PageBitmap, waited: &PageBitmap) {
        self.note(changed);
        for place in waited.runs(0..waited.len()).flatten() {
            let seen = usize::try_from(place).ok().and_then(|place| self.seen.get_mut(place));
            seen.into_iter().for_each(|seen| *seen >>= 1);
        }
    }

    /// The hot ones among these pages.
    pub(crate) fn hot(&self, among: &PageBitmap) -> PageBitmap {
        let mut hot = PageBitmap::new(among.len());
        let window = u8::MAX >> 8u32.saturating_sub(WINDOW);
        for place in among.runs(0..among.len()).flatten() {
            let seen = usize::try_from(place).ok().and_then(|place| self.seen.get(place));
            if seen.is_some_and(|seen| (seen & window).count_ones() >= HOT_LEAST) {
                hot.insert(place);
            }
        }
        hot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(places: &[u64]) -> PageBitmap {
        let mut dirty = PageBitmap::new(10);
        places.iter().for_each(|&place| {
            dirty.insert(place);
        });
        dirty
    }

    #[test]
    fn a_page_is_hot_while_most_of_the_last_harvests_found_it_dirty() {
        let mut history = History::new(10);
        let hot = |history: &History| history.hot(&PageBitmap::full(10)).runs(0..10).flatten().collect::<Vec<_>>();
        history.note(&dirty(&[1, 2, 9]));
        history.note(&dirty(&[1, 3, 9]));
        assert!(hot(&history).is_empty());
        history.note(&dirty(&[1]));
        assert_eq!(hot(&history), [1]);
        history.note(&dirty(&[9, 3]));
        assert_eq!(hot(&history), [1, 9], "three of the last four, in whatever order");
        assert_eq!(history.hot(&dirty(&[9])), dirty(&[9]));
        (0..2).for_each(|_| history.note(&dirty(&[])));
        assert!(hot(&history).is_empty(), "it cools down");
    }

    #[test]
    fn a_page_that_waits_neither_cools_down_nor_warms_up() {
        let mut history = History::new(10);
        let hot = |history: &History| history.hot(&PageBitmap::full(10)).runs(0..10).flatten().collect::<Vec<_>>();
        (0..3).for_each(|_| history.note_compared(&dirty(&[1, 2]), &dirty(&[])));
        (0..9).for_each(|_| history.note_compared(&dirty(&[]), &dirty(&[1, 5])));
        assert_eq!(hot(&history), [1], "nobody looked at it");
        (0..2).for_each(|_| history.note_compared(&dirty(&[]), &dirty(&[])));
        assert!(hot(&history).is_empty());
    }
}
