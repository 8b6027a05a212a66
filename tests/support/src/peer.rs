//! Peers that say whatever a test wants, against one real engine: no transport, no time but what the test tells.
//!
//! [`Script`] holds what both roles share: the engine, the clock, and every frame the engine has said. Its engine can be
//! brought into any phase by honest frames; from there on a test speaks.

use crate::image::Image;
use crate::memory::{ImageMemory, ImageSink, SourceFaults};
use pagewire_protocol::batch::BatchHasher;
use pagewire_protocol::challenge::PageProof;
use pagewire_protocol::compress::{Compressor, compress_delta};
use pagewire_protocol::digest::{Digest, PageBytes, PageHasher, join_proof, page_digest, transcript_digest};
use pagewire_protocol::domain::{DedupDomain, LineageId};
use pagewire_protocol::error::{CloseCode, Violation, chain};
use pagewire_protocol::frame::{
    Accept, Close, Codec, Done, EntryKind, Frame, FrameHeader, FrameKind, HEADER_BYTES, Hello, ImageName, Join, LaneId,
    LiveOpen, Open, PagesHead, Role, Root, RoundEnd, Run, SKIPPED_DIGEST,
};
use pagewire_protocol::handover::HostId;
use pagewire_protocol::limits::WINDOW_BYTES;
use pagewire_protocol::session::{Job, Machine, Phase, Policy};
use pagewire_protocol::time::{Span, Time};
use pagewire_receiver::{Event, OtherPages, ReceiverEngine, ReceiverError, Terms};
use pagewire_sender::{Base, SenderConfig, SenderEngine, SenderError};

/// The secret of every scripted session.
pub const SECRET: [u8; 32] = [7; 32];
/// What every scripted receiver challenges with.
pub const CHALLENGE: [u8; 32] = [6; 32];
/// The id of every scripted session.
pub const SESSION: [u8; 16] = [5; 16];

/// A frame that an engine has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// On which lane.
    pub lane: LaneId,
    /// What it is.
    pub kind: FrameKind,
    /// Its body.
    pub body: Vec<u8>,
}

/// One engine and whoever speaks to it.
#[derive(Debug)]
pub struct Script<M> {
    /// The engine.
    pub engine: M,
    /// The time it is told.
    pub now: Time,
    /// Everything it has said.
    pub said: Vec<Said>,
    /// The body of its HELLO.
    pub hello: Vec<u8>,
    /// The digest of both hellos.
    pub transcript: [u8; 32],
    /// Lanes that a transport would have.
    pub lanes: u8,
    /// Roots that an honest sender knows.
    pub known: Vec<Digest>,
    /// Pages of other guests that a receiver has.
    pub others: Option<Box<dyn OtherPages>>,
    /// The features that the script offers.
    pub features: u64,
    /// The hand-over that an honest sender opens.
    pub live: Option<LiveOpen>,
    /// The host that an honest receiver is, for guests that are handed over.
    pub host: Option<HostId>,
}

impl<M: Machine> Script<M> {
    pub(crate) fn new(engine: M, now: Time, lanes: u8) -> Self {
        let (said, hello, known, others, features, live, host) = Default::default();
        let mut script =
            Self { engine, now, said, hello, transcript: [0; 32], lanes, known, others, features, live, host };
        script.listen();
        script.hello = script.said.first().map(|said| said.body.clone()).unwrap_or_default();
        script
    }

    /// Hands over a frame as it is.
    pub fn raw(&mut self, lane: LaneId, kind: FrameKind, body: &[u8]) {
        self.engine.handle_frame(lane, kind, body, self.now);
    }

    /// Hands over a frame.
    pub fn say(&mut self, lane: LaneId, frame: &Frame<'_>) {
        let mut bytes = Vec::new();
        frame.encode(lane, &mut bytes);
        self.raw(lane, frame.kind(), &bytes[HEADER_BYTES..]);
    }

