//! Pages of any guest of one dedup domain, by content. Only a domain that somebody named is worth this.
//!
//! Five bytes a slot of a table that is made once in its final size, so 12 bytes a page at most; digests stay in the
//! manifests, and every hit is compared there in full. Nothing found is proven: who uses a page hashes it first.

use crate::error::StoreError;
use crate::index::DigestIndex;
use crate::store::Store;
use crate::visit::Visit;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageBytes};
use pagewire_protocol::page::{Place, RegionId};
use std::io;

/// Visits that are looked through, the newest: each takes three descriptors, of which a process has 1,024.
const VISITS_MAX: usize = 128;
/// Digests that are read and sorted at once, 8 MiB: more leave the processor's cache, fewer jump further in the table.
const PIECE_DIGESTS: usize = 256 * 1024;

/// Where a page with a wanted digest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundPage {
    /// Which visit, for [`DomainPages::visit`].
    pub visit: usize,
    /// Its region.
    pub region: RegionId,
    /// Its number there.
    pub page: u64,
}

/// The visits whose pages are looked through, numbered in a row.
#[derive(Debug, Default)]
struct Shelf {
    visits: Vec<Visit>,
    starts: Vec<u32>,
    end: u32,
}

impl Shelf {
    /// Adds a visit unless there are no numbers left for its pages.
    fn add(&mut self, visit: Visit) {
        let pages = u32::try_from(visit.head().layout.pages()).ok();
        if let Some(end) = pages.and_then(|pages| self.end.checked_add(pages)) {
            self.starts.push(self.end);
            self.visits.push(visit);
            self.end = end;
        }
    }

    fn locate(&self, place: Place) -> Option<(usize, &Visit, Place)> {
        let at = self.starts.partition_point(|&start| start <= place.0).checked_sub(1)?;
        let start = self.starts.get(at)?;
        Some((at, self.visits.get(at)?, Place(place.0.saturating_sub(*start))))
    }

    /// The digest as its manifest has it now; one that no page has if it cannot be read.
    fn digest(&self, place: Place) -> Digest {
        let mut digest = Digest::default();
        if let Some((_, visit, place)) = self.locate(place)
            && visit.stored_digests(u64::from(place.0), &mut digest.0).is_err()
        {
            return Digest::default();
        }
        digest
    }
}

/// Finds pages of a domain's visits by content. The visits stay open, so they are not evicted meanwhile.
#[derive(Debug)]
pub struct DomainPages {
    shelf: Shelf,
    index: DigestIndex,
}

impl DomainPages {
    /// Looks through the newest visits of the domain of `key` that keep pages. `seed` must be random.
    ///
    /// Reads every digest of them twice: two seconds for 16 million pages. What cannot be read is left out.
    ///
    /// # Errors
    /// The operating system refused to open a visit.
    pub fn new(store: &Store, key: &[u8; 32], seed: u64) -> Result<Self, StoreError> {
        let mut shelf = Shelf::default();
        let mut kept = Vec::new();
        let heads = store.visits(key).into_iter().filter(|head| head.pages_kept);
        for head in heads.take(VISITS_MAX) {
            let Some(visit) = store.open_visit(&head)? else { continue };
            let Ok(present) = visit.present() else { continue };
            let before = shelf.visits.len();
            shelf.add(visit);
            if shelf.visits.len() > before {
                kept.push(present);
            }
        }
        let mut index = DigestIndex::new(seed);
        let mut pages = 0usize;
        for (visit, present) in shelf.visits.iter().zip(&kept) {
            each_piece(visit, present, |_, digests| pages = pages.saturating_add(digests.count()));
        }
        index.reserve(pages, |place| shelf.digest(place));
        let mut hints = Hints(vec![0; usize::try_from(shelf.end.div_ceil(2)).unwrap_or(usize::MAX)]);
        let mut order: Vec<(u64, u32)> = Vec::new();
        for ((visit, present), &start) in shelf.visits.iter().zip(&kept).zip(&shelf.starts) {
            each_piece(visit, present, |piece, digests| {
                order.clear();
                for (place, digest) in digests {
                    hints.set(Place(start.saturating_add(place)), &digest);
                    order.push((index.hash(&digest), place));
                }
                index.sort(&mut order);
                for &(hash, place) in &order {
                    let same = |known: Place| {
                        let digest = piece.digest(u64::from(place)).unwrap_or_default();
                        // A duplicate is mostly a neighbour's: its digest is at hand.
                        let near = known.0.checked_sub(start).and_then(|at| piece.digest(u64::from(at)));
                        hints.fits(known, &digest) && near.unwrap_or_else(|| shelf.digest(known)) == digest
                    };
                    let of = |known| shelf.digest(known);
                    index.insert_hashed(hash, Place(start.saturating_add(place)), same, of);
                }
            });
        }
        Ok(Self { shelf, index })
    }

