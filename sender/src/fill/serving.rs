//! Which page goes next to a guest that waits: what it has asked for, what it wants again, what it will touch, the rest.
//!
//! A page that the guest waits for goes alone, raw, on the urgent lane, once, even if it has gone in the background: it
//! may be far behind there. The background goes on behind the page that was asked for last, because its neighbours are
//! what the guest touches next, and leaves out what has gone. Where both bring a page the receiver keeps the first.

use super::Remainder;
use super::ahead::Ahead;
use crate::classify::Entries;
use crate::error::ErrorKind;
use crate::lanes::{Batch, Lanes};
use crate::memory::GuestMemory;
use crate::report::{Decision, FillCounts};
use crate::switch::CompressSwitch;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::error::{DecodeError, PeerError, Violation};
use pagewire_protocol::frame::{
    Ack, Codec, EntryKind, Fault, FrameKind, Lack, Lacking, LaneId, PagesHead, Urgency, Want, seal,
};
use pagewire_protocol::limits::{BATCH_PAGES_MAX, FAULTS_A_PAGE_MAX, PAGE_BYTES, WANTS_A_PAGE_MAX};
use pagewire_protocol::page::{PageRange, Place};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::Outgoing;
use pagewire_protocol::time::Time;
use pagewire_protocol::tree::image_root;
use std::collections::VecDeque;
use std::ops::Range;

/// Pages that one frame may span where few of them are lacking (8 MiB).
const SPAN_PAGES: u64 = 2048;
/// Room for what of a frame is not pages, where it brings one page.
const URGENT_HEAD_BYTES: usize = 256;
/// Runs of lacking pages in one frame.
const SPAN_RUNS: usize = 256;
/// Announcements after which it is judged whether they are worth it.
const ANNOUNCED_SAMPLE: u64 = 4096;
/// Digests in a frame: 4 KiB of them, and pages that a receiver puts in while somebody waits for half a millisecond.
const ANNOUNCED_PAGES: u64 = 128;
/// They are if this share of them is found at the receiver.
const ANNOUNCED_HITS_MIN: f64 = 0.1;

/// Digests that go ahead of the bytes, where the receiver may hold pages.
#[derive(Debug)]
enum Announcing {
    /// They do not, or not any more.
    Off,
    /// The first so many show whether they are worth it.
    Sampling(u64),
    /// Whether they are will be known when these frames of each lane are acknowledged; bytes go meanwhile.
    Waiting(Vec<(LaneId, u64)>),
    /// They are.
    On,
}

/// What is true while a guest that runs elsewhere is served.
#[derive(Debug)]
pub(super) struct Serving<M> {
    pub(super) remainder: Remainder<M>,
    /// What the receiver lacks and has not been sent in this session.
    lacking: PageBitmap,
    /// Up to which place it has said so, and how many it lacks in all.
    told: u64,
    expected: u64,
    /// Pages that went because the guest waited for them, or will.
    asked: PageBitmap,
    faults: VecDeque<u64>,
    /// Those that went before the receiver had said all that it lacks.
    early: Vec<Range<u64>>,
    /// Pages that were named ahead.
    hinted: PageBitmap,
    /// Pages named in FAULT, in all.
    named: u64,
    ahead: Ahead,
    wants: PageBitmap,
    wanted: u64,
    /// Where the background goes on.
    cursor: u64,
    /// The guest has touched a page just before it.
    jumped: bool,
    announcing: Announcing,
    /// Pages announced, and those of them that were not found.
    announced: u64,
    missed: u64,
    pub(super) lanes: Lanes,
    /// Frames so far: they take turns on the lanes.
    turns: u64,
    compress: CompressSwitch,
    batch_pages: u64,
    digests: Vec<Digest>,
    pub(super) counts: FillCounts,
    pub(super) decisions: Vec<Decision>,
}

/// How a session serves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ways {
    pub(super) compress: bool,
    pub(super) workers: usize,
    pub(super) bandwidth_limit: Option<u64>,
    pub(super) batch_pages: u16,
}

impl<M: GuestMemory> Serving<M> {
    pub(super) fn new(remainder: Remainder<M>, lack: &Lack, ways: Ways) -> Self {
        let pages = remainder.layout().pages();
        let none = || PageBitmap::new(pages);
        Self {
            lacking: none(),
            told: 0,
            expected: lack.pages,
            asked: none(),
            faults: VecDeque::new(),
            early: Vec::new(),
            hinted: none(),
            named: 0,
            ahead: Ahead::default(),
            wants: none(),
            wanted: 0,
            cursor: 0,
            jumped: false,
            announcing: if lack.holds { Announcing::Sampling(0) } else { Announcing::Off },
            announced: 0,
            missed: 0,
            lanes: Lanes::new(lack.lanes, lack.window, ways.bandwidth_limit, ways.workers),
            turns: 0,
            compress: CompressSwitch::new(ways.compress, ways.workers),
            batch_pages: u64::from(ways.batch_pages),
            digests: Vec::new(),
            counts: FillCounts::default(),
            decisions: Vec::new(),
            remainder,
        }
    }

