//! Pages stated by reference that are neither put nor wanted yet.
//!
//! A base that is not agreed is read while frames arrive, and a page may have moved here from a part that is not read: a
//! miss waits for the end of the scan. Where the base does not stay, whatever is put at its place overwrites what a page
//! that is stated later may have come from: there a hit waits, too, for the end of the round, and then every page is put
//! before its source is overwritten. The frame of a page that waits counts as applied, but not as settled.

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageBytes};
use pagewire_protocol::limits::WAITING_PAGES_MAX;
use pagewire_protocol::page::Place;
use std::collections::VecDeque;

/// Pages that wait at most where most of a frame is as it was: what changed there has hardly moved, and waiting for
/// 4 MiB of bytes in the end costs little.
const SPARSE_PAGES_MAX: usize = 1024;

/// What to do next with pages that waited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Copy what is at this place out of the way: whoever needs it comes after it is overwritten.
    Keep(Place),
    /// Put the contents with these digests at these places; nothing of it is needed by what comes later.
    Put(Vec<(Place, Digest)>),
}

/// Where a content is that a page waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Nowhere: it has to be wanted.
    Nowhere,
    /// Where nothing is put.
    Safe,
    /// In memory, at a place that may be put before.
    At(Place),
}

/// The pages that wait.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// Places and the digests that they should have, as stated: of one place the last counts, if it still waits.
    stated: Vec<(Place, Digest)>,
    places: PageBitmap,
    /// Which of `stated` come next, and whether what is there is kept before.
    turns: Option<VecDeque<(u32, bool)>>,
    kept: Option<(Digest, Box<PageBytes>)>,
}

impl Waiting {
    /// None of `pages` waits.
    pub(crate) fn new(pages: u64) -> Self {
        Self { stated: Vec::new(), places: PageBitmap::new(pages), turns: None, kept: None }
    }

    /// How many may wait, by a frame that refers to `references` pages, of which `strangers` are not what lies there.
    /// Memory moves in large pieces: where nearly all have changed they may have moved, else they have just changed.
    pub(crate) fn limit(strangers: usize, references: usize) -> usize {
        let is_dense = strangers.saturating_mul(4) >= references.saturating_mul(3);
        if is_dense { WAITING_PAGES_MAX } else { SPARSE_PAGES_MAX }
    }

    /// Lets a page wait; false if as many as `limit` do.
    pub(crate) fn push(&mut self, place: Place, digest: Digest, limit: usize) -> bool {
        let has_room = self.stated.len() < limit;
        if has_room {
            self.stated.push((place, digest));
            self.places.insert(u64::from(place.0));
        }
        has_room
    }

    /// Pages were stated again.
    pub(crate) fn settle(&mut self, places: std::ops::Range<u64>) {
        if !self.is_empty() {
            self.places.remove_range(places);
            self.forget_if_empty();
        }
    }

    fn forget_if_empty(&mut self) {
        if self.is_empty() {
            (self.stated, self.turns, self.kept) = (Vec::new(), None, None);
        }
    }

    /// Whether none waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.places.count() == 0
    }

    /// Pages that wait.
    pub(crate) fn count(&self) -> u64 {
        self.places.count()
    }

    /// The next turn, of so many pages at `most`; `source` says where a content is before the first turn.
    pub(crate) fn next(&mut self, most: usize, source: impl FnMut(&Digest) -> Source) -> Option<Turn> {
        if self.is_empty() {
            return None;
        }
        if self.turns.is_none() {
            // A stable sort: of what was stated twice the later is behind.
            self.stated.sort_by_key(|(place, _)| *place);
            self.stated.dedup_by(|later, earlier| {
                let same = later.0 == earlier.0;
                if same {
                    *earlier = *later;
                }
                same
            });
            self.stated.retain(|(place, _)| self.places.contains(u64::from(place.0)));
            self.turns = Some(order(&self.stated, source));
        }
        let (turns, mut put) = (self.turns.as_mut()?, Vec::new());
        while let Some(&(at, keep)) = turns.front() {
            let page = usize::try_from(at).ok().and_then(|at| self.stated.get(at)).copied()?;
            let waits = self.places.contains(u64::from(page.0.0));
            if put.len() >= most || keep && waits && !put.is_empty() {
                break;
            }
            turns.pop_front();
            if keep && waits {
                return Some(Turn::Keep(page.0));
            }
            put.extend(waits.then_some(page));
        }
        Some(Turn::Put(put)).filter(|turn| *turn != Turn::Put(Vec::new()))
    }

    /// A page had its turn.
    pub(crate) fn done(&mut self, place: Place) {
        self.places.remove(u64::from(place.0));
        self.forget_if_empty();
    }

    /// Keeps what was at a place before it is overwritten.
    pub(crate) fn keep(&mut self, digest: Digest, bytes: Box<PageBytes>) {
        self.kept = Some((digest, bytes));
    }

    /// What was kept, if it had this digest.
    pub(crate) fn kept(&self, digest: &Digest) -> Option<&PageBytes> {
        self.kept.as_ref().filter(|(known, _)| known == digest).map(|(_, bytes)| &**bytes)
    }
}

