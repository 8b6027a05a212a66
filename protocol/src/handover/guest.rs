//! All hand-overs of one guest at one host: who may begin, whom a message is about, and what may be forgotten.
//!
//! Its state after a restart is its records and nothing else. The highest epoch in them is the *floor*: no hand-over at
//! or below it begins here again, so old records can go. Kept are the one that says where the guest is, the highest
//! one, and each STARTED until its sender's GONE.

use super::sender::Step;
use super::{
    Epoch, Fence, Grant, Handover, HostId, Input, Message, Output, Receiver, ReceiverPhase, Record, RecordError,
    RecordKind, Refusal, Resolve, Sender, SenderPhase, Word,
};
use crate::domain::LineageId;
use crate::error::GuestAt;
use crate::limits::{EPOCH_STEP_MAX, HANDOVERS_MAX};
use alloc::vec::Vec;

/// Where the guest is, as far as this host's records know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Whereabouts {
    /// It was never handed over from or to here: whoever runs guests on this host knows.
    Unrecorded,
    /// On this host.
    Here,
    /// On this host, but a crash has taken its memory.
    Lost,
    /// On this host, and pages of it may be absent: it is lost with the process that runs it.
    Filling,
    /// On another host.
    There,
    /// On another host, which still lacks pages of it: the memory here must be kept, and must not run.
    Serving,
    /// Handed over from here without an answer.
    InDoubt,
}

/// One hand-over, from the side that this host is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Side {
    Sender(Sender),
    Receiver(Receiver),
}

impl Side {
    fn restored(record: &Record, me: HostId, kept: bool) -> Option<Self> {
        if record.handover.sender == me {
            return Sender::restored(record).map(Self::Sender);
        }
        Receiver::restored(record, kept).filter(|_| record.handover.receiver == me).map(Self::Receiver)
    }

    fn handover(&self) -> &Handover {
        match self {
            Self::Sender(sender) => sender.handover(),
            Self::Receiver(receiver) => receiver.handover(),
        }
    }

    fn other_host(&self) -> HostId {
        match self {
            Self::Sender(sender) => sender.handover().receiver,
            Self::Receiver(receiver) => receiver.handover().sender,
        }
    }

    fn handle(&mut self, step: Step, out: &mut Vec<Output>) {
        match self {
            Self::Sender(sender) => sender.handle(step, out),
            Self::Receiver(receiver) => receiver.handle(step, out),
        }
    }

    fn durable(&self) -> Option<RecordKind> {
        match self {
            Self::Sender(sender) => sender.durable(),
            Self::Receiver(receiver) => receiver.durable(),
        }
    }

    /// Whether it is open: where the guest goes depends on it.
    fn is_live(&self) -> bool {
        match self {
            Self::Sender(sender) => !matches!(sender.phase(), SenderPhase::Gone | SenderPhase::Returned),
            Self::Receiver(receiver) => {
                use ReceiverPhase as P;
                matches!(receiver.phase(), P::Ready | P::Asking | P::Starting)
            }
        }
    }

    /// Whether nobody will ask for it any more.
    fn is_settled(&self) -> bool {
        match self {
            Self::Sender(sender) => !self.is_live() && sender.durable().is_some(),
            Self::Receiver(receiver) => {
                matches!(receiver.phase(), ReceiverPhase::Settled | ReceiverPhase::Rejected)
            }
        }
    }

    /// Where it says that the guest is, if it says anything.
    fn whereabouts(&self) -> Option<Whereabouts> {
        use ReceiverPhase as P;
        match self {
            Self::Sender(sender) => match (sender.phase(), sender.guest_at()) {
                (SenderPhase::Offered | SenderPhase::Ready, _) => None,
                (_, GuestAt::Sender) => Some(Whereabouts::Here),
                (SenderPhase::Gone, _) => Some(Whereabouts::There),
                (SenderPhase::Serving, _) => Some(Whereabouts::Serving),
                _ => Some(Whereabouts::InDoubt),
            },
            Self::Receiver(receiver) => match receiver.phase() {
                P::Started | P::Settling if receiver.handover().post_copy => Some(Whereabouts::Filling),
                P::Started | P::Settling | P::Settled => Some(Whereabouts::Here),
                P::Lost => Some(Whereabouts::Lost),
                P::Starting => Some(Whereabouts::InDoubt),
                P::Ready | P::Asking | P::Rejecting | P::Rejected => None,
            },
        }
    }
}

