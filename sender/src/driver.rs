//! The sender under tokio: connects, joins its lanes and drives the engine to its end.

use crate::ask::AskEngine;
use crate::base::Base;
use crate::engine::{Event, SenderConfig, SenderEngine};
use crate::error::{ErrorKind, SenderError};
use crate::fill::Remainder;
use crate::memory::GuestMemory;
use crate::report::{Counts, Decision, RoundReport};
use crate::trace::Trace;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::error::{GuestAt, PeerError};
use pagewire_protocol::frame::LaneId;
use pagewire_protocol::framing::Framer;
use pagewire_protocol::handover::{Message, Word};
use pagewire_protocol::time::Span;
use pagewire_protocol::tree::Manifest;
pub use pagewire_transport::Progress;
use pagewire_transport::{Address, CancellationToken, PROGRESS_EVERY, Pump, Socket, Wire, block_on};
use std::io;
use std::time::{Duration, Instant};

mod control;
mod fill;
mod notice;

use control::Controlled;
pub use control::{Action, Approval, GuestControl};
pub use fill::{FillSummary, fill};
pub use notice::{LivePhase, Notice};

/// What a session did, however it ended.
#[derive(Debug, Default)]
pub struct Summary {
    /// Pages by the way they were stated.
    pub counts: Counts,
    /// Bytes on the wire.
    pub wire: Wire,
    /// What was decided.
    pub decisions: Vec<Decision>,
    /// From the first byte to the end.
    pub spent: Span,
    /// The digests of all pages, if the receiver has them.
    pub manifest: Option<Manifest>,
    /// The rounds of a live session.
    pub rounds: Vec<RoundReport>,
    /// Pages that its guest wrote all the time, by their places.
    pub hot: Option<PageBitmap>,
}

/// What may end a session from here.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// Somebody cancels it.
    pub cancel: CancellationToken,
    /// It may take this long.
    pub deadline: Option<Duration>,
}

