//! What a fill session does with each frame: pages that are lacking are proved and installed, others dropped.

use super::{Incomplete, touches};
use crate::error::ErrorKind;
use crate::memory::GuestSink;
use crate::page_map::Found;
use crate::resolve::runs;
use crate::wants::Wants;
use pagewire_protocol::batch::BatchHasher;
use pagewire_protocol::compress::Decompressor;
use pagewire_protocol::digest::{Digest, PageBytes, is_zero, page_digest};
use pagewire_protocol::error::{DecodeError, PeerError, Violation};
use pagewire_protocol::frame::{
    Ack, Codec, EntryKind, Fault, Frame, FrameKind, Lacking, LaneId, Pages, SKIPPED_DIGEST, Urgency, Want,
};
use pagewire_protocol::limits::{
    ACK_BYTES, ACK_DELAY_MAX, FAULTS_A_PAGE_MAX, LACKING_BYTES_MAX, PAGE_BYTES, WANTS_MAX,
};
use pagewire_protocol::page::{PageRange, Place, RegionId};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::Outgoing;
use pagewire_protocol::time::Time;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;

#[derive(Clone, Copy, Debug, Default)]
struct Lane {
    frames: u64,
    unacked_bytes: u64,
    ack_due: Option<Time>,
}

/// What is true while a guest that runs here is filled.
#[derive(Debug)]
pub(super) struct Filling<S> {
    pub(super) guest: Incomplete<S>,
    lanes: [Lane; LaneId::COUNT],
    pub(super) bulk_lanes: u8,
    /// The codecs that were agreed, as bits.
    codecs: u32,
    ack_bytes: u64,
    wants: Wants,
    /// Pages that the guest waits for and that were not asked for in this session.
    touched: VecDeque<Want>,
    /// Pages that it will touch, in this order.
    ahead: VecDeque<Want>,
    asked: pagewire_protocol::bitmap::PageBitmap,
    /// Pages that came and were not needed.
    again: u64,
    told: u64,
    decompressor: Decompressor,
    payload: PageBuffer,
    pages: PageBuffer,
    digests: Vec<Digest>,
}

