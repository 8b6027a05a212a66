//! Guests that run here and lack pages, while no session fills them or one is about to.
//!
//! A guest is with the session that fills it, or parked. A new session for it ends the one that has it: whoever connects
//! again has given the old connection up. While it is parked, somebody looks at what it touches, so that threads which
//! throw memory away do not wait, and touches that no page is needed for are answered.

use super::{Refusal, registered};
use crate::fill::Incomplete;
use crate::memory::GuestSink;
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::error::CloseCode;
use pagewire_protocol::handover::Handover;
use pagewire_transport::{CancellationToken, block_on};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a session that is asked to let go of a guest may take.
const LET_GO: Duration = Duration::from_secs(5);
/// How often it is looked whether it has, and whether a parked guest was taken.
const LOOK_EVERY: Duration = Duration::from_millis(5);
const PARKED_LOOK: Duration = Duration::from_millis(250);

#[derive(Debug)]
struct Place<S> {
    handover: Handover,
    /// Gone while a session has it.
    guest: Option<Incomplete<S>>,
    /// Ends the session that has it.
    session: CancellationToken,
    /// Counts sessions: who looks after a parked guest ends when it is another's.
    turn: u64,
}

/// The guests of one server that lack pages.
#[derive(Debug)]
pub struct Parking<S> {
    places: Mutex<BTreeMap<LineageId, Place<S>>>,
}

impl<S> Default for Parking<S> {
    fn default() -> Self {
        Self { places: Mutex::default() }
    }
}

impl<S: GuestSink> Parking<S> {
    fn places(&self) -> MutexGuard<'_, BTreeMap<LineageId, Place<S>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no guest here lacks anything.
    pub fn is_empty(&self) -> bool {
        self.places().is_empty()
    }

    /// A guest lacks pages, and no session fills it for now. It is looked after until one does.
    pub fn park(self: &Arc<Self>, guest: Incomplete<S>) {
        let (handover, watch) = (*guest.handover(), guest.pages() > 0);
        let turn = {
            let mut places = self.places();
            let turn = places.get(&handover.lineage).map_or(0, |place| place.turn).saturating_add(1);
            let session = CancellationToken::new();
            places.insert(handover.lineage, Place { handover, guest: Some(guest), session, turn });
            turn
        };
        if watch {
            let parking = Arc::clone(self);
            let name = "pagewire-parked".to_owned();
            // Without a thread the guest is filled all the same when somebody comes.
            let _ = std::thread::Builder::new().name(name).spawn(move || parking.look_after(handover.lineage, turn));
        }
    }

    /// Answers what needs no page until the guest is taken.
    fn look_after(&self, lineage: LineageId, turn: u64) {
        let touches = || {
            let places = self.places();
            let guest = places.get(&lineage).filter(|place| place.turn == turn)?.guest.as_ref()?;
            Some(guest.sink.touches().and_then(|fd| fd.try_clone_to_owned().ok()))
        };
        let Some(fd) = touches() else { return };
        let _ = block_on(async {
            let ready = fd.and_then(|fd| registered(fd).ok());
            loop {
                match &ready {
                    Some(ready) => {
                        let readable = tokio::time::timeout(PARKED_LOOK, ready.readable()).await;
                        readable.into_iter().flatten().for_each(|mut guard| guard.clear_ready());
                    }
                    None => tokio::time::sleep(PARKED_LOOK).await,
                }
                let mut places = self.places();
                let place = places.get_mut(&lineage).filter(|place| place.turn == turn);
                let Some(guest) = place.and_then(|place| place.guest.as_mut()) else { return };
                // What is touched is asked for by the session that fills it next.
                if guest.sink().gather(&mut Vec::new()).is_err() {
                    return;
                }
            }
        });
    }

    /// Takes the guest of a hand-over, to fill it; the token is cancelled when another session wants it.
    ///
    /// # Errors
    /// No guest of this hand-over is here, or the session that has it does not let go.
    pub(super) async fn take(&self, handover: &Handover) -> Result<(Incomplete<S>, CancellationToken), Refusal> {
        let until = Instant::now() + LET_GO;
        loop {
            {
                let mut places = self.places();
                let place = places.get_mut(&handover.lineage).filter(|place| place.handover == *handover);
                let Some(place) = place else {
                    let reason =
                        "no guest of this hand-over is here that lacks pages: it was lost in a restart, or has all";
                    return Err(Refusal { code: CloseCode::REFUSED, reason: reason.to_owned() });
                };
                if let Some(guest) = place.guest.take() {
                    place.turn = place.turn.saturating_add(1);
                    place.session = CancellationToken::new();
                    return Ok((guest, place.session.clone()));
                }
                place.session.cancel();
            }
            if Instant::now() >= until {
                let reason = "the session that fills this guest does not let go of it".to_owned();
                return Err(Refusal { code: CloseCode::BUSY, reason });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The guest has all of its pages, and its sender knows.
    pub(super) fn leave(&self, handover: &Handover) {
        self.places().remove(&handover.lineage);
    }
}
