//! What the receiver does while pages come: judges where they lie, has them resolved, and sees when all are there.
//!
//! Nothing of a frame is applied before the part of the base that it speaks of has been read, and nothing is complete
//! before every page is present under the sender's root.

use crate::bring::Wish;
use crate::engine::{Agreed, FinishJob, Terms};
use crate::error::ErrorKind;
use crate::fill::{Incomplete, Touches};
use crate::memory::GuestSink;
use crate::page_map::{Found, PageMap};
use crate::report::{Counts, FillCounts};
use crate::resolve::{Base, Others, Resolved, Resolver, Target, runs};
use crate::scan::Scan;
use crate::waiting::{Source, Turn, Waiting};
use crate::wants::Wants;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::challenge::Challenge;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::error::{DecodeError, PeerError, Violation};
use pagewire_protocol::frame::{
    Accept, Ack, Blob, EntryKind, Frame, FrameKind, Have, LaneId, LiveOpen, Open, Pages, Root, RoundEnd,
};
use pagewire_protocol::handover::{Handover, HostId};
use pagewire_protocol::limits::{ACK_BYTES, ACK_DELAY_MAX, HANDSHAKE_SPAN_MAX, PAGE_BYTES, SUBTREE_PAGES};
use pagewire_protocol::page::{GROUP_PAGES, Layout, PageNumber, PageRange, Place, RegionId, common_pages};
use pagewire_protocol::session::Outgoing;
use pagewire_protocol::time::{Span, Time};
use pagewire_protocol::tree::live_root;
use std::io;
use std::ops::Range;

/// Lowest nodes of trees that one step hashes: half a millisecond.
const NODES_A_STEP: u64 = 256;
/// PAGES frames of a lane that are acknowledged without waiting for more.
const ACK_AT_ONCE: u64 = 8;
/// Pages that have waited and get their turn in one step: as much as a step of the scan reads.
const TURN_PAGES: usize = SUBTREE_PAGES;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lane {
    pub(crate) joined: bool,
    /// Rounds that have ended here, and so the round that is due.
    pub(crate) ended: u32,
    /// The round of the last pages.
    pub(crate) round: u32,
    pub(crate) frames: u64,
    /// How many of them came before the first that left pages waiting, if any wait.
    pub(crate) settled: Option<u64>,
    pub(crate) unacked_bytes: u64,
    pub(crate) ack_due: Option<Time>,
}

impl Lane {
    /// The round that is due ends here; the last that there is a number for never does, as none could be due after it.
    // SPEC 6.20
    fn end(&mut self, end: RoundEnd) -> Result<(), Violation> {
        let next = self.ended.checked_add(1).filter(|_| end.round == self.ended);
        let Some(next) = next else { return Err(Violation::Round { got: end.round, expected: self.ended }) };
        if end.frames != self.frames {
            return Err(Violation::Ack { got: end.frames, sent: self.frames });
        }
        self.ended = next;
        Ok(())
    }
}

/// What is true while an image is received.
#[derive(Debug)]
pub(crate) struct Receiving<S> {
    pub(crate) open: Open,
    pub(crate) secret: [u8; 32],
    /// The codecs that were agreed, as bits.
    pub(crate) codecs: u32,
    pub(crate) hasher: PageHasher,
    pub(crate) map: PageMap,
    pub(crate) scan: Scan,
    pub(crate) base: Base,
    pub(crate) wants: Wants,
    pub(crate) waiting: Waiting,
    pub(crate) resolver: Resolver,
    pub(crate) others: Option<Others>,
    pub(crate) lanes: [Lane; LaneId::COUNT],
    pub(crate) bulk_lanes: u8,
    /// When something was last stated, or read from the base.
    pub(crate) moved: Time,
    /// Until when every granted lane must have joined.
    pub(crate) joined_until: Time,
    pub(crate) root: Option<Root>,
    /// What comes with the memory of a guest that runs.
    pub(crate) blobs: Blobs,
    /// The image root, once all is present.
    pub(crate) image: Digest,
    /// The guest may start before all of its pages are there.
    pub(crate) post_copy: bool,
    /// This host, for a guest that is handed over.
    pub(crate) host: Option<HostId>,
    /// All of it is present, verified and lasting.
    pub(crate) lasts: bool,
    /// A round of a guest that runs has ended: nodes of trees may be left to hash, while nobody waits for the root.
    hashes: bool,
    /// Gone while the finish job has it.
    pub(crate) sink: Option<S>,
    pub(crate) finish: Option<FinishJob<S>>,
}

