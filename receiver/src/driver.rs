//! The receiver under tokio: one session on the thread that calls, and a server of many.

use crate::engine::{Agreed, Event, Offer, ReceiverEngine, Terms};
use crate::error::{ErrorKind, ReceiverError};
use crate::memory::{GuestSink, OtherPages};
use crate::report::Counts;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::error::{CloseCode, GuestAt, PeerError};
use pagewire_protocol::frame::Open;
use pagewire_protocol::framing::Framer;
use pagewire_protocol::handover::{Handover, HostId, Message};
use pagewire_protocol::limits::WINDOW_BYTES;
use pagewire_protocol::session::{FEATURE_LIVE, Policy};
use pagewire_protocol::time::{Span, Time};
use pagewire_protocol::tree::Manifest;
pub use pagewire_transport::Progress;
use pagewire_transport::{CancellationToken, PROGRESS_EVERY, Pump, Registration, Sessions, Socket, Wire, block_on};
use std::time::Instant;

/// What a session did, however it ended.
#[derive(Debug, Default)]
pub struct Summary {
    /// What the sender asked for; `None` if it never did.
    pub offer: Option<Offer>,
    /// Pages by the way they came.
    pub counts: Counts,
    /// Bytes on the wire.
    pub wire: Wire,
    /// From the first byte to the end.
    pub spent: Span,
    /// The digests of all pages, if the image is whole.
    pub manifest: Option<Manifest>,
}

/// What an offered image is to go into.
#[derive(Debug)]
pub struct Landed<S> {
    /// Where pages go.
    pub sink: S,
    /// What the sender knows of the base, if it does.
    pub agreed: Option<Agreed>,
    /// Pages of other guests of the domain, if they may be matched.
    pub others: Option<Box<dyn OtherPages>>,
}

/// Why an offer is refused: what the peer is told.
#[derive(Debug)]
pub struct Refusal {
    /// The code.
    pub code: CloseCode,
    /// The words.
    pub reason: String,
}

/// Random bytes, fresh for each session.
#[derive(Clone, Copy, Debug)]
pub struct Entropy {
    /// Makes the transcript unique.
    pub nonce: [u8; 16],
    /// What lanes prove.
    pub secret: [u8; 32],
    /// The seed of the digest index.
    pub seed: u64,
    /// What proofs of having a page are made for.
    pub challenge: [u8; 32],
}

/// What a session begins with.
#[derive(Debug)]
pub struct Beginning {
    /// The control connection.
    pub socket: Socket,
    /// What came on it already.
    pub framer: Framer,
    /// All lanes come over it.
    pub single_stream: bool,
    /// Lanes granted at most.
    pub lanes: u8,
    /// When the connection was accepted: the handshake's time counts from here.
    pub start: Instant,
    /// Randomness.
    pub entropy: Entropy,
}

/// What the session has to do for a guest's hand-over.
#[derive(Debug)]
pub enum Action {
    /// Say this to the sender.
    Say(Message),
    /// End: the sender has let go of the guest.
    Release,
    /// End: the guest will not start here.
    Stop(ErrorKind),
}

/// Whoever takes guests over on this host, for one session. Its methods may block for as long as a disk or the start of
/// a guest does.
pub trait GuestTaker {
    /// A guest is offered: this host's name, if the guest may come.
    ///
    /// # Errors
    /// It may not.
    fn open(&mut self, open: &Open) -> Result<HostId, Refusal>;

    /// All of it is here, verified and lasting, with these blobs.
    fn ready(&mut self, handover: Handover, blobs: Blobs) -> Vec<Action>;

    /// The sender says this, perhaps of a hand-over that an earlier session left open.
    fn hear(&mut self, message: Message) -> Vec<Action>;
}

/// Receives one image. Blocks until it lasts or the session failed.
///
/// `decide` says where an offered image goes. The result is `Ok` only if every page is verified and lasting.
pub fn receive<S: GuestSink>(
    begin: Beginning,
    sessions: &Sessions,
    cancel: &CancellationToken,
    decide: impl FnMut(&Offer) -> Result<Landed<S>, Refusal>,
    taker: Option<&mut dyn GuestTaker>,
    observe: impl FnMut(Progress),
) -> (Summary, Result<(), ReceiverError>) {
    let mut summary = Summary::default();
    let session = drive(begin, (sessions, cancel), decide, taker, observe, &mut summary);
    let failed = |source| ErrorKind::Destination { what: "runtime", source };
    let result = block_on(session).map_err(failed).unwrap_or_else(Err);
    (summary, result.map_err(|kind| ReceiverError { kind, guest_at: GuestAt::Sender }))
}

