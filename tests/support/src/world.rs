//! A pair of engines, the connections between them, and the clock that both are told.
//!
//! [`World::run`] moves bytes, runs jobs and passes time until both sides are over. Nothing here sleeps and nothing is
//! random but by seed; the number of steps is bounded, so a session that hangs is a failed test.

mod connection;
mod fill;
mod hosts;
mod process;
mod side;

pub use fill::{FillHarm, FillOutcome, FillWorld, FillWorldConfig, Habit, Left};
pub use hosts::Fate;
pub use process::{Harm, When};

use connection::{Connection, read};
use side::Side;

use crate::guest::{Guest, TraceLog};
use crate::host::Host;
use crate::image::Image;
use crate::link::{Cut, LinkConfig, Pipe};
use crate::memory::{ImageBase, ImageMemory, ImageSink, SourceFaults};
use crate::rng::Rng;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{FrameKind, ImageName, LaneId, LiveOpen, Role};
use pagewire_protocol::framing::Framer;
use pagewire_protocol::handover::{Message, Word};
use pagewire_protocol::limits::WINDOW_BYTES;
use pagewire_protocol::session::{FEATURE_LIVE, FEATURE_POST_COPY, Machine, Outgoing, Policy};
use pagewire_protocol::time::{Span, Time};
use pagewire_receiver::{Event as ReceiverEvent, Offer, OtherPages, ReceiverEngine, ReceiverError, Terms};
use pagewire_sender::converge::Limits;
use pagewire_sender::{
    Base, ErrorKind as SenderFailure, Event as SenderEvent, GuestMemory, Live, RoundReport, SenderConfig, SenderEngine,
    SenderError,
};

/// What is overdue but waits for a lane is looked at again so much later, as the tokio pump does.
const TICK: Span = Span::from_millis(250);
/// Steps after which a session hangs.
const STEPS_MAX: u64 = 2_000_000;

/// What the receiver's embedder does with the offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Takes it.
    Accept,
    /// Refuses it.
    Refuse(CloseCode, String),
    /// Never answers.
    Never,
}

/// What somebody in the middle does to each frame: whether it goes to the receiver, and its bytes.
pub type Meddler = Box<dyn FnMut(bool, &mut Vec<u8>)>;

/// Everything that makes a world what it is.
pub struct WorldConfig {
    /// The seed of all chance.
    pub seed: u64,
    /// How the sender sends.
    pub sender: SenderConfig,
    /// What the receiver speaks.
    pub receiver_policy: Policy,
    /// What the receiver does with the offer.
    pub decision: Decision,
    /// Bulk lanes the receiver grants at most.
    pub lanes: u8,
    /// The receiver's window.
    pub window: u64,
    /// Every connection, both ways.
    pub link: LinkConfig,
    /// Which lane's connection breaks, whether on the way to the receiver, and how.
    pub cuts: Vec<(LaneId, bool, Cut)>,
    /// When nothing arrives, on any connection.
    pub stall: Option<(Time, Time)>,
    /// The longest a job takes.
    pub job_span_max: Span,
    /// One side's engine is told to stop when so many frames have been written.
    pub cancel: Option<(Role, u64)>,
    /// What happens to the process of one side, and when.
    pub harms: Vec<(Role, When, Harm)>,
    /// Somebody in the middle.
    pub meddler: Option<Meddler>,
    /// Faults of the sender's memory.
    pub source_faults: SourceFaults,
    /// Earlier images that the sending host knows, the newest first.
    pub bases: Vec<ImageBase>,
    /// Pages of other guests that the receiver has.
    pub others: Option<Box<dyn OtherPages>>,
    /// Pages of the memory that are known not to have changed since one of them.
    pub unchanged: Option<(Digest, [u8; 16], PageBitmap)>,
    /// The guest that is sent while it runs.
    pub guest: Option<Guest>,
    /// How long that may take.
    pub live: Option<Limits>,
    /// It may start before all of it is there; and this says whether that is to happen at once.
    pub post_copy: Option<bool>,
    /// Sees what the guest writes.
    pub trace: TraceLog,
    /// The hosts of that guest: the one that it leaves, the one that it comes to.
    pub hosts: [Host; 2],
    /// What becomes of the first saying of a word.
    pub fates: Vec<(Word, Fate)>,
    /// The blobs that go with it.
    pub blobs: Blobs,
    /// How long it takes until the guest stands still.
    pub pause_span: Span,
    /// Keep every frame that is written.
    pub record: bool,
}

