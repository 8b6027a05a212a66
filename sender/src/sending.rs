//! What the sender does while pages travel: wants first, then the next part of the image, then the end of the round.
//!
//! One step reads at most one batch, digests it while it is hot, and plans at most one frame from that copy. Bytes that
//! go out are the bytes that were digested. Memory at rest that changes between two looks at it is an error.

use crate::base::Base;
use crate::classify::{Cover, Entries, SentPages};
use crate::engine::SenderConfig;
use crate::error::ErrorKind;
use crate::holdings::{Held, Holdings};
use crate::lanes::{Batch, EncodeOutput, Lanes, inline_pages};
use crate::leave::Leaving;
use crate::memory::GuestMemory;
use crate::report::{Counts, Decision};
use crate::reuse::{Reuse, Stated, between};
use crate::rounds::Rounds;
use crate::switch::{AnnounceSwitch, CompressSwitch, Way};
use crate::tally::Tally;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::challenge::Challenge;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::error::{DecodeError, PeerError, Violation};
use pagewire_protocol::frame::{
    Accept, Ack, Codec, EntryKind, Frame, FrameKind, LaneId, PagesHead, Root, RoundEnd, Run,
};
use pagewire_protocol::limits::{COVER_PAGES_MAX, PAGE_BYTES, RUNS_MAX, SUBTREE_PAGES, WANTS_A_PAGE_MAX};
use pagewire_protocol::page::{GROUP_PAGES, Layout, PageNumber, PageRange, Region, RegionId};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::time::Time;
use pagewire_protocol::tree::{DigestTree, Manifest, image_root, live_root};
use std::ops::Range;

/// What a step did.
#[derive(Debug)]
pub(crate) enum Step {
    /// Something; there may be more.
    Did,
    /// It waits for the receiver or the link.
    Waits,
    /// A round was judged, and the next begins.
    Judged,
    /// The guest has to stand still now.
    Pause,
    /// The guest has to be slowed down to so many per cent less.
    Throttle(u8),
    /// Everything is stated: this is the root.
    Stated(Root),
}

/// How a batch is sent beyond its entries.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    /// Its references are announcements.
    announced: bool,
    /// Where in the base its pages were.
    shift: i64,
    /// Its inline pages may go as a delta against them.
    delta: bool,
}

/// The base that both sides know, with its digests if they were read ahead.
#[derive(Debug)]
pub(crate) struct AgreedBase {
    pub(crate) base: Box<dyn Base>,
    pub(crate) ahead: Option<Vec<DigestTree>>,
}

/// What is true while pages travel.
#[derive(Debug)]
pub(crate) struct Sending<M> {
    pub(crate) memory: M,
    pub(crate) layout: Layout,
    pub(crate) hasher: PageHasher,
    pub(crate) trees: Vec<DigestTree>,
    /// The rounds, if the guest runs.
    pub(crate) rounds: Option<Rounds>,
    /// What goes with the memory of a guest that runs.
    pub(crate) blobs: Blobs,
    /// The image root, once all is stated; ROOT of a live session covers blobs as well.
    pub(crate) image: Digest,
    holdings: Holdings,
    /// The base, if both sides know its manifest: `trees` begin with its digests then.
    reuse: Option<Reuse>,
    /// The receiver has pages of other guests, for whoever proves that it has them too.
    challenge: Option<Challenge>,
    pub(crate) sent: SentPages,
    pub(crate) lanes: Lanes,
    compress: CompressSwitch,
    announce: Vec<AnnounceSwitch>,
    /// Places wanted and not answered yet.
    pub(crate) wants: PageBitmap,
    /// Places wanted before: their next answer carries the bytes, whatever was sent elsewhere.
    pub(crate) wanted: PageBitmap,
    cover: Option<Cover>,
    pub(crate) region: RegionId,
    pub(crate) next: u64,
    /// The guest may start before all of its pages are there.
    pub(crate) post_copy: bool,
    /// What is left behind, once it is.
    pub(crate) leaving: Option<Leaving>,
    batch_pages: u64,
    pub(crate) digests: Vec<Digest>,
    pub(crate) ended: bool,
    pub(crate) tally: Tally,
    pub(crate) counts: Counts,
    pub(crate) decisions: Vec<Decision>,
}

