//! The sender as a machine: the greeting, the terms, and the end. What happens between is in `sending`.
//!
//! ```text
//! Greeting ─HELLO→ Opening ─ACCEPT→ Sending ─everything stated, ROOT→ Finishing ─DONE→ Over
//! ```
//! The sender's copy is free only after DONE with the right root: an end of stream is a failure in every phase.

use crate::base::Base;
use crate::converge::Limits;
use crate::error::{ErrorKind, SenderError};
use crate::fill::Remainder;
use crate::holdings::check_holdings;
use crate::lanes::{EncodeJob, EncodeOutput};
use crate::memory::GuestMemory;
use crate::report::{Counts, Decision, RoundReport};
use crate::rounds::Rounds;
use crate::sending::{AgreedBase, Sending, Step};
use crate::trace::Trace;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::digest::PageHasher;
use pagewire_protocol::digest::join_proof;
use pagewire_protocol::domain::{DedupDomain, LineageId};
use pagewire_protocol::error::{GuestAt, Incompatible, PeerError, Violation, chain};
use pagewire_protocol::frame::{
    Accept, Ack, Done, Frame, FrameKind, ImageName, Join, LaneId, LiveOpen, Open, Role, Root,
};
use pagewire_protocol::handover::{Handover, HostId, Message};
use pagewire_protocol::limits::{ROOTS_MAX, STALL_SPAN_MAX};
use pagewire_protocol::page::common_pages;
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::{Endpoint, FEATURE_LIVE, FEATURE_POST_COPY, Machine, Outgoing, Phase, Policy};
use pagewire_protocol::time::{Span, Time};
use pagewire_protocol::tree::{DigestTree, Manifest};
use std::collections::VecDeque;

/// How to send.
#[derive(Clone, Debug)]
pub struct SenderConfig {
    /// The image's name at the receiver.
    pub name: ImageName,
    /// Random: the session's id.
    pub session: [u8; 16],
    /// Random: makes the transcript unique.
    pub nonce: [u8; 16],
    /// Random: the seed of the digest index.
    pub seed: u64,
    /// The key of the dedup domain; zeros for the public one.
    pub domain_key: [u8; 32],
    /// Which guest it is; zeros for one that nobody has kept.
    pub lineage: LineageId,
    /// Bulk lanes to ask for, 1 to 8.
    pub lanes: u8,
    /// All lanes travel on the control connection.
    pub single_stream: bool,
    /// Ask the receiver to ignore what it has.
    pub fresh: bool,
    /// Send what is there twice once.
    pub dedup: bool,
    /// Compress where it pays.
    pub compress: bool,
    /// Threads that may compress at once.
    pub workers: usize,
    /// The receiver is on this host: compressing takes the processors that it needs.
    pub shares_host: bool,
    /// Bytes a second at most.
    pub bandwidth_limit: Option<u64>,
    /// Pages read and sent at once where nothing else decides: 16 to 512, a power of two.
    pub batch_pages: u16,
    /// The guest runs while it is sent, and is handed over in the end; none for memory at rest.
    pub live: Option<Live>,
    /// What this side speaks.
    pub policy: Policy,
}

impl SenderConfig {
    /// The defaults: one lane, everything that saves bytes allowed. Entropy is all zeros and must be set.
    pub fn new(name: ImageName) -> Self {
        Self {
            name,
            session: [0; 16],
            nonce: [0; 16],
            seed: 0,
            domain_key: [0; 32],
            lineage: LineageId([0; 16]),
            lanes: 1,
            single_stream: false,
            fresh: false,
            dedup: true,
            compress: true,
            workers: 1,
            shares_host: false,
            bandwidth_limit: None,
            batch_pages: BATCH_PAGES,
            live: None,
            policy: Policy::default(),
        }
    }
}

/// How a guest that runs is sent.
#[derive(Clone, Copy, Debug)]
pub struct Live {
    /// How long it may take and stand still.
    pub limits: Limits,
    /// The hand-over in the end.
    pub handover: LiveOpen,
    /// It starts at the receiver before any of its pages is sent, if the hand-over says that it may.
    pub at_once: bool,
}

/// Pages of a batch: 256 KiB stay in a core's cache from the read to the write.
const BATCH_PAGES: u16 = 64;