impl WorldConfig {
    /// A world without harm: one lane, no delay, no limits.
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let mut sender = SenderConfig::new(ImageName::new("vm.img").unwrap());
        sender.seed = rng.word();
        rng.fill(&mut sender.session);
        rng.fill(&mut sender.nonce);
        Self {
            seed,
            sender,
            receiver_policy: Policy::default(),
            decision: Decision::Accept,
            lanes: 8,
            window: WINDOW_BYTES,
            link: LinkConfig::delaying(Span::ZERO),
            cuts: Vec::new(),
            stall: None,
            job_span_max: Span::ZERO,
            cancel: None,
            harms: Vec::new(),
            meddler: None,
            source_faults: SourceFaults::default(),
            bases: Vec::new(),
            others: None,
            unchanged: None,
            guest: None,
            live: None,
            post_copy: None,
            trace: TraceLog::default(),
            hosts: [Host::new(1), Host::new(2)],
            fates: Vec::new(),
            blobs: Blobs::new(),
            pause_span: Span::ZERO,
            record: false,
        }
    }
}

/// What a session came to.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended at the sender.
    pub sender: Result<(), SenderError>,
    /// How it ended at the receiver.
    pub receiver: Result<(), ReceiverError>,
    /// Pages by the way they were stated.
    pub sent: pagewire_sender::Counts,
    /// Pages by the way they came.
    pub received: pagewire_receiver::Counts,
    /// What the sender decided.
    pub decisions: Vec<String>,
    /// The rounds of a guest that ran.
    pub rounds: Vec<RoundReport>,
    /// Pages that the guest wrote all the time, once it has left.
    pub hot: Option<PageBitmap>,
    /// Bytes to the receiver and to the sender.
    pub wire: [u64; 2],
    /// When the first PAGES frame arrived at the receiver.
    pub first_pages: Option<Time>,
    /// What has happened to processes before their side was over.
    pub harmed: Vec<(Role, Harm)>,
    /// The hosts of a guest that ran, as they are now.
    pub hosts: [Host; 2],
    /// Every word that a host has said, by whether it went to the receiver.
    pub words: Vec<(bool, Message)>,
    /// The blobs that came with it.
    pub blobs: Option<Blobs>,
    /// When the sender knew.
    pub sender_over: Time,
    /// When the receiver knew.
    pub receiver_over: Time,
    /// Frames written: to the receiver or not, the kind, the lane.
    pub frames: Vec<(bool, FrameKind, LaneId)>,
    /// Their bytes, if they were to be kept.
    pub recording: Vec<(bool, Vec<u8>)>,
}

/// One session between two engines.
pub struct World {
    config: WorldConfig,
    sink: ImageSink,
    rng: Rng,
    now: Time,
    steps: u64,
    sender: Side<SenderEngine<Box<dyn GuestMemory>>>,
    receiver: Side<ReceiverEngine<ImageSink>>,
    /// When the guest will stand still.
    pausing: Option<Time>,
    /// It does, and the sender has not been told.
    stands_still: bool,
    /// Its hand-over is its host's from now on.
    offered: bool,
    /// When READY is late, by the sender's clock.
    ready_until: Option<Time>,
    harmed: Vec<(Role, Harm)>,
    blobs: Option<Blobs>,
    words: Vec<(bool, Message)>,
    connections: Vec<Connection>,
    first_pages: Option<Time>,
    frames: Vec<(bool, FrameKind, LaneId)>,
    recording: Vec<(bool, Vec<u8>)>,
}

const TO_RECEIVER: usize = 0;
const TO_SENDER: usize = 1;

