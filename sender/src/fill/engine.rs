//! One session that fills a guest: greets, hears what it lacks, brings it, and hears that all of it has come.
//!
//! ```text
//! Greeting ─HELLO→ Opening ─LACK→ Serving ─DONE, GONE said→ Over
//! ```

use super::Remainder;
use super::serving::{Serving, Ways};
use crate::error::ErrorKind;
use crate::lanes::{EncodeJob, EncodeOutput};
use crate::memory::GuestMemory;
use crate::report::{Decision, FillCounts};
use pagewire_protocol::digest::join_proof;
use pagewire_protocol::error::{Incompatible, PeerError, Violation, chain};
use pagewire_protocol::frame::{Done, Fill, Frame, FrameKind, Join, Lack, LaneId, Role};
use pagewire_protocol::handover::Message;
use pagewire_protocol::limits::STALL_SPAN_MAX;
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::{Endpoint, FEATURE_LIVE, FEATURE_POST_COPY, Machine, Outgoing, Phase, Policy};
use pagewire_protocol::time::{Span, Time};
use std::collections::VecDeque;

/// How to fill.
#[derive(Clone, Debug)]
pub struct FillConfig {
    /// Random: the session's id.
    pub session: [u8; 16],
    /// Random: makes the transcript unique.
    pub nonce: [u8; 16],
    /// Bulk lanes to ask for, 1 to 8.
    pub lanes: u8,
    /// All lanes travel on the control connection.
    pub single_stream: bool,
    /// Compress where it pays; pages that the guest waits for never are.
    pub compress: bool,
    /// Threads that may compress at once.
    pub workers: usize,
    /// Bytes a second at most in the background; pages that the guest waits for do not count.
    pub bandwidth_limit: Option<u64>,
    /// Pages read and sent at once in the background: 16 to 512, a power of two.
    pub batch_pages: u16,
    /// What this side speaks.
    pub policy: Policy,
}

impl Default for FillConfig {
    /// One lane, compression allowed. Entropy is all zeros and must be set.
    fn default() -> Self {
        Self {
            session: [0; 16],
            nonce: [0; 16],
            lanes: 1,
            single_stream: false,
            compress: true,
            workers: 1,
            bandwidth_limit: None,
            batch_pages: 32,
            policy: Policy::default(),
        }
    }
}

/// What the engine tells whoever embeds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FillEvent {
    /// The receiver has said on which terms: these lanes and the urgent one need connections, each beginning with its
    /// JOIN.
    Accepted {
        /// Bulk lanes granted.
        lanes: u8,
    },
    /// The receiver has all of the guest, under the right root. When that is durable, [`FillEngine::release`] says so.
    Filled,
}

/// The sending side of one session that fills a guest.
#[derive(Debug)]
pub struct FillEngine<M> {
    endpoint: Endpoint,
    config: FillConfig,
    remainder: Option<Remainder<M>>,
    secret: Option<[u8; 32]>,
    serving: Option<Box<Serving<M>>>,
    filled: bool,
    /// Something went wrong where it could not be told.
    failed: Option<ErrorKind>,
    moved: Time,
    events: VecDeque<FillEvent>,
    outcome: Option<Result<(), ErrorKind>>,
}

impl<M: GuestMemory> FillEngine<M> {
    /// A session that greets.
    pub fn new(remainder: Remainder<M>, mut config: FillConfig, now: Time) -> Self {
        let features = FEATURE_LIVE | FEATURE_POST_COPY;
        config.policy.features_offered |= features;
        config.policy.features_required |= features;
        Self {
            endpoint: Endpoint::new(Role::Sender, &config.policy, config.nonce, now),
            config,
            remainder: Some(remainder),
            secret: None,
            serving: None,
            filled: false,
            failed: None,
            moved: now,
            events: VecDeque::new(),
            outcome: None,
        }
    }

    /// The first frame of the connection that is to carry `lane`; `None` before [`FillEvent::Accepted`].
    pub fn join(&self, lane: LaneId) -> Option<Outgoing> {
        let proof = join_proof(self.secret.as_ref()?, &self.config.session, lane.number());
        Some(Outgoing::frame(&Frame::Join(Join { session: self.config.session, proof }), lane))
    }

    /// Stops the session, for the reason that `kind` names. What is left may be brought in another one.
    pub fn cancel(&mut self, kind: ErrorKind) {
        self.fail(kind);
    }