    /// Takes what the engine has to say now, on every lane; every frame must be one.
    pub fn listen(&mut self) {
        let lanes = [LaneId::CONTROL, LaneId::URGENT].into_iter();
        for lane in lanes.chain((0..self.lanes).map(LaneId::bulk)) {
            while let Some(frame) = self.engine.poll_frame(lane, self.now) {
                let bytes = frame.pieces().collect::<Vec<_>>().concat();
                let header = FrameHeader::decode(bytes.first_chunk().unwrap()).expect("an own header is legal");
                assert_eq!((header.lane, header.frame_bytes()), (lane, bytes.len()));
                let body = bytes[HEADER_BYTES..].to_vec();
                Frame::decode(header.kind, &body).expect("an own frame is legal");
                self.said.push(Said { lane, kind: header.kind, body });
                self.engine.recycle(frame.payload.buffer);
            }
        }
    }

    /// Lets the engine work, run its jobs and speak until it has nothing more to do.
    pub fn settle(&mut self) {
        loop {
            let mut moved = self.engine.work(self.now);
            while let Some(job) = self.engine.poll_job() {
                self.engine.handle_job(job.run(), Span::from_nanos(1_000), self.now);
                moved = true;
            }
            let before = self.said.len();
            self.listen();
            if !moved && self.said.len() == before {
                return;
            }
        }
    }

    /// Time passes; timeouts fire when they are due.
    pub fn wait(&mut self, span: Span) {
        let end = self.now + span;
        for _ in 0..10_000 {
            let Some(due) = self.engine.poll_timeout().filter(|&due| due <= end) else { break };
            // What is overdue waits for a lane that this script does not have: the next tick looks again.
            self.now = due.max(self.now + Span::from_millis(1)).min(end);
            self.engine.handle_timeout(self.now);
            self.listen();
            if self.now >= end {
                break;
            }
        }
        self.now = end;
    }

    /// The last frame of a kind that the engine has said.
    pub fn last(&self, kind: FrameKind) -> Option<Frame<'_>> {
        let said = self.said.iter().rev().find(|said| said.kind == kind)?;
        Some(Frame::decode(kind, &said.body).unwrap())
    }

    /// The CLOSE that the engine has said.
    pub fn closed(&mut self) -> Option<Close> {
        self.listen();
        match self.last(FrameKind::CLOSE) {
            Some(Frame::Close(close)) => Some(close),
            _ => None,
        }
    }

    /// Says the HELLO of an honest peer of `role`.
    pub fn greet(&mut self, role: Role) {
        let policy = Policy { features_offered: self.features, ..Policy::default() };
        let hello: Hello = policy.hello(role, [9; 16]);
        let mut body = Vec::new();
        hello.encode(&mut body);
        let (sender, receiver) = if role == Role::Sender { (&body, &self.hello) } else { (&self.hello, &body) };
        self.transcript = transcript_digest(sender, receiver).0;
        self.raw(LaneId::CONTROL, FrameKind::HELLO, &body);
    }
}

/// What a scripted sender claims about an image, page for page.
#[derive(Clone, Debug, Default)]
pub struct Statement {
    /// The round.
    pub round: u32,
    /// The region.
    pub region: u16,
    /// The first page.
    pub first: u64,
    /// The batch digest, if it is not to be the right one.
    pub digest: Option<Digest>,
    /// The runs.
    pub runs: Vec<Run>,
    /// The digests of reference pages.
    pub references: Vec<Digest>,
    /// Proofs of having them, if there are to be any.
    pub proofs: Vec<PageProof>,
    /// The digests of all pages.
    pub digests: Vec<Digest>,
    /// The bytes of inline pages.
    pub payload: Vec<u8>,
    /// How far in the base the old bytes of its pages lie.
    pub shift: i64,
    /// Its base pages are those of an agreed base.
    pub agreed: bool,
}

impl Statement {
    /// A statement about pages from `first` of `region` on.
    pub fn at(region: u16, first: u64) -> Self {
        Self { region, first, ..Self::default() }
    }