impl World {
    /// A world in which `image` goes to `sink`.
    pub fn new(image: &Image, sink: &ImageSink, mut config: WorldConfig) -> Self {
        if let Some(limits) = config.live {
            let mut handover = config.hosts[0].open(config.sender.session);
            handover.post_copy = config.post_copy.is_some();
            config.sender.live = Some(Live { limits, handover, at_once: config.post_copy == Some(true) });
        }
        let mut memory = ImageMemory::new(image.clone(), config.source_faults);
        memory.unchanged = config.unchanged.clone();
        let memory: Box<dyn GuestMemory> = match &config.guest {
            Some(guest) => Box::new(guest.clone()),
            None => Box::new(memory),
        };
        let bases = config.bases.iter().map(|base| Box::new(base.clone()) as Box<dyn Base>).collect();
        let now = Time::ZERO + Span::from_secs(1);
        let mut rng = Rng::new(config.seed);
        let mut nonce = [0; 16];
        rng.fill(&mut nonce);
        let mut receiver_policy = config.receiver_policy.clone();
        if config.live.is_some() {
            receiver_policy.features_offered |= FEATURE_LIVE;
        }
        if config.post_copy.is_some() {
            receiver_policy.features_offered |= FEATURE_POST_COPY;
            sink.state().waits = true;
        }
        let mut sender = SenderEngine::new(memory, bases, config.sender.clone(), now);
        sender.trace(Box::new(config.trace.clone()));
        let mut world = Self {
            sender: Side::new(sender),
            receiver: Side::new(ReceiverEngine::new(&receiver_policy, nonce, now)),
            config,
            sink: sink.clone(),
            rng,
            now,
            steps: 0,
            pausing: None,
            stands_still: false,
            offered: false,
            ready_until: None,
            harmed: Vec::new(),
            blobs: None,
            words: Vec::new(),
            connections: Vec::new(),
            first_pages: None,
            frames: Vec::new(),
            recording: Vec::new(),
        };
        world.connect(LaneId::CONTROL);
        world
    }

    /// Drives the session to its end.
    pub fn run(self) -> Outcome {
        self.run_apart().0
    }

    /// The same, and what is left to bring of a guest that lacks pages.
    pub fn run_apart(mut self) -> (Outcome, Option<Left>) {
        loop {
            self.settle();
            if self.sender.machine.is_over() && self.receiver.machine.is_over() {
                return self.finish();
            }
            self.now = self.next_time();
            self.run_guest();
            self.check_ready();
            self.sender.handle_timeout(self.now);
            self.receiver.handle_timeout(self.now);
        }
    }

    fn connect(&mut self, lane: LaneId) {
        let cut = |to_receiver| {
            let mut cuts = self.config.cuts.iter();
            cuts.find(|(of, way, _)| *of == lane && *way == to_receiver).map(|(_, _, cut)| *cut)
        };
        let pipe = |to_receiver| Pipe::new(self.config.link, cut(to_receiver), self.config.stall);
        self.connections.push(Connection {
            lane,
            pipes: [pipe(true), pipe(false)],
            framers: [Framer::new(), Framer::new()],
            carries: [lane == LaneId::CONTROL, true],
            told: [false; 2],
        });
    }

    /// Moves everything that can move now.
    fn settle(&mut self) {
        loop {
            self.steps += 1;
            assert!(self.steps < STEPS_MAX, "seed {}: the session hangs at {:?}", self.config.seed, self.now);
            let mut moved = self.read_all() | self.handle_events() | self.write_all();
            moved |= self.sender.run_jobs(self.now, self.config.job_span_max, &mut self.rng);
            moved |= self.receiver.run_jobs(self.now, self.config.job_span_max, &mut self.rng);
            moved |= self.sender.work(self.now) | self.receiver.work(self.now);
            self.harm();
            self.bury();
            self.sender.note_over(self.now);
            self.receiver.note_over(self.now);
            if !moved {
                return;
            }
        }
    }

