//! Two hosts, one guest, and all that can go wrong between them: the model that the checker walks through.
//!
//! Both hosts run `pagewire_protocol::handover`, not a copy of it. Letters are never used up and come in any order, so
//! each may be lost, late, repeated or from another age; a loss is a letter that nobody delivers. A whole session is one
//! letter, too, and so can be replayed. Disks write in order; a crash keeps any beginning of what was under way.
//!
//! The guest is a number that grows each time it is let run: a copy with another number is out of date.

use crate::fill;
use crate::mutants::Mutant;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::handover::{
    Epoch, Fence, Grant, Handover, Handovers, HostId, Input, Message, Output, ReceiverPhase, Record, RecordKind,
    Resolve, SenderPhase, Whereabouts, Word,
};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) const LINEAGE: LineageId = LineageId([1; 16]);
pub(crate) const IDS: [HostId; 2] = [HostId([1; 32]), HostId([2; 32])];
pub(crate) const STRANGER: HostId = HostId([3; 32]);

/// The bounds of one walk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) name: &'static str,
    /// Guests live in files and survive a crash of their host.
    pub(crate) kept: bool,
    /// Crashes of each host.
    pub(crate) crashes: u8,
    /// Writes that fail, of each host.
    pub(crate) fails: u8,
    /// Hand-overs that begin.
    pub(crate) offers: u8,
    pub(crate) arbiter: bool,
    /// The guest starts with pages absent.
    pub(crate) post_copy: bool,
    pub(crate) operator: bool,
    /// Messages that differ in one field from what they should be.
    pub(crate) strays: bool,
}

pub(crate) const CALM: Config = Config {
    name: "file",
    kept: true,
    crashes: 1,
    fails: 0,
    offers: 1,
    arbiter: false,
    post_copy: false,
    operator: false,
    strays: false,
};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Letter {
    /// A session that brings all of the guest.
    Session(Handover),
    Message(Message),
    /// The arbiter's, to the host of this number.
    Grant(usize, Grant),
    /// The receiver's in a fill session: nothing is absent.
    Done(Handover),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Host {
    /// `None` while it is down.
    pub(crate) desk: Option<Handovers>,
    pub(crate) disk: BTreeSet<Record>,
    pub(crate) writing: Vec<Record>,
    pub(crate) runs: bool,
    /// The copy of the guest that is here.
    pub(crate) memory: Option<u8>,
    /// What brought that copy, if it has not been started.
    pub(crate) received: Option<Handover>,
    /// Parts of that copy that are absent.
    pub(crate) lacks: u8,
    /// What this host has been told to serve.
    pub(crate) serves: Option<Handover>,
    pub(crate) fenced: bool,
    pub(crate) crashes: u8,
    pub(crate) fails: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) hosts: [Host; 2],
    pub(crate) letters: BTreeSet<Letter>,
    pub(crate) asked: BTreeSet<(usize, Handover)>,
    pub(crate) granted: BTreeMap<Epoch, HostId>,
    pub(crate) offers: u8,
    /// How often the guest was let run.
    pub(crate) guest: u8,
    pub(crate) last_runner: usize,
    pub(crate) told_doubt: bool,
    /// A COMMIT that was about nothing has been answered.
    pub(crate) strayed: bool,
    /// An operator has had a copy run that the guest may have outrun before its host was lost, or has given it up.
    pub(crate) vouched: bool,
    /// A sender went down while its receiver had some of what was absent and lacked the rest.
    pub(crate) cut: bool,
    /// What must never happen, and has.
    pub(crate) wrong: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Offer(usize),
    Deliver(Letter),
    Connect,
    Input(usize, Input),
    Written(usize),
    /// The write fails, and the record is on the disk all the same, or is not.
    WriteFails(usize, bool),
    /// This much of what was under way reaches the disk.
    Crash(usize, usize),
    Restart(usize),
    Fence(usize),
    Decide(usize, Handover),
    /// A fill session by this host.
    Fill(usize),
    Stray(usize, HostId, Message),
}

pub(crate) struct World {
    pub(crate) config: Config,
    pub(crate) mutant: Option<Mutant>,
}

impl Host {
    pub(crate) fn outgoing(&self) -> Option<(SenderPhase, Handover)> {
        let sender = self.desk.as_ref()?.outgoing()?;
        Some((sender.phase(), *sender.handover()))
    }

    pub(crate) fn incoming(&self) -> Option<(ReceiverPhase, Handover)> {
        let receiver = self.desk.as_ref()?.incoming()?;
        Some((receiver.phase(), *receiver.handover()))
    }