/// The turns of pages sorted by their places: a page is put before another overwrites its source. Every page has one
/// source, so what has no such order are rings, and of a ring one page is kept.
///
/// Whatever can be wanted comes first, as it has the longest way to go. Pages that become free are put in the order in
/// which they became so: what has moved together is put together.
fn order(pages: &[(Place, Digest)], mut source: impl FnMut(&Digest) -> Source) -> VecDeque<(u32, bool)> {
    let at = |place: Place| pages.binary_search_by_key(&place, |(place, _)| *place).ok();
    let sources: Vec<Source> = pages.iter().map(|(_, digest)| source(digest)).collect();
    // The page that waits where a content is.
    let blocked = |source: &Source| match source {
        Source::At(place) => at(*place),
        _ => None,
    };
    let mut users = vec![0u32; pages.len()];
    for page in sources.iter().filter_map(blocked) {
        if let Some(users) = users.get_mut(page) {
            *users = users.saturating_add(1);
        }
    }
    let mut free = Free { wanted: VecDeque::new(), put: VecDeque::new() };
    let (count, is_free) = (pages.len(), |at: &usize| users.get(*at) == Some(&0));
    (0..count).filter(is_free).for_each(|at| free.push(at, &sources));
    let mut done = PageBitmap::new(count as u64);
    let mut turns = VecDeque::with_capacity(count);
    let mut turn = |at: usize, keep: bool| turns.extend(u32::try_from(at).ok().map(|at| (at, keep)));
    for start in 0..=count {
        while let Some(next) = free.pop() {
            if !done.insert(next as u64) {
                continue;
            }
            turn(next, false);
            let Some(page) = sources.get(next).and_then(blocked) else { continue };
            let Some(users) = users.get_mut(page) else { continue };
            *users = users.saturating_sub(1);
            if *users == 0 {
                free.push(page, &sources);
            }
        }
        if start < count && !done.contains(start as u64) {
            turn(start, true);
            free.push(start, &sources);
        }
    }
    turns
}

/// Pages that may be overwritten, first come, first served.
struct Free {
    wanted: VecDeque<usize>,
    put: VecDeque<usize>,
}

impl Free {
    fn push(&mut self, page: usize, sources: &[Source]) {
        let is_wanted = sources.get(page) == Some(&Source::Nowhere);
        if is_wanted { self.wanted.push_back(page) } else { self.put.push_back(page) }
    }