/// All hand-overs of one guest at one host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handovers {
    me: HostId,
    lineage: LineageId,
    /// The session that prepares to send the guest.
    sending: Option<[u8; 16]>,
    sides: Vec<Side>,
    /// The highest epoch that was ever durable. It does not go down while a record is being replaced.
    floor: Epoch,
}

impl Handovers {
    /// The hand-overs of guest `lineage` at host `me` as its `records` left them, and the records that are no longer
    /// needed. `kept` says that the memory of a guest that was started here has outlived the restart; of one that was
    /// started with pages absent nothing has, unless [`keep`](Self::keep) says so.
    ///
    /// # Errors
    /// Records that this host cannot have written. Nothing may be decided on them.
    pub fn restore(
        me: HostId,
        lineage: LineageId,
        records: &[Record],
        kept: bool,
    ) -> Result<(Self, Vec<Output>), RecordError> {
        let mut handovers =
            Self { me, lineage, sending: None, sides: Vec::with_capacity(records.len()), floor: Epoch::ZERO };
        for record in records {
            let side = Side::restored(record, me, kept).filter(|_| record.handover.lineage == lineage);
            let side = side.ok_or(RecordError::Foreign(record.handover.epoch))?;
            if handovers.sides.iter().any(|other| other.handover() == side.handover()) {
                return Err(RecordError::Twice(record.handover.epoch));
            }
            handovers.floor = handovers.floor.max(record.handover.epoch);
            handovers.add(side);
        }
        let mut out = Vec::new();
        handovers.forget(&mut out);
        Ok((handovers, out))
    }

    // SPEC 11.16
    /// The process that started the guest here by `handover`, with pages absent, still lives and serves them: what
    /// [`restore`](Self::restore) has taken for lost is not. Changes nothing for any other hand-over.
    pub fn keep(&mut self, handover: &Handover) {
        for side in &mut self.sides {
            if let Side::Receiver(receiver) = side
                && receiver.handover() == handover
            {
                receiver.keep();
            }
        }
    }

    /// Where the guest is, as far as the records know. After a restart it may run on this host only if they say
    /// [`Here`](Whereabouts::Here), or nothing.
    pub fn whereabouts(&self) -> Whereabouts {
        self.sides.iter().rev().find_map(Side::whereabouts).unwrap_or(Whereabouts::Unrecorded)
    }

    /// Where the guest is, seen from this hand-over; `None` if it is not known here.
    pub fn guest_at(&self, handover: &Handover) -> Option<GuestAt> {
        self.sides.iter().find(|side| side.handover() == handover).map(|side| match side {
            Side::Sender(sender) => sender.guest_at(),
            Side::Receiver(receiver) => receiver.guest_at(),
        })
    }

    /// The hand-over that is open and has this host as its sender.
    pub fn outgoing(&self) -> Option<&Sender> {
        self.sides.iter().filter(|side| side.is_live()).find_map(|side| match side {
            Side::Sender(sender) => Some(sender),
            Side::Receiver(_) => None,
        })
    }

    /// The hand-over that is open and has this host as its receiver, else the last one that started here, else the last.
    pub fn incoming(&self) -> Option<&Receiver> {
        let receivers = || {
            self.sides.iter().rev().filter_map(|side| match side {
                Side::Receiver(receiver) => Some((side, receiver)),
                Side::Sender(_) => None,
            })
        };
        let open = receivers().find(|(side, _)| side.is_live());
        let started = || receivers().find(|(side, _)| side.whereabouts().is_some());
        open.or_else(started).or_else(|| receivers().next()).map(|(_, receiver)| receiver)
    }

