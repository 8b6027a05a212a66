//! Scripted peers of fill sessions: a guest that was handed over with all of its pages absent, and either side of it as a
//! [`Script`].

use crate::guest::{Guest, Pattern};
use crate::image::Image;
use crate::memory::{ImageBase, ImageSink};
use crate::peer::{SECRET, SESSION, Script};
use crate::world::{Left, World, WorldConfig};
use pagewire_protocol::digest::{Digest, join_proof};
use pagewire_protocol::error::{CloseCode, chain};
use pagewire_protocol::frame::{
    Ack, Done, Fault, Fill, Frame, FrameKind, Join, Lack, Lacking, LaneId, Role, Urgency, Want,
};
use pagewire_protocol::handover::{Handover, Message, Word};
use pagewire_protocol::limits::WINDOW_BYTES;
use pagewire_protocol::session::{FEATURE_LIVE, FEATURE_POST_COPY, Machine, Policy};
use pagewire_protocol::time::{Span, Time};
use pagewire_receiver::fill::{FillEngine as ReceiverFill, FillEvent as ReceiverEvent, FillTerms, Incomplete};
use pagewire_sender::converge::{AtLimit, Limits};
use pagewire_sender::fill::{FillConfig, FillEngine as SenderFill, FillEvent as SenderEvent};
use pagewire_sender::{GuestMemory, Tracking};

/// What fill sessions agree on.
pub const FEATURES: u64 = FEATURE_LIVE | FEATURE_POST_COPY;

/// A guest with this memory that runs at the receiver, where all of it is absent; onto `base`, which stays, if there is one.
pub fn all_absent(image: &Image, base: Option<&Image>) -> (Left, ImageSink) {
    let mut config = WorldConfig::new(7);
    (config.live, config.post_copy) = (Some(Limits::default()), Some(true));
    config.guest = Some(Guest::new(image.clone(), Pattern::Uniform, 0, Tracking::Dirty, 1));
    config.bases = base.iter().map(|base| ImageBase::whole(base, [0; 32])).collect();
    let sink = match base {
        Some(base) => ImageSink::claiming(base, [0; 32], base.clone(), true),
        None => ImageSink::empty(image),
    };
    let (_, left) = World::new(image, &sink, config).run_apart();
    (left.expect("all of it was left behind"), sink)
}

/// A guest with this memory, of one region, that left after a round in which it wrote to some of its pages.
pub fn partly_absent(image: &Image) -> (Left, ImageSink) {
    let mut config = WorldConfig::new(7);
    let limits = Limits { downtime: Span::ZERO, rounds: 1, at_limit: AtLimit::PostCopy, ..Limits::default() };
    (config.live, config.post_copy) = (Some(limits), Some(false));
    config.link.rate = Some(10_000_000);
    config.guest = Some(Guest::new(image.clone(), Pattern::Uniform, 1_000, Tracking::Dirty, 1));
    let sink = ImageSink::empty(image);
    let (outcome, left) = World::new(image, &sink, config).run_apart();
    (left.unwrap_or_else(|| panic!("{:?} {:?}", outcome.sender, outcome.receiver)), sink)
}

/// A scripted sender against a receiver whose guest lacks pages.
pub type AgainstFilled = Script<ReceiverFill<ImageSink>>;

impl AgainstFilled {
    /// A receiver that greets.
    pub fn filled() -> Self {
        Self::filled_with(&Policy { features_offered: FEATURES, ..Policy::default() })
    }

    /// A receiver that speaks what `policy` says.
    pub fn filled_with(policy: &Policy) -> Self {
        let now = Time::ZERO + Span::from_secs(1);
        let mut script = Self::new(ReceiverFill::new(policy, [8; 16], now), now, 1);
        script.features = FEATURES;
        script
    }

    /// The FILL of an honest sender.
    pub fn honest_fill(&self, handover: Handover) -> Fill {
        Fill { transcript: self.transcript, session: SESSION, lanes: 1, single_stream: false, handover }
    }

    /// Takes what was asked for.
    pub fn grant(&mut self, guest: Incomplete<ImageSink>) {
        let mut guest = Some(guest);
        while let Some(event) = self.engine.poll_event() {
            if let (ReceiverEvent::Asked(_), Some(guest)) = (event, guest.take()) {
                let terms = FillTerms { lanes: 1, window: WINDOW_BYTES, secret: SECRET, ahead: Vec::new() };
                self.engine.accept(guest, terms, self.now);
            }
        }
        self.listen();
    }