    pub(crate) fn is_waiting(&self) -> bool {
        use ReceiverPhase as P;
        let receives = self.incoming().is_some_and(|(phase, _)| matches!(phase, P::Ready | P::Asking));
        self.outgoing().is_some() || receives
    }

    pub(crate) fn wrote(&self, kind: RecordKind, handover: &Handover) -> bool {
        self.disk.contains(&Record { kind, handover: *handover })
    }

    pub(crate) fn drop_memory(&mut self) {
        (self.memory, self.lacks) = (None, 0);
    }

    fn put(&mut self, record: Record) {
        self.disk.retain(|other| other.handover != record.handover);
        self.disk.insert(record);
    }
}

fn root(guest: u8) -> Digest {
    Digest([guest; 32])
}

pub(crate) fn number(id: HostId) -> Option<usize> {
    IDS.iter().position(|known| *known == id)
}

impl World {
    pub(crate) fn first(&self) -> State {
        let mut hosts = [Host::default(), Host::default()];
        // The guest has been about for a while: there is an older hand-over for old messages to be of.
        let older = Handover { epoch: Epoch::new(4), ..self.binding(0, 0, Epoch::new(4), 9) };
        hosts[0].disk.insert(Record { kind: RecordKind::Returned, handover: older });
        hosts[0].runs = true;
        hosts[0].memory = Some(0);
        for (host, id) in hosts.iter_mut().zip(IDS) {
            let records: Vec<Record> = host.disk.iter().copied().collect();
            host.desk = Some(Handovers::restore(id, LINEAGE, &records, true).unwrap().0);
        }
        State {
            hosts,
            letters: BTreeSet::new(),
            asked: BTreeSet::new(),
            granted: BTreeMap::new(),
            offers: 0,
            guest: 0,
            last_runner: 0,
            told_doubt: false,
            strayed: false,
            vouched: false,
            cut: false,
            wrong: None,
        }
    }

    fn binding(&self, at: usize, session: u8, epoch: Epoch, guest: u8) -> Handover {
        let (sender, receiver) = (IDS[at], IDS[1 - at]);
        let session = [session; 16];
        let Config { arbiter, post_copy, .. } = self.config;
        Handover { lineage: LINEAGE, session, epoch, root: root(guest), sender, receiver, arbiter, post_copy }
    }

    /// A session freezes the guest and states all of it.
    fn offer(&self, state: &mut State, at: usize) {
        let session = [state.offers + 1; 16];
        let Some(desk) = self.desk_for_offer(&mut state.hosts[at]) else { return };
        let Ok(epoch) = desk.open(session) else { return };
        let handover = self.binding(at, state.offers + 1, epoch, state.guest);
        if desk.send(handover).is_err() {
            return;
        }
        state.offers += 1;
        state.hosts[at].runs = false;
        state.letters.insert(Letter::Session(handover));
    }

