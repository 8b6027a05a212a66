//! The sender's lanes: frames in order, the window, the bandwidth cap, and batches that are being compressed.
//!
//! A lane sends its frames in the order they were planned, so a batch that compresses holds back those behind it, and a
//! page's number fixes its lane. All batches of a session together are few: they are its memory.

use crate::goodput::Goodput;
use crate::pace::Pace;
use crate::switch::Way;
use pagewire_protocol::challenge::PageProof;
use pagewire_protocol::compress::{Compressor, compress_delta};
use pagewire_protocol::digest::{Digest, PageBytes};
use pagewire_protocol::error::Violation;
use pagewire_protocol::frame::{Ack, Codec, EntryKind, Frame, FrameKind, HEADER_BYTES, LaneId, PagesHead, Run, seal};
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::RegionId;
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::{Job, Outgoing, Payload};
use pagewire_protocol::time::Time;
use std::collections::VecDeque;
use std::ops::Range;

/// Batches that may wait at once beside those being compressed: one being written, one ready, one being filled.
const READY_BATCHES_MAX: usize = 3;

/// A batch that was classified.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) head: PagesHead,
    pub(crate) runs: Vec<Run>,
    pub(crate) references: Vec<Digest>,
    /// Their proofs, or none.
    pub(crate) proofs: Vec<PageProof>,
    pub(crate) payload: Payload,
    /// Pages that were announced and may be wanted.
    pub(crate) announced: u32,
    /// What the inline pages were in the base, if they may travel as a delta, and as much room behind it.
    pub(crate) old: Option<PageBuffer>,
}

/// Compresses one batch, possibly on another thread.
#[derive(Debug)]
pub struct EncodeJob {
    lane: LaneId,
    batch: Batch,
    way: Way,
    /// The codecs that were agreed, as bits.
    codecs: u32,
    compressor: Compressor,
    out: Vec<u8>,
}

/// What came of an [`EncodeJob`].
#[derive(Debug)]
pub struct EncodeOutput {
    pub(crate) lane: LaneId,
    pub(crate) way: Way,
    pub(crate) raw: usize,
    pub(crate) compressed: usize,
    /// Pages that travel as a delta.
    pub(crate) deltas: Vec<(RegionId, Range<u64>)>,
    pub(crate) compressor: Compressor,
    spare: PageBuffer,
    old: Option<PageBuffer>,
    planned: Planned,
}

impl Job for EncodeJob {
    type Output = EncodeOutput;

    fn run(self) -> EncodeOutput {
        let Self { lane, mut batch, way, codecs, mut compressor, mut out } = self;
        let raw = batch.payload.len();
        let codec = match way {
            Way::Level(level) => {
                gather(&mut batch.payload);
                let pages = batch.payload.buffer.get(..raw).unwrap_or_default();
                compressor.compress(pages, level, &mut out).then_some(Codec::ZSTD)
            }
            Way::Delta => delta(&mut batch, codecs, &mut compressor, &mut out),
        };
        let compressed = if codec.is_some() { out.len() } else { raw };
        let mut spare = PageBuffer::from(out);
        if let Some(codec) = codec {
            batch.head.codec = codec;
            std::mem::swap(&mut spare, &mut batch.payload.buffer);
            batch.payload.ranges = std::iter::once(0..compressed).collect();
        }
        let pages = inline_pages(batch.head.first, &batch.runs).into_iter();
        let deltas = pages.filter(|_| batch.head.codec.is_delta());
        let deltas = deltas.map(|pages| (RegionId(batch.head.region), pages)).collect();
        let old = batch.old.take();
        let planned = Planned::new(batch, lane);
        EncodeOutput { lane, way, raw, compressed, deltas, compressor, spare, old, planned }
    }
}

/// The pages of a batch from `first` whose bytes go inline.
pub(crate) fn inline_pages(first: u64, runs: &[Run]) -> Vec<Range<u64>> {
    let mut next = first;
    let mut inline = Vec::new();
    for run in runs {
        let start = next;
        next = next.saturating_add(u64::from(run.count));
        if run.kind == EntryKind::INLINE {
            inline.push(start..next);
        }
    }
    inline
}

