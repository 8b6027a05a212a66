//! Hand-overs that leave pages absent: what comes to the receiver after its guest runs, and what must still be at the
//! sender.
//!
//! A fill session brings one part of what is absent and is cut, or ends with DONE when nothing is. DONE is a letter, so
//! it may be lost, late or said twice, and there may be any number of sessions.

use crate::world::{Action, Host, IDS, Letter, State, World, altered, number};
use pagewire_protocol::handover::{Handover, Input, ReceiverPhase, SenderPhase, Whereabouts};

/// How many sessions it takes: with two there is a middle to be cut in.
pub(crate) const PARTS: u8 = 2;

/// The hand-over that host `at` can serve now, if its receiver lives and has started the guest by it.
pub(crate) fn session(state: &State, at: usize) -> Option<Handover> {
    let (sender, receiver) = (&state.hosts[at], &state.hosts[1 - at]);
    let handover = sender.serves.filter(|_| sender.memory.is_some())?;
    let (phase, started) = receiver.incoming()?;
    (started == handover && phase == ReceiverPhase::Started).then_some(handover)
}

/// One session.
pub(crate) fn fill(state: &mut State, at: usize) {
    let Some(handover) = session(state, at) else { return };
    if state.hosts[at].memory != Some(handover.root.0[0]) {
        state.wrong.get_or_insert("pages of another age are served");
    }
    let receiver = &mut state.hosts[1 - at];
    receiver.lacks = receiver.lacks.saturating_sub(1);
    if receiver.lacks == 0 {
        state.letters.insert(Letter::Done(handover));
    }
}

/// The sender hears DONE.
pub(crate) fn done(world: &World, state: &mut State, handover: Handover) {
    if let Some(at) = number(handover.sender) {
        world.feed(state, at, Input::Filled(handover));
    }
}

/// Host `at` gives its memory up, which must be nobody's need.
pub(crate) fn release(state: &mut State, at: usize) {
    let receiver = &state.hosts[1 - at];
    // A receiver that is down has lost what lacked pages.
    let is_lost = receiver.desk.as_ref().is_none_or(|desk| desk.whereabouts() == Whereabouts::Lost);
    let is_whole = receiver.lacks == 0 && receiver.memory == Some(state.guest);
    if state.hosts[at].memory == Some(state.guest) && !is_whole && !state.vouched {
        state.wrong.get_or_insert("the last copy was given up");
    } else if receiver.lacks > 0 && !is_lost {
        state.wrong.get_or_insert("pages were given up that the receiver lacks");
    }
    state.hosts[at].serves = None;
    state.hosts[at].drop_memory();
}

/// Words about a fill session that are not of this hand-over, or come before the receiver has said that it started.
pub(crate) fn strays(state: &State, at: usize, actions: &mut Vec<Action>) {
    for letter in &state.letters {
        let Letter::Session(handover) = letter else { continue };
        if handover.sender != IDS[at] || !handover.post_copy {
            continue;
        }
        actions.extend(altered(handover).map(|other| Action::Input(at, Input::Filled(other))));
        let serves = |(phase, _)| phase == SenderPhase::Serving;
        if !state.hosts[at].outgoing().is_some_and(serves) {
            actions.push(Action::Input(at, Input::Filled(*handover)));
        }
    }
}

/// Whether the memory that a host serves is there, and stands still.
pub(crate) fn is_kept(world: &World, host: &Host) -> bool {
    let serves = host.outgoing().is_some_and(|(phase, _)| phase == SenderPhase::Serving);
    !serves || (!host.runs && (host.memory.is_some() || !world.config.kept))
}

/// Whether a guest that runs with pages absent has somebody who has them, now or when that host is back.
pub(crate) fn is_backed(world: &World, state: &State, at: usize) -> bool {
    let (host, other) = (&state.hosts[at], &state.hosts[1 - at]);
    !host.runs || host.lacks == 0 || other.memory.is_some() || !world.config.kept
}