impl<M: GuestMemory> Sending<M> {
    pub(crate) fn new(
        (mut memory, rounds): (M, Option<Rounds>),
        accept: &Accept,
        agreed: Option<AgreedBase>,
        config: &SenderConfig,
        (hasher, codecs): (PageHasher, u32),
    ) -> Self {
        let layout = memory.layout().clone();
        let zstd = codecs & Codec::ZSTD.bit() != 0;
        let mut trees: Vec<_> =
            layout.regions().iter().map(|region| DigestTree::new(&hasher, region.pages())).collect();
        let is_agreed = agreed.is_some();
        let reuse = agreed.and_then(|AgreedBase { mut base, ahead }| {
            let of_base = ahead.or_else(|| base.trees(&hasher).ok())?.into_iter();
            trees = of_base.zip(layout.regions()).map(|(tree, region)| tree.resized(&hasher, region.pages())).collect();
            let deltas = codecs & (Codec::DELTA.bit() | Codec::WORDS.bit()) != 0;
            let mut reuse = Reuse::new(base, &layout, accept.base_stays, deltas, config.seed);
            let (root, session) = reuse.identity();
            reuse.hint(memory.unchanged_since(&root, &session).filter(|hint| hint.len() == layout.pages()));
            Some(reuse)
        });
        Self {
            trees,
            hasher,
            rounds,
            blobs: Blobs::new(),
            image: Digest::default(),
            reuse,
            // Nothing is announced of an agreed base.
            holdings: Holdings::new(&layout, if is_agreed { &[] } else { &accept.held_pages }),
            challenge: accept.challenge.map(|random| Challenge::new(&random, &config.session, &config.domain_key)),
            sent: SentPages::new(&layout, config.dedup.then_some(config.seed), !is_agreed),
            lanes: Lanes::new(accept.lanes, accept.window, config.bandwidth_limit, config.workers)
                .beside_receiver(config.shares_host)
                .speaking(codecs),
            compress: CompressSwitch::new(config.compress && zstd, config.workers),
            announce: layout.regions().iter().map(|_| AnnounceSwitch::default()).collect(),
            wants: PageBitmap::new(layout.pages()),
            wanted: PageBitmap::new(layout.pages()),
            cover: None,
            region: RegionId(0),
            next: 0,
            post_copy: accept.post_copy,
            leaving: None,
            batch_pages: u64::from(config.batch_pages),
            digests: Vec::new(),
            ended: false,
            tally: Tally::new(layout.pages()),
            counts: Counts::default(),
            decisions: Vec::new(),
            memory,
            layout,
        }
    }

    pub(crate) fn handle_have(&mut self, have: &pagewire_protocol::frame::Have) -> Result<(), ErrorKind> {
        Ok(self.holdings.handle_have(have)?)
    }