fn unreadable(source: io::Error) -> ErrorKind {
    ErrorKind::Destination { what: "base cannot be read", source }
}

impl<S: GuestSink> Receiving<S> {
    /// What an image that was offered goes into, and the ACCEPT that says so, but for its transcript.
    pub(crate) fn new(
        open: Open,
        terms: Terms<S>,
        (codecs, can_wait): (u32, bool),
        now: Time,
    ) -> io::Result<(Self, Accept)> {
        let Terms { sink, lanes, window, secret, seed, agreed, others, challenge, host } = terms;
        let host = host.filter(|_| open.live.is_some());
        // SPEC 4.22
        let post_copy = can_wait && sink.can_wait() && open.live.is_some_and(|live| live.post_copy);
        let proved = || Challenge::new(&challenge, &open.session, &open.domain_key);
        let others = others.map(|pages| Others { pages, challenge: proved() });
        let regions = (0..).map(RegionId).take(open.layout.regions().len());
        let base: Vec<u64> = regions.map(|region| sink.base_pages(region)).collect();
        // SPEC 4.14
        let held: Vec<u64> = base.iter().map(|&pages| if open.fresh { 0 } else { pages }).collect();
        let agreed = agreed.filter(|agreed| suits(agreed, &open, &held));
        let trusted = agreed.as_ref().is_some_and(|agreed| agreed.trusted) && sink.base_in_place();
        let stays = sink.base_stays() && !open.fresh;
        let accept = Accept {
            transcript: open.transcript,
            secret,
            lanes: lanes.clamp(1, open.lanes),
            window,
            held_pages: held.clone(),
            agreed: agreed.as_ref().map_or(0, |agreed| agreed.known.saturating_add(1)),
            base_stays: stays,
            challenge: others.is_some().then_some(challenge),
            host: host.map(|host| host.0),
            post_copy,
        };
        let hasher = PageHasher::new(&DedupDomain::new(&open.domain_key));
        let mut map = PageMap::new(open.layout.clone(), &hasher, seed, sink.starts_zero()).over_base(&base, stays);
        let scan = if trusted { Scan::trusting(held.clone()) } else { Scan::new(held.clone(), agreed.is_some()) };
        let base = Base { agreed: agreed.is_some(), trusted, stays };
        if let Some(Agreed { trees, kept, .. }) = agreed {
            let trees = trees.into_iter().zip(open.layout.regions());
            let trees = trees.map(|(tree, region)| tree.resized(&hasher, region.pages()));
            // Of one region places are pages; of several both layouts are the same.
            map.claim(trees.collect(), &kept, &held, trusted);
        }
        let receiving = Self {
            secret,
            codecs,
            map,
            hasher,
            scan,
            base,
            wants: Wants::new(&open.layout, accept.lanes),
            waiting: Waiting::new(open.layout.pages()),
            resolver: Resolver::new()?,
            others,
            lanes: Default::default(),
            bulk_lanes: accept.lanes,
            moved: now,
            joined_until: now + HANDSHAKE_SPAN_MAX,
            root: None,
            blobs: Blobs::new(),
            image: Digest::default(),
            post_copy,
            host,
            lasts: false,
            hashes: false,
            sink: Some(sink),
            finish: None,
            open,
        };
        Ok((receiving, accept))
    }

    pub(crate) fn open_lane(&mut self, lane: LaneId) {
        if let Some(lane) = self.lanes.get_mut(lane.index()) {
            lane.joined = true;
        }
    }

