//! The receiver as a machine: what it does with each frame, and when the image is complete.
//!
//! ```text
//! Greeting ─HELLO→ Waiting ─OPEN→ Deciding ─accept()→ Receiving ─all pages, root equal→ (finish job) ─DONE→ Parting → Over
//! ```
//! One invariant carries the rest: DONE goes out only after every page is present, the root over them equals the
//! sender's, and the sink has made them last.

use crate::error::{ErrorKind, ReceiverError};
use crate::fill::Incomplete;
use crate::memory::{GuestSink, OtherPages};
use crate::receiving::Receiving;
use crate::report::Counts;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::digest::{join_proof, proofs_equal};
use pagewire_protocol::error::{CloseCode, GuestAt, Incompatible, PeerError, Violation, chain};
use pagewire_protocol::frame::{Accept, Done, Fill, Frame, FrameKind, Join, LaneId, Open, Role};
use pagewire_protocol::handover::{Handover, HostId, Message};
use pagewire_protocol::limits::STALL_SPAN_MAX;
use pagewire_protocol::page::Layout;
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
    /// Random: what the sender's proofs of having such pages are made for.
    pub challenge: [u8; 32],
    /// This host, for a guest that is to be handed over; without it such a guest cannot be accepted.
    pub host: Option<HostId>,
}

/// A base whose manifest both sides know.
#[derive(Debug)]
pub struct Agreed {
    /// Which of OPEN's known roots it has, counted from 0.
    pub known: u8,
    /// Its regions.
    pub layout: Layout,
    /// Its digests: the root over them was checked.
    pub trees: Vec<DigestTree>,
    /// The pages, by their places in it, that are here; of the others the digests alone are known.
    pub kept: PageBitmap,
    /// Pages that did not change are not read. Takes effect where the sink says that the base is in place.
    pub trusted: bool,
}

/// What the engine tells whoever embeds it.
#[derive(Clone, Debug)]
pub enum Event {
    /// Decide: [`ReceiverEngine::accept`] or [`ReceiverEngine::refuse`].
    Offered(Box<Offer>),
    /// The session is no transfer, but fills a guest that runs here: [`ReceiverEngine::into_endpoint`] goes on with it.
    Fill(Box<Fill>),
    /// Every page is present and the root is equal; now it is made to last.
    Verified,
    /// All of a guest that runs is here and lasts: it can be handed over by this, with these blobs. From here on its
    /// hand-overs decide.
    Ready(Handover, Blobs),
    /// The sender says this of a hand-over.
    Said(Message),
    /// It lasts, and the sender knows or will.
    Finished,
}

/// Makes the image last, possibly on another thread; a guest that lacks pages is made to wait for them.
#[derive(Debug)]
pub struct FinishJob<S>(pub(crate) S, pub(crate) Option<PageBitmap>);

/// What came of a [`FinishJob`].
#[derive(Debug)]
pub struct FinishOutput<S> {
    sink: S,
    result: io::Result<()>,
}

impl<S: GuestSink> Job for FinishJob<S> {
    type Output = FinishOutput<S>;

    fn run(mut self) -> FinishOutput<S> {
        let armed = self.1.map_or(Ok(()), |absent| self.0.arm(&absent));
        let result = armed.and_then(|()| self.0.finish());
        FinishOutput { sink: self.0, result }
    }
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