    // SPEC 11.11
    /// A session wants to send the guest away: the epoch for it, if it may.
    ///
    /// # Errors
    /// Another session sends it, a hand-over is open, or the guest is not here.
    pub fn open(&mut self, session: [u8; 16]) -> Result<Epoch, Refusal> {
        if self.sending.is_some_and(|other| other != session) {
            return Err(Refusal::Sending);
        }
        if let Some(side) = self.sides.iter().find(|side| side.is_live()) {
            return Err(Refusal::Busy(side.handover().epoch));
        }
        match self.whereabouts() {
            Whereabouts::Unrecorded | Whereabouts::Here => {}
            // SPEC 11.21
            Whereabouts::Filling | Whereabouts::Lost if self.is_post_copied() => return Err(Refusal::Lacking),
            _ => return Err(Refusal::NotHere),
        }
        self.has_room()?;
        let floor = self.floor;
        let epoch = floor.next().ok_or(Refusal::EpochOver { epoch: floor, floor })?;
        self.sending = Some(session);
        Ok(epoch)
    }

    /// The session ends before it has handed the guest over.
    pub fn close(&mut self, session: [u8; 16]) {
        self.sending = self.sending.filter(|open| *open != session);
    }

    /// Whether a session prepares to send the guest: it was [opened](Self::open), and has offered nothing yet.
    pub fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// The session that was [opened](Self::open) has frozen the guest and stated all of it: READY may come.
    ///
    /// # Errors
    /// Not this host's guest, not that session, or not an epoch for it.
    pub fn send(&mut self, handover: Handover) -> Result<(), Refusal> {
        if handover.lineage != self.lineage || handover.sender != self.me {
            return Err(Refusal::Foreign);
        }
        if self.sending != Some(handover.session) {
            return Err(Refusal::Sending);
        }
        // Asked again: a message may have raised the floor since.
        self.open(handover.session)?;
        self.is_new(handover.epoch)?;
        self.sending = None;
        self.add(Side::Sender(Sender::offered(handover)));
        Ok(())
    }

    /// A session has brought the guest at `epoch`: whether it may be started by it. Asked by [`receive`](Self::receive).
    ///
    /// # Errors
    /// The records have reached that epoch, the guest is here, or a hand-over is open.
    pub fn may_receive(&self, epoch: Epoch) -> Result<(), Refusal> {
        self.is_new(epoch)?;
        self.is_free()
    }

    // SPEC 11.12
    /// A session wants to bring the guest at `epoch`: whether it may begin. One whose epoch is over may, where nothing here
    /// could be harmed: the REJECT that it ends with is what uses the epoch up at a sender that has no record of it, as
    /// after a crash before HANDED. Refused at once, that sender would come with the same epoch for ever.
    ///
    /// # Errors
    /// The guest is here, a hand-over is open, or the epoch is far above all records.
    pub fn may_begin(&self, epoch: Epoch) -> Result<(), Refusal> {
        match self.may_receive(epoch) {
            Err(Refusal::EpochOver { .. }) => self.is_free(),
            judged => judged,
        }
    }

    /// Whether the guest could come here, at some epoch.
    fn is_free(&self) -> Result<(), Refusal> {
        // A failed STARTED that REJECTED has not replaced yet would stand for what is received now, after a crash.
        let is_open = |side: &&Side| (side.is_live() && !is_ready(side)) || is_rejecting(side);
        if let Some(side) = self.sides.iter().find(is_open) {
            return Err(Refusal::Busy(side.handover().epoch));
        }
        if self.sending.is_some() {
            return Err(Refusal::Sending);
        }
        match self.whereabouts() {
            Whereabouts::Unrecorded | Whereabouts::There => self.has_room(),
            _ => Err(Refusal::IsHere),
        }
    }

    /// A session by `from` has brought everything, and all of it is verified: READY is said, or why not.
    pub fn receive(&mut self, from: HostId, handover: Handover) -> Vec<Output> {
        let mut out = Vec::new();
        if !self.is_bound(Word::Commit, from, &handover) {
            out.push(Output::Refuse(Refusal::Foreign));
        } else if let Some(side) = self.sides.iter_mut().find(|side| *side.handover() == handover) {
            side.handle(Step::Connected, &mut out);
        } else if let Err(refusal) = self.may_receive(handover.epoch) {
            out.push(Output::Refuse(refusal));
            // SPEC 11.12
            if matches!(refusal, Refusal::EpochOver { .. }) {
                out.push(Output::Send(Message { word: Word::Reject, handover }));
            }
        } else {
            // One that is merely ready has promised nothing that a restart would keep.
            self.sides.retain(|side| !is_ready(side));
            self.add(Side::Receiver(Receiver::ready(handover, &mut out)));
        }
        out
    }

