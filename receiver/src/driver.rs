//! The receiver under tokio: one session on the thread that calls, and a server of many.

use crate::engine::{Agreed, Event, Offer, ReceiverEngine, Terms};
use crate::error::{ErrorKind, ReceiverError};
use crate::fill::FillEngine;
use crate::memory::{GuestSink, OtherPages};
use crate::report::Counts;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::error::{CloseCode, GuestAt, PeerError};
use pagewire_protocol::frame::Open;
use pagewire_protocol::framing::Framer;
use pagewire_protocol::handover::{Handover, HostId, Message};
use pagewire_protocol::limits::WINDOW_BYTES;
use pagewire_protocol::page::Place;
use pagewire_protocol::session::{FEATURE_LIVE, FEATURE_POST_COPY, Policy};
use pagewire_protocol::time::{Span, Time};
use pagewire_protocol::tree::Manifest;
pub use pagewire_transport::Progress;
use pagewire_transport::{CancellationToken, PROGRESS_EVERY, Pump, Registration, Sessions, Socket, Wire, block_on};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

mod fill;
mod parking;

pub use fill::FillSummary;
pub use parking::Parking;

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
    /// Pages that the guest lacked when it was started here, and lacks still.
    pub lacking: u64,
    /// If the session filled a guest: what it and those before it did.
    pub filled: Option<FillSummary>,
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
    /// End: the guest runs and lacks pages; other sessions bring them.
    Split,
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

    /// The session fills this guest, which runs here: it was found, and no other session has it.
    fn fills(&mut self, _handover: &Handover) {}

    /// A guest that runs here is about to be filled: the pages that it will touch, by their places in the image and in
    /// that order, as far as that is known from another time. `open` is how it was offered.
    fn expects(&mut self, _handover: &Handover, _open: &Open) -> Vec<Place> {
        Vec::new()
    }

    /// The guest has all of its pages; these it touched before they had come, behind those that were expected.
    fn touched(&mut self, _handover: &Handover, _first_touches: &[Place]) {}
}

/// Receives one image. Blocks until it lasts or the session failed.
///
/// `decide` says where an offered image goes. The result is `Ok` only if every page is verified and lasting.
pub fn receive<S: GuestSink>(
    begin: Beginning,
    sessions: &Sessions,
    cancel: &CancellationToken,
    decide: impl FnMut(&Offer) -> Result<Landed<S>, Refusal>,
    (taker, parking): (Option<&mut dyn GuestTaker>, Option<&Arc<Parking<S>>>),
    observe: impl FnMut(Progress),
) -> (Summary, Result<(), ReceiverError>) {
    let mut summary = Summary::default();
    let session = drive(begin, (sessions, cancel), decide, (taker, parking), observe, &mut summary);
    let failed = |source| ErrorKind::Destination { what: "runtime", source };
    let result = block_on(session).map_err(failed).unwrap_or_else(Err);
    (summary, result.map_err(|kind| ReceiverError { kind, guest_at: GuestAt::Sender }))
}