    fn pop(&mut self) -> Option<usize> {
        self.wanted.pop_front().or_else(|| self.put.pop_front())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest(content: u32) -> Digest {
        let mut digest = Digest([1; 32]);
        digest.0[..4].copy_from_slice(&content.to_le_bytes());
        digest
    }

    /// Moves `wished` contents inside a row of pages of which page n has content n, as the receiver does; returns what
    /// is there then, and how many were not found.
    fn moved(pages: u32, wished: &[(u32, u32)], most: usize) -> (Vec<u32>, usize) {
        let mut waiting = Waiting::new(u64::from(pages));
        for &(place, content) in wished {
            assert!(waiting.push(Place(place), digest(content), usize::MAX));
        }
        let mut memory: Vec<u32> = (0..pages).collect();
        let (mut kept, mut missed) = (None, 0);
        let source = |wanted: &Digest| {
            let at = (0..pages).find(|&content| digest(content) == *wanted);
            at.map_or(Source::Nowhere, |at| Source::At(Place(at)))
        };
        while let Some(turn) = waiting.next(most, source) {
            match turn {
                Turn::Keep(place) => kept = Some(memory[place.0 as usize]),
                Turn::Put(turns) => {
                    assert!((1..=most).contains(&turns.len()));
                    let before = memory.clone();
                    for (place, wanted) in turns {
                        let here = before.iter().copied().find(|&content| digest(content) == wanted);
                        match here.or(kept.filter(|&content| digest(content) == wanted)) {
                            Some(content) => memory[place.0 as usize] = content,
                            None => missed += 1,
                        }
                        waiting.done(place);
                    }
                }
            }
        }
        assert!(waiting.is_empty());
        (memory, missed)
    }

    proptest! {
        /// Whatever moves where, in chains, fans and rings, nothing is overwritten before all who need it have it.
        #[test]
        fn every_content_of_the_base_is_found(
            wishes in proptest::collection::vec((0u32..40, 0u32..60), 0..120), most in 1usize..9
        ) {
            let (memory, missed) = moved(40, &wishes, most);
            let mut expected: Vec<u32> = (0..40).collect();
            wishes.iter().for_each(|&(place, content)| expected[place as usize] = content);
            let strange = expected.iter().filter(|&&content| content >= 40).count();
            prop_assert_eq!(missed, strange);
            prop_assert!((0..40).all(|at| expected[at] >= 40 || memory[at] == expected[at]));
        }
    }

    #[test]
    fn what_is_stated_again_waits_no_more_or_for_the_newer_content() {
        let mut waiting = Waiting::new(10);
        assert!(waiting.push(Place(3), digest(1), 4) && waiting.push(Place(4), digest(2), 4));
        waiting.settle(3..5);
        assert!(waiting.is_empty());
        assert!(waiting.push(Place(4), digest(5), 4) && waiting.push(Place(5), digest(6), 4));
        waiting.settle(4..5);
        assert!(waiting.push(Place(4), digest(7), 4));
        assert_eq!(waiting.count(), 2);
        let turn = waiting.next(8, |_| Source::Safe);
        assert_eq!(turn, Some(Turn::Put(vec![(Place(4), digest(7)), (Place(5), digest(6))])));
        waiting.done(Place(4));
        waiting.done(Place(5));
        assert_eq!(waiting.next(8, |_| Source::Safe), None);
    }

    /// A row that moved by some pages is put in a few turns of neighbours, and what is nowhere is wanted before.
    #[test]
    fn what_moved_together_is_put_together_and_what_is_nowhere_comes_first() {
        let (pages, moved, most) = (1000, 100, 64);
        let mut waiting = Waiting::new(u64::from(pages));
        // Up, in place: the first pages are new, and what was last is gone.
        for place in 0..pages {
            assert!(waiting.push(Place(place), digest(place), usize::MAX));
        }
        let source = |wanted: &Digest| {
            let content = u32::from_le_bytes(wanted.0[..4].try_into().unwrap());
            content.checked_sub(moved).map_or(Source::Nowhere, |from| Source::At(Place(from)))
        };
        let (mut runs, mut at, mut last, mut wanted) = (0, 0, None, None);
        while let Some(Turn::Put(turn)) = waiting.next(most, source) {
            for (place, content) in turn {
                if source(&content) == Source::Nowhere {
                    wanted = wanted.or(Some(at));
                } else {
                    runs += usize::from(last.is_none_or(|last| last + 1 != place.0));
                    last = Some(place.0);
                }
                at += 1;
                waiting.done(place);
            }
        }
        assert!(waiting.is_empty());
        assert!(runs <= 10, "{runs}");
        // What lies at the first page is needed a hundred pages further: as soon as it is there.
        assert_eq!(wanted, Some(pages - 2 * moved + 1));
    }

    #[test]
    fn no_more_wait_than_the_limit_of_their_frame() {
        assert_eq!(Waiting::limit(191, 256), SPARSE_PAGES_MAX);
        assert_eq!(Waiting::limit(192, 256), WAITING_PAGES_MAX);
        let mut waiting = Waiting::new(10);
        assert!(waiting.push(Place(3), digest(1), 1));
        assert!(!waiting.push(Place(4), digest(1), 1));
        assert!(waiting.push(Place(4), digest(1), 2));
    }
}
