//! A guest that runs at the receiver while its memory follows: vCPUs that touch pages and wait for those that are absent,
//! and one pair of fill engines after the other, until all is there.
//!
//! The guest's memory is watched by [`ImageSink`], which is not installed into where nothing is absent; what each vCPU
//! reads is held against what it should be, whoever wrote it.

mod vcpu;

pub use vcpu::Habit;

use super::connection::{Connection, read};
use super::side::Side;
use super::{Meddler, STEPS_MAX, TO_RECEIVER, TO_SENDER};
use crate::image::Image;
use crate::link::{Cut, LinkConfig, Pipe};
use crate::memory::ImageSink;
use crate::rng::Rng;
use pagewire_protocol::frame::{FrameKind, LaneId};
use pagewire_protocol::framing::Framer;
use pagewire_protocol::handover::{Message, Word};
use pagewire_protocol::limits::WINDOW_BYTES;
use pagewire_protocol::page::Place;
use pagewire_protocol::session::{FEATURE_LIVE, FEATURE_POST_COPY, Machine, Outgoing, Policy};
use pagewire_protocol::time::{Span, Time};
use pagewire_receiver::fill::{FillEngine as ReceiverFill, FillEvent as ReceiverEvent, FillTerms, Incomplete};
use pagewire_receiver::{ErrorKind as ReceiverFailure, FillCounts as Received};
use pagewire_sender::fill::{FillConfig, FillEngine as SenderFill, FillEvent as SenderEvent, Remainder};
use pagewire_sender::{ErrorKind as SenderFailure, FillCounts as Sent, GuestMemory};
use vcpu::Vcpu;

/// What is left to bring of a guest that runs, as both sides know it.
pub struct Left {
    /// At the sender.
    pub remainder: Remainder<Box<dyn GuestMemory>>,
    /// At the receiver.
    pub guest: Incomplete<ImageSink>,
}

/// What happens to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillHarm {
    /// A lane's connection breaks, on the way to the receiver or not.
    Cut(LaneId, bool, Cut),
    /// The sender's side is stopped when so many frames have been written.
    StopSender(u64),
    /// The receiver's side is.
    StopReceiver(u64),
    /// The first frame of this kind never arrives: its connection breaks.
    CutAt(FrameKind),
}

/// Everything that makes such a world what it is.
pub struct FillWorldConfig {
    /// The seed of all chance.
    pub seed: u64,
    /// How the sender sends. Session and nonce are chosen here.
    pub sender: FillConfig,
    /// Bulk lanes the receiver grants at most.
    pub lanes: u8,
    /// The receiver's window.
    pub window: u64,
    /// Every connection, both ways.
    pub link: LinkConfig,
    /// What the guest's vCPUs do.
    pub vcpus: Vec<Habit>,
    /// Between two touches of a vCPU.
    pub think: Span,
    /// Touches of each vCPU.
    pub touches: u64,
    /// What happens to the sessions, in their order; later ones are left alone.
    pub harms: Vec<FillHarm>,
    /// Somebody in the middle.
    pub meddler: Option<Meddler>,
    /// The pages that the guest is known to touch.
    pub ahead: Vec<Place>,
}

impl FillWorldConfig {
    /// A world without harm, with one vCPU that goes through all of its memory.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            sender: FillConfig::default(),
            lanes: 8,
            window: WINDOW_BYTES,
            link: LinkConfig::delaying(Span::ZERO),
            vcpus: vec![Habit::Sequential],
            think: Span::from_nanos(200_000),
            touches: 500,
            harms: Vec::new(),
            meddler: None,
            ahead: Vec::new(),
        }
    }
}

/// What it came to.
#[derive(Debug)]
pub struct FillOutcome {
    /// How each session ended at the sender and at the receiver.
    pub sessions: Vec<(Result<(), SenderFailure>, Result<(), ReceiverFailure>)>,
    /// What the sender did, in all sessions.
    pub sent: Vec<Sent>,
    /// What the receiver did.
    pub received: Received,
    /// The longest that a vCPU waited for a page it asked for while all lanes were there.
    pub longest_wait: Span,
    /// Frames written: to the receiver or not, the kind, the lane.
    pub frames: Vec<(bool, FrameKind, LaneId)>,
    /// Their bytes to the receiver, to the sender.
    pub wire: [u64; 2],
    /// What the sender decided.
    pub decisions: Vec<String>,
    /// From the first session's begin to the end of the last.
    pub took: Span,
}

