//! The receiver as a machine: what it does with each frame, and when the image is complete.
//!
//! ```text
//! Greeting ─HELLO→ Waiting ─OPEN→ Deciding ─accept()→ Receiving ─all pages, root equal→ (finish job) ─DONE→ Parting → Over
//! ```
//! One invariant carries the rest: DONE goes out only after every page is present, the root over them equals the
//! sender's, and the sink has made them last.

use crate::error::{ErrorKind, ReceiverError};
use crate::memory::{GuestSink, OtherPages};
use crate::page_map::PageMap;
use crate::report::Counts;
use crate::resolve::{Base, Resolved, Resolver, Target};
use crate::scan::Scan;
use crate::wants::Wants;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageHasher, join_proof, proofs_equal};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::error::{CloseCode, DecodeError, GuestAt, Incompatible, PeerError, Violation, chain};
use pagewire_protocol::frame::{
    Accept, Ack, Done, EntryKind, Frame, FrameKind, Join, LaneId, Open, Pages, Role, Root, RoundEnd,
};
use pagewire_protocol::limits::{ACK_BYTES, ACK_DELAY_MAX, HANDSHAKE_SPAN_MAX, STALL_SPAN_MAX};
use pagewire_protocol::page::{GROUP_PAGES, PageRange, RegionId};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::{Endpoint, Job, Machine, Outgoing, Phase, Policy};
use pagewire_protocol::time::{Span, Time};
use pagewire_protocol::tree::{DigestTree, Manifest};
use std::collections::VecDeque;
use std::io;

/// What a sender asks to send, for whoever embeds the engine to decide on.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Name, regions and wishes, judged.
    pub open: Open,
}

/// On which terms an offer is accepted.
#[derive(Debug)]
pub struct Terms<S> {
    /// Where pages go.
    pub sink: S,
    /// Bulk lanes granted at most.
    pub lanes: u8,
    /// Unacknowledged bytes a lane may have, 1 to [`WINDOW_BYTES`](pagewire_protocol::limits::WINDOW_BYTES).
    pub window: u64,
    /// Random: the secret that further connections prove.
    pub secret: [u8; 32],
    /// Random: the seed of the digest index.
    pub seed: u64,
    /// What the sender knows of the base, if it does.
    pub agreed: Option<Agreed>,
    /// Pages of other guests of the domain, if they may be matched.
    pub others: Option<Box<dyn OtherPages>>,
}

/// A base whose manifest both sides know.
#[derive(Debug)]
pub struct Agreed {
    /// Which of OPEN's known roots it has, counted from 0.
    pub known: u8,
    /// Its digests: the root over them was checked.
    pub trees: Vec<DigestTree>,
    /// The pages, by their places in the image, that are here; of the others the digests alone are known.
    pub kept: PageBitmap,
    /// Pages that did not change are not read. Takes effect where the sink says that the base is in place.
    pub trusted: bool,
}

/// What the engine tells whoever embeds it.
#[derive(Clone, Debug)]
pub enum Event {
    /// Decide: [`ReceiverEngine::accept`] or [`ReceiverEngine::refuse`].
    Offered(Offer),
    /// Every page is present and the root is equal; now it is made to last.
    Verified,
    /// It lasts, and the sender knows or will.
    Finished,
}

/// Makes the image last, possibly on another thread.
#[derive(Debug)]
pub struct FinishJob<S>(S);

/// What came of a [`FinishJob`].
#[derive(Debug)]
pub struct FinishOutput<S> {
    sink: S,
    result: io::Result<()>,
}

impl<S: GuestSink> Job for FinishJob<S> {
    type Output = FinishOutput<S>;

    fn run(mut self) -> FinishOutput<S> {
        let result = self.0.finish();
        FinishOutput { sink: self.0, result }
    }
}

/// PAGES frames of a lane that are acknowledged without waiting for more.
const ACK_AT_ONCE: u64 = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Lane {
    joined: bool,
    /// Rounds that have ended here, and so the round that is due.
    ended: u32,
    /// The round of the last pages.
    round: u32,
    frames: u64,
    unacked_bytes: u64,
    ack_due: Option<Time>,
}