/// Makes `out` what differs in a batch from its old pages: in words where few have changed.
fn delta(batch: &mut Batch, codecs: u32, compressor: &mut Compressor, out: &mut Vec<u8>) -> Option<Codec> {
    let both = batch.old.as_deref_mut()?;
    let (old, room) = both.split_at_mut(both.len() / 2);
    let parts = batch.payload.ranges.iter().filter_map(|range| batch.payload.buffer.get(range.clone()));
    let pages = parts.flat_map(|part| part.as_chunks().0);
    let speaks = |codec: Codec| codecs & codec.bit() != 0;
    if speaks(Codec::WORDS) && compressor.compress_words(pages.clone(), old, out) {
        return Some(Codec::WORDS);
    }
    if !speaks(Codec::DELTA) {
        return None;
    }
    room.as_chunks_mut().0.iter_mut().zip(pages).for_each(|(space, page): (&mut PageBytes, _)| *space = *page);
    compress_delta(room, old, out).then_some(Codec::DELTA)
}

/// Moves the parts of a payload together at the front of its buffer.
fn gather(payload: &mut Payload) {
    let mut end = 0usize;
    for range in &payload.ranges {
        if range.start != end {
            payload.buffer.copy_within(range.clone(), end);
        }
        end = end.saturating_add(range.len());
    }
    payload.ranges = std::iter::once(0..end).collect();
}

/// A frame that is ready, and what its acknowledgement will say something about.
#[derive(Debug)]
struct Planned {
    outgoing: Outgoing,
    is_pages: bool,
    /// Bytes of the pages whose bytes it carries.
    pages: u64,
    region: u16,
    announced: u32,
}

impl Planned {
    fn new(batch: Batch, lane: LaneId) -> Self {
        let Batch { mut head, runs, references, proofs, payload, announced, .. } = batch;
        if !head.codec.is_delta() && runs.iter().all(|run| run.kind != EntryKind::SHIFTED) {
            head.shift = 0;
        }
        let inline = runs.iter().filter(|run| run.kind == EntryKind::INLINE).map(|run| u64::from(run.count));
        let pages = inline.sum::<u64>().saturating_mul(PAGE_BYTES as u64);
        let mut bytes = vec![0; HEADER_BYTES];
        head.encode(&runs, &references, &proofs, &mut bytes);
        seal(FrameKind::PAGES, lane, 0, payload.len(), &mut bytes);
        Self { outgoing: Outgoing { head: bytes, payload }, is_pages: true, pages, region: head.region, announced }
    }
}

/// A PAGES frame that is not acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InFlight {
    bytes: u64,
    payload: u64,
    /// Bytes of the pages whose bytes it carries.
    pages: u64,
    /// The region of its pages.
    pub(crate) region: u16,
    /// How many of them were announced.
    pub(crate) announced: u32,
    /// When it went out.
    since: Time,
}

#[derive(Debug, Default)]
struct Lane {
    /// Planned frames in order; `None` is one that is being compressed.
    slots: VecDeque<Option<Planned>>,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: u64,
    planned: u64,
    acked: u64,
    /// Those of them of which no page waits at the receiver.
    settled: u64,
}

/// All bulk lanes of a session.
#[derive(Debug)]
pub(crate) struct Lanes {
    lanes: Vec<Lane>,
    /// Bytes of PAGES frames that were acknowledged.
    delivered: u64,
    window: u64,
    batches_max: usize,
    pace: Option<Pace>,
    /// The codecs that were agreed, as bits.
    codecs: u32,
    jobs: VecDeque<EncodeJob>,
    compressors: Vec<Compressor>,
    buffers: Vec<PageBuffer>,
    /// Where compressed batches went, to be used again.
    outs: Vec<Vec<u8>>,
    pub(crate) goodput: Goodput,
}

impl Lanes {
    /// `count` lanes; `rate` caps bytes a second, `workers` is how many batches may be compressed at once.
    pub(crate) fn new(count: u8, window: u64, rate: Option<u64>, workers: usize) -> Self {
        Self {
            lanes: (0..count).map(|_| Lane::default()).collect(),
            delivered: 0,
            window,
            batches_max: READY_BATCHES_MAX.saturating_add(workers),
            pace: rate.map(Pace::new),
            codecs: Codec::NONE.bit(),
            jobs: VecDeque::new(),
            compressors: Vec::new(),
            buffers: Vec::new(),
            outs: Vec::new(),
            goodput: Goodput::default(),
        }
    }