    fn next_time(&self) -> Time {
        let pipes =
            self.connections.iter().flat_map(|connection| &connection.pipes).filter_map(|pipe| pipe.next(self.now));
        let sides = [self.sender.next(self.now), self.receiver.next(self.now)].into_iter().flatten();
        let next = pipes.chain(sides).chain(self.pausing).chain(self.ready_is_late_at()).min();
        next.unwrap_or_else(|| panic!("seed {}: nothing will ever happen again", self.config.seed))
    }

    fn handle_events(&mut self) -> bool {
        let mut moved = false;
        while self.sender.is_awake(self.now)
            && let Some(event) = self.sender.machine.poll_event()
        {
            moved = true;
            self.handle_guest(&event);
            let SenderEvent::Accepted { lanes } = event else { continue };
            let lanes = if self.config.sender.single_stream { 0 } else { lanes };
            for lane in (0..lanes).map(LaneId::bulk) {
                self.connect(lane);
                let join = self.sender.machine.join(lane).unwrap();
                self.write(self.connections.len() - 1, TO_RECEIVER, &join);
                let clock = self.sender.clock(self.now);
                self.sender.machine.handle_lane_open(lane, clock);
            }
        }
        while self.receiver.is_awake(self.now)
            && let Some(event) = self.receiver.machine.poll_event()
        {
            moved = true;
            match event {
                ReceiverEvent::Offered(offer) => self.decide(&offer),
                ReceiverEvent::Ready(handover, blobs) => {
                    self.blobs = Some(blobs);
                    let actions = self.config.hosts[1].ready(handover);
                    self.act_at_receiver(actions);
                }
                ReceiverEvent::Said(message) => {
                    let actions = self.config.hosts[1].hear(self.config.hosts[0].id, message);
                    self.act_at_receiver(actions);
                }
                ReceiverEvent::Fill(_) => self.receiver.machine.refuse(CloseCode::REFUSED, "no guest lacks pages here"),
                ReceiverEvent::Verified | ReceiverEvent::Finished => {}
            }
        }
        moved
    }

    fn decide(&mut self, offer: &Offer) {
        let may_begin = |live: &LiveOpen| self.config.hosts[1].handovers.may_begin(live.epoch);
        if let Some(Err(refusal)) = offer.open.live.as_ref().map(may_begin) {
            return self.receiver.machine.refuse(CloseCode::REFUSED, &refusal.to_string());
        }
        match self.config.decision.clone() {
            Decision::Accept => {
                let (lanes, window, secret, seed) =
                    (self.config.lanes, self.config.window, self.rng.key(), self.rng.word());
                let (agreed, others) = (self.sink.agreed(&offer.open), self.config.others.take());
                let challenge = self.rng.key();
                let host = Some(self.config.hosts[1].id);
                let terms =
                    Terms { sink: self.sink.clone(), lanes, window, secret, seed, agreed, others, challenge, host };
                let clock = self.receiver.clock(self.now);
                self.receiver.machine.accept(terms, clock);
            }
            Decision::Refuse(code, reason) => self.receiver.machine.refuse(code, &reason),
            Decision::Never => {}
        }
    }

    fn read_all(&mut self) -> bool {
        let (now, single) = (self.now, self.config.sender.single_stream);
        let mut moved = false;
        for connection in &mut self.connections {
            let mut on_frame = |kind| {
                if kind == FrameKind::PAGES {
                    self.first_pages.get_or_insert(now);
                }
            };
            if self.receiver.is_awake(now) {
                let clocks = (now, self.receiver.clock(now));
                moved |= read(connection, TO_RECEIVER, &mut self.receiver.machine, single, clocks, &mut on_frame);
            }
            if self.sender.is_awake(now) {
                let clocks = (now, self.sender.clock(now));
                moved |= read(connection, TO_SENDER, &mut self.sender.machine, single, clocks, &mut |_| ());
            }
        }
        moved
    }

    fn write_all(&mut self) -> bool {
        let mut moved = false;
        for index in 0..self.connections.len() {
            for way in [TO_RECEIVER, TO_SENDER] {
                moved |= self.write_some(index, way);
            }
        }
        moved
    }