/// What is true while an image is received.
#[derive(Debug)]
struct Receiving<S> {
    open: Open,
    secret: [u8; 32],
    /// The codecs that were agreed, as bits.
    codecs: u32,
    hasher: PageHasher,
    map: PageMap,
    scan: Scan,
    base: Base,
    wants: Wants,
    resolver: Resolver,
    others: Option<Box<dyn OtherPages>>,
    lanes: [Lane; LaneId::COUNT],
    bulk_lanes: u8,
    /// When something was last stated, or read from the base.
    moved: Time,
    /// Until when every granted lane must have joined.
    joined_until: Time,
    root: Option<Root>,
    /// All of it is present, verified and lasting.
    lasts: bool,
    /// Gone while the finish job has it.
    sink: Option<S>,
    finish: Option<FinishJob<S>>,
}

/// The receiving side of one session.
#[derive(Debug)]
pub struct ReceiverEngine<S> {
    endpoint: Endpoint,
    offer: Option<Open>,
    receiving: Option<Box<Receiving<S>>>,
    counts: Counts,
    events: VecDeque<Event>,
    outcome: Option<Result<(), ReceiverError>>,
}

impl<S: GuestSink> ReceiverEngine<S> {
    /// A session that greets; `nonce` must be random.
    pub fn new(policy: &Policy, nonce: [u8; 16], now: Time) -> Self {
        Self {
            endpoint: Endpoint::new(Role::Receiver, policy, nonce, now),
            offer: None,
            receiving: None,
            counts: Counts::default(),
            events: VecDeque::new(),
            outcome: None,
        }
    }