/// What the engine tells whoever embeds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The receiver took the image: these lanes need connections, each beginning with its JOIN.
    Accepted {
        /// Bulk lanes granted.
        lanes: u8,
    },
    /// A round has ended, and another begins: [`rounds`](SenderEngine::rounds) and [`decisions`](SenderEngine::decisions)
    /// have more.
    Judged,
    /// The guest has to stand still: [`SenderEngine::paused`] says that it does.
    Pause,
    /// The guest runs on here, at full speed: it was paused, or may have been.
    Resume,
    /// The guest has to be slowed down to so many per cent less.
    Throttle(u8),
    /// Everything was stated once; what remains is the receiver's to ask for.
    Stated,
    /// All of a guest that stands still was stated: it can be handed over by this. Whether it runs on is decided by its
    /// hand-overs from here on, not by this session: no [`Event::Resume`] comes any more.
    Offer(Handover),
    /// The receiver says this of a hand-over.
    Said(Message),
    /// The receiver has everything, verified and lasting.
    Finished,
}

/// The sending side of one session.
#[derive(Debug)]
pub struct SenderEngine<M> {
    endpoint: Endpoint,
    config: SenderConfig,
    memory: Option<M>,
    bases: Vec<Box<dyn Base>>,
    /// The digests of the newest base, read while the receiver decides.
    ahead: Option<Option<Vec<DigestTree>>>,
    secret: Option<[u8; 32]>,
    sending: Option<Box<Sending<M>>>,
    root: Option<Root>,
    /// The guest stands still, or was asked to.
    pausing: bool,
    /// When the receiver last took pages of a guest that stands still, or it was paused.
    moved: Option<Time>,
    /// The receiver's host, in a live session.
    host: Option<HostId>,
    offered: Option<Handover>,
    trace: Option<Box<dyn Trace>>,
    rounds: Vec<RoundReport>,
    hot: Option<PageBitmap>,
    finished: bool,
    events: VecDeque<Event>,
    outcome: Option<Result<(), SenderError>>,
}

impl<M: GuestMemory> SenderEngine<M> {
    /// A session that greets. `bases` are earlier images of the same layout, the newest first; of these
    /// [`ROOTS_MAX`] are named.
    pub fn new(memory: M, mut bases: Vec<Box<dyn Base>>, mut config: SenderConfig, now: Time) -> Self {
        if config.live.is_some() {
            config.policy.features_offered |= FEATURE_LIVE;
            config.policy.features_required |= FEATURE_LIVE;
            if config.live.is_some_and(|live| live.handover.post_copy) {
                config.policy.features_offered |= FEATURE_POST_COPY;
            }
        }
        bases.retain(|base| common_pages(base.layout(), memory.layout()).is_some());
        bases.truncate(ROOTS_MAX);
        Self {
            endpoint: Endpoint::new(Role::Sender, &config.policy, config.nonce, now),
            config,
            memory: Some(memory),
            bases,
            ahead: None,
            secret: None,
            sending: None,
            root: None,
            pausing: false,
            moved: None,
            host: None,
            offered: None,
            trace: None,
            rounds: Vec::new(),
            hot: None,
            finished: false,
            events: VecDeque::new(),
            outcome: None,
        }
    }

    /// Shows `trace` what the guest of a live session writes. Called before the receiver has accepted.
    pub fn trace(&mut self, trace: Box<dyn Trace>) {
        self.trace = Some(trace);
    }

    /// The first frame of the connection that is to carry `lane`; `None` before [`Event::Accepted`].
    pub fn join(&self, lane: LaneId) -> Option<Outgoing> {
        let proof = join_proof(self.secret.as_ref()?, &self.config.session, lane.number());
        Some(Outgoing::frame(&Frame::Join(Join { session: self.config.session, proof }), lane))
    }

    /// Stops the session, for the reason that `kind` names.
    pub fn cancel(&mut self, kind: ErrorKind) {
        self.fail(kind);
    }

    /// The guest stands still, as [`Event::Pause`] asked, and this is what goes with its memory; or it cannot be made to.
    pub fn paused(&mut self, result: Result<Blobs, String>, now: Time) {
        let Some(sending) = self.sending.as_mut().filter(|_| self.pausing) else { return };
        let begun = result.map_err(ErrorKind::Pause).and_then(|blobs| sending.begin_last_round(blobs, now));
        self.moved = Some(now);
        if let Err(kind) = begun {
            self.fail(kind);
        }
    }

    /// When a receiver has left a guest that stands still standing for too long, whatever signs of life it gives.
    fn stalled_at(&self) -> Option<Time> {
        self.moved.filter(|_| self.is_sending()).map(|moved| moved + STALL_SPAN_MAX)
    }