    /// The guest's memory is given up: `gone` is said, and the session ends.
    pub fn release(&mut self, gone: Message) {
        if self.filled && self.endpoint.phase() == Phase::Serving {
            self.endpoint.push_frame(LaneId::CONTROL, &Frame::Handover(gone));
            self.endpoint.finish();
            self.outcome = Some(Ok(()));
        }
    }

    /// What is left to bring, with the memory, when the session is over.
    pub fn into_remainder(self) -> Option<Remainder<M>> {
        self.remainder.or(self.serving.map(|serving| serving.remainder))
    }

    /// What was done so far.
    pub fn counts(&self) -> FillCounts {
        self.serving.as_ref().map(|serving| serving.counts).unwrap_or_default()
    }

    /// What was decided so far.
    pub fn decisions(&self) -> &[Decision] {
        self.serving.as_ref().map_or(&[], |serving| &serving.decisions)
    }

    /// Lacking pages that have gone out, and how many were lacking when the session began.
    pub fn progress(&self) -> (u64, u64) {
        self.serving.as_ref().map_or((0, 0), |serving| serving.progress())
    }

    /// How the session ended, once it has.
    pub fn outcome(&mut self) -> Option<Result<(), ErrorKind>> {
        self.outcome.take()
    }

    fn fail(&mut self, kind: ErrorKind) {
        if self.endpoint.phase() == Phase::Over {
            return;
        }
        self.endpoint.close(kind.close_code(), &chain(&kind), kind.tells_peer());
        self.outcome = Some(Err(kind));
    }

    fn handle(&mut self, lane: LaneId, kind: FrameKind, body: &[u8], now: Time) -> Result<(), ErrorKind> {
        let was = self.endpoint.phase();
        let frame = self.endpoint.judge(lane, kind, body, now)?;
        if was == Phase::Greeting && self.endpoint.phase() == Phase::Opening {
            return self.open();
        }
        match frame {
            Some(Frame::Lack(lack)) => self.handle_lack(&lack, now),
            Some(Frame::Done(done)) => self.handle_done(done),
            Some(frame) => {
                self.moved = now;
                let Some(serving) = self.serving.as_mut() else {
                    return Err(Violation::Live(kind.name(), "fills a guest").into());
                };
                match frame {
                    Frame::Lacking(part) => serving.handle_lacking(&part),
                    Frame::Fault(fault) => serving.handle_fault(&fault),
                    Frame::Ack(ack) => serving.handle_ack(lane, &ack, now),
                    _ => Err(Violation::Live(kind.name(), "fills a guest").into()),
                }
            }
            None => Ok(()),
        }
    }

    // SPEC 13.4
    fn open(&mut self) -> Result<(), ErrorKind> {
        let (Some(greeted), Some(remainder)) = (self.endpoint.greeted(), self.remainder.as_ref()) else {
            return Ok(());
        };
        for region in remainder.layout().regions() {
            let size = region.install_size.bytes();
            if greeted.agreement.install_sizes & (size / 4096) == 0 {
                let unknown = Incompatible::Unsupported { what: "install size", value: u64::from(size) };
                return Err(ErrorKind::Peer(unknown.into()));
            }
        }
        let fill = Fill {
            transcript: greeted.transcript,
            session: self.config.session,
            lanes: self.config.lanes,
            single_stream: self.config.single_stream,
            handover: remainder.handover,
        };
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Fill(fill));
        Ok(())
    }

    // SPEC 13.5
    fn handle_lack(&mut self, lack: &Lack, now: Time) -> Result<(), ErrorKind> {
        let (Some(greeted), Some(remainder)) = (self.endpoint.greeted(), self.remainder.take()) else {
            return Ok(());
        };
        let pages = remainder.absent.count();
        if lack.transcript != greeted.transcript {
            self.remainder = Some(remainder);
            return Err(Violation::Transcript.into());
        }
        let refused = if lack.lanes > self.config.lanes {
            Some(Violation::Join { lane: lack.lanes, why: "more lanes granted than asked for" })
        } else if lack.pages > pages {
            Some(Violation::Terms { what: "pages lacking", got: lack.pages, expected: pages })
        } else {
            None
        };
        if let Some(violation) = refused {
            self.remainder = Some(remainder);
            return Err(violation.into());
        }
        let FillConfig { compress, workers, bandwidth_limit, batch_pages, .. } = self.config;
        let zstd = greeted.agreement.codecs & pagewire_protocol::frame::Codec::ZSTD.bit() != 0;
        let ways = Ways { compress: compress && zstd, workers, bandwidth_limit, batch_pages };
        self.secret = Some(lack.secret);
        self.moved = now;
        self.serving = Some(Box::new(Serving::new(remainder, lack, ways)));
        self.endpoint.enter(Phase::Serving);
        if self.config.single_stream {
            let lanes = (0..lack.lanes).map(LaneId::bulk).chain([LaneId::URGENT]);
            lanes.for_each(|lane| self.endpoint.open_lane(lane, now));
        }
        self.events.push_back(FillEvent::Accepted { lanes: lack.lanes });
        Ok(())
    }

    // SPEC 13.11
    fn handle_done(&mut self, done: Done) -> Result<(), ErrorKind> {
        let Some(serving) = self.serving.as_mut() else { return Ok(()) };
        if self.filled {
            return Err(Violation::Live("a second DONE", "is filled").into());
        }
        let (pages, root) = (serving.remainder.layout().pages(), serving.root());
        if (done.pages, done.root) != (pages, root) || !serving.is_told() {
            let (theirs, their_pages) = (done.root, done.pages);
            return Err(Violation::Root { theirs, their_pages, ours: root, our_pages: pages }.into());
        }
        // Until all has been read, the root is one over absent pages, which anybody can know.
        if let Some(place) = serving.not_gone() {
            return Err(Violation::Lacking { what: "DONE, though a page that is lacking was not sent", place }.into());
        }
        self.filled = true;
        self.events.push_back(FillEvent::Filled);
        Ok(())
    }

    // SPEC 9.8
    /// When a receiver that was sent everything has been silent about it for too long.
    fn stalled_at(&self) -> Option<Time> {
        let sent = self.serving.as_ref().is_some_and(|serving| serving.is_sent());
        (sent && !self.filled && self.endpoint.phase() == Phase::Serving).then(|| self.moved + STALL_SPAN_MAX)
    }
}