    /// Takes the offered image.
    pub fn accept(&mut self, terms: Terms<S>, now: Time) {
        let (Some(open), Some(greeted)) = (self.offer.take(), self.endpoint.greeted()) else { return };
        let Terms { sink, lanes, window, secret, seed, agreed, others } = terms;
        let resolver = match Resolver::new() {
            Ok(resolver) => resolver,
            Err(source) => return self.fail(ErrorKind::Destination { what: "zstd cannot start", source }),
        };
        let regions = (0..).map(RegionId).take(open.layout.regions().len());
        let base: Vec<u64> = regions.map(|region| sink.base_pages(region)).collect();
        // SPEC 4.14
        let held: Vec<u64> = base.iter().map(|&pages| if open.fresh { 0 } else { pages }).collect();
        let agreed = agreed.filter(|agreed| !open.fresh && usize::from(agreed.known) < open.known.len());
        let trusted = agreed.as_ref().is_some_and(|agreed| agreed.trusted) && sink.base_in_place();
        let stays = sink.base_stays() && !open.fresh;
        let scan = if trusted { Scan::trusting(held.clone()) } else { Scan::new(held.clone(), agreed.is_some()) };
        let bulk_lanes = lanes.clamp(1, open.lanes);
        let hasher = PageHasher::new(&DedupDomain::new(&open.domain_key));
        let mut receiving = Box::new(Receiving {
            secret,
            codecs: greeted.agreement.codecs,
            map: PageMap::new(open.layout.clone(), &hasher, seed, sink.starts_zero()),
            hasher,
            scan,
            base: Base { agreed: agreed.is_some(), trusted, stays },
            wants: Wants::new(&open.layout, bulk_lanes),
            resolver,
            others: None,
            lanes: Default::default(),
            bulk_lanes,
            moved: now,
            joined_until: now + HANDSHAKE_SPAN_MAX,
            root: None,
            lasts: false,
            sink: Some(sink),
            finish: None,
            open,
        });
        for (region, pages) in (0..).map(RegionId).zip(base) {
            // What is there is unknown until it is read, even if all beyond it is zero.
            (0..pages).for_each(|page| receiving.map.forget(region, page));
        }
        if stays {
            receiving.map.keep_overwritten();
        }
        let number = agreed.as_ref().map_or(0, |agreed| agreed.known.saturating_add(1));
        if let Some(Agreed { trees, kept, .. }) = agreed {
            receiving.map.claim(trees, &kept, trusted);
        }
        self.endpoint.enter(Phase::Receiving);
        if receiving.open.single_stream {
            for lane in (0..bulk_lanes).map(LaneId::bulk) {
                receiving.open_lane(lane);
                self.endpoint.open_lane(lane, now);
            }
        }
        let accept = Accept {
            transcript: greeted.transcript,
            secret,
            lanes: bulk_lanes,
            window,
            held_pages: held,
            agreed: number,
            base_stays: stays,
            others: others.is_some(),
        };
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Accept(accept));
        receiving.others = others;
        self.receiving = Some(receiving);
    }

    /// Refuses the offered image and ends the session.
    pub fn refuse(&mut self, code: CloseCode, reason: &str) {
        self.close(ErrorKind::Refused(reason.to_owned()), code);
    }

    /// Stops the session.
    pub fn cancel(&mut self) {
        self.fail(ErrorKind::Cancelled);
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        let wants = self.receiving.as_ref().map_or(0, |receiving| receiving.wants.asked());
        Counts { wants, ..self.counts }
    }

    /// Pages that are as the sender means them, and pages of the image; for progress.
    pub fn progress(&self) -> (u64, u64) {
        let receiving = self.receiving.as_ref();
        receiving.map_or((0, 0), |receiving| (receiving.map.present_pages(), receiving.open.layout.pages()))
    }

    /// What the image is, once all of it is present and lasts; for whoever keeps manifests. Can be had once.
    pub fn manifest(&mut self) -> Option<Manifest> {
        let receiving = self.receiving.take_if(|receiving| receiving.lasts)?;
        let (layout, trees) = receiving.map.into_parts();
        Some(Manifest { root: receiving.root?.digest, layout, trees })
    }

    /// How the session ended, once it has.
    pub fn outcome(&mut self) -> Option<Result<(), ReceiverError>> {
        self.outcome.take()
    }

    fn fail(&mut self, kind: ErrorKind) {
        let code = kind.close_code();
        self.close(kind, code);
    }

    fn close(&mut self, kind: ErrorKind, code: CloseCode) {
        if self.endpoint.phase() == Phase::Over {
            return;
        }
        if self.endpoint.phase() == Phase::Parting {
            // The image lasts; that the sender does not say that it knows changes nothing here.
            self.endpoint.finish();
            self.outcome = Some(Ok(()));
            self.events.push_back(Event::Finished);
            return;
        }
        self.endpoint.close(code, &chain(&kind), kind.tells_peer());
        self.outcome = Some(Err(ReceiverError { kind, guest_at: GuestAt::Sender }));
        self.receiving = None;
    }

    fn handle(&mut self, lane: LaneId, kind: FrameKind, body: &[u8], now: Time) -> Result<(), ErrorKind> {
        let Some(frame) = self.endpoint.judge(lane, kind, body, now)? else { return Ok(()) };
        match frame {
            Frame::Open(open) => self.handle_open(open),
            Frame::Done(_) => {
                self.endpoint.finish();
                self.outcome = Some(Ok(()));
                self.events.push_back(Event::Finished);
                Ok(())
            }
            frame => {
                let Some(receiving) = self.receiving.as_mut() else { return Ok(()) };
                receiving.moved = now;
                match frame {
                    Frame::Pages(pages) => {
                        receiving.handle_pages(lane, &pages, body.len() as u64, &mut self.counts, now)?
                    }
                    Frame::Round(end) => receiving.handle_round(lane, end, now)?,
                    Frame::Root(root) => receiving.handle_root(root)?,
                    _ => {}
                }
                if receiving.check_complete()? {
                    self.events.push_back(Event::Verified);
                }
                Ok(())
            }
        }
    }

    /// When the sender has stated nothing for too long; never while the image is made to last.
    fn stalled_at(&self) -> Option<Time> {
        let receiving = self.receiving.as_ref().filter(|receiving| receiving.sink.is_some())?;
        Some(receiving.moved + STALL_SPAN_MAX).filter(|_| self.endpoint.phase() == Phase::Receiving)
    }

    /// Until when lanes may join, if some have not.
    fn joining_until(&self) -> Option<Time> {
        let receiving = self.receiving.as_ref().filter(|_| self.endpoint.phase() == Phase::Receiving)?;
        let mut granted = (0..receiving.bulk_lanes).map(LaneId::bulk);
        let missing = granted.any(|lane| receiving.lanes.get(lane.index()).is_some_and(|lane| !lane.joined));
        missing.then_some(receiving.joined_until)
    }

    fn handle_open(&mut self, open: Open) -> Result<(), ErrorKind> {
        let greeted = self.endpoint.greeted();
        // SPEC 4.9
        if greeted.is_none_or(|greeted| greeted.transcript != open.transcript) {
            return Err(Violation::Transcript.into());
        }
        // SPEC 4.8
        for region in open.layout.regions() {
            let size = region.install_size.bytes();
            if greeted.is_none_or(|greeted| greeted.agreement.install_sizes & (size / 4096) == 0) {
                let unknown = Incompatible::Unsupported { what: "install size", value: u64::from(size) };
                return Err(ErrorKind::Peer(unknown.into()));
            }
        }
        self.endpoint.enter(Phase::Deciding);
        self.events.push_back(Event::Offered(Offer { open: open.clone() }));
        self.offer = Some(open);
        Ok(())
    }
}