/// The world.
pub struct FillWorld {
    config: FillWorldConfig,
    sink: ImageSink,
    /// What the guest's memory would be had nothing ever been absent.
    truth: Image,
    vcpus: Vec<Vcpu>,
    rng: Rng,
    now: Time,
    steps: u64,
    outcome: FillOutcome,
    filled: bool,
}

/// One session.
struct Session {
    sender: Side<SenderFill<Box<dyn GuestMemory>>>,
    receiver: Side<ReceiverFill<ImageSink>>,
    connections: Vec<Connection>,
    harm: Option<FillHarm>,
    gone: Message,
    written: u64,
}

impl FillWorld {
    /// A world in which the memory of a guest that was `image` when it left follows it into `sink`.
    pub fn new(image: Image, sink: ImageSink, config: FillWorldConfig) -> Self {
        let mut rng = Rng::new(config.seed ^ 0xf111);
        let vcpus = config.vcpus.iter().map(|habit| Vcpu::new(*habit, config.touches, rng.word())).collect();
        let outcome = FillOutcome {
            sessions: Vec::new(),
            sent: Vec::new(),
            received: Received::default(),
            longest_wait: Span::ZERO,
            frames: Vec::new(),
            wire: [0; 2],
            decisions: Vec::new(),
            took: Span::ZERO,
        };
        let now = Time::ZERO + Span::from_secs(100);
        Self { config, sink, truth: image, vcpus, rng, now, steps: 0, outcome, filled: false }
    }

    /// Lets sessions follow each other until all is there, and the guest run to its end.
    pub fn run(mut self, mut left: Left) -> FillOutcome {
        let begin = self.now;
        let lacking = left.guest.pages();
        let mut harms = std::mem::take(&mut self.config.harms).into_iter();
        for _ in 0..64 {
            left = self.session(left, harms.next());
            if self.filled {
                break;
            }
            // Nobody is there for a while: who touches an absent page waits.
            for _ in 0..self.rng.below(20) {
                self.now = self.now + Span::from_millis(1);
                self.run_vcpus(None);
            }
        }
        let ends = &self.outcome.sessions;
        assert!(self.filled, "seed {}: {} sessions do not fill it: {:?}", self.config.seed, ends.len(), ends.last());
        self.outcome.took = self.now.since(begin);
        while self.vcpus.iter().any(|vcpu| !vcpu.is_done()) {
            self.now = self.now + self.config.think;
            self.run_vcpus(None);
        }
        let state = self.sink.state();
        assert!(state.finished, "it was made to last");
        crate::checkers::check_equal(&state.image, &self.truth);
        drop(state);
        self.outcome.received = left.guest.counts();
        let Received { zero, inline, local, .. } = self.outcome.received;
        assert_eq!(zero + inline + local, lacking, "every page comes once");
        self.outcome
    }

    fn session(&mut self, left: Left, harm: Option<FillHarm>) -> Left {
        let mut sending = self.config.sender.clone();
        self.rng.fill(&mut sending.session);
        self.rng.fill(&mut sending.nonce);
        let mut nonce = [0; 16];
        self.rng.fill(&mut nonce);
        let policy = Policy { features_offered: FEATURE_LIVE | FEATURE_POST_COPY, ..Policy::default() };
        let gone = Message { word: Word::Gone, handover: *left.remainder.handover() };
        assert_eq!(gone.handover, *left.guest.handover());
        let mut session = Session {
            sender: Side::new(SenderFill::new(left.remainder, sending, self.now)),
            receiver: Side::new(ReceiverFill::new(&policy, nonce, self.now)),
            connections: Vec::new(),
            harm,
            gone,
            written: 0,
        };
        session.connect(LaneId::CONTROL, self.config.link);
        let mut guest = Some(left.guest);
        loop {
            self.settle(&mut session, &mut guest);
            if session.sender.machine.is_over() && session.receiver.machine.is_over() {
                break;
            }
            self.now = self.next_time(&session);
            self.run_vcpus(Some(&mut session));
            session.sender.handle_timeout(self.now);
            session.receiver.handle_timeout(self.now);
        }
        let Session { mut sender, mut receiver, connections, .. } = session;
        self.outcome.sessions.push((sender.machine.outcome().unwrap(), receiver.machine.outcome().unwrap()));
        self.outcome.sent.push(sender.machine.counts());
        let decisions = sender.machine.decisions().iter().map(|decision| decision.what.clone());
        self.outcome.decisions.extend(decisions);
        for way in [TO_RECEIVER, TO_SENDER] {
            self.outcome.wire[way] += connections.iter().map(|connection| connection.pipes[way].bytes).sum::<u64>();
        }
        let remainder = sender.machine.into_remainder().expect("what is left outlives every session");
        let guest = guest.or_else(|| receiver.machine.into_incomplete()).expect("so does the guest");
        Left { remainder, guest }
    }

