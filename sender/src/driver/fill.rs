//! One session that fills a guest at its receiver, under tokio.

use super::{Route, Stop, connect, local};
use crate::error::ErrorKind;
use crate::fill::{FillConfig, FillEngine, FillEvent, Remainder};
use crate::memory::GuestMemory;
use crate::report::{Decision, FillCounts};
use pagewire_protocol::error::PeerError;
use pagewire_protocol::frame::LaneId;
use pagewire_protocol::framing::Framer;
use pagewire_protocol::handover::Message;
use pagewire_protocol::time::{Span, Time};
use pagewire_transport::{Address, PROGRESS_EVERY, Progress, Pump, Wire, block_on};
use std::time::Instant;

/// What a session did, however it ended.
#[derive(Debug, Default)]
pub struct FillSummary {
    /// Pages by the way they went.
    pub counts: FillCounts,
    /// Bytes on the wire.
    pub wire: Wire,
    /// What was decided.
    pub decisions: Vec<Decision>,
    /// From the first byte to the end.
    pub spent: Span,
}

/// Brings what is left to a guest that runs at the receiver. Blocks until that has all of it, or the session failed.
///
/// `filled` makes durable that the memory here is given up, and gives the word that says so. What is left is given back
/// if it was not: another session may bring it.
pub fn fill<M: GuestMemory>(
    remainder: Remainder<M>,
    config: FillConfig,
    route: Route,
    stop: &Stop,
    mut filled: impl FnMut() -> Result<Message, String>,
    mut observe: impl FnMut(Progress),
) -> (FillSummary, Result<(), ErrorKind>, Option<Remainder<M>>) {
    let mut summary = FillSummary::default();
    let mut engine = Some(FillEngine::new(remainder, config, Time::ZERO));
    let session = drive(&mut engine, route, stop, &mut filled, &mut observe, &mut summary);
    let result = block_on(session).map_err(local("runtime")).unwrap_or_else(Err);
    let left = engine.and_then(FillEngine::into_remainder);
    (summary, result, left)
}

async fn drive<M: GuestMemory>(
    place: &mut Option<FillEngine<M>>,
    route: Route,
    stop: &Stop,
    filled: &mut impl FnMut() -> Result<Message, String>,
    observe: &mut impl FnMut(Progress),
    summary: &mut FillSummary,
) -> Result<(), ErrorKind> {
    let start = Instant::now();
    let (address, control) = match route {
        Route::Connect(address) => (Some(address.clone()), connect(&address)?),
        Route::Over(socket) => (None, socket),
    };
    let stream = control.into_stream().map_err(local("control connection"))?;
    let Some(engine) = place.take() else { return Err(ErrorKind::Cancelled) };
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
            (Some(FillEvent::Accepted { lanes }), Some(address)) => {
                // What the guest waits for first of all.
                let mut lanes = std::iter::once(LaneId::URGENT).chain((0..lanes).map(LaneId::bulk));
                let joined = lanes.try_for_each(|lane| join(&mut pump, address, lane));
                joined.unwrap_or_else(|kind| pump.machine().cancel(kind));
            }
            (Some(FillEvent::Accepted { .. }), None) => {}
            (Some(FillEvent::Filled), _) => match filled() {
                Ok(gone) => pump.machine().release(gone),
                Err(why) => pump.machine().cancel(ErrorKind::Handover(why)),
            },
            (None, _) => break pump.machine().outcome(),
        }
    };
    observe(progress(&mut pump));
    summary.wire = pump.wire();
    summary.spent = pump.now().since(Time::ZERO);
    summary.counts = pump.machine().counts();
    summary.decisions = pump.machine().decisions().to_vec();
    *place = Some(pump.into_machine());
    result.unwrap_or_else(|| Err(PeerError::EndOfStream { lane: 0 }.into()))
}

fn join<M: GuestMemory>(pump: &mut Pump<FillEngine<M>>, address: &Address, lane: LaneId) -> Result<(), ErrorKind> {
    let stream = connect(address)?.into_stream().map_err(local("lane"))?;
    if let Some(frame) = pump.machine().join(lane) {
        pump.attach(lane, stream, frame);
    }
    Ok(())
}

fn progress<M: GuestMemory>(pump: &mut Pump<FillEngine<M>>) -> Progress {
    let (pages, pages_total) = pump.machine().progress();
    Progress { pages, pages_total, wire: pump.wire() }
}
