//! The receiver's side of one hand-over, from READY to its end.
//!
//! ```text
//! Ready ─COMMIT→ (Asking ─granted→) Starting ─STARTED durable; run; say STARTED→ Started ─GONE→ Settling ─durable→ Settled
//!   │                │ denied           │ it cannot be written
//!   │ cancel,        │ cancel           │
//!   │ timeout        ▼                  │
//!   └───────────► Rejecting ◄───────────┘        a COMMIT of what is not known begins here
//!                    └─REJECTED durable; say REJECT→ Rejected
//! ```
//!
//! *Ready* is in no record: after a crash the receiver has promised nothing, and a COMMIT is rejected. *Lost* stands for
//! *Started* after a crash that took the guest's memory: the sender is then told neither STARTED, upon which it would
//! give up its copy, nor REJECT, as the guest may have run. A guest with absent pages has lost them with the process that
//! asked for them, wherever the others are kept, so after a restart it is lost.

use super::sender::Step;
use super::{Handover, Message, Output, Record, RecordKind, Refusal, Word};
use crate::error::GuestAt;
use alloc::vec::Vec;

/// Where a hand-over stands at its receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReceiverPhase {
    /// All is verified and READY said. COMMIT is awaited.
    Ready,
    /// COMMIT has come, and the arbiter is asked.
    Asking,
    /// STARTED is being written.
    Starting,
    /// STARTED is durable, and the guest runs here.
    Started,
    /// STARTED is durable, and a crash has taken the guest's memory, or what was to fill it.
    Lost,
    /// The sender's copy is gone, and GONE is being written.
    Settling,
    /// GONE is durable.
    Settled,
    /// REJECTED is being written.
    Rejecting,
    /// REJECTED is durable.
    Rejected,
}

/// One hand-over, seen by its receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Receiver {
    handover: Handover,
    phase: ReceiverPhase,
}

impl Receiver {
    // SPEC 11.3
    /// A hand-over of which all is here and verified.
    pub(super) fn ready(handover: Handover, out: &mut Vec<Output>) -> Self {
        let receiver = Self { handover, phase: ReceiverPhase::Ready };
        receiver.say(Word::Ready, out);
        receiver
    }

    // SPEC 11.8
    /// A hand-over of which nothing is known: it will never start here.
    pub(super) fn rejecting(handover: Handover, out: &mut Vec<Output>) -> Self {
        let mut receiver = Self { handover, phase: ReceiverPhase::Rejecting };
        receiver.reject(out);
        receiver
    }

    /// The hand-over as a record left it; `None` for a record that no receiver writes. `kept` says that the guest's
    /// memory has outlived the restart.
    pub(super) fn restored(record: &Record, kept: bool) -> Option<Self> {
        let phase = match record.kind {
            // SPEC 11.16
            RecordKind::Started if kept && !record.handover.post_copy => ReceiverPhase::Started,
            RecordKind::Started => ReceiverPhase::Lost,
            RecordKind::Rejected => ReceiverPhase::Rejected,
            RecordKind::Gone => ReceiverPhase::Settled,
            RecordKind::Handed | RecordKind::Returned => return None,
        };
        Some(Self { handover: record.handover, phase })
    }

    /// The process that started a guest with absent pages lives: nothing is lost.
    pub(super) fn keep(&mut self) {
        if self.phase == ReceiverPhase::Lost && self.handover.post_copy {
            self.phase = ReceiverPhase::Started;
        }
    }

    /// The hand-over.
    pub fn handover(&self) -> &Handover {
        &self.handover
    }

    /// Where it stands.
    pub fn phase(&self) -> ReceiverPhase {
        self.phase
    }

    /// The record that is known to be durable.
    pub fn durable(&self) -> Option<RecordKind> {
        match self.phase {
            ReceiverPhase::Started | ReceiverPhase::Lost | ReceiverPhase::Settling => Some(RecordKind::Started),
            ReceiverPhase::Settled => Some(RecordKind::Gone),
            ReceiverPhase::Rejected => Some(RecordKind::Rejected),
            _ => None,
        }
    }

    /// Where the guest is, as far as this side knows.
    pub fn guest_at(&self) -> GuestAt {
        match self.phase {
            ReceiverPhase::Ready | ReceiverPhase::Rejecting | ReceiverPhase::Rejected => GuestAt::Sender,
            ReceiverPhase::Asking | ReceiverPhase::Starting => GuestAt::InDoubt,
            _ => GuestAt::Receiver,
        }
    }

    pub(super) fn handle(&mut self, step: Step, out: &mut Vec<Output>) {
        match self.phase {
            ReceiverPhase::Ready | ReceiverPhase::Asking => self.while_ready(step, out),
            ReceiverPhase::Starting => self.while_starting(step, out),
            ReceiverPhase::Rejecting | ReceiverPhase::Rejected => self.while_rejected(step, out),
            _ => self.while_started(step, out),
        }
    }

