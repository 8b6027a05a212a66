//! What a state comes to when nothing goes wrong any more: every walk ends, and its end has a name.
//!
//! Hosts come back, connections stand, disks write, whoever waits loses patience. Twice: with all old letters lost, and
//! with all of them delivered first. A host that is fenced off stays off.

use crate::fill;
use crate::world::{Action, Host, Letter, State, World};
use pagewire_protocol::handover::{Input, ReceiverPhase, SenderPhase, Whereabouts};

/// How a hand-over ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// One host runs the guest, and nothing is open.
    Runs,
    /// Its memory went in a crash, and no copy is as new. It may run still, until it touches what is absent.
    Lost,
    /// Frozen in doubt or ready to start, until an operator says what has become of the other host.
    NeedsOperator,
}

/// More rounds than any state needs.
const ROUNDS: usize = 12;

pub(crate) fn end(world: &World, state: &State) -> Result<End, &'static str> {
    // A mutant that went wrong has been caught already.
    if state.wrong.is_some() {
        return Ok(End::Runs);
    }
    let mut lost = state.clone();
    lost.letters.clear();
    let ends = [settle(world, state.clone()), settle(world, lost)];
    ends.into_iter().map(|state| name(world, &state)).collect::<Result<Vec<_>, _>>().map(|ends| ends[0])
}

fn settle(world: &World, mut state: State) -> State {
    deliver_all(world, &mut state);
    for round in 0..ROUNDS {
        let before = state.hosts.clone();
        for at in 0..2 {
            if state.hosts[at].desk.is_none() && !state.hosts[at].fenced {
                world.restart(&mut state, at);
            }
        }
        deliver_all(world, &mut state);
        if state.hosts.iter().all(|host| host.desk.is_some()) {
            world.act(&mut state, Action::Connect);
        }
        deliver_all(world, &mut state);
        for at in 0..2 {
            // Whoever waits for a host that is gone for good waits for an operator.
            if round > 0 && state.hosts[at].is_waiting() && !state.hosts[1 - at].fenced {
                world.feed(&mut state, at, Input::Timeout);
                deliver_all(world, &mut state);
            }
        }
        if round > 1 && state.hosts == before {
            break;
        }
    }
    state
}

/// Writes, decides and delivers until there is nothing new. What is said twice is heard once.
fn deliver_all(world: &World, state: &mut State) {
    for _ in 0..ROUNDS {
        for at in 0..2 {
            while !state.hosts[at].writing.is_empty() && state.hosts[at].desk.is_some() {
                world.written(state, at);
            }
            if state.hosts[at].outgoing().is_some_and(|(phase, _)| phase == SenderPhase::Ready) {
                world.feed(state, at, Input::Commit);
            }
        }
        while let Some((at, handover)) = state.asked.first().copied() {
            world.decide(state, at, handover);
        }
        for at in 0..2 {
            // As many sessions as bring everything, and one more that only says so.
            (0..=fill::PARTS).for_each(|_| fill::fill(state, at));
        }
        let letters: Vec<Letter> = std::mem::take(&mut state.letters).into_iter().collect();
        letters.iter().for_each(|letter| world.deliver(state, letter));
        if letters.is_empty() && state.hosts.iter().all(|host| host.writing.is_empty() || host.desk.is_none()) {
            return;
        }
    }
}

fn name(world: &World, state: &State) -> Result<End, &'static str> {
    let whereabouts = |host: &Host| host.desk.as_ref().map(|desk| desk.whereabouts());
    let phase = |host: &Host| host.incoming().map(|(phase, _)| phase);
    let fenced = state.hosts.iter().any(|host| host.fenced);
    let lost_here = state.hosts.iter().any(|host| whereabouts(host) == Some(Whereabouts::Lost));
    if let Some(at) = (0..2).find(|&at| state.hosts[at].runs) {
        let other = &state.hosts[1 - at];
        let serves = other.outgoing().is_some_and(|(phase, _)| phase == SenderPhase::Serving);
        // What is absent went with its host, or with that host's memory.
        if (state.hosts[at].lacks > 0 && other.fenced) || (serves && other.memory.is_none() && !world.config.kept) {
            return Ok(End::Lost);
        }
        if state.hosts.iter().any(|host| host.outgoing().is_some() || host.is_waiting()) {
            return Err("the guest runs, and a hand-over is open");
        }
        if !fenced && phase(&state.hosts[at]) == Some(ReceiverPhase::Started) {
            return Err("the receiver has not heard GONE");
        }
        let starts_again = match whereabouts(&state.hosts[at]) {
            Some(Whereabouts::Here | Whereabouts::Unrecorded) => true,
            // It waits for the GONE of a host that is off.
            Some(Whereabouts::Filling) => fenced,
            _ => false,
        };
        return if starts_again { Ok(End::Runs) } else { Err("the guest runs where its host does not know it") };
    }
    let is_lost = |host: &Host| whereabouts(host) == Some(Whereabouts::Lost);
    let has_newest = |host: &Host| host.memory == Some(state.guest) && !host.fenced && !is_lost(host);
    let newest = |at: &usize| has_newest(&state.hosts[*at]);
    match (0..2).find(newest) {
        // Where it ran it was lost, and an older copy is frozen; or it is gone with the host that had it.
        None if fenced || lost_here || state.hosts.iter().any(|host| host.crashes > 0) => Ok(End::Lost),
        None => Err("the guest is lost without a crash"),
        Some(at) => {
            let waits = state.hosts[at].is_waiting();
            let on_whom = fenced || phase(&state.hosts[1 - at]) == Some(ReceiverPhase::Lost);
            if waits && on_whom { Ok(End::NeedsOperator) } else { Err("a whole guest, and nobody runs it") }
        }
    }
}