    /// Whether the receiver has said all that it lacks.
    pub(super) fn is_told(&self) -> bool {
        self.told >= self.remainder.layout().pages()
    }

    /// The next part of what the receiver lacks.
    // SPEC 13.6
    pub(super) fn handle_lacking(&mut self, part: &Lacking<'_>) -> Result<(), ErrorKind> {
        let refuse = |what, place| Err(Violation::Lacking { what, place }.into());
        let pages = self.remainder.layout().pages();
        if part.first != self.told || self.is_told() {
            return refuse("a part of what is lacking that does not continue the last", part.first);
        }
        for (at, &byte) in (0u64..).zip(part.bits) {
            let first = part.first.saturating_add(at.saturating_mul(8));
            let known = pages.saturating_sub(first).min(8);
            if known == 0 || (known < 8 && u64::from(byte) >> known != 0) {
                return refuse("lacking behind the end of the image", first);
            }
            self.lacking.insert_bits(first, u64::from(byte));
            self.told = first.saturating_add(known);
        }
        if !self.is_told() {
            return Ok(());
        }
        if self.lacking.count() != self.expected {
            return refuse("another number of pages is lacking than was said, from", self.lacking.count());
        }
        self.judge_lacking()?;
        for places in std::mem::take(&mut self.early) {
            self.lacking.remove_range(places);
        }
        Ok(())
    }

    /// What is lacking must have been left behind; what is not must have been brought; large pages lack as a whole.
    // SPEC 13.6
    fn judge_lacking(&self) -> Result<(), ErrorKind> {
        let refuse = |what, place| Err(Violation::Lacking { what, place }.into());
        let Remainder { absent, gone, .. } = &self.remainder;
        let layout = self.remainder.layout();
        for run in self.lacking.runs(0..layout.pages()) {
            if let Some(gap) = absent.gaps(run.clone()).next() {
                return refuse("a page is lacking that was not left behind", gap.start);
            }
            for place in [run.start, run.end] {
                let (region, page) = layout.locate(Place(u32::try_from(place).unwrap_or(u32::MAX)));
                let known = layout.region(region).copied();
                let install = known.map_or(1, |region| u64::from(region.install_size.pages())).max(1);
                // The end of the last region is no page.
                if place < layout.pages() && !page.0.is_multiple_of(install) {
                    return refuse("part of an install page is lacking", place);
                }
            }
        }
        if let Some(gone) = gone {
            let mut brought = absent.runs(0..layout.pages()).flat_map(|run| self.lacking.gaps(run));
            if let Some(never) = brought.find_map(|run| gone.gaps(run).next()) {
                return refuse("a page is not lacking that was never brought", never.start);
            }
        }
        Ok(())
    }

    /// Pages that the guest waits for, or will touch.
    // SPEC 13.9
    pub(super) fn handle_fault(&mut self, fault: &Fault) -> Result<(), ErrorKind> {
        let pages = self.remainder.layout().pages();
        for want in &fault.pages {
            let places = self.judge(want, FrameKind::FAULT)?;
            self.named = self.named.saturating_add(u64::from(want.count));
            if self.named > pages.saturating_mul(FAULTS_A_PAGE_MAX) {
                return Err(Violation::FaultFlood { faults: self.named, pages }.into());
            }
            if fault.urgency == Urgency::AHEAD {
                // What was named before is on its way.
                let fresh: Vec<Range<u64>> = self.hinted.gaps(places.clone()).collect();
                self.hinted.insert_range(places);
                fresh.into_iter().for_each(|places| self.ahead.push(places));
                continue;
            }
            (self.cursor, self.jumped) = (places.end, true);
            self.ahead.touch(places.start);
            let mut place = places.start;
            while place < places.end {
                let whole = self.install_page(place);
                place = whole.end.max(place.saturating_add(1));
                if self.asked.insert(whole.start) {
                    self.faults.push_back(whole.start);
                }
            }
        }
        Ok(())
    }