impl<M: GuestMemory> Machine for FillEngine<M> {
    type Job = EncodeJob;
    type Event = FillEvent;

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
            Err(PeerError::Timeout("all that the guest lacks was sent, and nothing came of it for 120 s"))
        } else {
            self.endpoint.handle_timeout(now)
        };
        if let Err(error) = late {
            self.fail(error.into());
        }
    }

    fn handle_job(&mut self, output: EncodeOutput, spent: Span, _now: Time) {
        if let Some(serving) = self.serving.as_mut() {
            serving.handle_encoded(output, spent);
        }
    }

    fn handle_join(&mut self, lane: LaneId, _join: &Join, _now: Time) -> Result<(), Violation> {
        Err(Violation::Join { lane: lane.number(), why: "a sender is not joined" })
    }

    fn handle_lane_open(&mut self, lane: LaneId, now: Time) {
        self.endpoint.open_lane(lane, now);
    }

    fn work(&mut self, now: Time) -> bool {
        if self.endpoint.phase() != Phase::Serving {
            return false;
        }
        let step = match self.failed.take() {
            Some(kind) => Err(kind),
            None => self.serving.as_mut().map_or(Ok(false), |serving| serving.step(now)),
        };
        step.unwrap_or_else(|kind| {
            self.fail(kind);
            true
        })
    }

    fn poll_frame(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        let queued = self.endpoint.poll_frame(lane, now);
        if queued.is_some() || self.endpoint.phase() != Phase::Serving {
            return queued;
        }
        let serving = self.serving.as_mut()?;
        if lane != LaneId::URGENT {
            return serving.lanes.poll_frame(lane, now);
        }
        serving.next_urgent().unwrap_or_else(|kind| {
            self.failed = Some(kind);
            None
        })
    }

    fn poll_job(&mut self) -> Option<EncodeJob> {
        self.serving.as_mut()?.lanes.poll_job()
    }

    fn poll_event(&mut self) -> Option<FillEvent> {
        self.events.pop_front()
    }

    fn poll_timeout(&self) -> Option<Time> {
        let serving = self.serving.as_ref().filter(|_| self.endpoint.phase() == Phase::Serving);
        let pace = serving.and_then(|serving| serving.lanes.poll_timeout());
        pace.into_iter().chain(self.endpoint.poll_timeout()).chain(self.stalled_at()).min()
    }

    fn recycle(&mut self, buffer: PageBuffer) {
        if let Some(serving) = self.serving.as_mut() {
            serving.lanes.recycle(buffer);
        }
    }

    fn is_over(&self) -> bool {
        self.endpoint.phase() == Phase::Over
    }
}