    /// The same, where the receiver may run on the same processors.
    #[must_use]
    pub(crate) fn beside_receiver(self, shares_host: bool) -> Self {
        Self { goodput: Goodput::new(shares_host), ..self }
    }

    /// The same, with these codecs agreed, as bits.
    #[must_use]
    pub(crate) fn speaking(self, codecs: u32) -> Self {
        Self { codecs, ..self }
    }

    /// The lane of a page group.
    pub(crate) fn lane_of(&self, group: u64) -> LaneId {
        LaneId::bulk(u8::try_from(group.checked_rem(self.lanes.len() as u64).unwrap_or(0)).unwrap_or(0))
    }

    /// All lanes.
    pub(crate) fn ids(&self) -> impl Iterator<Item = LaneId> + use<> {
        (0..u8::try_from(self.lanes.len()).unwrap_or(0)).map(LaneId::bulk)
    }

    /// Whether another batch may be made.
    pub(crate) fn has_room(&self) -> bool {
        self.lanes.iter().map(|lane| lane.slots.len()).sum::<usize>() < self.batches_max
    }

    /// Bytes of PAGES frames that the receiver has applied.
    pub(crate) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Bytes of PAGES frames that have gone out and are not acknowledged.
    pub(crate) fn under_way(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.in_flight_bytes).sum()
    }

    /// Whether everything that was planned has gone out.
    pub(crate) fn is_sent(&self) -> bool {
        self.lanes.iter().all(|lane| lane.slots.is_empty())
    }

    /// Whether it is acknowledged, too.
    pub(crate) fn is_idle(&self) -> bool {
        self.is_sent() && self.lanes.iter().all(|lane| lane.in_flight.is_empty())
    }

    /// PAGES frames planned on a lane so far; the next one gets this number.
    pub(crate) fn planned(&self, lane: LaneId) -> u64 {
        self.lane(lane).map_or(0, |lane| lane.planned)
    }

    /// PAGES frames of a lane that the receiver has applied.
    pub(crate) fn acked(&self, lane: LaneId) -> u64 {
        self.lane(lane).map_or(0, |lane| lane.acked)
    }

    /// A buffer of `len` bytes with any content.
    pub(crate) fn buffer(&mut self, len: usize) -> PageBuffer {
        let mut buffer = self.buffers.pop().unwrap_or_default();
        buffer.resize(len);
        buffer
    }

    /// A buffer to be used again.
    pub(crate) fn recycle(&mut self, buffer: PageBuffer) {
        if buffer.is_unallocated() {
            return;
        }
        if !buffer.is_aligned() {
            if self.outs.len() < self.batches_max {
                self.outs.push(buffer.into());
            }
        } else if self.buffers.len() < self.batches_max {
            self.buffers.push(buffer);
        }
    }

    /// Sends a batch, compressed in a `way` if one is given.
    pub(crate) fn plan(&mut self, lane: LaneId, batch: Batch, way: Option<Way>) {
        let way = way.filter(|_| !batch.payload.is_empty());
        let compressor = way.and_then(|_| self.compressors.pop().or_else(|| Compressor::new().ok()));
        let out = compressor.as_ref().and_then(|_| self.outs.pop()).unwrap_or_default();
        let codecs = self.codecs;
        let Some(state) = self.lane_mut(lane) else { return };
        state.planned = state.planned.saturating_add(1);
        match (way, compressor) {
            (Some(way), Some(compressor)) => {
                state.slots.push_back(None);
                self.jobs.push_back(EncodeJob { lane, batch, way, codecs, compressor, out });
            }
            _ => state.slots.push_back(Some(Planned::new(batch, lane))),
        }
    }

    /// Sends a frame that is not PAGES behind everything planned.
    pub(crate) fn plan_frame(&mut self, lane: LaneId, frame: &Frame<'_>) {
        let outgoing = Outgoing::frame(frame, lane);
        if let Some(state) = self.lane_mut(lane) {
            state.slots.push_back(Some(Planned { outgoing, is_pages: false, pages: 0, region: 0, announced: 0 }));
        }
    }

    /// The next batch to compress.
    pub(crate) fn poll_job(&mut self) -> Option<EncodeJob> {
        self.jobs.pop_front()
    }

    /// A batch is compressed. Jobs end in the order they began, so it is the first of its lane that is awaited.
    pub(crate) fn encoded(&mut self, output: EncodeOutput) {
        let EncodeOutput { lane, compressor, spare, old, planned, .. } = output;
        self.compressors.push(compressor);
        old.into_iter().for_each(|buffer| self.recycle(buffer));
        self.recycle(spare);
        let slot = self.lane_mut(lane).and_then(|lane| lane.slots.iter_mut().find(|slot| slot.is_none()));
        if let Some(slot) = slot {
            *slot = Some(planned);
        }
    }

    /// The next frame of `lane`, if window and cap let it go.
    pub(crate) fn poll_frame(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        let (window, open) = (self.window, self.pace.as_ref().is_none_or(|pace| pace.is_open(now)));
        let state = self.lane_mut(lane)?;
        let bytes = state.slots.front()?.as_ref()?.outgoing.len() as u64;
        // SPEC 6.17
        let fits = state.in_flight.is_empty() || state.in_flight_bytes.saturating_add(bytes) <= window;
        if !fits || !open {
            return None;
        }
        let Planned { outgoing, is_pages, pages, region, announced } = state.slots.pop_front().flatten()?;
        if is_pages {
            let payload = outgoing.payload.len() as u64;
            state.in_flight.push_back(InFlight { bytes, payload, pages, region, announced, since: now });
            state.in_flight_bytes = state.in_flight_bytes.saturating_add(bytes);
        }
        if let Some(pace) = &mut self.pace {
            pace.spend(outgoing.len(), now);
        }
        self.goodput.unblock(now);
        Some(outgoing)
    }

    /// Nothing more can be made until a frame goes: the link is the brake if one is ready.
    pub(crate) fn note_full(&mut self, now: Time) {
        if self.lanes.iter().any(|lane| lane.slots.front().is_some_and(Option::is_some)) {
            self.goodput.block(now);
        }
    }

    /// The receiver has applied `frames` PAGES frames of `lane`; returns those that it had not before.
    pub(crate) fn acknowledge(&mut self, lane: LaneId, ack: &Ack, now: Time) -> Result<Vec<InFlight>, Violation> {
        let Ack { frames, settled, .. } = *ack;
        let Some(state) = self.lane_mut(lane) else { return Ok(Vec::new()) };
        let news = frames.checked_sub(state.acked).and_then(|news| usize::try_from(news).ok());
        let sent = state.acked.saturating_add(state.in_flight.len() as u64);
        // SPEC 6.16
        let Some(news) = news.filter(|&news| news <= state.in_flight.len()) else {
            return Err(Violation::Ack { got: frames, sent });
        };
        if settled < state.settled {
            return Err(Violation::Ack { got: settled, sent });
        }
        (state.acked, state.settled) = (frames, settled);
        let applied: Vec<InFlight> = state.in_flight.drain(..news).collect();
        let bytes = applied.iter().fold(0u64, |sum, frame| sum.saturating_add(frame.bytes));
        state.in_flight_bytes = state.in_flight_bytes.saturating_sub(bytes);
        self.delivered = self.delivered.saturating_add(bytes);
        let payload = applied.iter().fold(0u64, |sum, frame| sum.saturating_add(frame.payload));
        let pages = applied.iter().fold(0u64, |sum, frame| sum.saturating_add(frame.pages));
        let more = self.lanes.iter().map(|lane| lane.in_flight_bytes).sum();
        if let Some(first) = applied.first() {
            self.goodput.glimpse(payload, now.since(first.since));
        }
        self.goodput.delivered((payload, pages), more, now);
        Ok(applied)
    }

    /// Whether none of the acknowledged frames has a page that waits at the receiver and may be wanted yet.
    pub(crate) fn is_settled(&self) -> bool {
        self.lanes.iter().all(|lane| lane.settled == lane.acked)
    }

    /// When the bandwidth cap lets the next frame go, if one waits for it.
    pub(crate) fn poll_timeout(&self) -> Option<Time> {
        let waiting = self.lanes.iter().any(|lane| lane.slots.front().is_some_and(Option::is_some));
        self.pace.as_ref().filter(|_| waiting).map(Pace::opens_at)
    }

    fn lane(&self, lane: LaneId) -> Option<&Lane> {
        self.lanes.get(usize::from(lane.bulk_index()?))
    }

    fn lane_mut(&mut self, lane: LaneId) -> Option<&mut Lane> {
        self.lanes.get_mut(usize::from(lane.bulk_index()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::compress::{Decompressor, decompress_delta};

    /// A batch of pages of which one byte in `every` changed, and the codec that it goes under with these agreed.
    fn codec(every: usize, codecs: &[Codec]) -> Codec {
        let mut rng = 1u64;
        let mut noise = || {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            rng.to_le_bytes()[7]
        };
        let bytes = 8 * PAGE_BYTES;
        let old: Vec<u8> = (0..bytes).map(|_| noise()).collect();
        let mut new = old.clone();
        new.chunks_mut(every).for_each(|part| part[0] ^= 1);
        let mut both = PageBuffer::new(2 * bytes);
        both[..bytes].copy_from_slice(&old);
        // The pages lie apart in their buffer.
        let mut buffer = PageBuffer::new(2 * bytes);
        let ranges: Vec<Range<usize>> = (0..8).map(|page| 2 * page * PAGE_BYTES..(2 * page + 1) * PAGE_BYTES).collect();
        for (range, page) in ranges.iter().zip(new.chunks(PAGE_BYTES)) {
            buffer[range.clone()].copy_from_slice(page);
        }
        let head = PagesHead {
            round: 0,
            region: 0,
            codec: Codec::NONE,
            first: 0,
            count: 8,
            digest: Digest::default(),
            shift: 0,
        };
        let runs = vec![Run { kind: EntryKind::INLINE, count: 8 }];
        let payload = Payload { buffer, ranges };
        let (references, proofs) = Default::default();
        let batch = Batch { head, runs, references, proofs, payload, announced: 0, old: Some(both) };
        let bits = codecs.iter().fold(0, |bits, codec| bits | codec.bit());
        let mut lanes = Lanes::new(1, 1 << 20, None, 1).speaking(bits);
        lanes.plan(LaneId::bulk(0), batch, Some(Way::Delta));
        let output = lanes.poll_job().map(Job::run).unwrap();
        let sent = output.planned.outgoing;
        let body = [&sent.head[HEADER_BYTES..], &sent.payload.buffer[sent.payload.ranges[0].clone()]].concat();
        assert_eq!(output.deltas.is_empty(), output.compressed == output.raw);
        if sent.payload.ranges.len() > 1 {
            return Codec::NONE;
        }
        let pages = pagewire_protocol::frame::Pages::decode(&body).unwrap();
        assert_eq!(pages.payload.len(), output.compressed);
        let mut back = old.clone();
        match pages.head.codec {
            Codec::WORDS => Decompressor::new().unwrap().decompress_words(pages.payload, &mut back).unwrap(),
            _ => decompress_delta(pages.payload, &old, &mut back).unwrap(),
        }
        assert!(back == new);
        pages.head.codec
    }

    #[test]
    fn a_delta_is_in_words_where_few_changed_and_never_under_a_codec_that_was_not_agreed() {
        let (few, many, all) = (400, 30, 2);
        let both = [Codec::WORDS, Codec::DELTA];
        assert_eq!([few, many, all].map(|every| codec(every, &both)), [Codec::WORDS, Codec::DELTA, Codec::NONE]);
        assert_eq!([few, many].map(|every| codec(every, &[Codec::DELTA])), [Codec::DELTA; 2]);
        assert_eq!([few, many].map(|every| codec(every, &[Codec::WORDS])), [Codec::WORDS, Codec::NONE]);
        assert_eq!(codec(few, &[]), Codec::NONE);
    }
}