impl Stop {
    async fn wait(&self) -> ErrorKind {
        let deadline = async {
            match self.deadline {
                Some(deadline) => {
                    tokio::time::sleep(deadline).await;
                    ErrorKind::Deadline(deadline)
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            kind = deadline => kind,
            () = self.cancel.cancelled() => ErrorKind::Cancelled,
        }
    }
}

/// Where the lanes' connections come from.
#[derive(Debug)]
pub enum Route {
    /// Each lane connects to the receiver's address.
    Connect(Address),
    /// One connected socket carries them all; the config must say `single_stream`.
    Over(Socket),
}

/// What is sent.
pub struct Cargo<M> {
    /// Its memory.
    pub memory: M,
    /// Earlier images of it, the newest first.
    pub bases: Vec<Box<dyn Base>>,
    /// Who holds the guest, if the config says that it is live.
    pub control: Option<Box<dyn GuestControl>>,
    /// Who is shown what the guest writes.
    pub trace: Option<Box<dyn Trace>>,
}

/// Sends an image. Blocks until the receiver has all of it, verified and lasting, or the session failed. Beside the
/// result stands what is left to bring of a guest that was handed over before all of it had come, if it was: see [`fill`].
///
/// # Errors
/// See [`ErrorKind`]; the guest is at the sender then, unless its control knows better.
pub fn send<M: GuestMemory>(
    cargo: Cargo<M>,
    config: SenderConfig,
    route: Route,
    stop: &Stop,
    mut observe: impl FnMut(Notice),
) -> (Summary, Result<(), SenderError>, Option<Remainder<M>>) {
    let (mut summary, mut left) = (Summary::default(), None);
    let session = drive(cargo, config, route, stop, &mut observe, (&mut summary, &mut left));
    let result = block_on(session).map_err(local("runtime")).unwrap_or_else(Err);
    (summary, result.map_err(|kind| SenderError { kind, guest_at: GuestAt::Sender }), left)
}

fn local(what: &'static str) -> impl Fn(io::Error) -> ErrorKind {
    move |source| ErrorKind::Local { what, source }
}

async fn drive<M: GuestMemory>(
    Cargo { memory, bases, control: guest, trace }: Cargo<M>,
    config: SenderConfig,
    route: Route,
    stop: &Stop,
    observe: &mut impl FnMut(Notice),
    (summary, left): (&mut Summary, &mut Option<Remainder<M>>),
) -> Result<(), ErrorKind> {
    let start = Instant::now();
    let (address, control) = match route {
        Route::Connect(address) => (Some(address.clone()), connect(&address)?),
        Route::Over(socket) => (None, socket),
    };
    let stream = control.into_stream().map_err(local("control connection"))?;
    let mut engine = SenderEngine::new(memory, bases, config, pagewire_protocol::time::Time::ZERO);
    if let Some(trace) = trace {
        engine.trace(trace);
    }
    let mut pump = Pump::new(engine, stream, Framer::new(), start);
    if address.is_none() {
        pump.carry_all_lanes();
    }
    let mut guest = Controlled::new(guest);
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    let mut stopped = false;
    let mut stopping = std::pin::pin!(stop.wait());
    let result = loop {
        guest.told.tell(&mut pump, observe);
        let event = tokio::select! {
            biased;
            kind = &mut stopping, if !stopped => {
                stopped = true;
                guest.stop(kind, &mut pump);
                continue;
            }
            waited = guest.wait() => {
                guest.go_on(waited, &mut pump);
                continue;
            }
            _ = tick.tick() => {
                observe(Notice::Progress(progress(&mut pump)));
                continue;
            }
            event = pump.next() => event,
        };
        if let (Some(Event::Accepted { lanes }), Some(address)) = (&event, &address) {
            let joined = (0..*lanes).map(LaneId::bulk).try_for_each(|lane| join(&mut pump, address, lane));
            joined.unwrap_or_else(|kind| pump.machine().cancel(kind));
        }
        match event {
            Some(event) => guest.handle(event, &mut pump),
            None => break pump.machine().outcome(),
        }
    };
    guest.end().await;
    guest.told.tell(&mut pump, observe);
    observe(Notice::Progress(progress(&mut pump)));
    summary.rounds = pump.machine().rounds().to_vec();
    summary.hot = pump.machine().hot();
    summary.wire = pump.wire();
    summary.spent = pump.now().since(pagewire_protocol::time::Time::ZERO);
    summary.counts = pump.machine().counts();
    summary.decisions = pump.machine().decisions().to_vec();
    summary.manifest = pump.machine().manifest();
    *left = pump.into_machine().into_remainder();
    // The machine always leaves an outcome; without one nothing may count as success.
    let result = result.map(|result| result.map_err(|error| error.kind));
    result.unwrap_or_else(|| Err(PeerError::EndOfStream { lane: 0 }.into()))
}

/// Asks the receiver at `address` what became of a hand-over by saying `question` again, on a connection of its own.
/// Each answer goes to `hear`, which says what to say then; the connection ends when it says nothing more.
///
/// # Errors
/// Nobody is there, or nobody answers.
pub fn ask(
    address: &Address,
    question: Message,
    nonce: [u8; 16],
    mut hear: impl FnMut(Message) -> Vec<Message>,
) -> Result<(), ErrorKind> {
    let session = async {
        let stream = connect(address)?.into_stream().map_err(local("control connection"))?;
        let engine = AskEngine::new(question, nonce, pagewire_protocol::time::Time::ZERO);
        let mut pump = Pump::new(engine, stream, Framer::new(), Instant::now());
        while let Some(answer) = pump.next().await {
            let replies = hear(answer);
            let goes_on = replies.iter().any(|reply| reply.word == Word::Commit);
            replies.into_iter().for_each(|reply| pump.machine().say(reply));
            if !goes_on {
                pump.machine().finish();
            }
        }
        pump.machine().outcome().unwrap_or_else(|| Err(PeerError::EndOfStream { lane: 0 }.into()))
    };
    block_on(session).map_err(local("runtime"))?
}

fn connect(address: &Address) -> Result<Socket, ErrorKind> {
    let reason = |error: io::Error| PeerError::Connect { address: address.to_string(), reason: error.to_string() };
    Ok(Socket::connect(address).map_err(reason)?)
}

fn join<M: GuestMemory>(pump: &mut Pump<SenderEngine<M>>, address: &Address, lane: LaneId) -> Result<(), ErrorKind> {
    let stream = connect(address)?.into_stream().map_err(local("bulk connection"))?;
    if let Some(frame) = pump.machine().join(lane) {
        pump.attach(lane, stream, frame);
    }
    Ok(())
}

fn progress<M: GuestMemory>(pump: &mut Pump<SenderEngine<M>>) -> Progress {
    let (pages, pages_total) = pump.machine().progress();
    Progress { pages, pages_total, wire: pump.wire() }
}