    fn settle(&mut self, session: &mut Session, guest: &mut Option<Incomplete<ImageSink>>) {
        loop {
            self.steps += 1;
            assert!(self.steps < STEPS_MAX, "seed {}: it hangs at {:?}", self.config.seed, self.now);
            let single = self.config.sender.single_stream;
            let mut moved = session.read_all(self.now, single) | self.tell(session, guest) | self.write_all(session);
            moved |= session.sender.run_jobs(self.now, Span::ZERO, &mut self.rng);
            moved |= session.sender.work(self.now) | session.receiver.work(self.now);
            if !moved {
                return;
            }
        }
    }

    fn next_time(&self, session: &Session) -> Time {
        let connections = session.connections.iter();
        let pipes = connections.flat_map(|connection| &connection.pipes).filter_map(|pipe| pipe.next(self.now));
        let sides = [session.sender.next(self.now), session.receiver.next(self.now)].into_iter().flatten();
        let vcpus = self.vcpus.iter().filter_map(Vcpu::next);
        let vcpus = vcpus.map(|at| at.max(self.now + Span::from_nanos(1)));
        let next = pipes.chain(sides).chain(vcpus).min();
        next.unwrap_or_else(|| panic!("seed {}: nothing will ever happen again", self.config.seed))
    }

    fn run_vcpus(&mut self, mut session: Option<&mut Session>) {
        for vcpu in &mut self.vcpus {
            let touched = vcpu.run(self.now, self.config.think, &self.sink, &mut self.truth);
            if let (Some((region, page)), Some(session)) = (touched, session.as_mut()) {
                vcpu.asked_at = session.has_all_lanes().then_some(self.now);
                session.receiver.machine.touch(region, page);
            }
        }
    }

    /// Hands events to whoever they are for.
    fn tell(&mut self, session: &mut Session, guest: &mut Option<Incomplete<ImageSink>>) -> bool {
        let mut moved = false;
        while let Some(event) = session.sender.machine.poll_event() {
            moved = true;
            match event {
                SenderEvent::Accepted { lanes } if !self.config.sender.single_stream => {
                    self.open_lanes(session, lanes);
                }
                SenderEvent::Accepted { .. } => {}
                SenderEvent::Filled => {
                    assert!(!self.filled, "it is filled once");
                    let absent = self.sink.state().absent.as_ref().map_or(0, |absent| absent.count());
                    assert_eq!(absent, 0, "seed {}: the memory is given up too soon", self.config.seed);
                    self.filled = true;
                    session.sender.machine.release(session.gone);
                }
            }
        }
        while let Some(event) = session.receiver.machine.poll_event() {
            moved = true;
            match event {
                ReceiverEvent::Asked(fill) => {
                    assert_eq!(fill.handover, session.gone.handover);
                    self.accept(session, guest);
                }
                ReceiverEvent::Filled => {}
                ReceiverEvent::Said(message) => {
                    assert_eq!(message, session.gone);
                    session.receiver.machine.release();
                }
            }
        }
        // What has come wakes who waits for it.
        for vcpu in &mut self.vcpus {
            if let Some(waited) = vcpu.wake(self.now, &self.sink, &mut self.truth) {
                self.outcome.longest_wait = self.outcome.longest_wait.max(waited);
            }
        }
        moved
    }

    fn accept(&mut self, session: &mut Session, guest: &mut Option<Incomplete<ImageSink>>) {
        let Some(guest) = guest.take() else { return };
        let FillWorldConfig { lanes, window, .. } = self.config;
        let terms = FillTerms { lanes, window, secret: self.rng.key(), ahead: self.config.ahead.clone() };
        session.receiver.machine.accept(guest, terms, self.now);
        for vcpu in &mut self.vcpus {
            // Whoever was asked before is gone.
            vcpu.asked_at = None;
            if let Some((region, page)) = vcpu.waits_for() {
                session.receiver.machine.touch(region, page);
            }
        }
    }

