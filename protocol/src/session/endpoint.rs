//! What both roles' sessions have in common: the greeting, signs of life, CLOSE, and frames that wait for their lane.
//!
//! An engine owns one endpoint and asks it to judge every frame; what comes back is legal in the endpoint's phase and
//! is not HELLO, PING or CLOSE, which end here.

use super::{Agreed, Agreement, Liveness, Outgoing, Phase, Policy, check, negotiate};
use crate::digest::transcript_digest;
use crate::error::{CloseCode, PeerError, Violation};
use crate::frame::{Close, Frame, FrameKind, HEADER_BYTES, Hello, LaneId, Role};
use crate::limits::HANDSHAKE_SPAN_MAX;
use crate::time::Time;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// What the greeting settled.
#[derive(Clone, Copy, Debug)]
pub struct Greeted {
    /// Version, features, codecs.
    pub agreement: Agreement,
    /// The digest of both hellos, to be compared in OPEN and ACCEPT.
    pub transcript: [u8; 32],
}

/// The shell of a session.
#[derive(Debug)]
pub struct Endpoint {
    phase: Phase,
    role: Role,
    hello: Hello,
    hello_body: Vec<u8>,
    greeted: Option<Greeted>,
    handshake_until: Time,
    liveness: Liveness,
    queues: [VecDeque<Outgoing>; LaneId::COUNT],
}

impl Endpoint {
    /// An endpoint that greets at once.
    pub fn new(role: Role, policy: &Policy, nonce: [u8; 16], now: Time) -> Self {
        let hello = policy.hello(role, nonce);
        let greeting = Outgoing::frame(&Frame::Hello(hello.clone()), LaneId::CONTROL);
        let hello_body = greeting.head.get(HEADER_BYTES..).unwrap_or_default().to_vec();
        let mut endpoint = Self {
            phase: Phase::Greeting,
            role,
            hello,
            hello_body,
            greeted: None,
            handshake_until: now + HANDSHAKE_SPAN_MAX,
            liveness: Liveness::default(),
            queues: Default::default(),
        };
        endpoint.liveness.open(LaneId::CONTROL, now);
        // SPEC 4.1
        endpoint.push(LaneId::CONTROL, greeting);
        endpoint
    }

    /// Where the session stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The session moves on.
    pub fn enter(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// What the greeting settled, once it has.
    pub fn greeted(&self) -> Option<Greeted> {
        self.greeted
    }

    /// Judges a frame. `None` if it ends here; a HELLO does, and moves the phase on.
    ///
    /// # Errors
    /// Whatever ends the session: illegal now, malformed, incompatible, or the peer's CLOSE.
    pub fn judge<'a>(
        &mut self,
        lane: LaneId,
        kind: FrameKind,
        body: &'a [u8],
        now: Time,
    ) -> Result<Option<Frame<'a>>, PeerError> {
        self.liveness.heard(lane, now);
        // SPEC 2.5
        if !kind.is_known() {
            return Ok(None);
        }
        let agreed = self.greeted.map_or(Agreed::AtRest, |greeted| greeted.agreement.reach());
        check(self.role, self.phase, agreed, lane, kind)?;
        // SPEC 2.7: a single stream's headers may name any lane, also one that was not granted.
        if !self.liveness.is_open(lane) {
            return Err(Violation::WrongLane { lane: lane.number() }.into());
        }
        match Frame::decode(kind, body).map_err(|source| PeerError::Decode { kind, source })? {
            Frame::Hello(hello) => self.greet(&hello, body).map(|()| None),
            Frame::Close(Close { code, reason, .. }) => Err(PeerError::Closed { code, reason }),
            Frame::Ping(ping) => {
                self.liveness.handle_ping(lane, ping);
                Ok(None)
            }
            frame => Ok(Some(frame)),
        }
    }

    fn greet(&mut self, theirs: &Hello, body: &[u8]) -> Result<(), PeerError> {
        let agreement = negotiate(&self.hello, theirs)?;
        let (transcript, next) = match self.role {
            // SPEC 3.7
            Role::Sender => (transcript_digest(&self.hello_body, body), Phase::Opening),
            Role::Receiver => (transcript_digest(body, &self.hello_body), Phase::Waiting),
        };
        self.greeted = Some(Greeted { agreement, transcript: transcript.0 });
        self.phase = next;
        Ok(())
    }

    /// Enough of a frame under way on `lane` has moved to count as life.
    // SPEC 9.5
    pub fn note_progress(&mut self, lane: LaneId, now: Time) {
        self.liveness.heard(lane, now);
    }

    /// Starts to watch a lane that has been joined.
    pub fn open_lane(&mut self, lane: LaneId, now: Time) {
        self.liveness.open(lane, now);
    }

    /// Queues a frame.
    pub fn push(&mut self, lane: LaneId, outgoing: Outgoing) {
        if let Some(queue) = self.queues.get_mut(lane.index()) {
            queue.push_back(outgoing);
        }
    }

    /// Queues a frame without a separate payload.
    pub fn push_frame(&mut self, lane: LaneId, frame: &Frame<'_>) {
        self.push(lane, Outgoing::frame(frame, lane));
    }

    /// The next frame for `lane`: signs of life first.
    pub fn poll_frame(&mut self, lane: LaneId, now: Time) -> Option<Outgoing> {
        if self.phase != Phase::Over
            && self.phase != Phase::Greeting
            && let Some(ping) = self.liveness.poll_ping(lane, now)
        {
            return Some(Outgoing::frame(&ping, lane));
        }
        self.queues.get_mut(lane.index())?.pop_front()
    }

    // SPEC 8.2
    /// Ends the session: queued frames are dropped, and CLOSE goes out unless the peer said it or is gone.
    pub fn close(&mut self, code: CloseCode, reason: &str, tell: bool) {
        if self.phase == Phase::Over {
            return;
        }
        // HELLO stays, so that a peer that has not seen it can read the CLOSE that follows.
        let keep = usize::from(self.phase == Phase::Greeting);
        for (index, queue) in self.queues.iter_mut().enumerate() {
            queue.truncate(if index == 0 { keep } else { 0 });
        }
        self.phase = Phase::Over;
        if tell {
            self.push_frame(LaneId::CONTROL, &Frame::Close(Close::new(code, reason)));
        }
    }

    /// Ends the session after what is queued has gone out.
    pub fn finish(&mut self) {
        self.phase = Phase::Over;
    }

    /// The handshake may not last longer than its limit, and no lane may fall silent.
    ///
    /// # Errors
    /// One of them did.
    pub fn handle_timeout(&mut self, now: Time) -> Result<(), PeerError> {
        // SPEC 9.2
        let handshake = matches!(self.phase, Phase::Greeting | Phase::Opening | Phase::Waiting);
        if handshake && now >= self.handshake_until {
            return Err(PeerError::Timeout("handshake not complete after 10 s"));
        }
        if self.phase == Phase::Over {
            return Ok(());
        }
        self.liveness.lost(now).map_or(Ok(()), |why| Err(PeerError::Timeout(why)))
    }

    /// When [`handle_timeout`](Self::handle_timeout) or a sign of life is due.
    pub fn poll_timeout(&self) -> Option<Time> {
        match self.phase {
            Phase::Over => None,
            Phase::Greeting => Some(self.handshake_until),
            Phase::Opening | Phase::Waiting => self.liveness.next().map(|next| next.min(self.handshake_until)),
            _ => self.liveness.next(),
        }
    }
}
