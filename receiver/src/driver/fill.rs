//! One session that fills a guest which runs here, under tokio.

use super::{Entropy, GuestTaker, Parking, Refusal, busy, registered};
use crate::error::ErrorKind;
use crate::fill::{FillEngine, FillEvent, FillTerms, Incomplete};
use crate::memory::{FaultTimes, GuestSink};
use crate::report::FillCounts;
use pagewire_protocol::error::{CloseCode, PeerError};
use pagewire_protocol::frame::{Fill, Open};
use pagewire_protocol::handover::{Handover, Word};
use pagewire_protocol::page::Place;
use pagewire_protocol::session::Machine;
use pagewire_protocol::time::{Span, Time};
use pagewire_protocol::tree::Manifest;
use pagewire_transport::{CancellationToken, Joining, PROGRESS_EVERY, Progress, Pump, Registration, Sessions, Wire};
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
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
    /// Bytes on the wire, of the last session.
    pub wire: Wire,
    /// How long that took.
    pub spent: Span,
    /// Once it has all: how it was offered, what its image was when it came, and what of it was touched first.
    pub whole: Option<Box<(Open, Manifest, Vec<Place>)>>,
}

impl FillSummary {
    fn of<S: GuestSink>(guest: &Incomplete<S>) -> Self {
        let (counts, lacking, layout) = (guest.counts(), guest.pages(), guest.layout());
        let (times, size) = (guest.sink.fault_times(), (layout.bytes(), layout.pages()));
        Self { handover: Some(*guest.handover()), counts, times, lacking, size, ..Self::default() }
    }
}

/// Fills a guest until it has all, or the session breaks; then it is parked.
pub(super) async fn fill<S: GuestSink>(
    mut pump: Pump<FillEngine<S>>,
    (sessions, parking, cancel): (&Sessions, Option<&Arc<Parking<S>>>, &CancellationToken),
    mut taker: Option<&mut (dyn GuestTaker + '_)>,
    (lanes, entropy): (u8, Entropy),
    observe: &mut impl FnMut(Progress),
) -> (FillSummary, Result<(), ErrorKind>) {
    let mut superseded = pin!(CancellationToken::new().cancelled_owned());
    let mut cancelled = pin!(cancel.cancelled());
    let mut ready: Option<AsyncFd<OwnedFd>> = None;
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    let (mut stopped, mut registered_as): (bool, Option<Registration>) = (false, None);
    let result = loop {
        let event = tokio::select! {
            biased;
            () = touched(ready.as_ref()) => {
                gather(&mut pump);
                continue;
            }
            () = &mut cancelled, if !stopped => {
                stopped = true;
                pump.machine().cancel();
                continue;
            }
            () = &mut superseded, if !stopped => {
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
            // Whoever asked is gone: the session that has the guest goes on.
            Some(FillEvent::Asked(_)) if pump.machine().is_over() => {}
            Some(FillEvent::Asked(asked)) => match admit(&asked, sessions, parking).await {
                Ok(Admitted { guest, session, joins, registration }) => {
                    superseded.set(session.cancelled_owned());
                    registered_as = Some(registration);
                    pump.take_joins(joins);
                    let asked = (&asked.handover, guest.open());
                    let terms = terms(taker.as_deref_mut(), asked, lanes, entropy);
                    ready = accept(&mut pump, guest, terms);
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
                if let (Some(guest), Some(taker)) = (pump.machine().guest(), taker.as_mut()) {
                    taker.touched(guest.handover(), guest.first_touches());
                }
            }
            None => break pump.machine().outcome(),
        }
    };
    drop(registered_as);
    observe(progress(&mut pump));
    end(pump, parking, result)
}

/// What a session that is over did. A guest that its sender has let go of is nobody's concern here any more; any other is
/// parked.
fn end<S: GuestSink>(
    mut pump: Pump<FillEngine<S>>,
    parking: Option<&Arc<Parking<S>>>,
    result: Option<Result<(), ErrorKind>>,
) -> (FillSummary, Result<(), ErrorKind>) {
    let (wire, spent) = (pump.wire(), pump.now().since(Time::ZERO));
    let mut summary = pump.machine().guest().map(FillSummary::of).unwrap_or_default();
    match (pump.into_machine().into_incomplete(), parking, &result) {
        (Some(guest), Some(parking), Some(Ok(()))) => {
            parking.leave(guest.handover());
            let touches = guest.first_touches().to_vec();
            summary.whole = guest.into_manifest().map(|(open, manifest)| Box::new((open, manifest, touches)));
        }
        (Some(guest), Some(parking), _) => parking.park(guest),
        _ => {}
    }
    let summary = FillSummary { wire, spent, ..summary };
    (summary, result.unwrap_or_else(|| Err(PeerError::EndOfStream { lane: 0 }.into())))
}

/// A guest that is to be filled, and the session that does.
struct Admitted<S> {
    guest: Incomplete<S>,
    /// Cancelled when another session wants the guest.
    session: CancellationToken,
    joins: tokio::sync::mpsc::Receiver<Joining>,
    registration: Registration,
}

/// Finds the guest that is asked for.
async fn admit<S: GuestSink>(
    asked: &Fill,
    sessions: &Sessions,
    parking: Option<&Arc<Parking<S>>>,
) -> Result<Admitted<S>, Refusal> {
    let Some(parking) = parking else {
        let reason = "no guest that lacks pages can be here".to_owned();
        return Err(Refusal { code: CloseCode::REFUSED, reason });
    };
    let (registration, joins) = sessions.register(asked.session).ok_or_else(busy)?;
    let (guest, session) = parking.take(&asked.handover).await?;
    Ok(Admitted { guest, session, joins, registration })
}

/// On which terms a guest is filled that was found; who takes guests over here is told of it.
fn terms(
    taker: Option<&mut (dyn GuestTaker + '_)>,
    (handover, open): (&Handover, &Open),
    lanes: u8,
    entropy: Entropy,
) -> FillTerms {
    let ahead = taker.map(|taker| {
        taker.fills(handover);
        taker.expects(handover, open)
    });
    FillTerms { lanes, window: FILL_WINDOW, secret: entropy.secret, ahead: ahead.unwrap_or_default() }
}

/// Goes on with a guest; what becomes readable when it touches what is absent.
fn accept<S: GuestSink>(
    pump: &mut Pump<FillEngine<S>>,
    mut guest: Incomplete<S>,
    terms: FillTerms,
) -> Option<AsyncFd<OwnedFd>> {
    guest.sink().renew_touches();
    let fd = guest.sink().touches().and_then(|fd| fd.try_clone_to_owned().ok());
    let now = pump.now();
    pump.machine().accept(guest, terms, now);
    gather(pump);
    fd.and_then(|fd| registered(fd).ok())
}

/// Waits until somebody touches a page that is absent.
async fn touched(ready: Option<&AsyncFd<OwnedFd>>) {
    poll_fn(|cx| match ready.map(|ready| ready.poll_read_ready(cx)) {
        Some(Poll::Ready(guard)) => {
            guard.into_iter().for_each(|mut guard| guard.clear_ready());
            Poll::Ready(())
        }
        Some(Poll::Pending) | None => Poll::Pending,
    })
    .await;
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
