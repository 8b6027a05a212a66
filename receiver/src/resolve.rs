//! A PAGES frame becomes verified bytes in memory.
//!
//! First every page of the frame is given the digest it would have if all the sender's beliefs hold; the batch digest
//! then proves beliefs and bytes at once, and only after that anything is written. A reference is hashed again when its
//! bytes are copied: a digest in the map says what was there, not what a disk returns.

use crate::bring::{Bringer, Wish, clear};
use crate::error::ErrorKind;
use crate::memory::{GuestSink, OtherPages};
use crate::page_map::PageMap;
use crate::report::Counts;
use crate::scan::Scan;
use crate::waiting::Waiting;
use pagewire_protocol::batch::{batch_digest, counts};
use pagewire_protocol::challenge::Challenge;
use pagewire_protocol::compress::{Decompressor, decompress_delta};
use pagewire_protocol::digest::{Digest, PageBytes, PageHasher, is_zero};
use pagewire_protocol::error::{DecodeError, PeerError, Violation};
use pagewire_protocol::frame::{Codec, EntryKind, FrameKind, Pages};
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, PageRange, RegionId, fill_old, shifted};
use pagewire_protocol::page_buffer::PageBuffer;
use std::ops::Range;

/// What a frame left to ask for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Resolved {
    /// Every page of it is present but these.
    Missing(Vec<u64>),
    /// A belief of the sender is wrong: nothing of the frame was used.
    Disbelieved,
}

/// What of the receiver's base a frame rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Belief {
    /// Nothing.
    None,
    /// Pages of which the digest is known.
    Base,
    /// A page that turned out damaged since it was announced.
    Lost,
}

/// The bytes of a frame's pages, in page order: those that came, and those that moved here inside the base.
#[derive(Clone, Copy)]
struct Bytes<'a> {
    inline: &'a [PageBytes],
    shifted: &'a [PageBytes],
}

/// Turns frames into pages; keeps its buffers.
#[derive(Debug)]
pub(crate) struct Resolver {
    decompressor: Decompressor,
    payload: PageBuffer,
    /// Pages of the base that a frame builds on: the old ones of its delta, then those that have moved.
    old: PageBuffer,
    digests: Vec<Digest>,
    pub(crate) bringer: Bringer,
}

/// Everything a frame is resolved against.
pub(crate) struct Target<'a, S> {
    pub(crate) map: &'a mut PageMap,
    pub(crate) sink: &'a mut S,
    pub(crate) scan: &'a Scan,
    pub(crate) hasher: &'a PageHasher,
    pub(crate) counts: &'a mut Counts,
    pub(crate) base: Base,
    pub(crate) others: Option<&'a mut Others>,
    pub(crate) waiting: &'a mut Waiting,
    /// Nothing of the base is overwritten while it may be avoided.
    pub(crate) keeps_base: bool,
}

/// Pages of other guests, and what a sender has to prove before it gets one.
#[derive(Debug)]
pub(crate) struct Others {
    pub(crate) pages: Box<dyn OtherPages>,
    pub(crate) challenge: Challenge,
}

/// What kind of base the session has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Base {
    /// Its digests are those of a manifest that both sides know.
    pub(crate) agreed: bool,
    /// Nobody reads it to see whether it has them.
    pub(crate) trusted: bool,
    /// It can be read as it was until the session ends.
    pub(crate) stays: bool,
}

pub(crate) fn failed(what: &'static str) -> impl Fn(std::io::Error) -> ErrorKind {
    move |source| ErrorKind::Destination { what, source }
}

impl Resolver {
    pub(crate) fn new() -> std::io::Result<Self> {
        let (payload, old) = Default::default();
        Ok(Self { decompressor: Decompressor::new()?, payload, old, digests: Vec::new(), bringer: Bringer::default() })
    }

    /// Applies a frame whose range lies in the image.
    pub(crate) fn apply<S: GuestSink>(
        &mut self,
        range: PageRange,
        pages: &Pages<'_>,
        to: &mut Target<'_, S>,
    ) -> Result<Resolved, ErrorKind> {
        let (mut payload, mut old) = (std::mem::take(&mut self.payload), std::mem::take(&mut self.old));
        let result = self.unpack(range, pages, &mut payload, &mut old, to).and_then(|bytes| {
            let Some(inline) = bytes else { return Ok(Resolved::Disbelieved) };
            let bytes = Bytes { inline, shifted: read_shifted(range, pages, &mut old, to)? };
            let delta = if pages.head.codec.is_delta() { Belief::Base } else { Belief::None };
            let belief = self.digest_entries(range, pages, bytes, to)?.max(delta);
            // SPEC 6.7, 6.8
            let (domain, agreed) = (to.hasher.domain(), to.base.agreed);
            let digest = batch_digest((domain, agreed), range.first.0, pages.runs(), &self.digests);
            let fits = digest == pages.head.digest;
            if belief == Belief::Lost || !fits {
                if belief != Belief::None {
                    return Ok(Resolved::Disbelieved);
                }
                let (region, first, count) = (range.region.0, range.first.0, range.count);
                return Err(Violation::PageDigest { region, first, count }.into());
            }
            check_padding(range, pages, bytes, to)?;
            self.place(range, pages, bytes, to)
        });
        (self.payload, self.old) = (payload, old);
        result
    }