    fn handle_ack(&mut self, lane: LaneId, ack: &Ack, now: Time) -> Result<(), ErrorKind> {
        let Some(sending) = self.sending.as_mut() else { return Ok(()) };
        let before = sending.lanes.delivered();
        sending.handle_ack(lane, ack, now)?;
        if sending.lanes.delivered() > before {
            self.moved = self.moved.map(|_| now);
        }
        Ok(())
    }

    /// Says this of a hand-over, if there is anybody to hear it.
    pub fn say(&mut self, message: Message) {
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Handover(message));
    }

    /// The guest is the receiver's for good, perhaps with pages left behind that other sessions have to bring: the session
    /// ends when all that was said has gone out.
    pub fn release(&mut self) {
        if self.endpoint.phase() != Phase::Finishing || self.config.live.is_none() {
            return;
        }
        self.note_rounds();
        self.hot = self.sending.as_mut().and_then(|sending| sending.release());
        self.succeed();
    }

    /// What is left to bring of a guest that was offered before all of it had gone. Whether it is the receiver's, its
    /// hand-overs know.
    pub fn into_remainder(self) -> Option<Remainder<M>> {
        let handover = self.offered.filter(|handover| handover.post_copy)?;
        self.sending?.into_remainder(handover)
    }

    /// Pages that the guest wrote all the time, by their places, once it is gone: not worth keeping.
    pub fn hot(&mut self) -> Option<PageBitmap> {
        self.hot.take()
    }

    /// The rounds so far.
    pub fn rounds(&self) -> &[RoundReport] {
        let going_on = self.sending.as_ref().and_then(|sending| sending.rounds.as_ref());
        going_on.map_or(&self.rounds, Rounds::reports)
    }

    fn note_rounds(&mut self) {
        self.rounds = self.rounds().to_vec();
    }

    fn succeed(&mut self) {
        self.endpoint.finish();
        self.outcome = Some(Ok(()));
        self.finished = true;
        self.events.push_back(Event::Finished);
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.sending.as_ref().map(|sending| sending.counts()).unwrap_or_default()
    }

    /// What was decided so far.
    pub fn decisions(&self) -> &[Decision] {
        self.sending.as_ref().map_or(&[], |sending| &sending.decisions)
    }

    /// Pages stated so far, and pages of the image; for progress.
    pub fn progress(&self) -> (u64, u64) {
        self.sending.as_ref().map_or((0, 0), |sending| sending.progress())
    }

    /// What the image is that was sent, once the receiver has all of it. Can be had once.
    pub fn manifest(&mut self) -> Option<Manifest> {
        let whole = |sending: &mut Box<Sending<M>>| self.finished && sending.leaving.is_none();
        self.sending.take_if(whole).map(|sending| sending.into_manifest())
    }

    /// How the session ended, once it has.
    pub fn outcome(&mut self) -> Option<Result<(), SenderError>> {
        self.outcome.take()
    }

    fn fail(&mut self, kind: ErrorKind) {
        if self.endpoint.phase() == Phase::Over {
            return;
        }
        if std::mem::take(&mut self.pausing) {
            self.events.push_back(Event::Resume);
        }
        self.note_rounds();
        if let Some(sending) = &mut self.sending {
            sending.abandon();
        }
        self.endpoint.close(kind.close_code(), &chain(&kind), kind.tells_peer());
        self.outcome = Some(Err(SenderError { kind, guest_at: GuestAt::Sender }));
    }

    fn handle(&mut self, lane: LaneId, kind: FrameKind, body: &[u8], now: Time) -> Result<(), ErrorKind> {
        let was = self.endpoint.phase();
        let frame = self.endpoint.judge(lane, kind, body, now)?;
        if was == Phase::Greeting && self.endpoint.phase() == Phase::Opening {
            return self.open();
        }
        match frame {
            Some(Frame::Accept(accept)) => self.handle_accept(&accept, now),
            Some(Frame::Handover(message)) => {
                if self.config.live.is_none() {
                    return Err(Violation::Live(message.word.name(), "hands no guest over").into());
                }
                self.events.push_back(Event::Said(message));
                Ok(())
            }
            Some(Frame::Done(done)) => self.handle_done(done),
            Some(Frame::Have(have)) => self.sending.as_mut().map_or(Ok(()), |sending| sending.handle_have(&have)),
            Some(Frame::Ack(ack)) => self.handle_ack(lane, &ack, now),
            _ => Ok(()),
        }
    }

    fn open(&mut self) -> Result<(), ErrorKind> {
        let (Some(greeted), Some(memory)) = (self.endpoint.greeted(), self.memory.as_ref()) else { return Ok(()) };
        let layout = memory.layout().clone();
        for region in layout.regions() {
            let size = region.install_size.bytes();
            if greeted.agreement.install_sizes & (size / 4096) == 0 {
                let unknown = Incompatible::Unsupported { what: "install size", value: u64::from(size) };
                return Err(ErrorKind::Peer(unknown.into()));
            }
        }
        let open = Open {
            transcript: greeted.transcript,
            session: self.config.session,
            name: self.config.name.clone(),
            fresh: self.config.fresh,
            live: self.config.live.map(|live| live.handover),
            single_stream: self.config.single_stream,
            lanes: self.config.lanes,
            domain_key: self.config.domain_key,
            layout,
            lineage: self.config.lineage,
            known: self.bases.iter().map(|base| base.root()).collect(),
        };
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Open(open));
        Ok(())
    }

    fn handle_accept(&mut self, accept: &Accept, now: Time) -> Result<(), ErrorKind> {
        let (Some(greeted), Some(mut memory)) = (self.endpoint.greeted(), self.memory.take()) else { return Ok(()) };
        // SPEC 4.9
        if accept.transcript != greeted.transcript {
            return Err(Violation::Transcript.into());
        }
        if accept.lanes > self.config.lanes {
            return Err(Violation::Join { lane: accept.lanes, why: "more lanes granted than asked for" }.into());
        }
        let agreed = usize::from(accept.agreed).checked_sub(1).map(|at| self.bases.get(at));
        let common = agreed.flatten().and_then(|base| common_pages(base.layout(), memory.layout()));
        check_holdings(accept, memory.layout(), common.as_deref())?;
        // SPEC 4.20
        if usize::from(accept.agreed) > self.bases.len() {
            let (got, expected) = (u64::from(accept.agreed), self.bases.len() as u64);
            return Err(Violation::Terms { what: "agreed root", got, expected }.into());
        }
        // SPEC 4.21
        if accept.host.is_some() != self.config.live.is_some() {
            return Err(Violation::Live("terms of another kind", "asked for others").into());
        }
        // SPEC 4.22
        if accept.post_copy && !self.config.live.is_some_and(|live| live.handover.post_copy) {
            return Err(Violation::Live("terms of post-copy", "did not ask for it").into());
        }
        let at_once = self.config.live.is_some_and(|live| live.at_once);
        if at_once && !accept.post_copy {
            return Err(ErrorKind::NoPostCopy);
        }
        self.host = accept.host.map(HostId);
        self.secret = Some(accept.secret);
        let hasher = PageHasher::new(&DedupDomain::new(&self.config.domain_key));
        let agreed = usize::from(accept.agreed).checked_sub(1);
        let ahead = self.ahead.take().flatten().filter(|_| agreed == Some(0));
        let agreed =
            agreed.filter(|&at| at < self.bases.len()).map(|at| AgreedBase { base: self.bases.swap_remove(at), ahead });
        self.bases.clear();
        let terms = (hasher, greeted.agreement.codecs);
        let rounds = self.config.live.map(|live| Rounds::begin(&mut memory, live.limits, now));
        let mut rounds = rounds.transpose().map_err(ErrorKind::Source)?;
        if let Some(rounds) = &mut rounds {
            rounds.show(self.trace.take());
            if at_once {
                rounds.leave_at_once();
            }
        }
        let mut sending = Box::new(Sending::new((memory, rounds), accept, agreed, &self.config, terms));
        sending.explain_start(now);
        self.sending = Some(sending);
        self.endpoint.enter(Phase::Sending);
        if self.config.single_stream {
            (0..accept.lanes).map(LaneId::bulk).for_each(|lane| self.endpoint.open_lane(lane, now));
        }
        self.events.push_back(Event::Accepted { lanes: accept.lanes });
        Ok(())
    }

    fn handle_done(&mut self, done: Done) -> Result<(), ErrorKind> {
        let Some(root) = self.root else { return Ok(()) };
        // SPEC 7.6
        if (done.pages, done.root) != (root.pages, root.digest) {
            let (theirs, their_pages) = (done.root, done.pages);
            return Err(Violation::Root { theirs, their_pages, ours: root.digest, our_pages: root.pages }.into());
        }
        if self.config.live.is_some() {
            return Err(Violation::Live("DONE", "ends with a hand-over").into());
        }
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Done(done));
        // SPEC 7.7: the only place where a session at rest succeeds at this side.
        self.succeed();
        Ok(())
    }

    /// All is stated: the blobs and the root follow, and a guest that runs can be handed over.
    fn state_root(&mut self, root: Root) {
        self.root = Some(root);
        self.endpoint.enter(Phase::Finishing);
        let blobs = self.sending.as_ref().map(|sending| &sending.blobs);
        for part in blobs.into_iter().flat_map(Blobs::parts) {
            self.endpoint.push_frame(LaneId::CONTROL, &Frame::Blob(part));
        }
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Root(root));
        self.events.push_back(Event::Stated);
        if let (Some(live), Some(receiver)) = (self.config.live, self.host) {
            let LiveOpen { guest: lineage, epoch, host: sender, arbiter, .. } = live.handover;
            let left = self.sending.as_ref().and_then(|sending| sending.leaving.as_ref());
            let post_copy = left.is_some_and(|leaving| leaving.absent.count() > 0);
            let session = self.config.session;
            self.pausing = false;
            let handover =
                Handover { lineage, session, epoch, root: root.digest, sender, receiver, arbiter, post_copy };
            self.offered = Some(handover);
            self.events.push_back(Event::Offer(handover));
        }
    }

    fn is_sending(&self) -> bool {
        matches!(self.endpoint.phase(), Phase::Sending | Phase::Finishing)
    }
}