    /// A page whose digest is `digest`, if a visit keeps one.
    pub fn find(&self, digest: &Digest) -> Option<FoundPage> {
        if *digest == Digest::default() {
            return None;
        }
        let place = self.index.find(digest, |place| self.shelf.digest(place))?;
        let (visit, head, place) = self.shelf.locate(place).map(|(at, visit, place)| (at, visit.head(), place))?;
        let (region, page) = head.layout.locate(place);
        Some(FoundPage { visit, region, page: page.0 })
    }

    /// Reads a page as it is kept; it must be hashed before it is used.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self, found: FoundPage, page: &mut PageBytes) -> io::Result<()> {
        let visit = self.visit(found).ok_or(io::ErrorKind::NotFound)?;
        visit.read(found.region, found.page, page)
    }

    /// The visit that a page was found in: to touch it, or to reject it for wrong pages.
    pub fn visit(&self, found: FoundPage) -> Option<&Visit> {
        self.shelf.visits.get(found.visit)
    }

    /// Different pages known.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }
}

/// Four bits of each indexed page's digest, while the index is built: of two digests that share a slot's tag, fifteen in
/// sixteen differ in them, and nobody has to read the manifest to see it.
struct Hints(Vec<u8>);

impl Hints {
    fn fits(&self, place: Place, digest: &Digest) -> bool {
        let both = usize::try_from(place.0 / 2).ok().and_then(|at| self.0.get(at)).copied().unwrap_or(0);
        let hint = if place.0.is_multiple_of(2) { both } else { both >> 4 };
        hint & 0xf == digest.0[31] & 0xf
    }

    fn set(&mut self, place: Place, digest: &Digest) {
        let shift = if place.0.is_multiple_of(2) { 0 } else { 4 };
        if let Some(both) = usize::try_from(place.0 / 2).ok().and_then(|at| self.0.get_mut(at)) {
            *both |= (digest.0[31] & 0xf) << shift;
        }
    }
}

/// Digests that lie in a row in a manifest.
struct Piece<'a> {
    first: u64,
    bytes: &'a [[u8; 32]],
}

impl Piece<'_> {
    fn digest(&self, place: u64) -> Option<Digest> {
        let at = usize::try_from(place.checked_sub(self.first)?).ok()?;
        self.bytes.get(at).copied().map(Digest)
    }
}

/// Calls `each` for every piece of a visit's digests that is no hole, with its kept pages that are not zero. Ends early
/// where it cannot be read.
fn each_piece(
    visit: &Visit,
    present: &PageBitmap,
    mut each: impl FnMut(&Piece<'_>, &mut dyn Iterator<Item = (u32, Digest)>),
) {
    let pages = visit.head().layout.pages();
    let mut bytes = vec![[0; 32]; PIECE_DIGESTS];
    let mut first = visit.next_stored(0);
    while first < pages {
        let count = usize::try_from(pages.saturating_sub(first)).unwrap_or(usize::MAX).min(PIECE_DIGESTS);
        let Some(piece) = bytes.get_mut(..count) else { return };
        if visit.stored_digests(first, piece.as_flattened_mut()).is_err() {
            return;
        }
        let piece = Piece { first, bytes: piece };
        let kept = |(place, digest): &(u64, &[u8; 32])| **digest != [0; 32] && present.contains(*place);
        let narrow = |(place, digest): (u64, &[u8; 32])| Some((u32::try_from(place).ok()?, Digest(*digest)));
        each(&piece, &mut (first..).zip(piece.bytes).filter(kept).filter_map(narrow));
        first = visit.next_stored(first.saturating_add(count as u64));
    }
}

#[cfg(test)]
mod tests;
