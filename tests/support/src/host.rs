//! Two hosts of one guest: what each knows of its hand-overs, and whether it runs it.
//!
//! Records are durable as soon as they are asked for, and a host that crashes has nothing but these. What is said goes
//! where the caller brings it.

use pagewire_protocol::domain::LineageId;
use pagewire_protocol::frame::LiveOpen;
use pagewire_protocol::handover::{
    Epoch, Grant, Handover, Handovers, HostId, Input, Message, Output, Record, RecordKind, Whereabouts, Word,
};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// The guest of every world that has one.
pub const GUEST: LineageId = LineageId([5; 16]);

/// Who grants each epoch of the guest to one host, if hosts share one.
#[derive(Clone, Debug, Default)]
pub struct Lease(Arc<Mutex<LeaseState>>);

#[derive(Debug, Default)]
struct LeaseState {
    granted: BTreeMap<Epoch, HostId>,
    /// So many questions are not answered.
    outages: u64,
}

impl Lease {
    /// One that does not answer the first `outages` questions.
    pub fn failing(outages: u64) -> Self {
        Self(Arc::new(Mutex::new(LeaseState { outages, ..LeaseState::default() })))
    }

    /// From now on it answers.
    pub fn mend(&self) {
        self.0.lock().unwrap().outages = 0;
    }

    fn ask(&self, handover: &Handover, me: HostId) -> Option<Grant> {
        let mut state = self.0.lock().unwrap();
        if state.outages > 0 {
            state.outages -= 1;
            return None;
        }
        let host = *state.granted.entry(handover.epoch).or_insert(me);
        Some(Grant { lineage: handover.lineage, epoch: handover.epoch, host })
    }
}

/// A host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Who it is.
    pub id: HostId,
    /// What it knows.
    pub handovers: Handovers,
    /// Its disk.
    pub records: Vec<Record>,
    /// It has been told to run the guest, or to let it run again.
    pub told_to_run: u64,
    /// Where it crashes, if it gets there.
    pub dies_at: Option<Point>,
    /// It has crashed, and was not restarted.
    pub dead: bool,
    /// How often it was.
    pub restarts: u64,
    /// Whom it asks in doubt, and before it starts the guest.
    pub lease: Option<Lease>,
}

/// A point at which a host can crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// This record is to be written, and is not.
    Writing(RecordKind),
    /// This record is durable, and nothing has followed from it.
    Written(RecordKind),
    /// This word is to be said, and is not.
    Saying(Word),
}

/// What an engine has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Says this to the other host.
    Say(Message),
    /// Lets the guest run here.
    Run,
    /// Ends the session: the guest is gone.
    Release,
    /// The guest is gone, and its memory is kept for the pages that the other host lacks.
    Fill(Handover),
}

impl Host {
    /// A host that has never had the guest.
    pub fn new(number: u8) -> Self {
        let id = HostId([number; 32]);
        let (handovers, _) = Handovers::restore(id, GUEST, &[], true).unwrap();
        Self {
            id,
            handovers,
            records: Vec::new(),
            told_to_run: 0,
            dies_at: None,
            dead: false,
            restarts: 0,
            lease: None,
        }
    }

    /// The hand-over that the next session is to end with.
    ///
    /// # Panics
    /// The guest may not leave.
    pub fn open(&mut self, session: [u8; 16]) -> LiveOpen {
        let epoch = self.handovers.open(session).unwrap();
        LiveOpen { guest: GUEST, epoch, host: self.id, arbiter: self.lease.is_some(), post_copy: false }
    }

    /// All of the guest was stated.
    pub fn offer(&mut self, handover: Handover) {
        self.handovers.send(handover).unwrap();
    }

    /// All of the guest is here.
    pub fn ready(&mut self, handover: Handover) -> Vec<Action> {
        if self.dead {
            return Vec::new();
        }
        let outputs = self.handovers.receive(handover.sender, handover);
        self.carry_out(outputs)
    }

    /// What follows from an input.
    pub fn handle(&mut self, input: Input) -> Vec<Action> {
        if self.dead {
            return Vec::new();
        }
        let outputs = self.handovers.handle(input);
        self.carry_out(outputs)
    }

    /// The other host says something.
    pub fn hear(&mut self, from: HostId, message: Message) -> Vec<Action> {
        self.handle(Input::Message { from, message })
    }

    fn carry_out(&mut self, outputs: Vec<Output>) -> Vec<Action> {
        let mut actions = Vec::new();
        for output in outputs {
            match output {
                _ if self.dead => return actions,
                Output::Persist(record) => {
                    if self.dies(Point::Writing(record.kind)) {
                        return actions;
                    }
                    self.records.retain(|known| known.handover != record.handover);
                    self.records.push(record);
                    if self.dies(Point::Written(record.kind)) {
                        return actions;
                    }
                    actions.extend(self.handle(Input::Durable(record)));
                }
                Output::Forget(handover) => self.records.retain(|known| known.handover != handover),
                Output::Send(message) if self.dies(Point::Saying(message.word)) => return actions,
                Output::Send(message) => actions.push(Action::Say(message)),
                Output::Verified(_) => actions.extend(self.handle(Input::Commit)),
                Output::Run(_) | Output::Resume(_) => {
                    self.told_to_run += 1;
                    actions.push(Action::Run);
                }
                Output::Release(_) => actions.push(Action::Release),
                Output::Fill(handover) => actions.push(Action::Fill(handover)),
                Output::AskArbiter(handover) => actions.extend(self.ask_arbiter(&handover)),
                Output::InDoubt(_) | Output::Refuse(_) => {}
            }
        }
        actions
    }

    /// A receiver that gets no answer rejects the guest.
    fn ask_arbiter(&mut self, handover: &Handover) -> Vec<Action> {
        match self.lease.as_ref().and_then(|lease| lease.ask(handover, self.id)) {
            Some(grant) => self.handle(Input::Granted(grant)),
            None if handover.receiver == self.id => self.handle(Input::Cancel),
            None => Vec::new(),
        }
    }

    fn dies(&mut self, point: Point) -> bool {
        self.dead |= self.dies_at.take_if(|at| *at == point).is_some();
        self.dead
    }

    /// Starts again with nothing but what is on the disk; `kept` says that a guest which was started here is among that.
    pub fn restart(&mut self, kept: bool) {
        let (handovers, forgotten) = Handovers::restore(self.id, GUEST, &self.records, kept).unwrap();
        (self.handovers, self.dead) = (handovers, false);
        self.restarts += 1;
        self.carry_out(forgotten);
    }

    /// Whether its records let it run the guest.
    pub fn has_guest(&self) -> bool {
        self.handovers.whereabouts() == Whereabouts::Here
    }
}

/// A new connection between two hosts: everything that may have been lost is said again, until both are silent.
pub fn reconnect(one: &mut Host, other: &mut Host) {
    let mut said: Vec<(bool, Message)> = Vec::new();
    let note = |to_other: bool, actions: Vec<Action>, said: &mut Vec<(bool, Message)>| {
        said.extend(actions.into_iter().filter_map(|action| match action {
            Action::Say(message) => Some((to_other, message)),
            Action::Run | Action::Release | Action::Fill(_) => None,
        }));
    };
    note(true, one.handle(Input::Connected(other.id)), &mut said);
    note(false, other.handle(Input::Connected(one.id)), &mut said);
    for _ in 0..100 {
        let Some((to_other, message)) = said.pop() else { return };
        if to_other {
            note(false, other.hear(one.id, message), &mut said);
        } else {
            note(true, one.hear(other.id, message), &mut said);
        }
    }
    panic!("two hosts talk for ever");
}