    pub(crate) fn handle_pages(
        &mut self,
        lane: LaneId,
        pages: &Pages<'_>,
        bytes: u64,
        counts: &mut Counts,
        now: Time,
    ) -> Result<(), ErrorKind> {
        let range = self.judge_range(lane, pages)?;
        // SPEC 7.4: a late answer to a want, whose page was stated again meanwhile. What is absent stays so.
        if self.sink.is_none() {
            return Ok(());
        }
        if !only_leaves(pages) {
            self.read_up_to(range, &replaced(pages), counts)?;
        }
        for range in stated(range, pages) {
            let first = u64::from(self.open.layout.place(range.region, range.first.0).0);
            self.waiting.settle(first..first.saturating_add(u64::from(range.count)));
            self.map.unleave(range.region, range.numbers());
        }
        let waited = self.waiting.count();
        let Some((resolver, mut to)) = self.target(counts) else { return Ok(()) };
        let resolved = resolver.apply(range, pages, &mut to)?;
        self.note_waiting(lane, self.waiting.count() > waited);
        match resolved {
            Resolved::Missing(missing) => {
                stated(range, pages).for_each(|range| self.wants.settle(&self.open.layout, range));
                missing.iter().for_each(|&page| self.wants.ask(&self.open.layout, range.region, page, 1));
            }
            Resolved::Disbelieved => {
                for range in stated(range, pages) {
                    self.wants.settle(&self.open.layout, range);
                    range.numbers().for_each(|page| {
                        self.map.mark_absent(range.region, page);
                    });
                    self.wants.ask(&self.open.layout, range.region, range.first.0, u64::from(range.count));
                }
            }
        }
        self.check_wants()?;
        self.map.note_stated(range);
        if let Some(state) = self.lanes.get_mut(lane.index()) {
            state.frames = state.frames.saturating_add(1);
            state.round = pages.head.round;
            state.unacked_bytes = state.unacked_bytes.saturating_add(bytes);
            // The first ones at once: from them the sender learns what the link can do.
            let delay = if state.frames <= ACK_AT_ONCE { Span::ZERO } else { ACK_DELAY_MAX };
            state.ack_due.get_or_insert(now + delay);
        }
        Ok(())
    }

    /// So many pages may be wanted for each round that has begun.
    fn check_wants(&self) -> Result<(), Violation> {
        let begun = self.lanes.iter().map(|lane| u64::from(lane.ended)).max().unwrap_or(0).saturating_add(1);
        self.wants.check(&self.open.layout, begun)
    }