    /// What follows from an input, in order.
    pub fn handle(&mut self, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Message { from, message } => self.handle_message(from, message, &mut out),
            Input::Connected(host) => {
                let of_host = self.sides.iter_mut().filter(|side| side.other_host() == host);
                of_host.for_each(|side| side.handle(Step::Connected, &mut out));
            }
            Input::Durable(record) => {
                self.floor = self.floor.max(record.handover.epoch);
                self.of_record(&record, Step::Durable(record.kind), &mut out);
            }
            Input::Failed(record) => self.of_record(&record, Step::Failed(record.kind), &mut out),
            Input::Commit => self.live(Step::Commit, &mut out),
            Input::Cancel => self.live(Step::Cancel, &mut out),
            Input::Timeout => {
                let live = self.sides.iter_mut().find(|side| side.is_live());
                live.into_iter().for_each(|side| side.handle(Step::Timeout, &mut out));
            }
            Input::Resolve(resolve) => self.handle_resolve(resolve, &mut out),
            Input::Granted(grant) => self.handle_grant(&grant, &mut out),
            Input::Filled(handover) => self.handle_filled(&handover, &mut out),
        }
        self.forget(&mut out);
        out
    }

    // SPEC 11.3
    fn handle_message(&mut self, from: HostId, message: Message, out: &mut Vec<Output>) {
        let Message { word, handover } = message;
        if !self.is_bound(word, from, &handover) {
            return out.push(Output::Refuse(Refusal::Foreign));
        }
        match self.sides.iter_mut().find(|side| *side.handover() == handover) {
            Some(side) => side.handle(Step::Said(word), out),
            None => self.handle_unknown(word, handover, out),
        }
    }

    /// A message about a hand-over that is not known here: it never was, it went in a crash, or it was forgotten.
    fn handle_unknown(&mut self, word: Word, handover: Handover, out: &mut Vec<Output>) {
        let is_over = handover.epoch <= self.floor;
        match word {
            // What is forgotten was not started here, or its sender has said GONE and does not ask.
            Word::Commit if is_over => out.push(Output::Send(Message { word: Word::Reject, handover })),
            // SPEC 11.8
            Word::Commit => match self.is_near(handover.epoch).and_then(|()| self.has_room()) {
                Ok(()) => self.add(Side::Receiver(Receiver::rejecting(handover, out))),
                Err(refusal) => out.push(Output::Refuse(refusal)),
            },
            // HANDED is never forgotten: whatever this was, the guest will not run here by it.
            Word::Started if is_over => out.push(Output::Send(Message { word: Word::Gone, handover })),
            Word::Ready | Word::Started | Word::Reject | Word::Gone => {
                out.push(Output::Refuse(Refusal::Unknown(handover.epoch)));
            }
        }
    }

    // SPEC 11.14
    fn handle_resolve(&mut self, resolve: Resolve, out: &mut Vec<Output>) {
        let (epoch, step) = match resolve {
            Resolve::Here(Fence { epoch, .. }) => (epoch, Step::Here),
            Resolve::There(epoch) => (epoch, Step::There),
        };
        let in_doubt = |side: &&mut Side| side.handover().epoch == epoch && !side.is_settled();
        match (self.sides.iter_mut().find(in_doubt), resolve) {
            (None, _) => out.push(Output::Refuse(Refusal::Nothing)),
            (Some(side), Resolve::Here(fence)) if side.other_host() != fence.host => {
                out.push(Output::Refuse(Refusal::WrongFence(epoch)));
            }
            (Some(side), _) => side.handle(step, out),
        }
    }

    // SPEC 11.13
    fn handle_grant(&mut self, grant: &Grant, out: &mut Vec<Output>) {
        let step = if grant.host == self.me { Step::Granted } else { Step::Denied };
        let asked =
            |side: &&mut Side| side.is_live() && side.handover().arbiter && side.handover().epoch == grant.epoch;
        let side = self.sides.iter_mut().find(asked).filter(|_| grant.lineage == self.lineage);
        match side.filter(|side| grant.host == self.me || grant.host == side.other_host()) {
            Some(side) => side.handle(step, out),
            None => out.push(Output::Refuse(Refusal::Unknown(grant.epoch))),
        }
    }

    // SPEC 11.20
    fn handle_filled(&mut self, handover: &Handover, out: &mut Vec<Output>) {
        let sent = |side: &&mut Side| matches!(side, Side::Sender(_)) && side.handover() == handover;
        match self.sides.iter_mut().find(sent) {
            Some(side) => side.handle(Step::Filled, out),
            None => out.push(Output::Refuse(Refusal::Unknown(handover.epoch))),
        }
    }

    /// Drops what nobody will ask for any more.
    fn forget(&mut self, out: &mut Vec<Output>) {
        while let Some(at) = (0..self.sides.len()).find(|&at| self.is_superseded(at)) {
            out.push(Output::Forget(*self.sides.remove(at).handover()));
        }
    }

    // SPEC 11.15
    /// Whether another record keeps the floor as high and, if this one says where the guest is, says so later.
    fn is_superseded(&self, at: usize) -> bool {
        let Some(side) = self.sides.get(at).filter(|side| side.is_settled()) else { return false };
        let epoch = side.handover().epoch;
        let says_where = side.whereabouts().is_some();
        self.sides.iter().enumerate().any(|(other, newer)| {
            let is_later = newer.handover().epoch > epoch || (newer.handover().epoch == epoch && !says_where);
            let says_enough = newer.whereabouts().is_some() || !says_where;
            other != at && is_later && says_enough && newer.durable().is_some()
        })
    }

    fn live(&mut self, step: Step, out: &mut Vec<Output>) {
        match self.sides.iter_mut().find(|side| side.is_live()) {
            Some(side) => side.handle(step, out),
            None => out.push(Output::Refuse(Refusal::Nothing)),
        }
    }

    fn of_record(&mut self, record: &Record, step: Step, out: &mut Vec<Output>) {
        let side = self.sides.iter_mut().find(|side| *side.handover() == record.handover);
        side.into_iter().for_each(|side| side.handle(step, out));
    }

    /// Whether a message is about this guest, and this host and the one that says it are on the sides they have to be.
    fn is_bound(&self, word: Word, from: HostId, handover: &Handover) -> bool {
        let (here, there) =
            if word.is_senders() { (handover.receiver, handover.sender) } else { (handover.sender, handover.receiver) };
        handover.lineage == self.lineage && here == self.me && there == from
    }

    fn is_new(&self, epoch: Epoch) -> Result<(), Refusal> {
        let floor = self.floor;
        if epoch <= floor { Err(Refusal::EpochOver { epoch, floor }) } else { self.is_near(epoch) }
    }

    fn is_near(&self, epoch: Epoch) -> Result<(), Refusal> {
        let floor = self.floor;
        let step = epoch.number().saturating_sub(floor.number());
        if step > EPOCH_STEP_MAX { Err(Refusal::EpochFar { epoch, floor }) } else { Ok(()) }
    }

    fn is_post_copied(&self) -> bool {
        self.incoming().is_some_and(|receiver| receiver.handover().post_copy)
    }

    fn has_room(&self) -> Result<(), Refusal> {
        if self.sides.len() >= HANDOVERS_MAX { Err(Refusal::Full(self.sides.len())) } else { Ok(()) }
    }

    /// Adds a hand-over in its place: by epoch.
    fn add(&mut self, side: Side) {
        let at = self.sides.partition_point(|other| other.handover().epoch <= side.handover().epoch);
        self.sides.insert(at, side);
    }
}

fn is_ready(side: &Side) -> bool {
    matches!(side, Side::Receiver(receiver) if receiver.phase() == ReceiverPhase::Ready)
}

fn is_rejecting(side: &Side) -> bool {
    matches!(side, Side::Receiver(receiver) if receiver.phase() == ReceiverPhase::Rejecting)
}
