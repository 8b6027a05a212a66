//! Asks a receiver what became of a hand-over, on a connection of its own: greets, says one word, hears one.

use crate::error::ErrorKind;
use pagewire_protocol::error::{CloseCode, PeerError, Violation, chain};
use pagewire_protocol::frame::{Close, Frame, FrameKind, Join, LaneId, Role};
use pagewire_protocol::handover::Message;
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::{Endpoint, FEATURE_LIVE, Machine, NoJob, Outgoing, Phase, Policy};
use pagewire_protocol::time::{Span, Time};

/// One question.
#[derive(Debug)]
pub struct AskEngine {
    endpoint: Endpoint,
    question: Option<Message>,
    heard: Option<Message>,
    outcome: Option<Result<(), ErrorKind>>,
}

impl AskEngine {
    /// Says `question` again; `nonce` must be random.
    pub fn new(question: Message, nonce: [u8; 16], now: Time) -> Self {
        let policy = Policy { features_offered: FEATURE_LIVE, features_required: FEATURE_LIVE, ..Policy::default() };
        let endpoint = Endpoint::new(Role::Sender, &policy, nonce, now);
        Self { endpoint, question: Some(question), heard: None, outcome: None }
    }

    /// All is said and heard: the connection ends when what was said last has gone out.
    pub fn finish(&mut self) {
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Close(Close::new(CloseCode::DONE, "")));
        self.endpoint.finish();
        self.outcome.get_or_insert(Ok(()));
    }

    /// Says one word more, before the connection is closed.
    pub fn say(&mut self, message: Message) {
        self.endpoint.push_frame(LaneId::CONTROL, &Frame::Handover(message));
    }

    /// How it ended, once it has.
    pub fn outcome(&mut self) -> Option<Result<(), ErrorKind>> {
        self.outcome.take()
    }

    fn fail(&mut self, kind: ErrorKind) {
        if self.endpoint.phase() != Phase::Over {
            self.endpoint.close(kind.close_code(), &chain(&kind), kind.tells_peer());
            self.outcome = Some(Err(kind));
        }
    }

    fn handle(&mut self, lane: LaneId, kind: FrameKind, body: &[u8], now: Time) -> Result<(), ErrorKind> {
        let frame = self.endpoint.judge(lane, kind, body, now)?;
        // SPEC 11.2
        if self.endpoint.phase() == Phase::Opening
            && let Some(question) = self.question.take()
        {
            self.say(question);
        }
        match frame {
            Some(Frame::Handover(message)) => self.heard = Some(message),
            Some(_) => return Err(Violation::Live("an answer", "asked about a hand-over").into()),
            None => {}
        }
        Ok(())
    }
}

impl Machine for AskEngine {
    type Job = NoJob;
    type Event = Message;

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
        if let Err(error) = self.endpoint.handle_timeout(now) {
            self.fail(error.into());
        }
    }

    fn handle_job(&mut self, _output: (), _spent: Span, _now: Time) {}

    fn handle_join(&mut self, lane: LaneId, _join: &Join, _now: Time) -> Result<(), Violation> {
        Err(Violation::Join { lane: lane.number(), why: "a question is not joined" })
    }

    fn handle_lane_open(&mut self, _lane: LaneId, _now: Time) {}

    fn work(&mut self, _now: Time) -> bool {
        false
    }

    fn poll_frame(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        self.endpoint.poll_frame(lane, now)
    }

    fn poll_job(&mut self) -> Option<NoJob> {
        None
    }

    fn poll_event(&mut self) -> Option<Message> {
        self.heard.take()
    }

    fn poll_timeout(&self) -> Option<Time> {
        self.endpoint.poll_timeout()
    }

    fn recycle(&mut self, _buffer: PageBuffer) {}

    fn is_over(&self) -> bool {
        self.endpoint.phase() == Phase::Over
    }
}