    fn push(mut self, kind: EntryKind, digest: Digest) -> Self {
        match self.runs.last_mut() {
            Some(run) if run.kind == kind => run.count += 1,
            _ => self.runs.push(Run { kind, count: 1 }),
        }
        self.digests.push(digest);
        self
    }

    /// The next page is zero.
    pub fn zero(self) -> Self {
        self.push(EntryKind::ZERO, page_digest(&DedupDomain::public(), &[0; 4096]))
    }

    /// The next page is as in the base, and has this digest.
    pub fn base(self, digest: Digest) -> Self {
        self.push(EntryKind::BASE, digest)
    }

    /// The next page is as in the base `shift` pages further, and has this digest.
    pub fn shifted(self, digest: Digest) -> Self {
        self.push(EntryKind::SHIFTED, digest)
    }

    /// The next page is not spoken of.
    pub fn skipped(self) -> Self {
        self.push(EntryKind::SKIPPED, SKIPPED_DIGEST)
    }

    /// The body with its payload as a delta against `old`.
    pub fn delta(&self, old: &[u8]) -> Vec<u8> {
        let mut payload = Vec::new();
        assert!(compress_delta(&self.payload, old, &mut payload), "shrinks");
        self.encoded(Codec::DELTA, &payload)
    }

    /// The body with its payload as the words that differ from `old`.
    pub fn words(&self, old: &[u8]) -> Vec<u8> {
        let mut payload = Vec::new();
        assert!(
            Compressor::new().unwrap().compress_words(self.payload.as_chunks().0.iter(), old, &mut payload),
            "few differ"
        );
        self.encoded(Codec::WORDS, &payload)
    }

    /// The next page has this digest.
    pub fn reference(mut self, digest: Digest) -> Self {
        self.references.push(digest);
        self.push(EntryKind::REFERENCE, digest)
    }

    /// The page referred to last comes with this proof.
    pub fn proof(mut self, proof: PageProof) -> Self {
        self.proofs.push(proof);
        self
    }

    /// The next page has these bytes.
    pub fn inline(mut self, page: &PageBytes) -> Self {
        self.payload.extend_from_slice(page);
        self.push(EntryKind::INLINE, page_digest(&DedupDomain::public(), page))
    }

    /// The body of its frame under the public domain.
    pub fn body(&self) -> Vec<u8> {
        self.encoded(Codec::NONE, &self.payload)
    }

    /// The body with its payload compressed.
    pub fn compressed(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        assert!(Compressor::new().unwrap().compress(&self.payload, 1, &mut payload), "shrinks");
        self.encoded(Codec::ZSTD, &payload)
    }

    /// The digest that proves it.
    pub fn batch_digest(&self) -> Digest {
        let mut batch = BatchHasher::new(&DedupDomain::public(), self.agreed);
        let mut rest = self.digests.as_slice();
        for run in &self.runs {
            let (of_run, after) = rest.split_at(usize::from(run.count).min(rest.len()));
            batch.run(*run, of_run);
            rest = after;
        }
        batch.finish(self.first)
    }

    /// The body with any payload.
    pub fn encoded(&self, codec: Codec, payload: &[u8]) -> Vec<u8> {
        let right = || self.batch_digest();
        let digest = self.digest.unwrap_or_else(right);
        let count = self.digests.len() as u32;
        let head = PagesHead {
            round: self.round,
            region: self.region,
            codec,
            first: self.first,
            count,
            digest,
            shift: self.shift,
        };
        let mut body = Vec::new();
        head.encode(&self.runs, &self.references, &self.proofs, &mut body);
        body.extend_from_slice(payload);
        body
    }
}

/// A scripted sender against a real receiver.
pub type AgainstReceiver = Script<ReceiverEngine<ImageSink>>;

impl AgainstReceiver {
    /// A receiver that greets and would grant `lanes`.
    pub fn receiver(lanes: u8) -> Self {
        Self::receiver_with(&Policy::default(), lanes)
    }