async fn drive<S: GuestSink>(
    begin: Beginning,
    (sessions, cancel): (&Sessions, &CancellationToken),
    mut decide: impl FnMut(&Offer) -> Result<Landed<S>, Refusal>,
    (mut taker, parking): (Option<&mut dyn GuestTaker>, Option<&Arc<Parking<S>>>),
    mut observe: impl FnMut(Progress),
    summary: &mut Summary,
) -> Result<(), ErrorKind> {
    let Beginning { socket, framer, single_stream, lanes, start, entropy } = begin;
    let failed = |source| ErrorKind::Destination { what: "control connection", source };
    let stream = socket.into_stream().map_err(failed)?;
    let engine = ReceiverEngine::new(&policy(taker.is_some(), parking.is_some()), entropy.nonce, Time::ZERO);
    let mut pump = Pump::new(engine, stream, framer, start);
    if single_stream {
        pump.carry_all_lanes();
    }
    let mut registration: Option<Registration> = None;
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    let mut cancelled = false;
    let fill = loop {
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
                    let host = taken(&offer, taker.as_deref_mut())?;
                    Ok(terms(decide(&offer)?, host, lanes, entropy))
                });
                summary.offer = Some(*offer);
                let now = pump.now();
                match terms {
                    Ok(terms) => pump.machine().accept(terms, now),
                    Err(Refusal { code, reason }) => pump.machine().refuse(code, &reason),
                }
            }
            Some(Event::Fill(fill)) => break Some(fill),
            Some(Event::Ready(handover, blobs)) => {
                act(taker.as_mut().map(|taker| taker.ready(handover, blobs)), pump.machine());
            }
            Some(Event::Said(message)) => act(taker.as_mut().map(|taker| taker.hear(message)), pump.machine()),
            Some(Event::Verified | Event::Finished) => {}
            None => break None,
        }
    };
    drop(registration);
    let Some(fill) = fill else { return end(pump, parking, &mut observe, summary) };
    let now = pump.now();
    let pump = pump.turn_into(|machine| FillEngine::answering(machine.into_endpoint(), *fill, now));
    let host = (sessions, parking, cancel);
    let (filled, result) = fill::fill(pump, host, taker, (lanes, entropy), &mut observe).await;
    (summary.spent, summary.wire, summary.lacking) = (filled.spent, filled.wire, filled.lacking);
    summary.filled = Some(filled);
    result
}

/// What a session that is over did, and what it leaves.
fn end<S: GuestSink>(
    mut pump: Pump<ReceiverEngine<S>>,
    parking: Option<&Arc<Parking<S>>>,
    observe: &mut impl FnMut(Progress),
    summary: &mut Summary,
) -> Result<(), ErrorKind> {
    observe(progress(&mut pump));
    summary.wire = pump.wire();
    summary.spent = pump.now().since(Time::ZERO);
    summary.counts = pump.machine().counts();
    summary.manifest = pump.machine().manifest();
    // The machine always leaves an outcome; without one nothing may count as success.
    let result = pump.machine().outcome().map(|result| result.map_err(|error| error.kind));
    let result = result.unwrap_or_else(|| Err(PeerError::EndOfStream { lane: 0 }.into()));
    // A guest that was not started goes with its session.
    let incomplete = pump.into_machine().into_incomplete().filter(|_| result.is_ok());
    if let (Some(guest), Some(parking)) = (incomplete, parking) {
        summary.lacking = guest.pages();
        parking.park(guest);
    }
    result
}

fn policy(live: bool, post_copy: bool) -> Policy {
    let live_bit = if live { FEATURE_LIVE } else { 0 };
    let post_copy_bit = if live && post_copy { FEATURE_POST_COPY } else { 0 };
    Policy { features_offered: live_bit | post_copy_bit, ..Policy::default() }
}

/// A descriptor that the runtime watches for something to read.
#[expect(deprecated, reason = "sound for a descriptor that is owned: what took its place is for those that may not be")]
fn registered(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// This host, if a guest that runs is offered and may come.
fn taken(offer: &Offer, taker: Option<&mut (dyn GuestTaker + '_)>) -> Result<Option<HostId>, Refusal> {
    taker.filter(|_| offer.open.live.is_some()).map(|taker| taker.open(&offer.open)).transpose()
}

fn terms<S>(landed: Landed<S>, host: Option<HostId>, lanes: u8, entropy: Entropy) -> Terms<S> {
    let Landed { sink, agreed, others } = landed;
    let Entropy { secret, seed, challenge, .. } = entropy;
    Terms { sink, lanes, window: WINDOW_BYTES, secret, seed, agreed, others, challenge, host }
}

fn act<S: GuestSink>(actions: Option<Vec<Action>>, engine: &mut ReceiverEngine<S>) {
    for action in actions.into_iter().flatten() {
        match action {
            Action::Say(message) => engine.say(message),
            Action::Release => engine.release(),
            Action::Split => engine.split(),
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