    /// Hands one frame to a connection, if there is one and it has room.
    fn write_some(&mut self, index: usize, way: usize) -> bool {
        let now = self.now;
        let is_awake = if way == TO_RECEIVER { self.sender.is_awake(now) } else { self.receiver.is_awake(now) };
        if !is_awake {
            return false;
        }
        let clocks = [self.sender.clock(now), self.receiver.clock(now)];
        let connection = &mut self.connections[index];
        // A connection that its reader has not taken yet carries frames all the same; one towards the sender has to wait.
        let open = way == TO_RECEIVER || connection.carries[TO_RECEIVER];
        if !open || connection.told[1 - way] || !connection.pipes[way].has_room(now) {
            return false;
        }
        let lane = connection.lane;
        let single = lane == LaneId::CONTROL && self.config.sender.single_stream;
        let lanes = std::iter::once(lane).chain((0..8).map(LaneId::bulk).filter(|_| single));
        let frame = {
            let (sender, receiver) = (&mut self.sender.machine, &mut self.receiver.machine);
            let mut poll = |lane| {
                if way == TO_RECEIVER {
                    sender.poll_frame(lane, clocks[0])
                } else {
                    receiver.poll_frame(lane, clocks[1])
                }
            };
            lanes.into_iter().find_map(&mut poll)
        };
        let over = if way == TO_RECEIVER { self.sender.machine.is_over() } else { self.receiver.machine.is_over() };
        let Some(frame) = frame else {
            if over && lane == LaneId::CONTROL {
                self.connections[index].pipes[way].end(now);
            }
            return false;
        };
        self.write(index, way, &frame);
        if way == TO_RECEIVER {
            self.sender.machine.recycle(frame.payload.buffer);
        }
        true
    }

    fn write(&mut self, index: usize, way: usize, frame: &Outgoing) {
        let mut bytes = frame.pieces().collect::<Vec<_>>().concat();
        assert_eq!(bytes.len(), frame.len());
        self.frames.push((way == TO_RECEIVER, FrameKind(bytes[4]), LaneId::from_wire(bytes[6]).unwrap()));
        if self.config.record {
            self.recording.push((way == TO_RECEIVER, bytes.clone()));
        }
        if let Some(meddler) = &mut self.config.meddler {
            meddler(way == TO_RECEIVER, &mut bytes);
        }
        self.connections[index].pipes[way].write(&bytes, self.now, &mut self.rng);
        if let Some((role, _)) = self.config.cancel.filter(|(_, frames)| *frames == self.frames.len() as u64) {
            match role {
                Role::Sender => self.sender.machine.cancel(SenderFailure::Cancelled),
                Role::Receiver => self.receiver.machine.cancel(),
            }
        }
    }

    fn finish(mut self) -> (Outcome, Option<Left>) {
        let sender = self.sender.machine.outcome().expect("a session that is over has an outcome");
        let receiver = self.receiver.machine.outcome().expect("a session that is over has an outcome");
        self.settle_hosts(sender.is_ok(), receiver.is_ok());
        let wire = [TO_RECEIVER, TO_SENDER]
            .map(|way| self.connections.iter().map(|connection| connection.pipes[way].bytes).sum());
        let outcome = Outcome {
            sender,
            receiver,
            sent: self.sender.machine.counts(),
            received: self.receiver.machine.counts(),
            rounds: self.sender.machine.rounds().to_vec(),
            harmed: self.harmed,
            hot: self.sender.machine.hot(),
            hosts: self.config.hosts,
            words: self.words,
            blobs: self.blobs,
            decisions: self.sender.machine.decisions().iter().map(|decision| decision.what.clone()).collect(),
            wire,
            first_pages: self.first_pages,
            sender_over: self.sender.over_at.unwrap(),
            receiver_over: self.receiver.over_at.unwrap(),
            frames: self.frames,
            recording: self.recording,
        };
        let left = self.sender.machine.into_remainder().zip(self.receiver.machine.into_incomplete());
        (outcome, left.map(|(remainder, guest)| Left { remainder, guest }))
    }
}