    pub(crate) fn handle_ack(&mut self, lane: LaneId, ack: &Ack, now: Time) -> Result<(), ErrorKind> {
        let applied = self.lanes.acknowledge(lane, ack, now)?;
        self.rounds.iter_mut().for_each(|rounds| rounds.note_last(&self.lanes, now));
        for want in &ack.wants {
            let malformed = |source: DecodeError| PeerError::Decode { kind: FrameKind::ACK, source };
            let range = self.layout.range(want.region, want.first, want.count).map_err(malformed)?;
            let (region, first) = (want.region, want.first);
            if !self.is_stated(range) {
                return Err(Violation::Entry { what: "want of a page that was not stated", region, first }.into());
            }
            self.counts.wants = self.counts.wants.saturating_add(u64::from(range.count));
            let first = u64::from(self.layout.place(range.region, first).0);
            self.wants.insert_range(first..first.saturating_add(u64::from(range.count)));
        }
        let pages = self.layout.pages();
        // SPEC 6.12
        let rounds = self.rounds.as_ref().map_or(0, |rounds| u64::from(rounds.number)).saturating_add(1);
        if self.counts.wants > pages.saturating_mul(WANTS_A_PAGE_MAX).saturating_mul(rounds) {
            return Err(Violation::WantFlood { wants: self.counts.wants, pages }.into());
        }
        let settled = self.lanes.is_settled();
        for (at, switch) in self.announce.iter_mut().enumerate() {
            let of_region = |region: u16| usize::from(region) == at;
            let announced =
                applied.iter().filter(|frame| of_region(frame.region)).map(|frame| u64::from(frame.announced)).sum();
            let wanted = ack.wants.iter().filter(|want| of_region(want.region)).map(|want| u64::from(want.count)).sum();
            let costs = (&self.compress, &self.lanes.goodput);
            switch.note(announced, wanted);
            if settled {
                switch.judge(u16::try_from(at).unwrap_or(0), costs, now, &mut self.decisions);
            }
        }
        Ok(())
    }

    pub(crate) fn handle_encoded(&mut self, output: EncodeOutput, spent: pagewire_protocol::time::Span) {
        self.compress.measured(output.way, output.raw, output.compressed, spent);
        for (region, pages) in &output.deltas {
            let first = u64::from(self.layout.place(*region, pages.start).0);
            self.tally.delta(first..first.saturating_add(pages.end.saturating_sub(pages.start)));
        }
        self.counts.payload_bytes = self.counts.payload_bytes.saturating_add(output.compressed as u64);
        self.lanes.encoded(output);
    }

    /// Whether every page of a range has been stated, in a frame that is planned.
    fn is_stated(&self, range: PageRange) -> bool {
        let end = if range.region < self.region { u64::MAX } else { self.next };
        range.region <= self.region && range.numbers().end <= end
    }

    /// One bounded step.
    pub(crate) fn step(&mut self, now: Time) -> Result<Step, ErrorKind> {
        if !self.lanes.has_room() {
            self.lanes.note_full(now);
            return Ok(Step::Waits);
        }
        if let Some(range) = self.next_want() {
            return self.answer(range, now).map(|()| Step::Did);
        }
        if self.rounds.as_ref().is_some_and(Rounds::leaves_at_once) {
            return Ok(self.pause_at_once());
        }
        if let Some(step) = self.leave_next()? {
            return Ok(step);
        }
        self.sample(now)?;
        if let Some(range) = self.next_range() {
            return self.state(range, now);
        }
        if let Some(range) = self.next_again() {
            return self.state_again(range, now);
        }
        if self.ended {
            return Ok(Step::Waits);
        }
        if self.rounds.is_some() {
            return self.end_live_round(now);
        }
        self.memory.check_unchanged().map_err(ErrorKind::Source)?;
        self.ended = true;
        self.end_round().map(Step::Stated)
    }

    /// Pages of a batch: what stays in cache, or what compresses well on its own.
    pub(crate) fn step_pages(&self) -> u64 {
        if self.compress.wants_large() { self.batch_pages.max(SUBTREE_PAGES as u64) } else { self.batch_pages }
    }

    /// The next part of the image: whole install pages inside one group, whole subtrees where something is held.
    // SPEC 6.18
    fn next_range(&mut self) -> Option<PageRange> {
        loop {
            let region = *self.layout.region(self.region)?;
            let left = region.pages().saturating_sub(self.next);
            if left > 0 {
                let held = self.reuse.as_ref().is_some_and(Reuse::is_quiet)
                    || self.holdings.look(self.region, self.next / SUBTREE_PAGES as u64) != Held::Nothing;
                let least = u64::from(region.install_size.pages()).max(if held { SUBTREE_PAGES as u64 } else { 1 });
                let step = self.step_pages().max(least).min(GROUP_PAGES);
                let border = (self.next / step).saturating_add(1).saturating_mul(step);
                let pages = border.saturating_sub(self.next).max(self.span(region)).min(left);
                let count = u32::try_from(pages).unwrap_or(0);
                return Some(PageRange { region: self.region, first: PageNumber(self.next), count });
            }
            self.region = RegionId(self.region.0.saturating_add(1));
            self.next = 0;
        }
    }