    /// The inline pages of a frame, decompressed into `buffer` if need be; `None` if they are a delta against a base
    /// that is not the one here.
    fn unpack<'b, S: GuestSink>(
        &mut self,
        range: PageRange,
        pages: &Pages<'b>,
        buffer: &'b mut PageBuffer,
        old: &mut PageBuffer,
        to: &mut Target<'_, S>,
    ) -> Result<Option<&'b [PageBytes]>, ErrorKind> {
        if pages.head.codec == Codec::NONE {
            return Ok(Some(pages.payload.as_chunks().0));
        }
        let size = pages.inline_pages().saturating_mul(PAGE_BYTES);
        if buffer.len() < size {
            buffer.resize(size);
        }
        let space = buffer.get_mut(..size).unwrap_or_default();
        let decompressed = match pages.head.codec {
            Codec::DELTA => {
                old.resize(size);
                read_old(range, pages, old, to)?;
                // SPEC 6.8
                if decompress_delta(pages.payload, old, space).is_err() {
                    return Ok(None);
                }
                Ok(())
            }
            Codec::WORDS => {
                read_old(range, pages, space, to)?;
                self.decompressor.decompress_words(pages.payload, space)
            }
            _ => self.decompressor.decompress(pages.payload, space),
        };
        decompressed.map_err(|source| PeerError::Decode { kind: FrameKind::PAGES, source })?;
        Ok(Some(space.as_chunks().0))
    }

    /// Fills `digests` with what each page would have that counts; says what of it rests on the base.
    fn digest_entries<S: GuestSink>(
        &mut self,
        range: PageRange,
        pages: &Pages<'_>,
        bytes: Bytes<'_>,
        to: &Target<'_, S>,
    ) -> Result<Belief, ErrorKind> {
        let entry = |what| Violation::Entry { what, region: range.region.0, first: range.first.0 };
        self.digests.clear();
        let (mut next, mut belief) = (range.first.0, Belief::None);
        let Bytes { mut inline, mut shifted } = bytes;
        let mut references = pages.references();
        for run in pages.runs() {
            let end = next.saturating_add(u64::from(run.count));
            match run.kind {
                EntryKind::BASE => {
                    // SPEC 6.4
                    if end > to.scan.held(range.region) {
                        return Err(entry("base entry, but nothing is held").into());
                    }
                    let fits = to.base.agreed || to.map.knows(range.region, next..end);
                    belief = belief.max(if fits { Belief::Base } else { Belief::Lost });
                    if counts(run.kind, to.base.agreed) {
                        to.map.digests(range.region, next..end, &mut self.digests);
                    }
                }
                EntryKind::REFERENCE => self.digests.extend(references.by_ref().take(usize::from(run.count))),
                EntryKind::INLINE => {
                    let bytes = take(&mut inline, u64::from(run.count));
                    to.hasher.digest_pages(bytes, |digest| self.digests.push(digest));
                }
                EntryKind::SHIFTED => {
                    belief = belief.max(Belief::Base);
                    let bytes = take(&mut shifted, u64::from(run.count));
                    to.hasher.digest_pages(bytes, |digest| self.digests.push(digest));
                }
                _ => {}
            }
            next = end;
        }
        Ok(belief)
    }

    /// Writes a proven frame: bytes that came along first, because its references may rest on them.
    fn place<S: GuestSink>(
        &mut self,
        range: PageRange,
        pages: &Pages<'_>,
        bytes: Bytes<'_>,
        to: &mut Target<'_, S>,
    ) -> Result<Resolved, ErrorKind> {
        let region = range.region;
        let (mut missing, mut digested) = (Vec::new(), 0usize);
        let Bytes { mut inline, mut shifted } = bytes;
        for (kind, run) in runs(pages) {
            let first = digested;
            if counts(kind, to.base.agreed) {
                digested = digested.saturating_add(usize::try_from(run.end.saturating_sub(run.start)).unwrap_or(0));
            }
            match kind {
                EntryKind::INLINE | EntryKind::SHIFTED => {
                    let from = if kind == EntryKind::INLINE { &mut inline } else { &mut shifted };
                    let bytes = take(from, run.end.saturating_sub(run.start));
                    to.sink.install(region, run.start, bytes.as_flattened()).map_err(failed("cannot be written"))?;
                    let digests = self.digests.get(first..digested).unwrap_or_default();
                    run.clone().zip(digests).for_each(|(page, digest)| to.map.set(region, page, *digest));
                }
                EntryKind::ZERO => {
                    self.place_zeros(region, run, to)?;
                    continue;
                }
                EntryKind::ABSENT => {
                    to.map.leave(region, run);
                    continue;
                }
                EntryKind::BASE => {
                    // Of an agreed base this is what the manifest says, and the bytes may be something else.
                    let (known, unknown) = to.map.split(region, run);
                    for page in unknown.into_iter().flatten() {
                        to.map.mark_absent(region, page);
                        missing.push(page);
                    }
                    known.into_iter().for_each(|run| count_present(kind, false, region, run, to));
                    continue;
                }
                _ => continue,
            }
            let delta = kind == EntryKind::INLINE && pages.head.codec.is_delta();
            count_present(kind, delta, region, run, to);
        }
        self.place_references(range, pages, &mut missing, to)?;
        Ok(Resolved::Missing(missing))
    }

    /// Brings referenced pages to their places, now or later; those that have to be wanted become `missing`.
    // SPEC 6.26
    fn place_references<S: GuestSink>(
        &mut self,
        range: PageRange,
        pages: &Pages<'_>,
        missing: &mut Vec<u64>,
        to: &mut Target<'_, S>,
    ) -> Result<(), ErrorKind> {
        let (region, mut strangers, mut references) = (range.region, Vec::new(), 0usize);
        let (mut digests, mut proofs) = (pages.references(), pages.proofs());
        for (_, run) in runs(pages).filter(|(kind, _)| *kind == EntryKind::REFERENCE) {
            for (page, digest) in run.zip(&mut digests) {
                references = references.saturating_add(1);
                let proof = proofs.next();
                if to.map.digest(region, page) == Some(digest) {
                    count_present(EntryKind::REFERENCE, false, region, page..page.saturating_add(1), to);
                } else {
                    strangers.push((page, digest, proof));
                }
            }
        }
        let limit = Waiting::limit(strangers.len(), references);
        let misses_wait = !to.base.agreed && !to.scan.is_finished();
        let (mut wishes, mut lacking) = (Vec::with_capacity(strangers.len()), Vec::new());
        for (page, digest, proof) in strangers {
            // A proof does not wait: what may be another guest's is brought at once.
            let overwrites = to.keeps_base && page < to.scan.held(region);
            let here = overwrites && (proof.is_none() || to.map.place_of(&digest).is_some());
            let place = to.map.layout().place(region, page);
            if here && to.waiting.push(place, digest, limit) {
                // A later round may state a page again that was present.
                to.map.mark_absent(region, page);
            } else {
                wishes.push(Wish { region, page, digest, proof });
            }
        }
        self.bringer.bring(&mut wishes, &mut lacking, to)?;
        for Wish { page, digest, .. } in lacking {
            to.map.mark_absent(region, page);
            let place = to.map.layout().place(region, page);
            if !(misses_wait && to.waiting.push(place, digest, limit)) {
                missing.push(page);
            }
        }
        Ok(())
    }

    /// Makes the pages of a run zero, now or later.
    fn place_zeros<S: GuestSink>(
        &self,
        region: RegionId,
        run: Range<u64>,
        to: &mut Target<'_, S>,
    ) -> Result<(), ErrorKind> {
        let (zero, mut next) = (to.hasher.zero(), run.start);
        let of_base = run.start..run.end.min(to.scan.held(region));
        for page in if to.keeps_base { of_base } else { 0..0 } {
            let place = to.map.layout().place(region, page);
            if to.map.digest(region, page) != Some(zero) && to.waiting.push(place, zero, Waiting::limit(0, 1)) {
                to.map.mark_absent(region, page);
                clear(region, next..page, to)?;
                count_present(EntryKind::ZERO, false, region, next..page, to);
                next = page.saturating_add(1);
            }
        }
        clear(region, next..run.end, to)?;
        count_present(EntryKind::ZERO, false, region, next..run.end, to);
        Ok(())
    }
}

