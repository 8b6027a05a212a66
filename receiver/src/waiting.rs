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

/// Pages that wait at most where most of a frame is as it was: what changed there has hardly moved, and waiting for
/// 4 MiB of bytes in the end costs little.
const SPARSE_PAGES_MAX: usize = 1024;

/// What to do next with a page that waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Copy what is at this place out of the way: whoever needs it comes after it is overwritten.
    Keep(Place),
    /// Put the content with this digest at this place.
    Put(Place, Digest),
}

/// The pages that wait.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// Places and the digests that they should have, as stated: of one place the last counts, if it still waits.
    stated: Vec<(Place, Digest)>,
    places: PageBitmap,
    /// Which of `stated` come next, the last first, and whether what is there is kept before.
    turns: Option<Vec<(u32, bool)>>,
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

    /// The next turn; `source` says where a content is that will be overwritten, if it is anywhere.
    pub(crate) fn next(&mut self, source: impl FnMut(&Digest) -> Option<Place>) -> Option<Turn> {
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
        loop {
            let (at, keep) = self.turns.as_mut().and_then(Vec::pop)?;
            let (place, digest) = usize::try_from(at).ok().and_then(|at| self.stated.get(at)).copied()?;
            if self.places.contains(u64::from(place.0)) {
                if keep {
                    return Some(Turn::Keep(place));
                }
                return Some(Turn::Put(place, digest));
            }
        }
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

/// The turns of pages sorted by their places, the last first: a page is put before another overwrites its source. Every
/// page has one source, so what has no such order are rings, and of a ring one page is kept.
fn order(pages: &[(Place, Digest)], mut source: impl FnMut(&Digest) -> Option<Place>) -> Vec<(u32, bool)> {
    let at = |place: Place| pages.binary_search_by_key(&place, |(place, _)| *place).ok();
    let sources: Vec<Option<u32>> =
        pages.iter().map(|(_, digest)| source(digest).and_then(at).and_then(|at| u32::try_from(at).ok())).collect();
    let index = |at: u32| usize::try_from(at).unwrap_or(usize::MAX);
    let mut users = vec![0u32; pages.len()];
    for user in sources.iter().flatten() {
        if let Some(users) = users.get_mut(index(*user)) {
            *users = users.saturating_add(1);
        }
    }
    let count = u32::try_from(pages.len()).unwrap_or(u32::MAX);
    let mut free: Vec<u32> = (0..count).rev().filter(|&at| users.get(index(at)) == Some(&0)).collect();
    let mut done = PageBitmap::new(u64::from(count));
    let mut turns = Vec::with_capacity(pages.len());
    for start in 0..=count {
        while let Some(next) = free.pop() {
            if !done.insert(u64::from(next)) {
                continue;
            }
            turns.push((next, false));
            let Some(source) = sources.get(index(next)).copied().flatten() else { continue };
            let Some(users) = users.get_mut(index(source)) else { continue };
            *users = users.saturating_sub(1);
            if *users == 0 {
                free.push(source);
            }
        }
        if start < count && !done.contains(u64::from(start)) {
            turns.push((start, true));
            free.push(start);
        }
    }
    turns.reverse();
    turns
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
    fn moved(pages: u32, wished: &[(u32, u32)]) -> (Vec<u32>, usize) {
        let mut waiting = Waiting::new(u64::from(pages));
        for &(place, content) in wished {
            assert!(waiting.push(Place(place), digest(content), usize::MAX));
        }
        let mut memory: Vec<u32> = (0..pages).collect();
        let (mut kept, mut missed) = (None, 0);
        let source = |wanted: &Digest| (0..pages).find(|&content| digest(content) == *wanted).map(Place);
        while let Some(turn) = waiting.next(source) {
            match turn {
                Turn::Keep(place) => kept = Some(memory[place.0 as usize]),
                Turn::Put(place, wanted) => {
                    let here = memory.iter().copied().find(|&content| digest(content) == wanted);
                    match here.or(kept.filter(|&content| digest(content) == wanted)) {
                        Some(content) => memory[place.0 as usize] = content,
                        None => missed += 1,
                    }
                    waiting.done(place);
                }
            }
        }
        assert!(waiting.is_empty());
        (memory, missed)
    }

    proptest! {
        /// Whatever moves where, in chains, fans and rings, nothing is overwritten before all who need it have it.
        #[test]
        fn every_content_of_the_base_is_found(wishes in proptest::collection::vec((0u32..40, 0u32..60), 0..120)) {
            let (memory, missed) = moved(40, &wishes);
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
        let mut next = || {
            waiting.next(|_| None).inspect(|turn| {
                if let Turn::Put(place, _) = turn {
                    waiting.done(*place)
                }
            })
        };
        assert_eq!(next(), Some(Turn::Put(Place(4), digest(7))));
        assert_eq!(next(), Some(Turn::Put(Place(5), digest(6))));
        assert_eq!(next(), None);
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
