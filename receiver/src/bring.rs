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
    /// are added to `missing`, in order.
    pub(crate) fn bring<S: GuestSink>(
        &mut self,
        wishes: &[Wish],
        missing: &mut Vec<Wish>,
        to: &mut Target<'_, S>,
    ) -> Result<(), ErrorKind> {
        wishes.chunks(BATCH_PAGES).try_for_each(|batch| self.bring_batch(batch, missing, to))
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
pub(crate) fn clear<S: GuestSink>(
    region: RegionId,
    run: Range<u64>,
    to: &mut Target<'_, S>,
) -> Result<(), ErrorKind> {
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
