//! The sender under tokio: connects, joins its lanes and drives the engine to its end.

use crate::base::Base;
use crate::engine::{Event, SenderConfig, SenderEngine};
use crate::error::{ErrorKind, SenderError};
use crate::memory::GuestMemory;
use crate::report::{Counts, Decision};
use pagewire_protocol::error::{GuestAt, PeerError};
use pagewire_protocol::frame::LaneId;
use pagewire_protocol::framing::Framer;
use pagewire_protocol::time::Span;
use pagewire_protocol::tree::Manifest;
pub use pagewire_transport::Progress;
use pagewire_transport::{Address, CancellationToken, PROGRESS_EVERY, Pump, Socket, Wire, block_on};
use std::io;
use std::time::{Duration, Instant};

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

/// Sends an image. Blocks until the receiver has all of it, verified and lasting, or the session failed.
///
/// # Errors
/// See [`ErrorKind`]; the guest is at the sender then.
pub fn send<M: GuestMemory>(
    memory: M,
    bases: Vec<Box<dyn Base>>,
    config: SenderConfig,
    route: Route,
    stop: &Stop,
    mut observe: impl FnMut(Progress),
) -> (Summary, Result<(), SenderError>) {
    let mut summary = Summary::default();
    let session = drive((memory, bases), config, route, stop, &mut observe, &mut summary);
    let result = block_on(session).map_err(local("runtime")).unwrap_or_else(Err);
    (summary, result.map_err(|kind| SenderError { kind, guest_at: GuestAt::Sender }))
}

fn local(what: &'static str) -> impl Fn(io::Error) -> ErrorKind {
    move |source| ErrorKind::Local { what, source }
}

async fn drive<M: GuestMemory>(
    (memory, bases): (M, Vec<Box<dyn Base>>),
    config: SenderConfig,
    route: Route,
    stop: &Stop,
    observe: &mut impl FnMut(Progress),
    summary: &mut Summary,
) -> Result<(), ErrorKind> {
    let start = Instant::now();
    let (address, control) = match route {
        Route::Connect(address) => (Some(address.clone()), connect(&address)?),
        Route::Over(socket) => (None, socket),
    };
    let stream = control.into_stream().map_err(local("control connection"))?;
    let engine = SenderEngine::new(memory, bases, config, pagewire_protocol::time::Time::ZERO);
    let mut pump = Pump::new(engine, stream, Framer::new(), start);
    if address.is_none() {
        pump.carry_all_lanes();
    }
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    let mut stopped = false;
    let mut stopping = std::pin::pin!(stop.wait());
    let result = loop {
        let event = tokio::select! {
            biased;
            kind = &mut stopping, if !stopped => {
                stopped = true;
                pump.machine().cancel(kind);
                continue;
            }
            _ = tick.tick() => {
                observe(progress(&mut pump));
                continue;
            }
            event = pump.next() => event,
        };
        match (event, &address) {
            (Some(Event::Accepted { lanes }), Some(address)) => {
                for lane in (0..lanes).map(LaneId::bulk) {
                    join(&mut pump, address, lane)?;
                }
            }
            (Some(_), _) => {}
            (None, _) => break pump.machine().outcome(),
        }
    };
    observe(progress(&mut pump));
    summary.wire = pump.wire();
    summary.spent = pump.now().since(pagewire_protocol::time::Time::ZERO);
    summary.counts = pump.machine().counts();
    summary.decisions = pump.machine().decisions().to_vec();
    summary.manifest = pump.machine().manifest();
    match result {
        Some(result) => result.map_err(|error| error.kind),
        // The machine always leaves an outcome; without one nothing may count as success.
        None => Err(PeerError::EndOfStream { lane: 0 }.into()),
    }
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