    /// The places that a peer names, if they were left behind.
    fn judge(&self, want: &Want, kind: FrameKind) -> Result<Range<u64>, ErrorKind> {
        let malformed = |source: DecodeError| PeerError::Decode { kind, source };
        let layout = self.remainder.layout();
        let range = layout.range(want.region, want.first, want.count).map_err(malformed)?;
        let first = u64::from(layout.place(range.region, want.first).0);
        let places = first..first.saturating_add(u64::from(want.count));
        match self.remainder.absent.gaps(places.clone()).next() {
            Some(gap) => {
                let what = "a page is asked for that was not left behind";
                Err(Violation::Lacking { what, place: gap.start }.into())
            }
            None => Ok(places),
        }
    }

    /// The install page that a place lies in.
    fn install_page(&self, place: u64) -> Range<u64> {
        let layout = self.remainder.layout();
        let (region, page) = layout.locate(Place(u32::try_from(place).unwrap_or(u32::MAX)));
        let Some(known) = layout.region(region) else { return place..place.saturating_add(1) };
        let install = u64::from(known.install_size.pages()).max(1);
        let first = page.0 / install * install;
        let start = place.saturating_sub(page.0.saturating_sub(first));
        start..start.saturating_add(install.min(known.pages().saturating_sub(first)))
    }

    // SPEC 13.8
    pub(super) fn handle_ack(&mut self, lane: LaneId, ack: &Ack, now: Time) -> Result<(), ErrorKind> {
        self.lanes.acknowledge(lane, ack, now)?;
        let pages = self.remainder.layout().pages();
        for want in &ack.wants {
            let places = self.judge(want, FrameKind::ACK)?;
            self.wanted = self.wanted.saturating_add(u64::from(want.count));
            if self.wanted > pages.saturating_mul(WANTS_A_PAGE_MAX) {
                return Err(Violation::WantFlood { wants: self.wanted, pages }.into());
            }
            self.missed = self.missed.saturating_add(u64::from(want.count));
            self.counts.wants = self.counts.wants.saturating_add(u64::from(want.count));
            // What was asked for and has not come as it should may be asked for again.
            self.asked.remove_range(places.clone());
            self.ahead.want(&places);
            self.wants.insert_range(places);
        }
        Ok(())
    }

    /// The next page that the guest waits for, as a frame; `None` if it waits for none.
    pub(super) fn next_urgent(&mut self) -> Result<Option<Outgoing>, ErrorKind> {
        let Some(place) = self.faults.pop_front() else { return Ok(None) };
        let places = self.install_page(place);
        let Some(range) = self.range(places.clone()) else { return Ok(None) };
        let batch = self.batch(range, std::slice::from_ref(&places), false)?;
        // The background need not bring it, too.
        self.wants.remove_range(places.clone());
        if self.is_told() {
            self.lacking.remove_range(places);
        } else {
            self.early.push(places);
        }
        self.counts.faults = self.counts.faults.saturating_add(1);
        let Batch { head, runs, payload, .. } = batch;
        let mut bytes = Vec::with_capacity(URGENT_HEAD_BYTES);
        bytes.resize(pagewire_protocol::frame::HEADER_BYTES, 0);
        head.encode(&runs, &[], &[], &mut bytes);
        seal(FrameKind::PAGES, LaneId::URGENT, 0, payload.len(), &mut bytes);
        Ok(Some(Outgoing { head: bytes, payload }))
    }

    /// One bounded step in the background; false if there is nothing to do, or no room for it.
    pub(super) fn step(&mut self, now: Time) -> Result<bool, ErrorKind> {
        if !self.is_told() {
            return Ok(false);
        }
        if !self.lanes.has_room() {
            self.lanes.note_full(now);
            return Ok(false);
        }
        let announces = self.announces(now);
        let Some(Next { source, range, parts, unasked }) = self.next_parts(announces) else { return Ok(false) };
        // What is wanted was not found by its digest, and would not be now.
        let announce = announces && source == Source::Lacking;
        if unasked && !announce {
            let pages: u64 = parts.iter().map(|part| part.end.saturating_sub(part.start)).sum();
            self.counts.prepaged = self.counts.prepaged.saturating_add(pages);
        }
        let batch = self.batch(range, &parts, announce)?;
        let raw = batch.payload.len();
        self.counts.inline_bytes = self.counts.inline_bytes.saturating_add(raw as u64);
        let way =
            if raw == 0 { None } else { self.compress.choose(None, &self.lanes.goodput, now, &mut self.decisions) };
        if way.is_none() {
            self.counts.payload_bytes = self.counts.payload_bytes.saturating_add(raw as u64);
        }
        let lane = self.lanes.lane_of(self.turns);
        self.turns = self.turns.saturating_add(1);
        self.lanes.plan(lane, batch, way);
        Ok(true)
    }

