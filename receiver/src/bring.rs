//! Pages whose content is here are brought to other places: many at once, neighbours with one read and one write.
//!
//! All of a batch is read and proved before any of it is written. So nothing in it is lost to what comes earlier in the
//! same batch, and pages are digested side by side. What is nowhere here, or is not what it was, is left to be wanted.

use crate::error::ErrorKind;
use crate::memory::GuestSink;
use crate::page_map::Found;
use crate::resolve::{Target, count_present, failed, used_bytes};
use pagewire_protocol::challenge::PageProof;
use pagewire_protocol::digest::{Digest, PageBytes, is_zero, page_digest};
use pagewire_protocol::error::Violation;
use pagewire_protocol::frame::EntryKind;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::RegionId;
use pagewire_protocol::page_buffer::PageBuffer;
use std::ops::Range;

/// Pages of a batch: 256 KiB, which stay in cache between the read and the write.
const BATCH_PAGES: usize = 64;

/// A page that is stated by its digest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) region: RegionId,
    pub(crate) page: u64,
    pub(crate) digest: Digest,
    /// The proof that the sender has it.
    pub(crate) proof: Option<PageProof>,
}

/// Where the content of a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// At its place.
    Here,
    /// Anywhere: it is zero.
    Zero,
    /// In memory, because it was overwritten; proved.
    Kept,
    At(Found),
    /// It was read, and is not what it should be.
    Damaged,
    Nowhere,
}

impl Source {
    /// Whether `next` is the page behind this one, so that one call reads both.
    fn is_before(self, next: Self) -> bool {
        match (self, next) {
            (Self::At(Found::Image(region, page)), Self::At(Found::Image(other, next)))
            | (Self::At(Found::Base(region, page)), Self::At(Found::Base(other, next))) => {
                region == other && page.checked_add(1) == Some(next)
            }
            _ => false,
        }
    }

    /// Whether it has a slot among the bytes.
    fn is_read(self) -> bool {
        matches!(self, Self::At(_) | Self::Kept | Self::Damaged)
    }
}

/// Brings pages to their places; keeps its buffers.
#[derive(Debug, Default)]
pub(crate) struct Bringer {
    /// The bytes of those that are read, one after the other.
    bytes: PageBuffer,
    sources: Vec<Source>,
    digests: Vec<Digest>,
}

impl Bringer {
    /// Brings pages, each to a place of its own, from wherever their contents are, and counts them; those that are nowhere
    /// are added to `missing`. Batches come in order; inside one everything is read first, so there the order is free.
    pub(crate) fn bring<S: GuestSink>(
        &mut self,
        wishes: &mut [Wish],
        missing: &mut Vec<Wish>,
        to: &mut Target<'_, S>,
    ) -> Result<(), ErrorKind> {
        wishes.chunks_mut(BATCH_PAGES).try_for_each(|batch| {
            batch.sort_by_key(|wish| (wish.region, wish.page));
            self.bring_batch(batch, missing, to)
        })
    }

    fn bring_batch<S: GuestSink>(
        &mut self,
        wishes: &[Wish],
        missing: &mut Vec<Wish>,
        to: &mut Target<'_, S>,
    ) -> Result<(), ErrorKind> {
        self.sources.clear();
        self.sources.extend(wishes.iter().map(|wish| look(wish, to)));
        self.read(wishes, to)?;
        self.digests.clear();
        let digests = &mut self.digests;
        to.hasher.digest_pages(self.bytes.as_chunks().0, |digest| digests.push(digest));
        self.check(wishes, to)?;
        self.write(wishes, missing, to)
    }

    /// Reads what is to be read into `bytes`.
    fn read<S: GuestSink>(&mut self, wishes: &[Wish], to: &mut Target<'_, S>) -> Result<(), ErrorKind> {
        let count = self.sources.iter().filter(|source| source.is_read()).count();
        self.bytes.resize(count.saturating_mul(PAGE_BYTES));
        let mut rest: &mut [u8] = &mut self.bytes;
        let mut read = wishes.iter().zip(&self.sources).filter(|(_, source)| source.is_read()).peekable();
        while let Some((wish, &source)) = read.next() {
            let (mut last, mut pages) = (source, 1usize);
            while let Some((_, next)) = read.next_if(|(_, next)| last.is_before(**next)) {
                (last, pages) = (*next, pages.saturating_add(1));
            }
            let (bytes, after) = rest.split_at_mut(pages.saturating_mul(PAGE_BYTES).min(rest.len()));
            rest = after;
            let result = match source {
                Source::At(Found::Image(region, first)) => to.sink.read(region, first, bytes),
                Source::At(Found::Base(region, first)) => to.sink.read_old(region, first, bytes),
                _ => {
                    to.waiting.kept(&wish.digest).into_iter().for_each(|kept| bytes.copy_from_slice(kept));
                    Ok(())
                }
            };
            result.map_err(failed("cannot be read"))?;
        }
        Ok(())
    }