/// Fills `space` with what the inline pages of a frame were in the base.
// SPEC 5.14
fn read_old<S: GuestSink>(
    range: PageRange,
    pages: &Pages<'_>,
    space: &mut [u8],
    to: &mut Target<'_, S>,
) -> Result<(), ErrorKind> {
    let (shift, region) = (pages.head.shift, range.region);
    if !to.base.agreed || (shift != 0 && !to.base.stays) {
        let what = "a delta against a base that is not agreed or does not stay";
        return Err(Violation::Entry { what, region: region.0, first: range.first.0 }.into());
    }
    let inline = runs(pages).filter(|(kind, _)| *kind == EntryKind::INLINE).map(|(_, run)| run);
    let (stays, sink) = (to.base.stays, &mut *to.sink);
    let read = |first, space: &mut [u8]| {
        if stays { sink.read_old(region, first, space) } else { sink.read(region, first, space) }
    };
    fill_old(inline, (shift, to.scan.held(region)), space, read).map_err(failed("cannot be read"))
}

/// The bytes of all shifted pages of a frame, from the base as it was.
fn read_shifted<'b, S: GuestSink>(
    range: PageRange,
    pages: &Pages<'_>,
    old: &'b mut PageBuffer,
    to: &mut Target<'_, S>,
) -> Result<&'b [PageBytes], ErrorKind> {
    let (shift, region) = (pages.head.shift, range.region);
    let moved = || runs(pages).filter(|(kind, _)| *kind == EntryKind::SHIFTED);
    let count = moved().fold(0u64, |sum, (_, run)| sum.saturating_add(run.end.saturating_sub(run.start)));
    if count == 0 {
        return Ok(&[]);
    }
    old.resize(usize::try_from(count).unwrap_or(0).saturating_mul(PAGE_BYTES));
    let (mut filled, held) = (0usize, to.scan.held(region));
    for (_, run) in moved() {
        let source = shifted(run.clone(), shift, held);
        // SPEC 6.24
        if !to.base.stays || source.end.saturating_sub(source.start) != run.end.saturating_sub(run.start) {
            let what = "a shifted entry, but its source is not held or does not stay";
            return Err(Violation::Entry { what, region: region.0, first: range.first.0 }.into());
        }
        let bytes = usize::try_from(source.end.saturating_sub(source.start)).unwrap_or(0).saturating_mul(PAGE_BYTES);
        let end = filled.saturating_add(bytes);
        let space = old.get_mut(filled..end).unwrap_or_default();
        to.sink.read_old(region, source.start, space).map_err(failed("cannot be read"))?;
        filled = end;
    }
    Ok(old.as_chunks().0)
}