    fn desk_for_offer<'a>(&self, host: &'a mut Host) -> Option<&'a mut Handovers> {
        if self.mutant == Some(Mutant::SecondSessionAllowed) {
            // It looks at no record and at no hand-over that is open.
            let id = if host.disk.iter().any(|record| record.handover.receiver == IDS[0]) { IDS[1] } else { IDS[0] };
            host.desk = Some(Handovers::restore(id, LINEAGE, &[], true).unwrap().0);
        }
        host.desk.as_mut()
    }

    /// An input to a host that is up, and what follows from it.
    pub(crate) fn feed(&self, state: &mut State, at: usize, input: Input) {
        let Some(mut desk) = state.hosts[at].desk.take() else { return };
        let outputs = self.step(&mut desk, input);
        state.hosts[at].desk = Some(desk);
        outputs.into_iter().for_each(|output| self.apply(state, at, output));
    }

    /// The code under test, as the mutant bends it.
    pub(crate) fn step(&self, desk: &mut Handovers, input: Input) -> Vec<Output> {
        match self.mutant {
            Some(mutant) => mutant.step(desk, input),
            None => desk.handle(input),
        }
    }

    fn apply(&self, state: &mut State, at: usize, output: Output) {
        match output {
            Output::Persist(record) => {
                if record.kind == RecordKind::Rejected && state.hosts[at].received == Some(record.handover) {
                    state.hosts[at].drop_memory();
                    state.hosts[at].received = None;
                }
                state.hosts[at].writing.push(record);
            }
            Output::Forget(handover) => state.hosts[at].disk.retain(|record| record.handover != handover),
            Output::Send(message) => {
                state.letters.insert(Letter::Message(message));
            }
            Output::Run(_) | Output::Resume(_) => start(state, at),
            Output::Fill(handover) => state.hosts[at].serves = Some(handover),
            Output::Release(_) => fill::release(state, at),
            Output::AskArbiter(handover) => {
                state.asked.insert((at, handover));
            }
            Output::InDoubt(_) => state.told_doubt = true,
            Output::Verified(_) | Output::Refuse(_) => {}
        }
    }

    pub(crate) fn deliver(&self, state: &mut State, letter: &Letter) {
        match *letter {
            Letter::Session(handover) => self.receive(state, handover),
            Letter::Message(message) => {
                let Handover { sender, receiver, .. } = message.handover;
                let (from, to) = if message.word.is_senders() { (sender, receiver) } else { (receiver, sender) };
                if let Some(to) = number(to) {
                    self.feed(state, to, Input::Message { from, message });
                }
            }
            Letter::Grant(to, grant) => self.feed(state, to, Input::Granted(grant)),
            Letter::Done(handover) => fill::done(self, state, handover),
        }
    }

    /// The receiver of a letter, if it is up.
    fn is_deliverable(state: &State, letter: &Letter) -> bool {
        let to = match letter {
            Letter::Session(handover) => number(handover.receiver),
            Letter::Message(Message { word, handover }) if word.is_senders() => number(handover.receiver),
            Letter::Message(message) => number(message.handover.sender),
            Letter::Grant(to, _) => Some(*to),
            Letter::Done(handover) => number(handover.sender),
        };
        to.is_some_and(|to| state.hosts[to].desk.is_some())
    }

    fn receive(&self, state: &mut State, handover: Handover) {
        let Some(at) = number(handover.receiver) else { return };
        let Some(mut desk) = state.hosts[at].desk.take() else { return };
        let begins = desk.guest_at(&handover).is_none() && desk.may_begin(handover.epoch).is_ok();
        if begins {
            let host = &mut state.hosts[at];
            (host.memory, host.received) = (Some(handover.root.0[0]), Some(handover));
            host.lacks = if handover.post_copy { fill::PARTS } else { 0 };
        }
        let outputs = match self.mutant {
            Some(Mutant::OldEpochReceived) if !state.hosts[at].runs => {
                desk = Handovers::restore(IDS[at], LINEAGE, &[], true).unwrap().0;
                state.hosts[at].memory = Some(handover.root.0[0]);
                desk.receive(handover.sender, handover)
            }
            _ => desk.receive(handover.sender, handover),
        };
        if begins && desk.guest_at(&handover).is_none() {
            // It was rejected without a record: what came goes with its session.
            state.hosts[at].drop_memory();
            state.hosts[at].received = None;
        }
        state.hosts[at].desk = Some(desk);
        outputs.into_iter().for_each(|output| self.apply(state, at, output));
    }

    pub(crate) fn written(&self, state: &mut State, at: usize) {
        if state.hosts[at].writing.is_empty() || state.hosts[at].desk.is_none() {
            return;
        }
        let record = state.hosts[at].writing.remove(0);
        if !self.mutant.is_some_and(|mutant| mutant.skips_write(at, &record)) {
            state.hosts[at].put(record);
        }
        self.feed(state, at, Input::Durable(record));
    }

    fn write_fails(&self, state: &mut State, at: usize, reaches_disk: bool) {
        let host = &mut state.hosts[at];
        let record = host.writing.remove(0);
        host.fails += 1;
        if reaches_disk {
            host.put(record);
        }
        self.feed(state, at, Input::Failed(record));
    }

    fn crash(&self, state: &mut State, at: usize, reaching_disk: usize) {
        state.cut |= state.hosts[at].serves.is_some() && (1..fill::PARTS).contains(&state.hosts[1 - at].lacks);
        let host = &mut state.hosts[at];
        let writing = std::mem::take(&mut host.writing);
        writing.into_iter().take(reaching_disk).for_each(|record| host.put(record));
        (host.desk, host.runs, host.received, host.serves) = (None, false, None, None);
        host.crashes += 1;
        if !self.config.kept {
            host.drop_memory();
        }
    }

    pub(crate) fn restart(&self, state: &mut State, at: usize) {
        let host = &mut state.hosts[at];
        let records: Vec<Record> = host.disk.iter().copied().collect();
        let kept = host.memory.is_some() || self.mutant == Some(Mutant::LostSaysStarted);
        let (mut desk, outputs) = Handovers::restore(IDS[at], LINEAGE, &records, kept).unwrap();
        if self.mutant == Some(Mutant::LackingSaysStarted) {
            records.iter().for_each(|record| desk.keep(&record.handover));
        }
        // Nothing is recorded on the host where the guest was born, and on one that it has never come to.
        let is_here = match desk.whereabouts() {
            Whereabouts::Filling => true,
            Whereabouts::Here => self.mutant != Some(Mutant::StartedDoesNotRunAfterRestart) || at == 0,
            Whereabouts::InDoubt => self.mutant == Some(Mutant::HandedRunsAfterRestart),
            Whereabouts::Unrecorded => at == 0,
            _ => false,
        };
        // A copy that was on its way in is not the guest. What is lost may still lie in a file.
        if !is_here && !matches!(desk.whereabouts(), Whereabouts::InDoubt | Whereabouts::Lost) {
            host.drop_memory();
        }
        let has_memory = host.memory.is_some();
        let lacks = host.lacks > 0;
        host.desk = Some(desk);
        outputs.into_iter().for_each(|output| self.apply(state, at, output));
        if is_here && has_memory {
            if lacks {
                state.wrong.get_or_insert("a guest is let run on pages that nobody brings");
            }
            start(state, at);
        }
    }

    pub(crate) fn decide(&self, state: &mut State, at: usize, handover: Handover) {
        state.asked.remove(&(at, handover));
        let first = *state.granted.entry(handover.epoch).or_insert(IDS[at]);
        let host = if self.mutant == Some(Mutant::ArbiterGrantsTwice) { IDS[at] } else { first };
        let grant = Grant { lineage: LINEAGE, epoch: handover.epoch, host };
        state.letters.insert(Letter::Grant(at, grant));
    }

    pub(crate) fn act(&self, state: &mut State, action: Action) {
        match action {
            Action::Offer(at) => self.offer(state, at),
            Action::Deliver(letter) => self.deliver(state, &letter),
            Action::Connect => (0..2).for_each(|at| self.feed(state, at, Input::Connected(IDS[1 - at]))),
            Action::Input(at, input) => {
                if let Input::Resolve(resolve) = input {
                    let was_lost = state.hosts[at].incoming().is_some_and(|(phase, _)| phase == ReceiverPhase::Lost);
                    let phase_there = state.hosts[1 - at].incoming().map(|(phase, _)| phase);
                    state.vouched |=
                        was_lost || phase_there == Some(ReceiverPhase::Lost) || matches!(resolve, Resolve::Here(_));
                    if was_lost {
                        state.hosts[at].drop_memory();
                    }
                }
                self.feed(state, at, input);
            }
            Action::Written(at) => self.written(state, at),
            Action::WriteFails(at, reaches_disk) => self.write_fails(state, at, reaches_disk),
            Action::Crash(at, reaching_disk) => self.crash(state, at, reaching_disk),
            Action::Restart(at) => self.restart(state, at),
            Action::Fence(at) => state.hosts[at].fenced = true,
            Action::Fill(at) => fill::fill(state, at),
            Action::Decide(at, handover) => self.decide(state, at, handover),
            Action::Stray(at, from, message) => {
                let letters = state.letters.len();
                let writing = state.hosts.each_ref().map(|host| host.writing.len());
                self.feed(state, at, Input::Message { from, message });
                // One that was refused has changed nothing.
                state.strayed |= message.word == Word::Commit
                    && (state.letters.len(), state.hosts.each_ref().map(|host| host.writing.len()))
                        != (letters, writing);
            }
        }
    }

    pub(crate) fn actions_of(&self, state: &State, actions: &mut Vec<Action>) {
        let deliverable = state.letters.iter().filter(|letter| Self::is_deliverable(state, letter));
        actions.extend(deliverable.cloned().map(Action::Deliver));
        actions.extend(state.asked.iter().map(|&(at, handover)| Action::Decide(at, handover)));
        if state.hosts.iter().all(|host| host.desk.is_some()) {
            actions.push(Action::Connect);
        }
        for at in 0..2 {
            self.actions_at(state, at, actions);
            if self.config.operator {
                self.operators_actions(state, at, actions);
            }
            if self.config.strays && state.hosts[at].desk.is_some() {
                strays(state, at, actions);
                fill::strays(state, at, actions);
            }
        }
    }

    fn actions_at(&self, state: &State, at: usize, actions: &mut Vec<Action>) {
        let host = &state.hosts[at];
        if host.desk.is_none() {
            if !host.fenced {
                actions.push(Action::Restart(at));
            }
            return;
        }
        let may_offer = host.runs || (self.mutant == Some(Mutant::SecondSessionAllowed) && host.memory.is_some());
        if may_offer && state.offers < self.config.offers {
            actions.push(Action::Offer(at));
        }
        if host.crashes < self.config.crashes {
            actions.extend((0..=host.writing.len()).map(|reaching| Action::Crash(at, reaching)));
        }
        if !host.writing.is_empty() {
            actions.push(Action::Written(at));
            if host.fails < self.config.fails {
                actions.extend([true, false].map(|reaches_disk| Action::WriteFails(at, reaches_disk)));
            }
        }
        if fill::session(state, at).is_some() {
            actions.push(Action::Fill(at));
        }
        if host.outgoing().is_some_and(|(phase, _)| phase == SenderPhase::Ready) {
            actions.push(Action::Input(at, Input::Commit));
        }
        if host.is_waiting() || self.mutant == Some(Mutant::RejectAfterStarted) {
            actions.extend([Input::Cancel, Input::Timeout].map(|input| Action::Input(at, input)));
        }
    }

    /// An operator fences off a host that is down, and ends the doubt at the other one.
    fn operators_actions(&self, state: &State, at: usize, actions: &mut Vec<Action>) {
        let (host, other) = (&state.hosts[at], &state.hosts[1 - at]);
        let fenced = other.fenced || self.mutant == Some(Mutant::ResolvedWithoutFence);
        let sends = host.outgoing().map(|(_, handover)| handover);
        let receives = host.incoming().map(|(_, handover)| handover);
        let mut resolve = |resolve| actions.push(Action::Input(at, Input::Resolve(resolve)));
        for handover in sends.into_iter().chain(receives).filter(|_| fenced) {
            resolve(Resolve::Here(Fence { epoch: handover.epoch, host: IDS[1 - at] }));
        }
        // That it is the other's an operator says who has seen it run there, or has seen that it is lost here.
        let lacks_nothing = other.runs && other.lacks == 0;
        let is_lost = other.incoming().is_some_and(|(phase, _)| phase == ReceiverPhase::Lost);
        let needs_nothing = |handover: &Handover| lacks_nothing || (handover.post_copy && is_lost);
        let is_there = |handover: &Handover| needs_nothing(handover) && other.wrote(RecordKind::Started, handover);
        if let Some(handover) = sends.filter(is_there) {
            resolve(Resolve::There(handover.epoch));
        }
        if let Some((ReceiverPhase::Lost, handover)) = host.incoming() {
            resolve(Resolve::There(handover.epoch));
        }
        if host.desk.is_none() && !host.fenced && !other.fenced {
            actions.push(Action::Fence(at));
        }
    }
}