    /// A receiver that speaks what `policy` says.
    pub fn receiver_with(policy: &Policy, lanes: u8) -> Self {
        let now = Time::ZERO + Span::from_secs(1);
        Self::new(ReceiverEngine::new(policy, [8; 16], now), now, lanes)
    }

    /// The OPEN of an honest sender of `image`.
    pub fn honest_open(&self, image: &Image) -> Open {
        Open {
            transcript: self.transcript,
            session: SESSION,
            name: ImageName::new("vm.img").unwrap(),
            fresh: false,
            live: self.live,
            single_stream: false,
            lanes: self.lanes,
            domain_key: [0; 32],
            layout: image.layout(),
            lineage: LineageId([0; 16]),
            known: self.known.clone(),
        }
    }

    /// Takes the offer.
    pub fn take(&mut self, sink: &ImageSink) {
        while let Some(event) = self.engine.poll_event() {
            if let Event::Offered(offer) = event {
                let (lanes, agreed, sink) = (self.lanes, sink.agreed(&offer.open), sink.clone());
                let (others, challenge, host) = (self.others.take(), CHALLENGE, self.host);
                let terms = Terms {
                    sink,
                    lanes,
                    window: WINDOW_BYTES,
                    secret: SECRET,
                    seed: 3,
                    agreed,
                    others,
                    challenge,
                    host,
                };
                self.engine.accept(terms, self.now);
            }
        }
        self.listen();
    }

    /// The JOIN of an honest sender.
    pub fn honest_join(lane: LaneId) -> Join {
        Join { session: SESSION, proof: join_proof(&SECRET, &SESSION, lane.number()) }
    }

    /// A connection asks to carry `lane`.
    ///
    /// # Errors
    /// It may not.
    pub fn join(&mut self, lane: LaneId, join: &Join) -> Result<(), Violation> {
        self.engine.handle_join(lane, join, self.now)
    }

    /// Brings the receiver into `phase` by honest frames about `image`.
    pub fn enter(&mut self, phase: Phase, image: &Image, sink: &ImageSink) {
        if phase == Phase::Greeting {
            return;
        }
        self.greet(Role::Sender);
        if phase == Phase::Waiting {
            return;
        }
        let open = self.honest_open(image);
        self.say(LaneId::CONTROL, &Frame::Open(open));
        if phase == Phase::Deciding {
            return;
        }
        self.take(sink);
        for lane in (0..self.lanes).map(LaneId::bulk) {
            self.join(lane, &Self::honest_join(lane)).unwrap();
        }
        if phase == Phase::Receiving {
            return;
        }
        self.settle();
        self.deliver(image);
        self.settle();
        if phase == Phase::Over {
            let done = Done { pages: image.pages(), root: image.root(&[0; 32]) };
            self.say(LaneId::CONTROL, &Frame::Done(done));
        }
    }

    /// States all of a small image of one region as bytes, ends the round, and says the root.
    pub fn deliver(&mut self, image: &Image) {
        let pages = (0..image.pages()).map(|page| image.page(0, page).first_chunk().unwrap());
        let statement = pages.fold(Statement::at(0, 0), Statement::inline);
        if image.pages() > 0 {
            self.raw(LaneId::bulk(0), FrameKind::PAGES, &statement.body());
        }
        self.end_round(u64::from(image.pages() > 0));
        self.end_with(0, image);
    }

    /// ROUND for round 0 on every lane, where the first has had `frames` frames and the others none.
    pub fn end_round(&mut self, frames: u64) {
        for lane in 0..self.lanes {
            let frames = if lane == 0 { frames } else { 0 };
            self.say(LaneId::bulk(lane), &Frame::Round(RoundEnd { round: 0, frames }));
        }
    }

    /// The ROOT of an honest sender whose last round is `round`.
    pub fn end_with(&mut self, round: u32, image: &Image) {
        let root = Root { round, pages: image.pages(), digest: image.root(&[0; 32]) };
        self.say(LaneId::CONTROL, &Frame::Root(root));
    }