/// Pages are present; each is counted the way in which it came first.
pub(crate) fn count_present<S>(
    kind: EntryKind,
    delta: bool,
    region: RegionId,
    pages: Range<u64>,
    to: &mut Target<'_, S>,
) {
    let news = to.map.mark_present(region, pages);
    let count = match kind {
        EntryKind::ZERO => &mut to.counts.zero,
        EntryKind::BASE => {
            let trusted = if to.base.trusted { news } else { 0 };
            to.counts.unverified = to.counts.unverified.saturating_add(trusted);
            &mut to.counts.base
        }
        EntryKind::REFERENCE | EntryKind::SHIFTED => &mut to.counts.reference,
        _ if delta => &mut to.counts.delta,
        _ => &mut to.counts.inline,
    };
    *count = count.saturating_add(news);
}

/// The first `count` pages of what is left.
fn take<'a>(rest: &mut &'a [PageBytes], count: u64) -> &'a [PageBytes] {
    let (first, after) = rest.split_at(usize::try_from(count).unwrap_or(0).min(rest.len()));
    *rest = after;
    first
}

/// The kinds of a frame's runs, with the pages that each covers.
pub(crate) fn runs(pages: &Pages<'_>) -> impl Iterator<Item = (EntryKind, Range<u64>)> {
    let mut next = pages.head.first;
    pages.runs().map(move |run| {
        let first = next;
        next = next.saturating_add(u64::from(run.count));
        (run.kind, first..next)
    })
}

/// Bytes of a page that lie in its region: fewer than a page only for the last.
pub(crate) fn used_bytes(layout: &Layout, region: RegionId, page: u64) -> usize {
    let bytes = layout.region(region).map_or(0, |region| region.bytes_of(page, 1));
    usize::try_from(bytes).unwrap_or(PAGE_BYTES)
}

/// Beyond the end of a region a page has nothing but zeros, or two images could share one root.
fn check_padding<S>(
    range: PageRange,
    pages: &Pages<'_>,
    bytes: Bytes<'_>,
    to: &Target<'_, S>,
) -> Result<(), ErrorKind> {
    let last = range.numbers().end.saturating_sub(1);
    let used = used_bytes(to.map.layout(), range.region, last);
    let from = match pages.runs().last().map(|run| run.kind) {
        Some(EntryKind::INLINE) => bytes.inline,
        Some(EntryKind::SHIFTED) => bytes.shifted,
        _ => &[],
    };
    // SPEC 5.7
    let padding = from.last().and_then(|page| page.get(used..));
    if padding.is_none_or(is_zero) {
        return Ok(());
    }
    let source = DecodeError::Unknown { field: "bytes beyond the end of the region", value: last };
    Err(PeerError::Decode { kind: FrameKind::PAGES, source }.into())
}