    /// Pages that one frame may state because most of them are known to be unchanged. With several lanes each frame
    /// keeps to its group.
    fn span(&self, region: Region) -> u64 {
        let reuse = self.reuse.as_ref().filter(|_| self.lanes.ids().count() == 1);
        let span = reuse.and_then(|reuse| reuse.span(&self.layout, self.region, self.next)).unwrap_or(0);
        let install = u64::from(region.install_size.pages()).max(1);
        span / install * install
    }

    /// Reads, digests and states the next part.
    fn state(&mut self, range: PageRange, now: Time) -> Result<Step, ErrorKind> {
        if self.reuse.is_some() {
            return self.state_on_base(range, now);
        }
        let subtrees = subtrees(range);
        let held: Vec<Held> = subtrees.clone().map(|subtree| self.holdings.look(range.region, subtree)).collect();
        if held.contains(&Held::Unknown) {
            return Ok(Step::Waits);
        }
        let buffer = self.read(range)?;
        self.next = range.numbers().end;
        let Some(tree) = self.trees.get_mut(usize::from(range.region.0)) else { return Ok(Step::Did) };
        for (page, digest) in range.numbers().zip(&self.digests) {
            tree.set(page, *digest);
        }
        let covers_subtrees = range.first.0.is_multiple_of(SUBTREE_PAGES as u64);
        if covers_subtrees && subtrees.zip(&held).all(|(subtree, held)| *held == Held::Digest(tree.subtree(subtree))) {
            self.lanes.recycle(buffer);
            self.state_equal(range);
            return Ok(Step::Did);
        }
        let announce = (self.challenge.is_some() || held.iter().any(|held| *held != Held::Nothing))
            && self.announce.get_mut(usize::from(range.region.0)).is_some_and(AnnounceSwitch::choose);
        self.state_pages(range, buffer, announce, now);
        Ok(Step::Did)
    }

    /// Reads what may have changed since the agreed base, and states it all.
    fn state_on_base(&mut self, range: PageRange, now: Time) -> Result<Step, ErrorKind> {
        let known = self.reuse.as_ref().map(|reuse| reuse.known_parts(&self.layout, range)).unwrap_or_default();
        let buffer = self.read_on_base(range, &known, now)?;
        self.next = range.numbers().end;
        let Some(reuse) = self.reuse.as_mut() else { return Ok(Step::Did) };
        let Stated { kinds, shift } =
            reuse.classify(range, &self.digests, &known, &self.hasher, (&self.layout, &self.trees));
        if kinds.iter().all(|kind| *kind == EntryKind::BASE) {
            self.lanes.recycle(buffer);
            let count = u16::try_from(range.count).unwrap_or(0);
            let runs = [Run { kind: EntryKind::BASE, count }];
            self.note(range, &runs);
            self.cover(range, &runs);
            return Ok(Step::Did);
        }
        self.flush_cover();
        let lane = self.lanes.lane_of(self.layout.group(range.region, range.first.0));
        let mut entries = Entries::over(buffer);
        let mut next = range.first.0;
        let read = between(range.numbers(), &known).flatten();
        for (slot, ((page, &digest), kind)) in read.zip(&self.digests).zip(kinds).enumerate() {
            entries.push_many(EntryKind::BASE, page.saturating_sub(next));
            next = page.saturating_add(1);
            let place = self.layout.place(range.region, page);
            if kind != EntryKind::BASE
                && let Some(tree) = self.trees.get_mut(usize::from(range.region.0))
            {
                tree.set(page, digest);
            }
            let gone = kind == EntryKind::INLINE
                && self.sent.has_gone(&digest, place, lane, (&self.layout, &self.trees, &self.lanes));
            entries.push(if gone { EntryKind::REFERENCE } else { kind }, slot, digest);
        }
        entries.push_many(EntryKind::BASE, range.numbers().end.saturating_sub(next));
        self.send(range, lane, entries, Sent { shift, delta: true, ..Sent::default() }, now);
        // Nodes over whole subtrees are hashed now, not when everybody waits for the root.
        if let Some(tree) = self.trees.get_mut(usize::from(range.region.0)) {
            let pages = range.numbers();
            tree.hash_subtrees(pages.start / SUBTREE_PAGES as u64..pages.end / SUBTREE_PAGES as u64);
        }
        Ok(Step::Did)
    }