    /// Whether digests go ahead still; they stop when the receiver finds too few of them.
    fn announces(&mut self, now: Time) -> bool {
        match &self.announcing {
            Announcing::Off => return false,
            Announcing::On => return true,
            Announcing::Sampling(announced) if *announced < ANNOUNCED_SAMPLE => return true,
            Announcing::Sampling(_) => {
                let planned = self.lanes.ids().map(|lane| (lane, self.lanes.planned(lane))).collect();
                self.announcing = Announcing::Waiting(planned);
                return false;
            }
            Announcing::Waiting(frames) if frames.iter().any(|(lane, frames)| self.lanes.acked(*lane) < *frames) => {
                return false;
            }
            Announcing::Waiting(_) => {}
        }
        let found = self.announced.saturating_sub(self.missed);
        let pays = found as f64 >= self.announced as f64 * ANNOUNCED_HITS_MIN;
        let next = if pays { "send digests ahead of bytes" } else { "send bytes at once" };
        let what = format!("{next}: of {} pages the receiver found {found}", self.announced);
        self.decisions.push(Decision { at: now, what });
        self.announcing = if pays { Announcing::On } else { Announcing::Off };
        pays
    }

    /// What goes next in the background: digests of all, then what is wanted, what will be touched, and the rest; what is
    /// wanted in the order in which it will be touched, too. Says whether it goes because the guest will touch it: a trace
    /// says so, or it touched what lies before it.
    fn next_parts(&mut self, announces: bool) -> Option<Next> {
        let pages = self.remainder.layout().pages();
        if self.wants.count() > 0 && (!announces || self.lacking.count() == 0) {
            if let Some(places) = self.ahead.next_wanted(&self.wants) {
                return self.take_parts(places, Source::Wants, false).map(|next| Next { unasked: true, ..next });
            }
            let first = self.wants.runs(0..pages).next()?.start;
            return self.take_parts(first..pages, Source::Wants, false);
        }
        if let Some(places) = self.ahead.next(&self.lacking) {
            // No more than what will be touched: its neighbours would be before the next of it.
            return self.take_parts(places, Source::Lacking, announces).map(|next| Next { unasked: true, ..next });
        }
        let ahead = self.lacking.runs(self.cursor.min(pages)..pages).next();
        let first = ahead.or_else(|| self.lacking.runs(0..pages).next())?.start;
        let taken = self.take_parts(first..pages, Source::Lacking, announces);
        self.cursor = taken.as_ref().and_then(|next| next.parts.last()).map_or(pages, |part| part.end);
        let follows = std::mem::take(&mut self.jumped);
        taken.map(|next| Next { unasked: follows, ..next })
    }

    /// Takes lacking or wanted pages of `places`, from the first on, that fit one frame.
    fn take_parts(&mut self, places: Range<u64>, source: Source, announces: bool) -> Option<Next> {
        let first = places.start;
        let layout = self.remainder.layout();
        let (region, page) = layout.locate(Place(u32::try_from(first).ok()?));
        let known = *layout.region(region)?;
        let install = u64::from(known.install_size.pages()).max(1);
        let most = if announces { self.batch_pages.max(ANNOUNCED_PAGES) } else { self.batch_pages };
        let batch = most.max(install).min(BATCH_PAGES_MAX as u64);
        let end = first.saturating_add(known.pages().saturating_sub(page.0).min(SPAN_PAGES.max(install)));
        let end = end.min(places.end);
        let from = if source == Source::Wants { &self.wants } else { &self.lacking };
        let (mut parts, mut taken) = (Vec::new(), 0u64);
        for run in from.runs(first..end) {
            let room = batch.saturating_sub(taken) / install * install;
            let pages = run.end.saturating_sub(run.start).min(room);
            if pages == 0 || parts.len() >= SPAN_RUNS {
                break;
            }
            taken = taken.saturating_add(pages);
            parts.push(run.start..run.start.saturating_add(pages));
        }
        let set = if source == Source::Wants { &mut self.wants } else { &mut self.lacking };
        for part in &parts {
            set.remove_range(part.clone());
        }
        let range = self.range(parts.first()?.start..parts.last()?.end)?;
        Some(Next { source, range, parts, unasked: false })
    }

    fn range(&self, places: Range<u64>) -> Option<PageRange> {
        let (region, first) = self.remainder.layout().locate(Place(u32::try_from(places.start).ok()?));
        let count = u32::try_from(places.end.saturating_sub(places.start)).ok()?;
        Some(PageRange { region, first, count })
    }