    /// Takes the offered image. A session that has ended meanwhile stays ended.
    pub fn accept(&mut self, terms: Terms<S>, now: Time) {
        let offer = self.offer.take_if(|_| self.endpoint.phase() == Phase::Deciding);
        let (Some(open), Some(greeted)) = (offer, self.endpoint.greeted()) else { return };
        if open.live.is_some() && terms.host.is_none() {
            return self.refuse(CloseCode::REFUSED, "no guest is taken over here");
        }
        let (transcript, agreement) = (greeted.transcript, greeted.agreement);
        let abilities = (agreement.codecs, agreement.is_post_copy());
        let (mut receiving, accept) = match Receiving::new(open, terms, abilities, now) {
            Ok((receiving, accept)) => (Box::new(receiving), Accept { transcript, ..accept }),
            Err(source) => return self.fail(ErrorKind::Destination { what: "zstd cannot start", source }),
        };
        self.endpoint.enter(Phase::Receiving);
        if receiving.open.single_stream {
            for lane in (0..accept.lanes).map(LaneId::bulk) {
                receiving.open_lane(lane);
                self.endpoint.open_lane(lane, now);
            }
        }
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Accept(accept));
        self.receiving = Some(receiving);
    }

    /// Refuses the offered image and ends the session.
    pub fn refuse(&mut self, code: CloseCode, reason: &str) {
        self.close(ErrorKind::Refused(reason.to_owned()), code);
    }

    /// Says this of a hand-over, if there is anybody to hear it.
    pub fn say(&mut self, message: Message) {
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Handover(message));
    }

    /// The sender has let go of the guest: the session ends when all that was said has gone out.
    pub fn release(&mut self) {
        if self.endpoint.phase() == Phase::Parting && self.is_live() {
            self.succeed();
        }
    }

    /// The guest runs here and lacks pages: this session ends, and others bring them.
    pub fn split(&mut self) {
        let lacks = self.receiving.as_ref().is_some_and(|receiving| receiving.map.absent().count() > 0);
        if self.endpoint.phase() == Phase::Parting && lacks {
            self.succeed();
        }
    }

    /// The shell of a session that fills a guest, for its [engine](crate::fill::FillEngine).
    pub fn into_endpoint(self) -> Endpoint {
        self.endpoint
    }

    /// What the guest lacks after a [`split`](Self::split), and its memory.
    pub fn into_incomplete(self) -> Option<Incomplete<S>> {
        self.receiving.filter(|receiving| receiving.lasts)?.into_incomplete()
    }

    fn succeed(&mut self) {
        self.endpoint.finish();
        self.outcome = Some(Ok(()));
        self.events.push_back(Event::Finished);
    }

    fn is_live(&self) -> bool {
        self.receiving.as_ref().is_some_and(|receiving| receiving.open.live.is_some())
    }

    /// Stops the session.
    pub fn cancel(&mut self) {
        self.stop(ErrorKind::Cancelled);
    }

    /// Stops the session, for the reason that `kind` names.
    pub fn stop(&mut self, kind: ErrorKind) {
        self.fail(kind);
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
        let receiving = self.receiving.take_if(|receiving| receiving.lasts && receiving.map.absent().count() == 0)?;
        let (layout, trees) = receiving.map.into_parts();
        Some(Manifest { root: receiving.image, layout, trees })
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
        if self.endpoint.phase() == Phase::Parting && !self.is_live() {
            // The image lasts; that the sender does not say that it knows changes nothing here.
            return self.succeed();
        }
        self.endpoint.close(code, &chain(&kind), kind.tells_peer());
        // Of a guest that is being handed over, only its hand-overs know.
        self.outcome = Some(Err(ReceiverError { kind, guest_at: GuestAt::Sender }));
        self.receiving.take_if(|receiving| !receiving.lasts);
    }

    fn handle(&mut self, lane: LaneId, kind: FrameKind, body: &[u8], now: Time) -> Result<(), ErrorKind> {
        let Some(frame) = self.endpoint.judge(lane, kind, body, now)? else { return Ok(()) };
        match frame {
            Frame::Open(open) => self.handle_open(open),
            Frame::Fill(fill) => {
                self.endpoint.enter(Phase::Deciding);
                self.events.push_back(Event::Fill(Box::new(fill)));
                Ok(())
            }
            Frame::Done(_) if self.is_live() => Err(Violation::Live("DONE", "ends with a hand-over").into()),
            Frame::Done(_) => {
                self.succeed();
                Ok(())
            }
            // Before OPEN it is about a hand-over that an earlier connection left open.
            Frame::Handover(message) if self.receiving.is_none() || self.is_live() => {
                self.events.push_back(Event::Said(message));
                Ok(())
            }
            Frame::Handover(message) => Err(Violation::Live(message.word.name(), "hands no guest over").into()),
            frame => {
                let Some(receiving) = self.receiving.as_mut() else { return Ok(()) };
                // SPEC 7.4: a late answer to a want whose pages were stated again, and no sign of progress.
                if receiving.lasts {
                    return Ok(());
                }
                receiving.moved = now;
                match frame {
                    Frame::Pages(pages) => {
                        receiving.handle_pages(lane, &pages, body.len() as u64, &mut self.counts, now)?
                    }
                    Frame::Round(end) => receiving.handle_round(lane, end, now)?,
                    Frame::Root(root) => receiving.handle_root(root)?,
                    Frame::Blob(part) => receiving.handle_blob(&part)?,
                    _ => {}
                }
                if receiving.check_complete()? {
                    self.events.push_back(Event::Verified);
                }
                Ok(())
            }
        }
    }

    /// When the sender has stated nothing, or has left READY unanswered, for too long; never while the image is made to
    /// last.
    fn stalled_at(&self) -> Option<Time> {
        let receiving = self.receiving.as_ref().filter(|receiving| receiving.sink.is_some())?;
        let waits = match self.endpoint.phase() {
            Phase::Receiving => true,
            Phase::Parting => receiving.open.live.is_some(),
            _ => false,
        };
        waits.then(|| receiving.moved + STALL_SPAN_MAX)
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
        self.events.push_back(Event::Offered(Box::new(Offer { open: open.clone() })));
        self.offer = Some(open);
        Ok(())
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
        // What moves after READY brings the hand-over no further.
        if let Some(receiving) = self.receiving.as_mut().filter(|receiving| !receiving.lasts) {
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
            Err(PeerError::Timeout(match self.endpoint.phase() {
                Phase::Parting => "READY came to nothing for 120 s",
                _ => "no page was stated for 120 s",
            }))
        } else {
            self.endpoint.handle_timeout(now)
        };
        if let Err(error) = late {
            self.fail(error.into());
        }
    }

    fn handle_job(&mut self, output: FinishOutput<S>, _spent: Span, now: Time) {
        let Some(receiving) = self.receiving.as_mut() else { return };
        let FinishOutput { sink, result } = output;
        receiving.sink = Some(sink);
        match result {
            // SPEC 7.6
            Ok(()) => {
                receiving.lasts = true;
                self.endpoint.enter(Phase::Parting);
                if let Some(handover) = receiving.handover() {
                    receiving.moved = now;
                    let blobs = std::mem::take(&mut receiving.blobs);
                    self.events.push_back(Event::Ready(handover, blobs));
                    return;
                }
                let root = receiving.root.map(|root| root.digest).unwrap_or_default();
                let done = Done { pages: receiving.open.layout.pages(), root };
                self.endpoint.push_frame(LaneId::CONTROL, &Frame::Done(done));
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
        let step = match receiving.step(&mut self.counts, now) {
            Ok(None) => return false,
            step => step,
        };
        // Everything may have been stated before the base was read to its end.
        match step.and_then(|have| Ok((have.flatten(), receiving.check_complete()?))) {
            Ok((have, complete)) => {
                have.into_iter().for_each(|have| self.endpoint.push_frame(LaneId::CONTROL, &Frame::Have(have)));
                self.events.extend(complete.then_some(Event::Verified));
            }
            Err(kind) => self.fail(kind),
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
