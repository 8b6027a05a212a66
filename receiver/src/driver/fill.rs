//! One session that fills a guest which runs here, under tokio.

use super::{Entropy, GuestTaker, Parking, Refusal, registered};
use crate::error::ErrorKind;
use crate::fill::{FillEngine, FillEvent, FillTerms, Incomplete};
use crate::memory::{FaultTimes, GuestSink};
use crate::report::FillCounts;
use pagewire_protocol::error::{CloseCode, PeerError};
use pagewire_protocol::handover::{Handover, Word};
use pagewire_transport::{CancellationToken, PROGRESS_EVERY, Progress, Pump, Wire};
use std::future::pending;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::io::unix::AsyncFd;

/// Bytes under way on a bulk lane: what waits there in the network goes before what the guest waits for.
const FILL_WINDOW: u64 = 1 << 20;

/// What sessions that fill a guest did.
#[derive(Clone, Debug, Default)]
pub struct FillSummary {
    /// How it came here; `None` if no guest was named.
    pub handover: Option<Handover>,
    /// How its pages came, in all sessions so far.
    pub counts: FillCounts,
    /// How long it waited for those that it touched.
    pub times: Option<FaultTimes>,
    /// Pages that it lacks still.
    pub lacking: u64,
    /// All of its bytes and pages.
    pub size: (u64, u64),
    /// Bytes on the wire, in this session.
    pub wire: Wire,
}

impl FillSummary {
    fn of<S: GuestSink>(guest: &Incomplete<S>) -> Self {
        let (counts, lacking, layout) = (guest.counts(), guest.pages(), guest.layout());
        let (times, size) = (guest.sink.fault_times(), (layout.bytes(), layout.pages()));
        Self { handover: Some(*guest.handover()), counts, times, lacking, size, wire: Wire::default() }
    }
}

/// Fills a guest until it has all, or the session breaks; then it is parked.
pub(super) async fn fill<S: GuestSink>(
    mut pump: Pump<FillEngine<S>>,
    parking: &Arc<Parking<S>>,
    mut taker: Option<&mut (dyn GuestTaker + '_)>,
    (lanes, entropy, cancel): (u8, Entropy, &CancellationToken),
    observe: &mut impl FnMut(Progress),
) -> (FillSummary, Result<(), ErrorKind>) {
    let mut superseded = CancellationToken::new();
    let mut ready: Option<AsyncFd<OwnedFd>> = None;
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    let mut stopped = false;
    let result = loop {
        let event = tokio::select! {
            biased;
            () = touched(ready.as_ref()) => {
                gather(&mut pump);
                continue;
            }
            () = either(cancel, &superseded), if !stopped => {
                stopped = true;
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
            Some(FillEvent::Asked(asked)) => match parking.take(&asked.handover).await {
                Ok((mut guest, session)) => {
                    superseded = session;
                    guest.sink.renew_touches();
                    let fd = guest.sink.touches().and_then(|fd| fd.try_clone_to_owned().ok());
                    ready = fd.and_then(|fd| registered(fd).ok());
                    let terms = FillTerms { lanes, window: FILL_WINDOW, secret: entropy.secret, ahead: Vec::new() };
                    let now = pump.now();
                    pump.machine().accept(guest, terms, now);
                    gather(&mut pump);
                }
                Err(Refusal { code, reason }) => pump.machine().refuse(code, &reason),
            },
            Some(FillEvent::Said(message)) => {
                let ours = pump.machine().guest().is_some_and(|guest| *guest.handover() == message.handover);
                taker.iter_mut().for_each(|taker| drop(taker.hear(message)));
                if ours && message.word == Word::Gone {
                    pump.machine().release();
                }
            }
            Some(FillEvent::Filled) => {
                // Nobody waits any more, and the kernel tells nothing of memory that it does not watch.
                ready = None;
            }
            None => break pump.machine().outcome(),
        }
    };
    observe(progress(&mut pump));
    let wire = pump.wire();
    let summary = pump.machine().guest().map(FillSummary::of).unwrap_or_default();
    let summary = FillSummary { wire, ..summary };
    match (pump.into_machine().into_incomplete(), &result) {
        (Some(guest), Some(Ok(()))) => parking.leave(guest.handover()),
        (Some(guest), _) => parking.park(guest),
        (None, _) => {}
    }
    (summary, result.unwrap_or_else(|| Err(PeerError::EndOfStream { lane: 0 }.into())))
}

async fn either(one: &CancellationToken, other: &CancellationToken) {
    tokio::select! {
        () = one.cancelled() => {}
        () = other.cancelled() => {}
    }
}

/// Waits until somebody touches a page that is absent.
async fn touched(ready: Option<&AsyncFd<OwnedFd>>) {
    match ready {
        Some(ready) => ready.readable().await.into_iter().for_each(|mut guard| guard.clear_ready()),
        None => pending().await,
    }
}

fn gather<S: GuestSink>(pump: &mut Pump<FillEngine<S>>) {
    if let Err(source) = pump.machine().gather() {
        pump.machine().stop(ErrorKind::Destination { what: "what the guest touches cannot be had", source });
    }
}

fn progress<S: GuestSink>(pump: &mut Pump<FillEngine<S>>) -> Progress {
    let guest = pump.machine().guest();
    let (pages_total, lacking) = guest.map_or((0, 0), |guest| (guest.layout().pages(), guest.pages()));
    Progress { pages: pages_total.saturating_sub(lacking), pages_total, wire: pump.wire() }
}

/// Why no guest can be filled here.
pub(super) fn none_here() -> Refusal {
    Refusal { code: CloseCode::REFUSED, reason: "no guest that lacks pages can be here".to_owned() }
}