    /// Reads and digests `parts` of a range, and states them; what lies between them is skipped.
    // SPEC 6.6, 13.7
    fn batch(&mut self, range: PageRange, parts: &[Range<u64>], announce: bool) -> Result<Batch, ErrorKind> {
        let base = u64::from(self.remainder.layout().place(range.region, range.first.0).0);
        let page = |place: u64| place.saturating_sub(base).saturating_add(range.first.0);
        let count = |part: &Range<u64>| usize::try_from(part.end.saturating_sub(part.start)).unwrap_or(0);
        let mut buffer = self.lanes.buffer(parts.iter().map(count).sum::<usize>().saturating_mul(PAGE_BYTES));
        let mut filled = 0usize;
        for part in parts {
            let end = filled.saturating_add(count(part).saturating_mul(PAGE_BYTES));
            let space = buffer.get_mut(filled..end).unwrap_or_default();
            self.remainder.memory.read(range.region, page(part.start), space).map_err(ErrorKind::Source)?;
            filled = end;
        }
        self.digests.clear();
        self.remainder.hasher.digest_nonzero(buffer.as_chunks().0, &mut self.digests);
        Ok(self.state(range, parts, buffer, announce))
    }

    fn state(&mut self, range: PageRange, parts: &[Range<u64>], buffer: PageBuffer, announce: bool) -> Batch {
        let base = u64::from(self.remainder.layout().place(range.region, range.first.0).0);
        let zero = self.remainder.hasher.zero();
        let Remainder { trees, gone, hasher, .. } = &mut self.remainder;
        let mut entries = Entries::over(buffer);
        let mut next = base;
        let places = parts.iter().cloned().flatten();
        for (slot, (place, &digest)) in places.zip(&self.digests).enumerate() {
            let skipped = place.saturating_sub(next);
            entries.push_many(EntryKind::SKIPPED, skipped);
            if let Some(tree) = trees.get_mut(usize::from(range.region.0)) {
                tree.set(place.saturating_sub(base).saturating_add(range.first.0), digest);
            }
            if let Some(gone) = gone {
                gone.insert(place);
            }
            let kind = match digest == zero {
                true => EntryKind::ZERO,
                false if announce => EntryKind::REFERENCE,
                false => EntryKind::INLINE,
            };
            entries.push(kind, slot, digest);
            next = place.saturating_add(1);
        }
        let digest = entries.digest((hasher.domain(), false), range.first.0);
        let Entries { runs, references, proofs, payload, inline, .. } = entries;
        let (region, first, count) = (range.region.0, range.first.0, range.count);
        let head = PagesHead { round: 0, region, codec: Codec::NONE, first, count, digest, shift: 0 };
        self.counts.inline = self.counts.inline.saturating_add(u64::from(inline));
        let announced = references.len() as u64;
        self.counts.announced = self.counts.announced.saturating_add(announced);
        self.announced = self.announced.saturating_add(announced);
        if let Announcing::Sampling(sampled) = &mut self.announcing {
            *sampled = sampled.saturating_add(u64::from(range.count));
        }
        Batch { head, runs, references, proofs, payload, announced: 0, old: None }
    }

    /// A page that is lacking and has not gone out in this session, if the receiver has said what is.
    pub(super) fn not_gone(&self) -> Option<u64> {
        self.lacking.runs(0..self.remainder.layout().pages()).next().map(|run| run.start)
    }

    /// Whether all that was lacking has gone out.
    pub(super) fn is_sent(&self) -> bool {
        self.is_told() && self.lacking.count() == 0 && self.wants.count() == 0 && self.faults.is_empty()
    }

    /// The root of the image as the receiver has to have it.
    pub(super) fn root(&mut self) -> Digest {
        let layout = self.remainder.memory.layout().clone();
        image_root(self.remainder.hasher.domain(), &layout, &mut self.remainder.trees)
    }

    pub(super) fn handle_encoded(&mut self, output: crate::lanes::EncodeOutput, spent: pagewire_protocol::time::Span) {
        self.compress.measured(output.way, output.raw, output.compressed, spent);
        self.counts.payload_bytes = self.counts.payload_bytes.saturating_add(output.compressed as u64);
        self.lanes.encoded(output);
    }

    /// Pages that have gone out, and pages that were lacking.
    pub(super) fn progress(&self) -> (u64, u64) {
        (self.expected.saturating_sub(self.lacking.count()), self.expected)
    }
}

/// What goes next in the background.
struct Next {
    source: Source,
    range: PageRange,
    /// The places of it that go.
    parts: Vec<Range<u64>>,
    /// Nobody waits for them, and the guest will touch them.
    unasked: bool,
}

/// Where background pages are taken from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Lacking,
    Wants,
}

#[cfg(test)]
mod tests;