impl<S: GuestSink> Receiving<S> {
    fn open_lane(&mut self, lane: LaneId) {
        if let Some(lane) = self.lanes.get_mut(lane.index()) {
            lane.joined = true;
        }
    }

    fn handle_pages(
        &mut self,
        lane: LaneId,
        pages: &Pages<'_>,
        bytes: u64,
        counts: &mut Counts,
        now: Time,
    ) -> Result<(), ErrorKind> {
        let range = self.judge_range(lane, pages)?;
        self.read_up_to(range, counts)?;
        let Some(sink) = self.sink.as_mut() else {
            // SPEC 7.4: a late answer to a want, whose page was stated again meanwhile.
            return Ok(());
        };
        let (scan, hasher, base) = (&self.scan, &self.hasher, self.base);
        let others = self.others.as_deref_mut();
        let mut to = Target { map: &mut self.map, sink, scan, hasher, counts, base, others };
        match self.resolver.apply(range, pages, &mut to)? {
            Resolved::Missing(missing) => {
                range.numbers().for_each(|page| self.wants.settle(&self.open.layout, range.region, page));
                missing.iter().for_each(|&page| self.wants.ask(&self.open.layout, range.region, page, 1));
            }
            Resolved::Disbelieved => {
                for page in range.numbers() {
                    self.wants.settle(&self.open.layout, range.region, page);
                    self.map.mark_absent(range.region, page);
                }
                self.wants.ask(&self.open.layout, range.region, range.first.0, u64::from(range.count));
            }
        }
        self.wants.check(&self.open.layout)?;
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

    /// Reads the base as far as a frame speaks of it: with an agreed one the sender need not wait for that.
    fn read_up_to(&mut self, range: PageRange, counts: &mut Counts) -> Result<(), ErrorKind> {
        let Some(sink) = self.sink.as_mut() else { return Ok(()) };
        while !self.scan.is_finished() && !self.scan.has_read(range.region, range.first.0, range.count) {
            let read = self.scan.step(&mut self.map, sink, &self.hasher, counts);
            read.map_err(|source| ErrorKind::Destination { what: "base cannot be read", source })?;
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
        let looks = pages.runs().any(|run| !matches!(run.kind, EntryKind::ZERO | EntryKind::BASE));
        let last = range.numbers().end.saturating_sub(1);
        // SPEC 6.3
        if (looks || self.bulk_lanes > 1) && first / GROUP_PAGES != last / GROUP_PAGES {
            return Err(Violation::Entry { what: "a batch that crosses a group", region, first }.into());
        }
        // SPEC 6.15
        if !self.base.agreed && !self.scan.has_read(range.region, first, head.count) {
            return Err(Violation::Entry { what: "pages stated before their holdings", region, first }.into());
        }
        Ok(range)
    }

    fn handle_round(&mut self, lane: LaneId, end: RoundEnd, now: Time) -> Result<(), ErrorKind> {
        let Some(state) = self.lanes.get_mut(lane.index()) else { return Ok(()) };
        if end.round != state.ended {
            return Err(Violation::Round { got: end.round, expected: state.ended }.into());
        }
        if end.frames != state.frames {
            return Err(Violation::Ack { got: end.frames, sent: state.frames }.into());
        }
        state.ended = state.ended.saturating_add(1);
        state.ack_due = Some(now);
        Ok(())
    }

    fn handle_root(&mut self, root: Root) -> Result<(), ErrorKind> {
        if let Some(known) = self.root {
            return Err(Violation::Round { got: root.round, expected: known.round }.into());
        }
        self.root = Some(root);
        Ok(())
    }

    /// Whether everything has come; if so the finish job is ready.
    fn check_complete(&mut self) -> Result<bool, ErrorKind> {
        let Some(root) = self.root.filter(|_| self.sink.is_some()) else { return Ok(false) };
        let has_ended = |lane: LaneId| self.lanes.get(lane.index()).is_some_and(|lane| lane.ended > root.round);
        if !self.scan.is_finished() || !(0..self.bulk_lanes).map(LaneId::bulk).all(has_ended) {
            return Ok(false);
        }
        let (pages, present, wanted) = (self.open.layout.pages(), self.map.present_pages(), self.wants.outstanding());
        if present < pages && wanted > 0 {
            return Ok(false);
        }
        let ours = if present == pages { self.map.root(&self.hasher) } else { Digest::default() };
        // SPEC 7.5
        if present != pages || root.pages != pages || root.digest != ours {
            let mismatch = Violation::Root { theirs: root.digest, their_pages: root.pages, ours, our_pages: present };
            return Err(mismatch.into());
        }
        self.finish = self.sink.take().map(FinishJob);
        Ok(true)
    }

    fn poll_ack(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        let state = self.lanes.get_mut(lane.index()).filter(|lane| lane.joined)?;
        let wants = self.wants.take(&self.open.layout, lane);
        let due = state.ack_due.is_some_and(|due| now >= due) || state.unacked_bytes >= ACK_BYTES;
        if wants.is_empty() && !due {
            return None;
        }
        (state.unacked_bytes, state.ack_due) = (0, None);
        Some(Outgoing::frame(&Frame::Ack(Ack { frames: state.frames, wants }), lane))
    }
}

impl<S: GuestSink> Machine for ReceiverEngine<S> {
    type Job = FinishJob<S>;
    type Event = Event;

    fn handle_frame(&mut self, lane: LaneId, kind: FrameKind, body: &[u8], now: Time) {
        if self.is_over() {
            return;
        }
        if let Err(kind) = self.handle(lane, kind, body, now) {
            self.fail(kind);
        }
    }

    fn handle_progress(&mut self, lane: LaneId, now: Time) {
        self.endpoint.note_progress(lane, now);
        if let Some(receiving) = self.receiving.as_mut() {
            receiving.moved = now;
        }
    }

    fn handle_peer_error(&mut self, error: PeerError, _now: Time) {
        self.fail(error.into());
    }

    fn handle_timeout(&mut self, now: Time) {
        let passed = |until: Option<Time>| until.is_some_and(|until| now >= until);
        let late = if passed(self.joining_until()) {
            Err(PeerError::Timeout("a granted lane was not joined within 10 s"))
        } else if passed(self.stalled_at()) {
            Err(PeerError::Timeout("no page was stated for 120 s"))
        } else {
            self.endpoint.handle_timeout(now)
        };
        if let Err(error) = late {
            self.fail(error.into());
        }
    }

    fn handle_job(&mut self, output: FinishOutput<S>, _spent: Span, _now: Time) {
        let Some(receiving) = self.receiving.as_mut() else { return };
        let FinishOutput { sink, result } = output;
        receiving.sink = Some(sink);
        match result {
            // SPEC 7.6
            Ok(()) => {
                let root = receiving.root.map(|root| root.digest).unwrap_or_default();
                let done = Done { pages: receiving.open.layout.pages(), root };
                receiving.lasts = true;
                self.endpoint.push_frame(LaneId::CONTROL, &Frame::Done(done));
                self.endpoint.enter(Phase::Parting);
            }
            Err(source) => self.fail(ErrorKind::Destination { what: "cannot be finished", source }),
        }
    }

    fn handle_join(&mut self, lane: LaneId, join: &Join, now: Time) -> Result<(), Violation> {
        let refuse = |why| Violation::Join { lane: lane.number(), why };
        let Some(receiving) = self.receiving.as_mut() else { return Err(refuse("no image is being received")) };
        // SPEC 4.16
        let granted = lane.bulk_index().is_some_and(|index| index < receiving.bulk_lanes);
        if receiving.open.single_stream || !granted {
            return Err(refuse("it was not granted"));
        }
        if receiving.lanes.get(lane.index()).is_none_or(|lane| lane.joined) {
            return Err(refuse("it is joined already"));
        }
        let proof = join_proof(&receiving.secret, &receiving.open.session, lane.number());
        if join.session != receiving.open.session || !proofs_equal(&proof, &join.proof) {
            return Err(refuse("the proof is wrong"));
        }
        receiving.open_lane(lane);
        self.endpoint.open_lane(lane, now);
        Ok(())
    }

    fn handle_lane_open(&mut self, _lane: LaneId, _now: Time) {}

    fn work(&mut self, now: Time) -> bool {
        if self.endpoint.phase() != Phase::Receiving {
            return false;
        }
        let Some(receiving) = self.receiving.as_mut() else { return false };
        let Receiving { scan, map, sink: Some(sink), hasher, moved, .. } = receiving.as_mut() else { return false };
        if scan.is_finished() {
            return false;
        }
        *moved = now;
        match scan.step(map, sink, hasher, &mut self.counts) {
            Ok(have) => {
                if let Some(have) = have {
                    self.endpoint.push_frame(LaneId::CONTROL, &Frame::Have(have));
                }
                // An agreed base may be read to its end after everything was stated.
                match receiving.check_complete() {
                    Ok(true) => self.events.push_back(Event::Verified),
                    Ok(false) => {}
                    Err(kind) => self.fail(kind),
                }
            }
            Err(source) => self.fail(ErrorKind::Destination { what: "base cannot be read", source }),
        }
        true
    }

    fn poll_frame(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        let queued = self.endpoint.poll_frame(lane, now);
        if queued.is_some() || self.endpoint.phase() != Phase::Receiving {
            return queued;
        }
        self.receiving.as_mut()?.poll_ack(lane, now)
    }

    fn poll_job(&mut self) -> Option<FinishJob<S>> {
        self.receiving.as_mut()?.finish.take()
    }

    fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    fn poll_timeout(&self) -> Option<Time> {
        // Once the image is whole nobody asks for acknowledgements any more, and none must wake anybody.
        let receiving = self.receiving.as_ref().filter(|_| self.endpoint.phase() == Phase::Receiving);
        let acks = receiving.into_iter().flat_map(|receiving| receiving.lanes.iter().filter_map(|lane| lane.ack_due));
        acks.chain(self.endpoint.poll_timeout()).chain(self.joining_until()).chain(self.stalled_at()).min()
    }

    fn recycle(&mut self, _buffer: PageBuffer) {}

    fn is_over(&self) -> bool {
        self.endpoint.phase() == Phase::Over
    }
}