    /// Holds what was read against the digests it should have.
    // SPEC 6.9
    fn check<S: GuestSink>(&mut self, wishes: &[Wish], to: &mut Target<'_, S>) -> Result<(), ErrorKind> {
        let mut digests = self.digests.iter();
        for (wish, source) in wishes.iter().zip(&mut self.sources).filter(|(_, source)| source.is_read()) {
            if digests.next() == Some(&wish.digest) {
                continue;
            }
            // Not what was read or written there: a miss, never a wrong page. One that was counted on is lost for good.
            if let Source::At(Found::Image(from, number)) = *source {
                if to.map.is_present(from, number) {
                    let error =
                        std::io::Error::other(format!("page {number} of region {} is not what was put there", from.0));
                    return Err(failed("returned other bytes than were put there")(error));
                }
                to.map.forget(from, number);
            }
            *source = Source::Damaged;
        }
        Ok(())
    }

    /// Puts every page at its place, neighbours at once.
    fn write<S: GuestSink>(
        &self,
        wishes: &[Wish],
        missing: &mut Vec<Wish>,
        to: &mut Target<'_, S>,
    ) -> Result<(), ErrorKind> {
        let (mut slot, mut run) = (0usize, Run::NONE);
        for (wish, source) in wishes.iter().zip(&self.sources) {
            let at = slot;
            slot = slot.saturating_add(usize::from(source.is_read()));
            let next = wish.page..wish.page.saturating_add(1);
            let is_here = match source {
                Source::At(_) | Source::Kept if self.fits(wish, at, to) => {
                    if !run.extend(wish, at) {
                        self.put(std::mem::replace(&mut run, Run::of(wish, at)), to)?;
                    }
                    continue;
                }
                Source::Here => true,
                Source::Zero => {
                    clear(wish.region, next.clone(), to)?;
                    true
                }
                Source::Nowhere => self.bring_other(wish, to)?,
                _ => false,
            };
            if is_here {
                let kind = if *source == Source::Zero { EntryKind::ZERO } else { EntryKind::REFERENCE };
                count_present(kind, false, wish.region, next, to);
            } else {
                missing.push(*wish);
            }
        }
        self.put(run, to)
    }

    /// Whether what is in a slot is a page of the image there: beyond the end of a region nothing is.
    fn fits<S>(&self, wish: &Wish, slot: usize, to: &Target<'_, S>) -> bool {
        let used = used_bytes(to.map.layout(), wish.region, wish.page);
        let page = self.bytes.as_chunks::<PAGE_BYTES>().0.get(slot);
        used == PAGE_BYTES || page.and_then(|page| page.get(used..)).is_none_or(is_zero)
    }

    /// Installs proved pages.
    fn put<S: GuestSink>(&self, run: Run, to: &mut Target<'_, S>) -> Result<(), ErrorKind> {
        let Run { region, pages, slots } = run;
        let bytes = self.bytes.as_chunks::<PAGE_BYTES>().0.get(slots.clone()).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(());
        }
        to.sink.install(region, pages.start, bytes.as_flattened()).map_err(failed("cannot be written"))?;
        let digests = self.digests.get(slots).unwrap_or_default();
        pages.clone().zip(digests).for_each(|(page, digest)| to.map.set(region, page, *digest));
        count_present(EntryKind::REFERENCE, false, region, pages, to);
        Ok(())
    }

    /// Brings a page of another guest to its place, if one has the digest and the sender has proved that it has the page.
    // SPEC 6.28
    fn bring_other<S: GuestSink>(&self, wish: &Wish, to: &mut Target<'_, S>) -> Result<bool, ErrorKind> {
        let Wish { region, page, digest, proof } = wish;
        let (Some(others), Some(proof)) = (to.others.as_mut(), proof) else { return Ok(false) };
        let mut bytes: PageBytes = [0; PAGE_BYTES];
        if !others.pages.fetch(digest, &mut bytes) || page_digest(to.hasher.domain(), &bytes) != *digest {
            return Ok(false);
        }
        if !others.challenge.holds(&bytes, proof) {
            return Err(Violation::Proof { region: region.0, page: *page }.into());
        }
        to.counts.others = to.counts.others.saturating_add(1);
        let used = used_bytes(to.map.layout(), *region, *page);
        if !bytes.get(used..).is_none_or(is_zero) {
            return Ok(false);
        }
        to.sink.install(*region, *page, &bytes).map_err(failed("cannot be written"))?;
        to.map.set(*region, *page, *digest);
        Ok(true)
    }
}