    /// What resolves frames, and against what; `None` while the image is made to last.
    fn target<'a>(&'a mut self, counts: &'a mut Counts) -> Option<(&'a mut Resolver, Target<'a, S>)> {
        let keeps_base = self.keeps_base();
        let Self { map, sink, scan, hasher, base, others, waiting, resolver, .. } = self;
        let (sink, others, base) = (sink.as_mut()?, others.as_mut(), *base);
        Some((resolver, Target { map, sink, scan, hasher, counts, base, others, waiting, keeps_base }))
    }

    /// Whether bytes of the base should stay where they are: it does not stay otherwise, and not every page has been
    /// stated that may have come from there.
    fn keeps_base(&self) -> bool {
        let in_place = !self.base.stays && !self.base.agreed && self.scan.holds_any();
        in_place && !self.has_ended(0)
    }

    /// Whether a round has ended on every lane.
    fn has_ended(&self, round: u32) -> bool {
        let has_ended = |lane: LaneId| self.lanes.get(lane.index()).is_some_and(|lane| lane.ended > round);
        (0..self.bulk_lanes).map(LaneId::bulk).all(has_ended)
    }

    /// The next frame of a lane left pages waiting, or did not.
    // SPEC 6.27
    fn note_waiting(&mut self, lane: LaneId, waits: bool) {
        if self.waiting.is_empty() {
            self.lanes.iter_mut().for_each(|lane| lane.settled = None);
        } else if let Some(state) = self.lanes.get_mut(lane.index()).filter(|_| waits) {
            state.settled.get_or_insert(state.frames);
        }
    }

    /// One bounded step of the receiver's own work: the next part of the base is read, and perhaps announced, or pages
    /// that wait get their turn. `None` if there is nothing to do.
    pub(crate) fn step(&mut self, counts: &mut Counts, now: Time) -> Result<Option<Option<Have>>, ErrorKind> {
        let all_stated = self.has_ended(0);
        let Some(sink) = self.sink.as_mut() else { return Ok(None) };
        let have = if self.scan.is_finished() {
            if self.look_again(counts, now)? {
                None
            } else if std::mem::take(&mut self.hashes) {
                // No sign of the peer's: nothing has moved.
                self.hashes = self.map.hash_some(NODES_A_STEP);
                return Ok(Some(None));
            } else {
                return Ok(None);
            }
        } else if self.scan.waits() && !all_stated {
            return Ok(None);
        } else {
            self.scan.step(None, (&mut self.map, sink), &self.hasher, counts).map_err(unreadable)?
        };
        self.moved = now;
        Ok(Some(have))
    }

    /// Gives some of the pages that wait their turn, if it has come; says whether there were any.
    // SPEC 6.26
    fn look_again(&mut self, counts: &mut Counts, now: Time) -> Result<bool, ErrorKind> {
        if self.waiting.is_empty() || !self.scan.is_finished() || self.keeps_base() {
            return Ok(false);
        }
        let (map, stays) = (&mut self.map, self.base.stays);
        let turn = self.waiting.next(TURN_PAGES, |digest| match map.find(digest) {
            _ if *digest == self.hasher.zero() => Source::Safe,
            None => Source::Nowhere,
            Some(Found::Image(region, page)) if !stays => Source::At(map.layout().place(region, page)),
            Some(_) => Source::Safe,
        });
        match turn {
            Some(Turn::Keep(place)) => self.keep(place)?,
            Some(Turn::Put(pages)) => self.put(&pages, counts)?,
            None => {}
        }
        self.check_wants()?;
        if self.waiting.is_empty() {
            for lane in &mut self.lanes {
                lane.ack_due = lane.settled.take().map_or(lane.ack_due, |_| Some(now));
            }
        }
        Ok(true)
    }

    /// Keeps what is at a place before it is overwritten.
    fn keep(&mut self, place: Place) -> Result<(), ErrorKind> {
        let Some(sink) = self.sink.as_mut() else { return Ok(()) };
        let (region, page) = self.open.layout.locate(place);
        let mut bytes = Box::new([0; PAGE_BYTES]);
        sink.read(region, page.0, bytes.as_mut_slice()).map_err(unreadable)?;
        self.waiting.keep(self.map.digest(region, page.0).unwrap_or_default(), bytes);
        Ok(())
    }

    /// Puts pages that waited, or wants them.
    fn put(&mut self, pages: &[(Place, Digest)], counts: &mut Counts) -> Result<(), ErrorKind> {
        let wish = |(place, digest): &(Place, Digest)| {
            let (region, page) = self.open.layout.locate(*place);
            Wish { region, page: page.0, digest: *digest, proof: None }
        };
        let (mut wishes, mut missing): (Vec<Wish>, _) = (pages.iter().map(wish).collect(), Vec::new());
        let Some((resolver, mut to)) = self.target(counts) else { return Ok(()) };
        resolver.bringer.bring(&mut wishes, &mut missing, &mut to)?;
        missing.iter().for_each(|wish| self.wants.ask(&self.open.layout, wish.region, wish.page, 1));
        pages.iter().for_each(|(place, _)| self.waiting.done(*place));
        Ok(())
    }

    /// Reads the base as far as a frame speaks of it, but for what it replaces: with an agreed one the sender need not
    /// wait for that.
    fn read_up_to(&mut self, range: PageRange, replaced: &[Range<u64>], counts: &mut Counts) -> Result<(), ErrorKind> {
        let Some(sink) = self.sink.as_mut() else { return Ok(()) };
        self.scan.note(range, replaced);
        while !self.scan.is_finished() && !self.scan.has_read(range.region, range.first.0, range.count) {
            let read = self.scan.step(Some((range, replaced)), (&mut self.map, sink), &self.hasher, counts);
            read.map_err(unreadable)?;
        }
        Ok(())
    }

    /// Where the frame's pages lie, if they may be stated here and now.
    fn judge_range(&self, lane: LaneId, pages: &Pages<'_>) -> Result<PageRange, ErrorKind> {
        let head = pages.head;
        let malformed = |source: DecodeError| PeerError::Decode { kind: FrameKind::PAGES, source };
        let range = self.open.layout.range(head.region, head.first, head.count).map_err(malformed)?;
        let (region, first) = (head.region, head.first);
        // SPEC 6.21: a page has one lane, and there rounds only rise; answers to wants may follow the end of theirs.
        let state = self.lanes.get(lane.index()).copied().unwrap_or_default();
        if !(state.round..=state.ended).contains(&head.round) {
            return Err(Violation::Round { got: head.round, expected: state.ended }.into());
        }
        let group = self.open.layout.group(range.region, first);
        // SPEC 6.3
        if lane.bulk_index().map(u64::from) != group.checked_rem(u64::from(self.bulk_lanes)) {
            return Err(Violation::PageLane { region, first, lane: lane.number() }.into());
        }
        // SPEC 5.6
        if self.codecs & head.codec.bit() == 0 {
            return Err(Violation::Entry { what: "a codec that was not agreed", region, first }.into());
        }
        let last = range.numbers().end.saturating_sub(1);
        // SPEC 6.3
        if self.bulk_lanes > 1 && first / GROUP_PAGES != last / GROUP_PAGES {
            return Err(Violation::Entry { what: "a batch that crosses a group", region, first }.into());
        }
        // SPEC 6.28
        if self.others.is_none() && pages.proofs().next().is_some() {
            return Err(Violation::Entry { what: "proofs that nothing asked for", region, first }.into());
        }
        // SPEC 13.2
        if !self.post_copy && pages.runs().any(|run| run.kind == EntryKind::ABSENT) {
            return Err(Violation::Entry { what: "an absent page, without post-copy", region, first }.into());
        }
        // SPEC 6.15
        if !only_leaves(pages) && !self.base.agreed && !self.scan.has_read(range.region, first, head.count) {
            return Err(Violation::Entry { what: "pages stated before their holdings", region, first }.into());
        }
        Ok(range)
    }

    pub(crate) fn handle_round(&mut self, lane: LaneId, end: RoundEnd, now: Time) -> Result<(), ErrorKind> {
        let Some(state) = self.lanes.get_mut(lane.index()) else { return Ok(()) };
        state.end(end)?;
        state.ack_due = Some(now);
        self.hashes = self.open.live.is_some();
        Ok(())
    }

    pub(crate) fn handle_root(&mut self, root: Root) -> Result<(), ErrorKind> {
        if let Some(known) = self.root {
            return Err(Violation::Round { got: root.round, expected: known.round }.into());
        }
        // SPEC 12.3
        self.blobs.is_whole().map_err(Violation::from)?;
        self.root = Some(root);
        Ok(())
    }

    /// A part of what comes with the memory.
    pub(crate) fn handle_blob(&mut self, part: &Blob<'_>) -> Result<(), ErrorKind> {
        if self.open.live.is_none() || self.root.is_some() {
            return Err(Violation::Live("BLOB", "takes none any more").into());
        }
        Ok(self.blobs.handle_part(part).map_err(Violation::from)?)
    }

    /// The hand-over that ends a live session whose image has come.
    pub(crate) fn handover(&self) -> Option<Handover> {
        let LiveOpen { guest: lineage, epoch, host: sender, arbiter, .. } = self.open.live?;
        let (root, receiver, session) = (self.root?.digest, self.host?, self.open.session);
        let post_copy = self.map.absent().count() > 0;
        Some(Handover { lineage, session, epoch, root, sender, receiver, arbiter, post_copy })
    }

    /// What the guest lacks that was handed over, and its memory.
    pub(crate) fn into_incomplete(self) -> Option<Incomplete<S>> {
        let handover = self.handover().filter(|handover| handover.post_copy)?;
        let left = self.map.absent().clone();
        let (lacking, holds) = (left.clone(), self.base.stays);
        let Self { sink, map, hasher, open, .. } = self;
        let (counts, touches) = (FillCounts::default(), Touches::new(left.len()));
        Some(Incomplete { sink: sink?, map, hasher, left, lacking, holds, handover, open, counts, touches })
    }

    /// Whether everything has come; if so the finish job is ready.
    pub(crate) fn check_complete(&mut self) -> Result<bool, ErrorKind> {
        let Some(root) = self.root.filter(|_| self.sink.is_some()) else { return Ok(false) };
        let absent = self.map.absent().count();
        let is_read = self.scan.is_finished() || absent > 0;
        if !is_read || !self.waiting.is_empty() || !self.has_ended(root.round) {
            return Ok(false);
        }
        let (pages, wanted) = (self.open.layout.pages(), self.wants.outstanding());
        let present = self.map.present_pages().saturating_add(absent);
        if present < pages && wanted > 0 {
            return Ok(false);
        }
        // SPEC 13.2: the guest's memory is filled by whole install pages.
        if let Some(place) = cut_install_page(&self.open.layout, self.map.absent()) {
            return Err(Violation::Lacking { what: "part of an install page is absent", place }.into());
        }
        self.image = if present == pages { self.map.root(&self.hasher) } else { Digest::default() };
        // SPEC 12.4
        let live = present == pages && self.open.live.is_some();
        let ours = if live { live_root(self.hasher.domain(), self.image, &self.blobs) } else { self.image };
        // SPEC 7.5
        if present != pages || root.pages != pages || root.digest != ours {
            let mismatch = Violation::Root { theirs: root.digest, their_pages: root.pages, ours, our_pages: present };
            return Err(mismatch.into());
        }
        let absent = (absent > 0).then(|| self.map.absent().clone());
        self.finish = self.sink.take().map(|sink| FinishJob(sink, absent));
        Ok(true)
    }

    pub(crate) fn poll_ack(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        let state = self.lanes.get_mut(lane.index()).filter(|lane| lane.joined)?;
        let wants = self.wants.take(&self.open.layout, lane);
        let due = state.ack_due.is_some_and(|due| now >= due) || state.unacked_bytes >= ACK_BYTES;
        if wants.is_empty() && !due {
            return None;
        }
        (state.unacked_bytes, state.ack_due) = (0, None);
        let ack = Ack { frames: state.frames, settled: state.settled.unwrap_or(state.frames), wants };
        Some(Outgoing::frame(&Frame::Ack(ack), lane))
    }
}