    /// Copies out, one after the other, and digests what of a range may have changed since the base: what lies between
    /// the known parts.
    fn read_on_base(&mut self, range: PageRange, known: &[Range<u64>], now: Time) -> Result<PageBuffer, ErrorKind> {
        let bytes = |part: &Range<u64>| {
            usize::try_from(part.end.saturating_sub(part.start)).unwrap_or(0).saturating_mul(PAGE_BYTES)
        };
        let total = between(range.numbers(), known).map(|part| bytes(&part)).sum();
        let mut buffer = self.lanes.buffer(total);
        self.digests.clear();
        let mut filled = 0usize;
        for part in between(range.numbers(), known) {
            let end = filled.saturating_add(bytes(&part));
            let space = buffer.get_mut(filled..end).unwrap_or_default();
            self.copy_out(range.region, part.start, space)?;
            filled = end;
        }
        self.hasher.digest_nonzero(buffer.as_chunks().0, &mut self.digests);
        let unread: u64 = known.iter().map(|part| part.end.saturating_sub(part.start)).sum();
        self.counts.unread = self.counts.unread.saturating_add(unread);
        self.check_hinted(range, known, now)?;
        Ok(buffer)
    }

    /// Holds those of the read pages that memory said to be unchanged against the base.
    fn check_hinted(&mut self, range: PageRange, known: &[Range<u64>], now: Time) -> Result<(), ErrorKind> {
        let (Some(reuse), Some(tree)) = (&self.reuse, self.trees.get(usize::from(range.region.0))) else {
            return Ok(());
        };
        let read = between(range.numbers(), known).flatten().zip(&self.digests);
        let hinted = read.filter(|(page, _)| reuse.is_hinted(&self.layout, range.region, *page));
        let (mut sampled, mut other) = (0u64, Vec::new());
        for (page, digest) in hinted {
            sampled = sampled.saturating_add(1);
            other.extend((tree.leaf(page) != *digest).then_some(page));
        }
        self.counts.sampled = self.counts.sampled.saturating_add(sampled);
        for page in other {
            if !self.was_written(range.region, page, now)? {
                let message = format!("page {page} was said to be unchanged since the base, and is not");
                return Err(ErrorKind::Source(std::io::Error::other(message)));
            }
        }
        Ok(())
    }

    /// States pages whose subtrees are equal: those that are held as base, and those beyond, which are zero.
    fn state_equal(&mut self, range: PageRange) {
        let held = self.holdings.pages(range.region).saturating_sub(range.first.0).min(u64::from(range.count));
        let beyond = u64::from(range.count).saturating_sub(held);
        let run = |kind, pages| Run { kind, count: u16::try_from(pages).unwrap_or(0) };
        let runs = [run(EntryKind::BASE, held), run(EntryKind::ZERO, beyond)];
        let runs: Vec<Run> = runs.into_iter().filter(|run| run.count > 0).collect();
        self.note(range, &runs);
        self.cover(range, &runs);
    }