/// Neighbouring pages in neighbouring slots.
#[derive(Debug)]
struct Run {
    region: RegionId,
    pages: Range<u64>,
    slots: Range<usize>,
}

impl Run {
    const NONE: Self = Self { region: RegionId(0), pages: 0..0, slots: 0..0 };

    fn of(wish: &Wish, slot: usize) -> Self {
        let pages = wish.page..wish.page.saturating_add(1);
        Self { region: wish.region, pages, slots: slot..slot.saturating_add(1) }
    }

    /// Adds the next page; false if it is no neighbour.
    fn extend(&mut self, wish: &Wish, slot: usize) -> bool {
        let continues = (wish.region, wish.page, slot) == (self.region, self.pages.end, self.slots.end);
        if continues && !self.slots.is_empty() {
            (self.pages.end, self.slots.end) = (self.pages.end.saturating_add(1), self.slots.end.saturating_add(1));
            return true;
        }
        false
    }
}

/// Where the content of a page is.
fn look<S>(wish: &Wish, to: &mut Target<'_, S>) -> Source {
    let Wish { region, page, digest, .. } = wish;
    if to.map.digest(*region, *page) == Some(*digest) {
        return Source::Here;
    }
    if *digest == to.hasher.zero() {
        return Source::Zero;
    }
    if to.waiting.kept(digest).is_some_and(|bytes| page_digest(to.hasher.domain(), bytes) == *digest) {
        return Source::Kept;
    }
    to.map.find(digest).map_or(Source::Nowhere, Source::At)
}