    fn open_lanes(&mut self, session: &mut Session, lanes: u8) {
        for lane in (0..lanes).map(LaneId::bulk).chain([LaneId::URGENT]) {
            session.connect(lane, self.config.link);
            let join = session.sender.machine.join(lane).expect("accepted");
            let at = session.connections.len() - 1;
            self.write(session, at, TO_RECEIVER, &join);
            session.sender.machine.handle_lane_open(lane, self.now);
        }
    }

    fn write_all(&mut self, session: &mut Session) -> bool {
        let mut moved = false;
        for index in 0..session.connections.len() {
            for way in [TO_RECEIVER, TO_SENDER] {
                moved |= self.write_some(session, index, way);
            }
        }
        moved
    }

    fn write_some(&mut self, session: &mut Session, index: usize, way: usize) -> bool {
        let now = self.now;
        let connection = &mut session.connections[index];
        let open = way == TO_RECEIVER || connection.carries[TO_RECEIVER];
        if !open || connection.told[1 - way] || !connection.pipes[way].has_room(now) {
            return false;
        }
        let lane = connection.lane;
        let single = lane == LaneId::CONTROL && self.config.sender.single_stream;
        let others = [LaneId::URGENT].into_iter().chain((0..8).map(LaneId::bulk)).filter(|_| single);
        let frame = std::iter::once(lane).chain(others).find_map(|lane| match way {
            TO_RECEIVER => session.sender.machine.poll_frame(lane, now),
            _ => session.receiver.machine.poll_frame(lane, now),
        });
        let over = match way {
            TO_RECEIVER => session.sender.machine.is_over(),
            _ => session.receiver.machine.is_over(),
        };
        let Some(frame) = frame else {
            if over && lane == LaneId::CONTROL {
                session.connections[index].pipes[way].end(now);
            }
            return false;
        };
        self.write(session, index, way, &frame);
        if way == TO_RECEIVER {
            session.sender.machine.recycle(frame.payload.buffer);
        }
        true
    }

    fn write(&mut self, session: &mut Session, index: usize, way: usize, frame: &Outgoing) {
        let mut bytes = frame.pieces().collect::<Vec<_>>().concat();
        let kind = FrameKind(bytes[4]);
        self.outcome.frames.push((way == TO_RECEIVER, kind, LaneId::from_wire(bytes[6]).unwrap()));
        session.written += 1;
        if let Some(meddler) = &mut self.config.meddler {
            meddler(way == TO_RECEIVER, &mut bytes);
        }
        if session.harm == Some(FillHarm::CutAt(kind)) {
            session.harm = None;
            return session.connections[index].pipes.iter_mut().for_each(|pipe| pipe.reset(self.now));
        }
        session.connections[index].pipes[way].write(&bytes, self.now, &mut self.rng);
        match session.harm {
            Some(FillHarm::StopSender(frames)) if session.written == frames => {
                session.sender.machine.cancel(SenderFailure::Cancelled);
            }
            Some(FillHarm::StopReceiver(frames)) if session.written == frames => session.receiver.machine.cancel(),
            _ => {}
        }
    }
}

impl Session {
    fn connect(&mut self, lane: LaneId, link: LinkConfig) {
        let cut = |to_receiver| match self.harm {
            Some(FillHarm::Cut(of, way, cut)) if of == lane && way == to_receiver => Some(cut),
            _ => None,
        };
        let pipes = [true, false].map(|to_receiver| Pipe::new(link, cut(to_receiver), None));
        self.connections.push(Connection {
            lane,
            pipes,
            framers: [Framer::new(), Framer::new()],
            carries: [lane == LaneId::CONTROL, true],
            told: [false; 2],
        });
    }

    /// Whether the receiver has been joined by all lanes.
    fn has_all_lanes(&self) -> bool {
        let urgent = self.connections.iter().any(|connection| connection.lane == LaneId::URGENT);
        let open = self.connections.iter().all(|connection| connection.carries[TO_RECEIVER]);
        open && (urgent || self.receiver.machine.guest().is_some()) && !self.receiver.machine.is_over()
    }

    fn read_all(&mut self, now: Time, single: bool) -> bool {
        let mut moved = false;
        for connection in &mut self.connections {
            let clocks = (now, now);
            moved |= read(connection, TO_RECEIVER, &mut self.receiver.machine, single, clocks, &mut |_| ());
            moved |= read(connection, TO_SENDER, &mut self.sender.machine, single, clocks, &mut |_| ());
        }
        moved
    }
}