    /// States pages one by one.
    fn state_pages(&mut self, range: PageRange, buffer: PageBuffer, announce: bool, now: Time) {
        let lane = self.lanes.lane_of(self.layout.group(range.region, range.first.0));
        let mut entries = Entries::over(buffer);
        let all_zero = self.digests.iter().all(|digest| *digest == self.hasher.zero());
        if !all_zero {
            // The frame under construction comes behind it: frame numbers taken below count on that.
            self.flush_cover();
            self.sent.fetch(&self.digests);
        }
        for (at, (page, &digest)) in range.numbers().zip(&self.digests).enumerate() {
            let place = self.layout.place(range.region, page);
            let kind = if digest == self.hasher.zero() {
                EntryKind::ZERO
            } else if announce || self.sent.has_gone(&digest, place, lane, (&self.layout, &self.trees, &self.lanes)) {
                EntryKind::REFERENCE
            } else {
                EntryKind::INLINE
            };
            entries.push(kind, at, digest);
        }
        if let Some(challenge) = self.challenge.as_ref().filter(|_| announce) {
            entries.prove(challenge, &self.hasher, &self.digests);
        }
        self.send(range, lane, entries, Sent { announced: announce, ..Sent::default() }, now);
    }

    /// Copies a range out and digests that copy into `digests`: what is sent are the bytes that were digested.
    // SPEC 6.6
    pub(crate) fn read(&mut self, range: PageRange) -> Result<PageBuffer, ErrorKind> {
        let count = usize::try_from(range.count).unwrap_or(0);
        let mut buffer = self.lanes.buffer(count.saturating_mul(PAGE_BYTES));
        self.digests.clear();
        self.copy_out(range.region, range.first.0, &mut buffer)?;
        self.hasher.digest_nonzero(buffer.as_chunks().0, &mut self.digests);
        Ok(buffer)
    }

    pub(crate) fn send(&mut self, range: PageRange, lane: LaneId, entries: Entries, how: Sent, now: Time) {
        let found = u64::from(entries.shifted).saturating_add(entries.references.len() as u64);
        self.note(range, &entries.runs);
        let skips = entries.runs.iter().any(|run| run.kind == EntryKind::SKIPPED);
        if entries.inline == 0 && found == 0 && !skips {
            self.lanes.recycle(entries.payload.buffer);
            return self.cover(range, &entries.runs);
        }
        self.flush_cover();
        let digest = entries.digest((self.hasher.domain(), self.reuse.is_some()), range.first.0);
        let Entries { runs, references, proofs, inline, payload, .. } = entries;
        let head = PagesHead { shift: how.shift, ..self.head(range, digest) };
        let announced = if how.announced { u32::try_from(references.len()).unwrap_or(0) } else { 0 };
        let bytes = payload.len();
        let delta = Some(bytes).filter(|_| how.delta && self.reuse.as_ref().is_some_and(Reuse::has_deltas));
        let way = match inline {
            0 => None,
            _ => self.compress.choose(delta, &self.lanes.goodput, now, &mut self.decisions),
        };
        let old = way.filter(|way| *way == Way::Delta).and_then(|_| self.old_pages(range, &runs, how.shift));
        let way = way.filter(|way| *way != Way::Delta || old.is_some());
        self.counts.inline_bytes = self.counts.inline_bytes.saturating_add(bytes as u64);
        if way.is_none() {
            self.counts.payload_bytes = self.counts.payload_bytes.saturating_add(bytes as u64);
        }
        self.lanes.plan(lane, Batch { head, runs, references, proofs, payload, announced, old }, way);
    }

    /// What the inline pages of a batch were in the base, with room behind it for what they are.
    fn old_pages(&mut self, range: PageRange, runs: &[Run], shift: i64) -> Option<PageBuffer> {
        let inline = inline_pages(range.first.0, runs);
        let pages = inline.iter().fold(0u64, |sum, run| sum.saturating_add(run.end.saturating_sub(run.start)));
        let bytes = usize::try_from(pages).ok()?.saturating_mul(PAGE_BYTES);
        let mut buffer = self.lanes.buffer(bytes.saturating_mul(2));
        if self.reuse.as_mut()?.old_pages(range.region, &inline, shift, buffer.get_mut(..bytes)?) {
            return Some(buffer);
        }
        self.lanes.recycle(buffer);
        None
    }