/// PAGES bytes of a lane with this window after which it is acknowledged at the latest: before the window is full, or
/// the sender would wait for the longest delay of an acknowledgement whenever the next frame does not fit.
const fn ack_bytes(window: u64) -> u64 {
    let quarter = window.div_ceil(4);
    if quarter < ACK_BYTES { quarter } else { ACK_BYTES }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> ErrorKind {
    move |source| ErrorKind::Destination { what, source }
}

impl<S: GuestSink> Filling<S> {
    pub(super) fn new(
        mut guest: Incomplete<S>,
        decompressor: Decompressor,
        (bulk_lanes, window, codecs): (u8, u64, u32),
        ahead: &[Place],
    ) -> Self {
        let pages = guest.layout().pages();
        ahead.iter().for_each(|place| guest.touches.note(*place));
        let ahead = touches::ahead(guest.layout(), &guest.lacking, ahead);
        Self {
            wants: Wants::new(guest.layout(), 1),
            lanes: Default::default(),
            bulk_lanes,
            codecs,
            ack_bytes: ack_bytes(window),
            touched: VecDeque::new(),
            ahead,
            asked: pagewire_protocol::bitmap::PageBitmap::new(pages),
            again: 0,
            told: 0,
            decompressor,
            payload: PageBuffer::default(),
            pages: PageBuffer::default(),
            digests: Vec::new(),
            guest,
        }
    }

    /// The next part of what is lacking; `None` when all is said.
    // SPEC 13.6
    pub(super) fn next_lacking(&mut self) -> Option<Outgoing> {
        let pages = self.guest.layout().pages();
        let first = self.told;
        let end = pages.min(first.saturating_add(u64::from(LACKING_BYTES_MAX) * 8));
        if first >= end {
            return None;
        }
        let mut bits = vec![0u8; usize::try_from(end.saturating_sub(first).div_ceil(8)).unwrap_or(0)];
        for place in self.guest.lacking.runs(first..end).flatten() {
            let at = place.saturating_sub(first);
            if let Some(byte) = usize::try_from(at / 8).ok().and_then(|at| bits.get_mut(at)) {
                *byte |= 1 << (at % 8);
            }
        }
        self.told = end;
        Some(Outgoing::frame(&Frame::Lacking(Lacking { first, bits: &bits }), LaneId::CONTROL))
    }

    /// The guest waits for a page.
    pub(super) fn touch(&mut self, region: RegionId, page: u64) {
        let layout = self.guest.map.layout();
        let Some(known) = layout.region(region).filter(|known| page < known.pages()) else { return };
        let install = u64::from(known.install_size.pages()).max(1);
        let first = page / install * install;
        let count = install.min(known.pages().saturating_sub(first));
        let place = u64::from(layout.place(region, first).0);
        if !self.guest.lacking.contains(u64::from(layout.place(region, page).0)) {
            // It has come meanwhile.
            return;
        }
        if self.asked.insert(place) {
            self.guest.counts.faults = self.guest.counts.faults.saturating_add(1);
            self.guest.touches.note(Place(u32::try_from(place).unwrap_or(u32::MAX)));
            let count = u32::try_from(count).unwrap_or(1);
            self.touched.push_back(Want { region: region.0, first, count });
        }
    }

    /// The next frame for the urgent lane: what the guest waits for, else what it will touch.
    // SPEC 13.9
    pub(super) fn next_fault(&mut self) -> Option<Outgoing> {
        let (urgency, queue) =
            if self.touched.is_empty() { (Urgency::AHEAD, &mut self.ahead) } else { (Urgency::NOW, &mut self.touched) };
        let pages: Vec<Want> = queue.drain(..queue.len().min(WANTS_MAX)).collect();
        if pages.is_empty() {
            return None;
        }
        Some(Outgoing::frame(&Frame::Fault(Fault { urgency, pages }), LaneId::URGENT))
    }

    /// Whether nothing is lacking, and the sender was told what was.
    pub(super) fn is_complete(&self) -> bool {
        self.guest.pages() == 0 && self.told >= self.guest.layout().pages()
    }

    pub(super) fn handle_pages(
        &mut self,
        lane: LaneId,
        pages: &Pages<'_>,
        bytes: u64,
        now: Time,
    ) -> Result<(), ErrorKind> {
        let range = self.judge(pages)?;
        let before = (self.guest.lacking.count(), self.wants.asked());
        if self.prove(range, pages)? {
            let lacked = self.guest.pages();
            self.place(range, pages)?;
            if lane == LaneId::URGENT {
                let answers = lacked.saturating_sub(self.guest.pages());
                self.guest.counts.answers = self.guest.counts.answers.saturating_add(answers);
            }
        } else {
            // SPEC 13.8
            let wanted = self.lacking_runs(range, pages);
            for run in wanted {
                self.want_again(range.region, run);
            }
        }
        self.wants.check(self.guest.map.layout(), 1)?;
        let came = before.0.saturating_sub(self.guest.lacking.count());
        let wanted = self.wants.asked().saturating_sub(before.1);
        self.drop_again(stated(pages).saturating_sub(came).saturating_sub(wanted))?;
        if let Some(state) = self.lanes.get_mut(lane.index()).filter(|_| lane.bulk_index().is_some()) {
            state.frames = state.frames.saturating_add(1);
            state.unacked_bytes = state.unacked_bytes.saturating_add(bytes);
            state.ack_due.get_or_insert(now + ACK_DELAY_MAX);
        }
        Ok(())
    }

    fn want_again(&mut self, region: RegionId, run: Range<u64>) {
        let layout = self.guest.map.layout();
        let first = u64::from(layout.place(region, run.start).0);
        let count = run.end.saturating_sub(run.start);
        // What was asked for is asked for again, on either way.
        self.asked.remove_range(first..first.saturating_add(count));
        if let Ok(range) = layout.range(region.0, run.start, u32::try_from(count).unwrap_or(0)) {
            self.wants.settle(layout, range);
        }
        self.wants.ask(layout, region, run.start, count);
    }

    // SPEC 13.7
    fn judge(&self, pages: &Pages<'_>) -> Result<PageRange, ErrorKind> {
        let head = pages.head;
        let malformed = |source: DecodeError| PeerError::Decode { kind: FrameKind::PAGES, source };
        let layout = self.guest.map.layout();
        let range = layout.range(head.region, head.first, head.count).map_err(malformed)?;
        let entry = |what| Violation::Entry { what, region: head.region, first: head.first };
        if head.round != 0 || head.codec.is_delta() || pages.proofs().next().is_some() {
            return Err(entry("a round, a delta or proofs, for a guest that runs").into());
        }
        if self.codecs & head.codec.bit() == 0 {
            return Err(entry("a codec that was not agreed").into());
        }
        if stated(pages) == 0 {
            return Err(entry("no page at all, for a guest that runs").into());
        }
        let legal = [EntryKind::ZERO, EntryKind::REFERENCE, EntryKind::INLINE, EntryKind::SKIPPED];
        if pages.runs().any(|run| !legal.contains(&run.kind)) {
            return Err(entry("an entry that rests on the base or is absent, for a guest that runs").into());
        }
        let install = layout.region(range.region).map_or(1, |region| u64::from(region.install_size.pages())).max(1);
        for (kind, run) in runs(pages) {
            // Only what is stated at all has to be whole.
            let ends_whole = run.end.is_multiple_of(install) || run.end == range.numbers().end;
            if kind == EntryKind::SKIPPED && !(run.start.is_multiple_of(install) && ends_whole) {
                return Err(entry("part of an install page, for a guest that runs").into());
            }
            let places = self.places(range.region, &run);
            if kind != EntryKind::SKIPPED && self.guest.left.gaps(places).next().is_some() {
                return Err(entry("a page that was not lacking").into());
            }
        }
        Ok(range)
    }

    /// Those pages of a run that are lacking.
    fn lacking_parts(&self, region: RegionId, run: Range<u64>) -> Vec<Range<u64>> {
        let places = self.places(region, &run);
        let page = |place: u64| place.saturating_sub(places.start).saturating_add(run.start);
        self.guest.lacking.runs(places.clone()).map(|part| page(part.start)..page(part.end)).collect()
    }

    fn places(&self, region: RegionId, run: &Range<u64>) -> Range<u64> {
        let first = u64::from(self.guest.map.layout().place(region, run.start).0);
        first..first.saturating_add(run.end.saturating_sub(run.start))
    }

    /// Gives every page its digest, with the bytes in `pages`; false if these are not what the sender means.
    fn prove(&mut self, range: PageRange, pages: &Pages<'_>) -> Result<bool, ErrorKind> {
        let inline = match pages.head.codec {
            Codec::NONE => pages.payload.as_chunks().0,
            _ => {
                let size = pages.inline_pages().saturating_mul(PAGE_BYTES);
                self.payload.resize(size);
                if self.decompressor.decompress(pages.payload, &mut self.payload).is_err() {
                    return Ok(false);
                }
                self.payload.as_chunks().0
            }
        };
        let hasher = &self.guest.hasher;
        self.digests.clear();
        let (mut rest, mut references): (&[PageBytes], _) = (inline, pages.references());
        let mut batch = BatchHasher::new(hasher.domain(), false);
        for run in pages.runs() {
            let (count, first) = (usize::from(run.count), self.digests.len());
            match run.kind {
                EntryKind::INLINE => {
                    let (first, after) = rest.split_at(count.min(rest.len()));
                    hasher.digest_pages(first, |digest| self.digests.push(digest));
                    rest = after;
                }
                EntryKind::REFERENCE => self.digests.extend(references.by_ref().take(count)),
                EntryKind::ZERO => self.digests.extend((0..count).map(|_| hasher.zero())),
                _ => self.digests.extend((0..count).map(|_| SKIPPED_DIGEST)),
            }
            batch.run(run, self.digests.get(first..).unwrap_or_default());
        }
        let fits = batch.finish(range.first.0) == pages.head.digest;
        Ok(fits && self.pads(range, pages, inline))
    }

    /// Whether what lies behind a region's end is zero.
    // SPEC 5.7
    fn pads(&self, range: PageRange, pages: &Pages<'_>, inline: &[PageBytes]) -> bool {
        let last = range.numbers().end.saturating_sub(1);
        let region = self.guest.map.layout().region(range.region);
        let used = region.map_or(0, |region| region.bytes_of(last, 1));
        let ends_inline = pages.runs().last().is_some_and(|run| run.kind == EntryKind::INLINE);
        let padding = inline.last().filter(|_| ends_inline).and_then(|page| page.get(usize::try_from(used).ok()?..));
        padding.is_none_or(is_zero)
    }

    /// Installs what is lacking of a proven frame.
    fn place(&mut self, range: PageRange, pages: &Pages<'_>) -> Result<(), ErrorKind> {
        let install = self.guest.map.layout().region(range.region).map_or(1, |region| region.install_size.pages());
        if install > 1 {
            return self.place_whole(range, pages);
        }
        let payload = std::mem::take(&mut self.payload);
        let inline = if pages.head.codec == Codec::NONE { pages.payload } else { &*payload };
        let mut offset = 0usize;
        let mut result = Ok(());
        for (kind, run) in runs(pages) {
            let bytes = usize::try_from(run.end.saturating_sub(run.start)).unwrap_or(0).saturating_mul(PAGE_BYTES);
            let here = offset..offset.saturating_add(bytes);
            result = match kind {
                EntryKind::INLINE => {
                    offset = here.end;
                    self.install_run(range, run, Some(inline.get(here).unwrap_or_default()))
                }
                EntryKind::ZERO => self.install_run(range, run, None),
                EntryKind::REFERENCE => self.bring_run(range, run),
                _ => Ok(()),
            };
            if result.is_err() {
                break;
            }
        }
        self.payload = payload;
        result
    }

    /// Installs those pages of a run that are lacking: `bytes`, or zeros.
    fn install_run(&mut self, range: PageRange, run: Range<u64>, bytes: Option<&[u8]>) -> Result<(), ErrorKind> {
        let parts = self.lacking_parts(range.region, run.clone());
        for part in parts {
            let count = part.end.saturating_sub(part.start);
            let counts = &mut self.guest.counts;
            match bytes {
                Some(bytes) => {
                    let offset = |page: u64| usize::try_from(page.saturating_sub(run.start)).unwrap_or(0) * PAGE_BYTES;
                    let bytes = bytes.get(offset(part.start)..offset(part.end)).unwrap_or_default();
                    let done = self.guest.sink.install(range.region, part.start, bytes);
                    done.map_err(failed("a page cannot be installed"))?;
                    counts.inline = counts.inline.saturating_add(count);
                }
                None => {
                    let done = self.guest.sink.zero(range.region, part.start, count);
                    done.map_err(failed("a page cannot be cleared"))?;
                    counts.zero = counts.zero.saturating_add(count);
                }
            }
            self.arrived(range, part);
        }
        Ok(())
    }

    /// Pages that came a second time, or without their bytes once more, are dropped, and not without limit.
    // SPEC 13.7
    fn drop_again(&mut self, pages: u64) -> Result<(), Violation> {
        self.again = self.again.saturating_add(pages);
        self.guest.counts.again = self.guest.counts.again.saturating_add(pages);
        let all = self.guest.map.layout().pages();
        if self.again > all.saturating_mul(FAULTS_A_PAGE_MAX) {
            return Err(Violation::FaultFlood { faults: self.again, pages: all });
        }
        Ok(())
    }

    fn arrived(&mut self, range: PageRange, part: Range<u64>) {
        for page in part.clone() {
            let at = usize::try_from(page.saturating_sub(range.first.0)).unwrap_or(usize::MAX);
            let digest = self.digests.get(at).copied().unwrap_or_default();
            self.guest.map.arrive(range.region, page, digest);
        }
        let places = self.places(range.region, &part);
        self.guest.lacking.remove_range(places);
        let layout = self.guest.map.layout();
        let count = u32::try_from(part.end.saturating_sub(part.start)).unwrap_or(0);
        if let Ok(part) = layout.range(range.region.0, part.start, count) {
            self.wants.settle(layout, part);
        }
    }

    /// Brings those pages of a run that are lacking from what is held here, or wants them.
    // SPEC 13.8
    fn bring_run(&mut self, range: PageRange, run: Range<u64>) -> Result<(), ErrorKind> {
        for page in run {
            let one = page..page.saturating_add(1);
            if !self.guest.lacking.contains(self.places(range.region, &one).start) {
                continue;
            }
            let mut bytes: PageBytes = [0; PAGE_BYTES];
            if !self.fetch(range, page, &mut bytes) {
                self.wants.ask(self.guest.map.layout(), range.region, page, 1);
                continue;
            }
            self.guest.sink.install(range.region, page, &bytes).map_err(failed("a page cannot be installed"))?;
            self.guest.counts.local = self.guest.counts.local.saturating_add(1);
            self.arrived(range, one);
        }
        Ok(())
    }

    /// Reads a page of the frame from what is held here, by its digest; false if it is not here.
    fn fetch(&mut self, range: PageRange, page: u64, bytes: &mut PageBytes) -> bool {
        let at = usize::try_from(page.saturating_sub(range.first.0)).unwrap_or(usize::MAX);
        let digest = self.digests.get(at).copied().unwrap_or_default();
        if !self.guest.holds {
            return false;
        }
        // What is in memory may have been written by the guest: only the base is as it was.
        let Some(Found::Base(region, number)) = self.guest.map.find(&digest) else { return false };
        // What a disk cannot give back, or a store lost, the sender has.
        let is_read = self.guest.sink.read_old(region, number, bytes).is_ok();
        is_read && page_digest(self.guest.hasher.domain(), bytes) == digest
    }

    /// As [`place`](Self::place), where several pages are installed at once: what a frame brings is put together first.
    fn place_whole(&mut self, range: PageRange, pages: &Pages<'_>) -> Result<(), ErrorKind> {
        let size = usize::try_from(range.count).unwrap_or(0).saturating_mul(PAGE_BYTES);
        let mut whole = std::mem::take(&mut self.pages);
        whole.resize(size);
        let missing = self.put_together(range, pages, &mut whole);
        let mut install_units = || {
            let install = self.guest.map.layout().region(range.region).map_or(1, |region| region.install_size.pages());
            let install = u64::from(install);
            let (mut first, end) = (range.first.0, range.numbers().end);
            while first < end {
                let next = first.saturating_add(install).min(end);
                let is_stated = self.digest_at(range, first) != SKIPPED_DIGEST;
                if is_stated && missing.iter().any(|page| (first..next).contains(page)) {
                    self.wants.ask(self.guest.map.layout(), range.region, first, next.saturating_sub(first));
                } else if is_stated {
                    let offset =
                        |page: u64| usize::try_from(page.saturating_sub(range.first.0)).unwrap_or(0) * PAGE_BYTES;
                    let bytes = whole.get(offset(first)..offset(next)).unwrap_or_default();
                    self.install_run(range, first..next, Some(bytes))?;
                }
                first = next;
            }
            Ok(())
        };
        let result = install_units();
        self.pages = whole;
        result
    }

    fn digest_at(&self, range: PageRange, page: u64) -> Digest {
        let at = usize::try_from(page.saturating_sub(range.first.0)).unwrap_or(usize::MAX);
        self.digests.get(at).copied().unwrap_or_default()
    }

    /// Puts the bytes of a frame's pages in their order; says which of them are not here.
    fn put_together(&mut self, range: PageRange, pages: &Pages<'_>, whole: &mut PageBuffer) -> Vec<u64> {
        let mut missing = Vec::new();
        let mut offset = 0usize;
        let payload = std::mem::take(&mut self.payload);
        let inline = if pages.head.codec == Codec::NONE { pages.payload } else { &*payload };
        for (kind, run) in runs(pages) {
            for page in run {
                let at = usize::try_from(page.saturating_sub(range.first.0)).unwrap_or(0).saturating_mul(PAGE_BYTES);
                let Some(space) = whole.get_mut(at..).and_then(<[u8]>::first_chunk_mut::<PAGE_BYTES>) else { continue };
                match kind {
                    EntryKind::INLINE => {
                        let end = offset.saturating_add(PAGE_BYTES);
                        if let Some(bytes) = inline.get(offset..end).and_then(<[u8]>::first_chunk) {
                            *space = *bytes;
                        }
                        offset = end;
                    }
                    EntryKind::REFERENCE if self.fetch(range, page, space) => {}
                    EntryKind::REFERENCE => missing.push(page),
                    EntryKind::ZERO => space.fill(0),
                    _ => {}
                }
            }
        }
        self.payload = payload;
        missing
    }

    /// The pages of a frame that it states and that are lacking.
    fn lacking_runs(&self, range: PageRange, pages: &Pages<'_>) -> Vec<Range<u64>> {
        let stated = runs(pages).filter(|(kind, _)| *kind != EntryKind::SKIPPED);
        stated.flat_map(|(_, run)| self.lacking_parts(range.region, run)).collect()
    }

    pub(super) fn poll_ack(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        if lane.bulk_index().is_none_or(|index| index >= self.bulk_lanes) {
            return None;
        }
        let wants = self.wants.take(self.guest.map.layout(), LaneId::bulk(0));
        let state = self.lanes.get_mut(lane.index())?;
        let due = state.ack_due.is_some_and(|due| now >= due) || state.unacked_bytes >= self.ack_bytes;
        if wants.is_empty() && !due {
            return None;
        }
        (state.unacked_bytes, state.ack_due) = (0, None);
        Some(Outgoing::frame(&Frame::Ack(Ack { frames: state.frames, settled: state.frames, wants }), lane))
    }

    /// When the next acknowledgement is due.
    pub(super) fn ack_due(&self) -> Option<Time> {
        self.lanes.iter().filter_map(|lane| lane.ack_due).min()
    }
}

/// Pages that a frame says something of.
fn stated(pages: &Pages<'_>) -> u64 {
    pages.runs().filter(|run| run.kind != EntryKind::SKIPPED).map(|run| u64::from(run.count)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_acknowledged_while_its_window_has_room_for_frames() {
        for window in [1u64 << 20, 4 << 20, 64 << 20] {
            assert!(ack_bytes(window) <= window / 4, "{window}");
        }
        assert_eq!(ack_bytes(64 << 20), ACK_BYTES);
        // A window of one byte takes one frame: it has to be acknowledged, and nothing before it.
        for window in 1..10 {
            assert!((1..=window).contains(&ack_bytes(window)), "{window}");
        }
    }
}