/// Makes those pages of a run zero that are not known to be.
pub(crate) fn clear<S: GuestSink>(region: RegionId, run: Range<u64>, to: &mut Target<'_, S>) -> Result<(), ErrorKind> {
    let zero = to.hasher.zero();
    let mut next = run.start;
    while next < run.end {
        let dirty = |page: &u64| to.map.digest(region, *page) != Some(zero);
        let Some(first) = (next..run.end).find(dirty) else { return Ok(()) };
        let end = (first..run.end).find(|page| !dirty(page)).unwrap_or(run.end);
        to.sink.zero(region, first, end.saturating_sub(first)).map_err(failed("cannot be cleared"))?;
        (first..end).for_each(|page| to.map.set(region, page, zero));
        next = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_map::PageMap;
    use crate::report::Counts;
    use crate::resolve::Base;
    use crate::scan::Scan;
    use crate::waiting::Waiting;
    use pagewire_protocol::digest::PageHasher;
    use pagewire_protocol::domain::DedupDomain;
    use pagewire_protocol::page::{InstallSize, Layout, Region};
    use std::io;

    /// Memory of one region that counts calls.
    #[derive(Default)]
    struct Memory {
        bytes: Vec<u8>,
        reads: usize,
        writes: usize,
    }

    impl Memory {
        fn at(&mut self, first: u64, len: usize) -> &mut [u8] {
            let start = first as usize * PAGE_BYTES;
            &mut self.bytes[start..start + len]
        }
    }

    impl GuestSink for Memory {
        fn base_pages(&self, _region: RegionId) -> u64 {
            (self.bytes.len() / PAGE_BYTES) as u64
        }

        fn starts_zero(&self) -> bool {
            false
        }

        fn read_base(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
            self.read(region, first, bytes)
        }

        fn read(&mut self, _region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
            self.reads += 1;
            bytes.copy_from_slice(self.at(first, bytes.len()));
            Ok(())
        }

        fn install(&mut self, _region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()> {
            self.writes += 1;
            self.at(first, bytes.len()).copy_from_slice(bytes);
            Ok(())
        }

        fn zero(&mut self, _region: RegionId, first: u64, count: u64) -> io::Result<()> {
            self.at(first, count as usize * PAGE_BYTES).fill(0);
            Ok(())
        }

        fn finish(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn content(page: u64) -> PageBytes {
        std::array::from_fn(|at| (page + 1).to_le_bytes()[at % 8])
    }

    /// Memory of `pages` pages, all known, of which the last ends after `last` bytes; those at `rotten` are not what they
    /// were. Brings (page, page whose content it gets) and returns the memory and which pages were missing.
    fn bring(pages: u64, last: u64, rotten: &[u64], wished: &[(u64, u64)]) -> (Memory, Vec<u64>) {
        let hasher = PageHasher::new(&DedupDomain::public());
        let bytes = (pages - 1) * PAGE_BYTES as u64 + last;
        let layout = Layout::new(vec![Region { bytes, install_size: InstallSize::KIB_4 }]).unwrap();
        let mut sink = Memory { bytes: (0..pages).flat_map(content).collect(), ..Memory::default() };
        let mut map = PageMap::new(layout, &hasher, 5, false);
        let digest = |page: u64| page_digest(hasher.domain(), &content(page));
        (0..pages).for_each(|page| map.set(RegionId(0), page, digest(page)));
        rotten.iter().for_each(|&page| sink.at(page, 1)[0] ^= 1);
        let (scan, mut waiting, mut counts) = (Scan::new(vec![pages], false), Waiting::new(pages), Counts::default());
        let mut to = Target {
            map: &mut map,
            sink: &mut sink,
            scan: &scan,
            hasher: &hasher,
            counts: &mut counts,
            base: Base::default(),
            others: None,
            waiting: &mut waiting,
            keeps_base: false,
        };
        let wish = |&(page, from): &(u64, u64)| Wish { region: RegionId(0), page, digest: digest(from), proof: None };
        let mut wishes: Vec<Wish> = wished.iter().map(wish).collect();
        let mut missing = Vec::new();
        Bringer::default().bring(&mut wishes, &mut missing, &mut to).unwrap();
        for &(page, from) in wished.iter().filter(|(page, _)| missing.iter().all(|wish| wish.page != *page)) {
            assert!(map.is_present(RegionId(0), page));
            assert_eq!(map.digest(RegionId(0), page), Some(digest(from)));
            assert!(sink.at(page, PAGE_BYTES) == content(from), "{page}");
        }
        assert_eq!(counts.reference, (wished.len() - missing.len()) as u64);
        (sink, missing.iter().map(|wish| wish.page).collect())
    }

    #[test]
    fn neighbours_are_read_with_one_call_and_written_with_one() {
        let wished: Vec<_> = (0..64).map(|page| (100 + page, page)).collect();
        let (memory, missing) = bring(256, PAGE_BYTES as u64, &[], &wished);
        assert_eq!((memory.reads, memory.writes, missing), (1, 1, vec![]));
        let wished: Vec<_> = (0..96).map(|page| (100 + page, page)).collect();
        let (memory, _) = bring(256, PAGE_BYTES as u64, &[], &wished);
        assert_eq!((memory.reads, memory.writes), (2, 2));
    }

    /// Memory that moved up by one page: every source is overwritten in the same batch, by the next page's content.
    #[test]
    fn a_batch_is_read_before_any_of_it_is_written() {
        let wished: Vec<_> = (1..64).rev().map(|page| (page, page - 1)).collect();
        let (memory, missing) = bring(64, PAGE_BYTES as u64, &[], &wished);
        assert_eq!((memory.reads, memory.writes, missing), (1, 1, vec![]));
        let ring: Vec<_> = (0..64).map(|page| (page, (page + 1) % 64)).collect();
        assert_eq!(bring(64, PAGE_BYTES as u64, &[], &ring).1, []);
    }

    /// SPEC 6.9
    #[test]
    fn a_page_that_is_not_what_it_was_is_missing_alone() {
        let wished: Vec<_> = (0..64).map(|page| (100 + page, page)).collect();
        let (mut memory, missing) = bring(256, PAGE_BYTES as u64, &[0, 31], &wished);
        assert_eq!((memory.reads, memory.writes, missing), (1, 2, vec![100, 131]));
        assert!(memory.at(131, PAGE_BYTES) == content(131), "nothing unproved is written");
    }

    #[test]
    fn bytes_beyond_the_end_of_a_region_are_of_no_page() {
        let (_, missing) = bring(80, 100, &[], &[(78, 3), (79, 4)]);
        assert_eq!(missing, [79]);
    }
}