    /// Joins the bulk lane and the urgent one.
    pub fn join_all(&mut self) {
        for lane in [LaneId::bulk(0), LaneId::URGENT] {
            let proof = join_proof(&SECRET, &SESSION, lane.number());
            self.engine.handle_join(lane, &Join { session: SESSION, proof }, self.now).unwrap();
        }
    }

    /// Brings the receiver to where pages may come.
    pub fn begin(&mut self, guest: Incomplete<ImageSink>) {
        self.greet(Role::Sender);
        let fill = self.honest_fill(*guest.handover());
        self.say(LaneId::CONTROL, &Frame::Fill(fill));
        self.grant(guest);
        self.join_all();
        self.settle();
    }

    /// How the session has failed: the code and the text that both sides know.
    pub fn fill_failure(&mut self) -> (CloseCode, String) {
        let error = self.engine.outcome().expect("over").expect_err("failed");
        let close = self.closed().expect("the peer is told");
        assert_eq!(close.reason, chain(&error), "both sides say the same");
        (close.code, close.reason)
    }
}

/// A scripted receiver against a sender that brings what a guest lacks.
pub type AgainstFiller = Script<SenderFill<Box<dyn GuestMemory>>>;

impl AgainstFiller {
    /// A sender that greets.
    pub fn filler(left: Left) -> Self {
        let config = FillConfig { session: SESSION, nonce: [8; 16], compress: false, ..FillConfig::default() };
        let now = Time::ZERO + Span::from_secs(1);
        let mut script = Self::new(SenderFill::new(left.remainder, config, now), now, 1);
        script.features = FEATURES;
        script
    }

    /// The LACK of an honest receiver whose guest lacks so many pages.
    pub fn honest_lack(&self, pages: u64) -> Lack {
        let transcript = self.transcript;
        Lack { transcript, secret: SECRET, window: WINDOW_BYTES, pages, lanes: 1, holds: false }
    }

    /// Says LACK and opens the lanes.
    pub fn lack(&mut self, lack: Lack) {
        self.say(LaneId::CONTROL, &Frame::Lack(lack));
        [LaneId::bulk(0), LaneId::URGENT].into_iter().for_each(|lane| self.engine.handle_lane_open(lane, self.now));
    }

    /// Says LACKING.
    pub fn lacking(&mut self, first: u64, bits: &[u8]) {
        self.say(LaneId::CONTROL, &Frame::Lacking(Lacking { first, bits }));
    }

    /// Brings the sender to where it has been told that all of the pages of `image` are lacking.
    pub fn begin(&mut self, image: &Image) {
        self.greet(Role::Receiver);
        self.listen();
        let pages = image.pages();
        let lack = self.honest_lack(pages);
        self.lack(lack);
        let mut bits = vec![0u8; pages.div_ceil(8) as usize];
        (0..pages as usize).for_each(|at| bits[at / 8] |= 1 << (at % 8));
        self.lacking(0, &bits);
    }

    /// The guest waits for pages, or will touch them.
    pub fn fault(&mut self, urgency: Urgency, pages: &[Want]) {
        self.say(LaneId::URGENT, &Frame::Fault(Fault { urgency, pages: pages.to_vec() }));
    }

    /// Acknowledges all frames on the bulk lane, and wants pages.
    pub fn want(&mut self, wants: &[Want]) {
        let on_bulk = |said: &&crate::peer::Said| said.lane == LaneId::bulk(0) && said.kind == FrameKind::PAGES;
        let frames = self.said.iter().filter(on_bulk).count() as u64;
        self.say(LaneId::bulk(0), &Frame::Ack(Ack { frames, settled: frames, wants: wants.to_vec() }));
    }

    /// Says DONE.
    pub fn done(&mut self, pages: u64, root: Digest) {
        self.say(LaneId::CONTROL, &Frame::Done(Done { pages, root }));
    }

    /// Whether the engine has told that all is there.
    pub fn is_filled(&mut self) -> bool {
        std::iter::from_fn(|| self.engine.poll_event()).any(|event| event == SenderEvent::Filled)
    }

    /// The memory is given up.
    pub fn release(&mut self, handover: Handover) {
        self.engine.release(Message { word: Word::Gone, handover });
        self.listen();
    }

    /// How the session has failed: the code and the text that both sides know.
    pub fn fill_failure(&mut self) -> (CloseCode, String) {
        let error = self.engine.outcome().expect("over").expect_err("failed");
        let close = self.closed().expect("the peer is told");
        assert_eq!(close.reason, chain(&error), "both sides say the same");
        (close.code, close.reason)
    }
}
