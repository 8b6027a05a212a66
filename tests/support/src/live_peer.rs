//! Scripted peers of live sessions: what [`Script`] says, with a hand-over in the end.

use crate::host::GUEST;
use crate::image::Image;
use crate::memory::{ImageMemory, ImageSink};
use crate::peer::{AgainstReceiver, AgainstSender, SESSION, Script, Statement};
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::frame::{Ack, Frame, FrameKind, ImageName, LaneId, LiveOpen, Root};
use pagewire_protocol::handover::{Epoch, Handover, HostId, Message, Word};
use pagewire_protocol::session::{FEATURE_LIVE, Machine, Phase, Policy};
use pagewire_protocol::tree::live_root;
use pagewire_receiver::{Event as ReceiverEvent, ReceiverEngine};
use pagewire_sender::converge::Limits;
use pagewire_sender::{Event as SenderEvent, Live, SenderConfig, SenderEngine};

/// The host that the guest leaves.
pub const FROM: HostId = HostId([1; 32]);
/// The host that it comes to.
pub const TO: HostId = HostId([2; 32]);
/// What every scripted live session opens.
pub const LIVE: LiveOpen =
    LiveOpen { guest: GUEST, epoch: Epoch::new(1), host: FROM, arbiter: false, post_copy: false };

/// What goes with every scripted guest.
pub fn blobs() -> Blobs {
    let mut blobs = Blobs::new();
    blobs.insert(ImageName::new("device-state").unwrap(), 3, vec![7; 40_000]).unwrap();
    blobs.insert(ImageName::new("clock").unwrap(), 1, Vec::new()).unwrap();
    blobs
}

/// The root of a live session that brings `image` and `blobs`.
pub fn root(image: &Image, blobs: &Blobs) -> Digest {
    live_root(&DedupDomain::public(), image.root(&[0; 32]), blobs)
}

/// The hand-over of an honest session that brings `image` and [`blobs`].
pub fn handover(image: &Image) -> Handover {
    let LiveOpen { guest: lineage, epoch, host: sender, arbiter, .. } = LIVE;
    let root = root(image, &blobs());
    Handover { lineage, session: SESSION, epoch, root, sender, receiver: TO, arbiter, post_copy: false }
}

impl<M: Machine> Script<M> {
    /// Says `word` of a hand-over.
    pub fn word(&mut self, word: Word, handover: Handover) {
        self.say(LaneId::CONTROL, &Frame::Handover(Message { word, handover }));
    }
}

/// A receiver that would take a guest over.
pub fn live_receiver() -> AgainstReceiver {
    let policy = Policy { features_offered: FEATURE_LIVE, ..Policy::default() };
    let mut script = AgainstReceiver::receiver_with(&policy, 1);
    (script.features, script.live, script.host) = (FEATURE_LIVE, Some(LIVE), Some(TO));
    script
}

impl Script<ReceiverEngine<ImageSink>> {
    /// States all of a small image in one frame and ends the round.
    pub fn state_all(&mut self, image: &Image) {
        let pages = (0..image.pages()).map(|page| image.page(0, page).first_chunk().unwrap());
        self.raw(LaneId::bulk(0), FrameKind::PAGES, &pages.fold(Statement::at(0, 0), Statement::inline).body());
        self.end_round(1);
    }

    /// Brings blobs, part by part.
    pub fn bring(&mut self, blobs: &Blobs) {
        blobs.parts().for_each(|part| self.say(LaneId::CONTROL, &Frame::Blob(part)));
    }

    /// Says ROOT for round 0.
    pub fn root(&mut self, image: &Image, digest: Digest) {
        self.say(LaneId::CONTROL, &Frame::Root(Root { round: 0, pages: image.pages(), digest }));
    }

    /// Brings all of a guest: the receiver is ready.
    pub fn bring_guest(&mut self, image: &Image, sink: &ImageSink) {
        self.enter(Phase::Receiving, image, sink);
        self.settle();
        self.state_all(image);
        self.bring(&blobs());
        self.root(image, root(image, &blobs()));
        self.settle();
    }

    /// What the engine has told since it was asked last.
    pub fn events(&mut self) -> Vec<ReceiverEvent> {
        std::iter::from_fn(|| self.engine.poll_event()).collect()
    }
}

/// A sender of a guest that is handed over. Its memory is an image: nobody writes to it.
pub fn live_sender(image: &Image) -> AgainstSender {
    let mut config = SenderConfig::new(ImageName::new("vm.img").unwrap());
    (config.session, config.nonce) = (SESSION, [8; 16]);
    config.live = Some(Live { limits: Limits::default(), handover: LIVE, at_once: false });
    let mut script = AgainstSender::sender_with(image, Vec::new(), config);
    (script.features, script.host) = (FEATURE_LIVE, Some(TO));
    script
}

impl Script<SenderEngine<ImageMemory>> {
    /// Takes what was stated, pauses the guest when that is asked for, and says what else the engine has told.
    pub fn follow(&mut self) -> Vec<SenderEvent> {
        let mut told = Vec::new();
        loop {
            self.settle();
            let before = told.len();
            while let Some(event) = self.engine.poll_event() {
                if event == SenderEvent::Pause {
                    self.engine.paused(Ok(blobs()), self.now);
                }
                told.push(event);
            }
            if told.len() == before {
                return told;
            }
        }
    }

    /// Acknowledges all frames on every lane.
    pub fn acknowledge(&mut self) {
        for lane in (0..self.lanes).map(LaneId::bulk) {
            let frames = self.frames(lane);
            self.say(lane, &Frame::Ack(Ack { frames, settled: frames, wants: Vec::new() }));
        }
    }

    /// Takes all of the guest: the sender waits for READY.
    pub fn take_guest(&mut self, image: &Image) -> Vec<SenderEvent> {
        self.enter(Phase::Sending, image);
        let mut told = self.follow();
        self.acknowledge();
        told.extend(self.follow());
        self.acknowledge();
        told.extend(self.follow());
        told
    }
}