impl<M: GuestMemory> Machine for SenderEngine<M> {
    type Job = EncodeJob;
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
    }

    fn handle_peer_error(&mut self, error: PeerError, _now: Time) {
        self.fail(error.into());
    }

    fn handle_timeout(&mut self, now: Time) {
        let late = if self.stalled_at().is_some_and(|until| now >= until) {
            Err(PeerError::Timeout("a guest that stands still was not taken on for 120 s"))
        } else {
            self.endpoint.handle_timeout(now)
        };
        if let Err(error) = late {
            self.fail(error.into());
        }
    }

    fn handle_job(&mut self, output: EncodeOutput, spent: Span, _now: Time) {
        if let Some(sending) = self.sending.as_mut() {
            sending.handle_encoded(output, spent);
        }
    }

    fn handle_join(&mut self, lane: LaneId, _join: &Join, _now: Time) -> Result<(), Violation> {
        Err(Violation::Join { lane: lane.number(), why: "a sender is not joined" })
    }

    fn handle_lane_open(&mut self, lane: LaneId, now: Time) {
        self.endpoint.open_lane(lane, now);
    }

    fn work(&mut self, now: Time) -> bool {
        if self.endpoint.phase() == Phase::Opening && self.ahead.is_none() {
            let hasher = PageHasher::new(&DedupDomain::new(&self.config.domain_key));
            self.ahead = Some(self.bases.first_mut().and_then(|base| base.trees(&hasher).ok()));
            return true;
        }
        if !self.is_sending() {
            return false;
        }
        match self.sending.as_mut().map(|sending| sending.step(now)) {
            Some(Ok(Step::Did)) => true,
            Some(Ok(Step::Judged)) => {
                self.events.push_back(Event::Judged);
                true
            }
            Some(Ok(Step::Pause)) => {
                self.pausing = true;
                self.events.push_back(Event::Pause);
                true
            }
            Some(Ok(Step::Throttle(percent))) => {
                self.events.push_back(Event::Throttle(percent));
                true
            }
            Some(Ok(Step::Stated(root))) => {
                self.state_root(root);
                true
            }
            Some(Err(kind)) => {
                self.fail(kind);
                true
            }
            Some(Ok(Step::Waits)) | None => false,
        }
    }

    fn poll_frame(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        let queued = self.endpoint.poll_frame(lane, now);
        if queued.is_some() || !self.is_sending() {
            return queued;
        }
        self.sending.as_mut()?.lanes.poll_frame(lane, now)
    }

    fn poll_job(&mut self) -> Option<EncodeJob> {
        self.sending.as_mut()?.lanes.poll_job()
    }

    fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    fn poll_timeout(&self) -> Option<Time> {
        let pace = self.sending.as_ref().filter(|_| self.is_sending()).and_then(|sending| sending.lanes.poll_timeout());
        pace.into_iter().chain(self.endpoint.poll_timeout()).chain(self.stalled_at()).min()
    }

    fn recycle(&mut self, buffer: PageBuffer) {
        if let Some(sending) = self.sending.as_mut() {
            sending.lanes.recycle(buffer);
        }
    }

    fn is_over(&self) -> bool {
        self.endpoint.phase() == Phase::Over
    }
}