/// Whether a base is one that the sender has named, and lies as the image does.
fn suits(agreed: &Agreed, open: &Open, held: &[u64]) -> bool {
    let common = common_pages(&agreed.layout, &open.layout);
    !open.fresh && usize::from(agreed.known) < open.known.len() && common.is_some_and(|common| common == held)
}

/// A place where a run of absent pages begins or ends inside an install page.
fn cut_install_page(layout: &Layout, absent: &PageBitmap) -> Option<u64> {
    let mut first = 0u64;
    for region in layout.regions() {
        let (start, install) = (first, u64::from(region.install_size.pages()).max(1));
        first = first.saturating_add(region.pages());
        let is_cut = |border: &u64| *border < first && !border.saturating_sub(start).is_multiple_of(install);
        let runs = absent.runs(start..first).take_while(|_| install > 1);
        if let Some(cut) = runs.flat_map(|run| [run.start, run.end]).find(is_cut) {
            return Some(cut);
        }
    }
    None
}

/// Whether nothing of a frame has to be there.
fn only_leaves(pages: &Pages<'_>) -> bool {
    pages.runs().all(|run| matches!(run.kind, EntryKind::ABSENT | EntryKind::SKIPPED))
}

/// Pages of a frame that are not what the base has at their place, in order.
fn replaced(pages: &Pages<'_>) -> Vec<Range<u64>> {
    let replaces = |kind: EntryKind| {
        [EntryKind::INLINE, EntryKind::SHIFTED, EntryKind::REFERENCE, EntryKind::ZERO].contains(&kind)
    };
    runs(pages).filter(|(kind, _)| replaces(*kind)).map(|(_, run)| run).collect()
}

/// The parts of a frame that it speaks of: all but what it skips.
fn stated(range: PageRange, pages: &Pages<'_>) -> impl Iterator<Item = PageRange> {
    let stated = runs(pages).filter(|(kind, _)| *kind != EntryKind::SKIPPED);
    stated.map(move |(_, run)| {
        let count = u32::try_from(run.end.saturating_sub(run.start)).unwrap_or(0);
        PageRange { first: PageNumber(run.start), count, ..range }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SPEC 6.20
    #[test]
    fn the_last_number_of_a_round_is_refused_and_never_wraps() {
        let mut lane = Lane { ended: u32::MAX - 1, frames: 3, ..Lane::default() };
        lane.end(RoundEnd { round: u32::MAX - 1, frames: 3 }).unwrap();
        for round in [u32::MAX, u32::MAX - 1, 0] {
            assert!(lane.end(RoundEnd { round, frames: 3 }).is_err(), "round {round}");
            assert_eq!(lane.ended, u32::MAX);
        }
    }
}