/// The guest is let run, if there is a copy of it.
fn start(state: &mut State, at: usize) {
    let host = &mut state.hosts[at];
    let Some(copy) = host.memory.filter(|_| !host.runs) else { return };
    if state.hosts[1 - at].runs {
        state.wrong.get_or_insert("two hosts run the guest");
    }
    if copy != state.guest && !state.vouched {
        state.wrong.get_or_insert("the guest goes back in time");
    }
    state.guest += 1;
    state.last_runner = at;
    let host = &mut state.hosts[at];
    (host.runs, host.memory, host.received) = (true, Some(state.guest), None);
}

/// Messages to `at` that are right but for one field, or for who says them. Of the COMMITs among them one comes a walk:
/// each is an unknown hand-over of its own, with a record.
fn strays(state: &State, at: usize, actions: &mut Vec<Action>) {
    for letter in &state.letters {
        let Letter::Session(handover) = letter else { continue };
        let words = if handover.sender == IDS[at] {
            &[Word::Ready, Word::Started, Word::Reject][..]
        } else {
            &[Word::Gone, Word::Commit][..]
        };
        for &word in words.iter().filter(|word| **word != Word::Commit || !state.strayed) {
            // Each field doubles what is on its way: the bit of post-copy is bent where it is set.
            let is_bent = |other: &Handover| handover.post_copy || !other.post_copy;
            let altered = altered(handover).into_iter().filter(is_bent).map(|handover| (IDS[1 - at], handover));
            for (from, handover) in altered.chain([(STRANGER, *handover)]) {
                actions.push(Action::Stray(at, from, Message { word, handover }));
            }
        }
    }
}

/// A binding with each field in turn that of another hand-over.
pub(crate) fn altered(handover: &Handover) -> [Handover; 8] {
    let older = Epoch::new(handover.epoch.number() - 1);
    [
        Handover { lineage: LineageId([9; 16]), ..*handover },
        Handover { session: [9; 16], ..*handover },
        Handover { epoch: older, ..*handover },
        Handover { root: root(99), ..*handover },
        Handover { sender: STRANGER, ..*handover },
        Handover { receiver: STRANGER, ..*handover },
        Handover { arbiter: !handover.arbiter, ..*handover },
        Handover { post_copy: !handover.post_copy, ..*handover },
    ]
}