    /// How the session ended.
    pub fn outcome(&mut self) -> Option<Result<(), ReceiverError>> {
        self.engine.outcome()
    }

    /// The session has failed: this is the code it told the peer, and the text on both sides.
    pub fn failure(&mut self) -> (CloseCode, String) {
        let error = self.outcome().expect("over").expect_err("failed");
        let close = self.closed().expect("the peer is told");
        assert_eq!(close.reason, chain(&error.kind), "both sides say the same");
        (close.code, close.reason)
    }
}

/// A scripted receiver against a real sender.
pub type AgainstSender = Script<SenderEngine<ImageMemory>>;

impl AgainstSender {
    /// A sender of `image` that greets and asks for `lanes`.
    pub fn sender(image: &Image, lanes: u8) -> Self {
        let mut config = SenderConfig::new(ImageName::new("vm.img").unwrap());
        (config.session, config.nonce, config.lanes) = (SESSION, [8; 16], lanes);
        Self::sender_with(image, Vec::new(), config)
    }

    /// A sender of `image` that greets.
    pub fn sender_with(image: &Image, bases: Vec<Box<dyn Base>>, config: SenderConfig) -> Self {
        let now = Time::ZERO + Span::from_secs(1);
        let lanes = config.lanes;
        let memory = ImageMemory::new(image.clone(), SourceFaults::default());
        Self::new(SenderEngine::new(memory, bases, config, now), now, lanes)
    }

    /// The ACCEPT of an honest receiver that holds nothing.
    pub fn honest_accept(&self, image: &Image) -> Accept {
        let held_pages = vec![0; image.regions.len()];
        Accept {
            transcript: self.transcript,
            secret: SECRET,
            lanes: self.lanes,
            window: WINDOW_BYTES,
            held_pages,
            agreed: 0,
            base_stays: false,
            challenge: None,
            host: self.host.map(|host| host.0),
            post_copy: false,
        }
    }

    /// Says ACCEPT and opens the lanes.
    pub fn take(&mut self, accept: Accept) {
        let lanes = accept.lanes;
        self.say(LaneId::CONTROL, &Frame::Accept(accept));
        (0..lanes).for_each(|lane| self.engine.handle_lane_open(LaneId::bulk(lane), self.now));
    }

    /// Brings the sender into `phase` by honest frames.
    pub fn enter(&mut self, phase: Phase, image: &Image) {
        if phase == Phase::Greeting {
            return;
        }
        self.greet(Role::Receiver);
        self.listen();
        if phase == Phase::Opening {
            return;
        }
        let accept = self.honest_accept(image);
        self.take(accept);
        if phase == Phase::Sending {
            return;
        }
        self.settle();
        if phase == Phase::Over {
            let done = Done { pages: image.pages(), root: image.root(&[0; 32]) };
            self.say(LaneId::CONTROL, &Frame::Done(done));
        }
    }

    /// PAGES frames said on a lane so far.
    pub fn frames(&self, lane: LaneId) -> u64 {
        self.said.iter().filter(|said| said.lane == lane && said.kind == FrameKind::PAGES).count() as u64
    }

    /// How the session ended.
    pub fn outcome(&mut self) -> Option<Result<(), SenderError>> {
        self.engine.outcome()
    }

    /// The session has failed: this is the code it told the peer, and the text on both sides.
    pub fn failure(&mut self) -> (CloseCode, String) {
        let error = self.outcome().expect("over").expect_err("failed");
        let close = self.closed().expect("the peer is told");
        assert_eq!(close.reason, chain(&error.kind), "both sides say the same");
        (close.code, close.reason)
    }
}

/// The digests of an image's first region in the public domain.
pub fn digests(image: &Image) -> Vec<Digest> {
    let mut digests = Vec::new();
    let pages = (0..image.regions[0].pages()).map(|page| image.page(0, page).first_chunk().unwrap());
    PageHasher::new(&DedupDomain::public()).digest_pages(pages, |digest| digests.push(digest));
    digests
}