    fn while_ready(&mut self, step: Step, out: &mut Vec<Output>) {
        let asking = self.phase == ReceiverPhase::Asking;
        match step {
            // SPEC 11.7
            Step::Said(Word::Commit) if self.handover.arbiter => {
                self.phase = ReceiverPhase::Asking;
                out.push(Output::AskArbiter(self.handover));
            }
            // SPEC 11.21: nobody would serve what is absent.
            Step::Here if self.handover.post_copy => out.push(Output::Refuse(Refusal::Lacking)),
            Step::Said(Word::Commit) | Step::Here => self.start(out),
            Step::Granted if asking => self.start(out),
            Step::Denied if asking => self.reject(out),
            Step::Timeout if asking => out.push(Output::AskArbiter(self.handover)),
            Step::Cancel | Step::Timeout | Step::There => self.reject(out),
            Step::Connected => self.say(Word::Ready, out),
            Step::Commit => out.push(Output::Refuse(Refusal::Nothing)),
            _ => {}
        }
    }

    fn while_starting(&mut self, step: Step, out: &mut Vec<Output>) {
        match step {
            // SPEC 11.7
            Step::Durable(RecordKind::Started) => {
                self.phase = ReceiverPhase::Started;
                out.push(Output::Run(self.handover));
                self.say(Word::Started, out);
            }
            // Nobody knows whether STARTED is on the disk, and nobody has acted on it: REJECTED takes its place.
            Step::Failed(RecordKind::Started) => self.reject(out),
            _ => self.too_late(step, out),
        }
    }

    fn while_started(&mut self, step: Step, out: &mut Vec<Output>) {
        match (self.phase, step) {
            (ReceiverPhase::Lost, Step::Said(Word::Commit) | Step::Connected | Step::Here) => self.is_lost(out),
            // SPEC 11.21: an operator of the sender may have given its memory up, so this says nothing about pages.
            (ReceiverPhase::Lost, Step::Said(Word::Gone)) if self.handover.post_copy => self.is_lost(out),
            (ReceiverPhase::Started, Step::Connected) => self.say(Word::Started, out),
            (_, Step::Said(Word::Commit)) => self.say(Word::Started, out),
            // SPEC 11.21: what is absent here has only the sender, wherever it is.
            (ReceiverPhase::Started, Step::Here) if self.handover.post_copy => {
                out.push(Output::Refuse(Refusal::Lacking));
            }
            (ReceiverPhase::Started | ReceiverPhase::Lost, Step::Said(Word::Gone))
            | (ReceiverPhase::Started, Step::Here) => {
                self.phase = ReceiverPhase::Settling;
                self.persist(RecordKind::Gone, out);
            }
            // What was lost runs nowhere, so an operator can have the sender's copy run on.
            (ReceiverPhase::Lost, Step::There) => self.reject(out),
            (ReceiverPhase::Settling, Step::Durable(RecordKind::Gone)) => self.phase = ReceiverPhase::Settled,
            (ReceiverPhase::Settling, Step::Failed(RecordKind::Gone)) => self.persist(RecordKind::Gone, out),
            _ => self.too_late(step, out),
        }
    }

    fn while_rejected(&mut self, step: Step, out: &mut Vec<Output>) {
        match (self.phase, step) {
            (ReceiverPhase::Rejecting, Step::Durable(RecordKind::Rejected)) => {
                self.phase = ReceiverPhase::Rejected;
                self.say(Word::Reject, out);
            }
            (ReceiverPhase::Rejecting, Step::Failed(RecordKind::Rejected)) => self.persist(RecordKind::Rejected, out),
            (ReceiverPhase::Rejected, Step::Connected | Step::Said(Word::Commit)) => self.say(Word::Reject, out),
            (_, Step::Here) => out.push(Output::Refuse(Refusal::TooLate(self.handover.epoch))),
            _ => {}
        }
    }

    /// What can no longer be asked for is refused; everything else changes nothing.
    fn too_late(&self, step: Step, out: &mut Vec<Output>) {
        if matches!(step, Step::Cancel | Step::Here | Step::There | Step::Commit) {
            out.push(Output::Refuse(Refusal::TooLate(self.handover.epoch)));
        }
    }

    fn is_lost(&self, out: &mut Vec<Output>) {
        out.push(Output::Refuse(Refusal::Lost(self.handover.epoch)));
    }

    fn start(&mut self, out: &mut Vec<Output>) {
        self.phase = ReceiverPhase::Starting;
        self.persist(RecordKind::Started, out);
    }

    fn reject(&mut self, out: &mut Vec<Output>) {
        self.phase = ReceiverPhase::Rejecting;
        self.persist(RecordKind::Rejected, out);
    }

    fn persist(&self, kind: RecordKind, out: &mut Vec<Output>) {
        out.push(Output::Persist(Record { kind, handover: self.handover }));
    }

    fn say(&self, word: Word, out: &mut Vec<Output>) {
        out.push(Output::Send(Message { word, handover: self.handover }));
    }
}