async fn drive<S: GuestSink>(
    begin: Beginning,
    (sessions, cancel): (&Sessions, &CancellationToken),
    mut decide: impl FnMut(&Offer) -> Result<Landed<S>, Refusal>,
    mut taker: Option<&mut dyn GuestTaker>,
    mut observe: impl FnMut(Progress),
    summary: &mut Summary,
) -> Result<(), ErrorKind> {
    let Beginning { socket, framer, single_stream, lanes, start, entropy } = begin;
    let failed = |source| ErrorKind::Destination { what: "control connection", source };
    let stream = socket.into_stream().map_err(failed)?;
    let features_offered = if taker.is_some() { FEATURE_LIVE } else { 0 };
    let policy = Policy { features_offered, ..Policy::default() };
    let engine = ReceiverEngine::new(&policy, entropy.nonce, Time::ZERO);
    let mut pump = Pump::new(engine, stream, framer, start);
    if single_stream {
        pump.carry_all_lanes();
    }
    let mut registration: Option<Registration> = None;
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    let mut cancelled = false;
    let result = loop {
        let event = tokio::select! {
            biased;
            () = cancel.cancelled(), if !cancelled => {
                cancelled = true;
                pump.machine().cancel();
                continue;
            }
            _ = tick.tick() => {
                observe(progress(&mut pump));
                continue;
            }
            event = pump.next() => event,
        };
        match event {
            Some(Event::Offered(offer)) => {
                let terms = sessions.register(offer.open.session).ok_or_else(busy).and_then(|(guard, joins)| {
                    registration = Some(guard);
                    pump.take_joins(joins);
                    check_streams(&offer, single_stream)?;
                    let taker = taker.as_mut().filter(|_| offer.open.live.is_some());
                    let host = taker.map(|taker| taker.open(&offer.open)).transpose()?;
                    let Landed { sink, agreed, others } = decide(&offer)?;
                    let Entropy { secret, seed, challenge, .. } = entropy;
                    Ok(Terms { sink, lanes, window: WINDOW_BYTES, secret, seed, agreed, others, challenge, host })
                });
                summary.offer = Some(*offer);
                let now = pump.now();
                match terms {
                    Ok(terms) => pump.machine().accept(terms, now),
                    Err(Refusal { code, reason }) => pump.machine().refuse(code, &reason),
                }
            }
            Some(Event::Ready(handover, blobs)) => {
                let actions = taker.as_mut().map(|taker| taker.ready(handover, blobs));
                act(actions.unwrap_or_default(), pump.machine());
            }
            Some(Event::Said(message)) => {
                let actions = taker.as_mut().map(|taker| taker.hear(message));
                act(actions.unwrap_or_default(), pump.machine());
            }
            Some(Event::Verified | Event::Finished) => {}
            None => break pump.machine().outcome(),
        }
    };
    drop(registration);
    observe(progress(&mut pump));
    summary.wire = pump.wire();
    summary.spent = pump.now().since(Time::ZERO);
    summary.counts = pump.machine().counts();
    summary.manifest = pump.machine().manifest();
    match result {
        Some(result) => result.map_err(|error| error.kind),
        // The machine always leaves an outcome; without one nothing may count as success.
        None => Err(PeerError::EndOfStream { lane: 0 }.into()),
    }
}

fn act<S: GuestSink>(actions: Vec<Action>, engine: &mut ReceiverEngine<S>) {
    for action in actions {
        match action {
            Action::Say(message) => engine.say(message),
            Action::Release => engine.release(),
            Action::Stop(kind) => engine.stop(kind),
        }
    }
}

fn busy() -> Refusal {
    Refusal { code: CloseCode::BUSY, reason: "a session with this id is open".to_owned() }
}

/// Whether the connection carries one lane or all is fixed by the transport, not by what a peer says.
fn check_streams(offer: &Offer, single_stream: bool) -> Result<(), Refusal> {
    if offer.open.single_stream == single_stream {
        return Ok(());
    }
    let reason =
        "this transport carries each lane on a connection of its own, or all on one; the peer asks for the other";
    Err(Refusal { code: CloseCode::REFUSED, reason: reason.to_owned() })
}

fn progress<S: GuestSink>(pump: &mut Pump<ReceiverEngine<S>>) -> Progress {
    let (pages, pages_total) = pump.machine().progress();
    Progress { pages, pages_total, wire: pump.wire() }
}