    /// Adds pages that need no look to the run of them that is under way.
    fn cover(&mut self, range: PageRange, runs: &[Run]) {
        // With several lanes a later round of one must never be overtaken by a frame of another: each keeps to its groups.
        let new_group = range.first.0.is_multiple_of(GROUP_PAGES) && self.lanes.ids().count() > 1;
        let cover = self.cover.as_mut().filter(|_| !new_group);
        if cover.is_some_and(|cover| cover.extend(range, runs, COVER_PAGES_MAX, RUNS_MAX)) {
            return;
        }
        self.flush_cover();
        self.cover = Some(Cover { range, runs: runs.to_vec() });
    }

    pub(crate) fn flush_cover(&mut self) {
        let Some(Cover { range, runs }) = self.cover.take() else { return };
        let Some(tree) = self.trees.get(usize::from(range.region.0)) else { return };
        let head = self.head(range, tree.batch(self.reuse.is_some(), range.first.0, &runs));
        let lane = self.lanes.lane_of(self.layout.group(range.region, range.first.0));
        let (references, proofs, payload) = Default::default();
        let batch = Batch { head, runs, references, proofs, payload, announced: 0, old: None };
        self.lanes.plan(lane, batch, None);
    }

    pub(crate) fn head(&self, range: PageRange, digest: Digest) -> PagesHead {
        PagesHead {
            round: self.round(),
            region: range.region.0,
            codec: Codec::NONE,
            first: range.first.0,
            count: range.count,
            digest,
            shift: 0,
        }
    }

    /// The last round ends, and with it the image.
    pub(crate) fn end_round(&mut self) -> Result<Root, ErrorKind> {
        self.flush_cover();
        self.push_round_ends();
        self.image = image_root(self.hasher.domain(), &self.layout, &mut self.trees);
        // SPEC 12.4
        let live = self.rounds.is_some();
        let digest = if live { live_root(self.hasher.domain(), self.image, &self.blobs) } else { self.image };
        Ok(Root { round: self.round(), pages: self.layout.pages(), digest })
    }

    /// The round under way ends on every lane.
    // SPEC 6.19
    pub(crate) fn push_round_ends(&mut self) {
        for lane in self.lanes.ids() {
            let end = RoundEnd { round: self.round(), frames: self.lanes.planned(lane) };
            self.lanes.plan_frame(lane, &Frame::Round(end));
        }
    }

    fn round(&self) -> u32 {
        self.rounds.as_ref().map_or(0, |rounds| rounds.number)
    }

    /// What was done so far.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = self.counts;
        self.tally.fill(&mut counts);
        counts
    }

    /// The pages of these runs are stated.
    pub(crate) fn note(&mut self, range: PageRange, runs: &[Run]) {
        let mut next = u64::from(self.layout.place(range.region, range.first.0).0);
        for run in runs {
            let first = next;
            next = next.saturating_add(u64::from(run.count));
            if run.kind != EntryKind::SKIPPED {
                self.tally.state(first..next, run.kind);
            }
        }
    }

    /// Pages stated so far, and pages of the image; for progress.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.tally.stated(), self.layout.pages())
    }

    /// The regions, and the digests of all pages as they were stated.
    pub(crate) fn into_manifest(self) -> Manifest {
        Manifest { root: self.image, layout: self.layout, trees: self.trees }
    }

    /// What the session started from, for the report.
    pub(crate) fn explain_start(&mut self, now: Time) {
        let what = if self.reuse.is_some() {
            "build on an earlier image that both sides know"
        } else if self.holdings.any() {
            "compare with what the receiver holds"
        } else {
            "send everything: the receiver holds nothing"
        };
        self.decisions.push(Decision { at: now, what: what.to_owned() });
    }
}

/// The subtrees that a range touches.
fn subtrees(range: PageRange) -> std::ops::Range<u64> {
    let pages = range.numbers();
    pages.start / SUBTREE_PAGES as u64..pages.end.div_ceil(SUBTREE_PAGES as u64)
}
