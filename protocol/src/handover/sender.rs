//! The sender's side of one hand-over, from the frozen guest to its end.
//!
//! ```text
//! Offered ─READY→ Ready ─commit→ Handing ─HANDED durable, COMMIT→ Handed ─STARTED→ Releasing ─GONE durable→ Gone
//!    │              │                │ REJECT came, or            │ ╰─STARTED, post-copy→ Serving ─filled→ Releasing
//!    │              │                │ it cannot be written       │ REJECT, grant, operator's fence
//!    └──REJECT, cancel, timeout:     ▼                            ▼
//!       the guest runs on ─────► Returning ◄──────────────────────┘
//!                                    └─RETURNED durable; the guest runs on, if it does not yet→ Returned
//! ```
//!
//! Up to *Ready* the guest can run on at any time, as no receiver may start it without COMMIT. RETURNED is written then,
//! too: it uses the epoch up, so that no later hand-over can be taken for this one. From *Handing* on a record that is on
//! the disk, or may be, says that the guest has left; it runs here again only when another record says otherwise.
//!
//! *Serving* is in no record of its own: after a crash it is *Handed* again, and STARTED, asked for again, leads back.

use super::{Handover, Message, Output, RecordKind, Refusal, Word};
use crate::error::GuestAt;
use crate::handover::Record;
use alloc::vec::Vec;

/// Where a hand-over stands at its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SenderPhase {
    /// The guest is frozen and all of it stated. READY is awaited.
    Offered,
    /// READY has come.
    Ready,
    /// HANDED is being written.
    Handing {
        /// REJECT has come meanwhile.
        rejected: bool,
    },
    /// HANDED is durable: in doubt until something ends it.
    Handed,
    /// The receiver runs it and lacks pages, which only the memory here has.
    Serving,
    /// The receiver has it, and GONE is being written.
    Releasing,
    /// GONE is durable.
    Gone,
    /// RETURNED is being written.
    Returning {
        /// The guest runs already, because HANDED never was.
        resumed: bool,
    },
    /// RETURNED is durable, and the guest was let run.
    Returned,
}

/// One hand-over, seen by its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sender {
    handover: Handover,
    phase: SenderPhase,
}

/// What a machine is told, once it is known to be about its hand-over and to come from its other host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Said(Word),
    Connected,
    Durable(RecordKind),
    Failed(RecordKind),
    Commit,
    Cancel,
    Timeout,
    Filled,
    Here,
    There,
    Granted,
    Denied,
}

impl Sender {
    /// A hand-over of a guest that is frozen and stated.
    pub(super) fn offered(handover: Handover) -> Self {
        Self { handover, phase: SenderPhase::Offered }
    }

    /// The hand-over as a record left it; `None` for a record that no sender writes.
    pub(super) fn restored(record: &Record) -> Option<Self> {
        let phase = match record.kind {
            RecordKind::Handed => SenderPhase::Handed,
            RecordKind::Returned => SenderPhase::Returned,
            RecordKind::Gone => SenderPhase::Gone,
            RecordKind::Started | RecordKind::Rejected => return None,
        };
        Some(Self { handover: record.handover, phase })
    }

    /// The hand-over.
    pub fn handover(&self) -> &Handover {
        &self.handover
    }

    /// Where it stands.
    pub fn phase(&self) -> SenderPhase {
        self.phase
    }

    /// The record that is known to be durable.
    pub fn durable(&self) -> Option<RecordKind> {
        match self.phase {
            SenderPhase::Handed | SenderPhase::Serving | SenderPhase::Releasing => Some(RecordKind::Handed),
            SenderPhase::Gone => Some(RecordKind::Gone),
            SenderPhase::Returned => Some(RecordKind::Returned),
            _ => None,
        }
    }

    /// Where the guest is, as far as this side knows.
    pub fn guest_at(&self) -> GuestAt {
        match self.phase {
            SenderPhase::Offered | SenderPhase::Ready | SenderPhase::Returned => GuestAt::Sender,
            SenderPhase::Returning { resumed: true } => GuestAt::Sender,
            SenderPhase::Handing { .. } | SenderPhase::Handed | SenderPhase::Returning { .. } => GuestAt::InDoubt,
            SenderPhase::Serving | SenderPhase::Releasing | SenderPhase::Gone => GuestAt::Receiver,
        }
    }

    pub(super) fn handle(&mut self, step: Step, out: &mut Vec<Output>) {
        // SPEC 11.20
        if step == Step::Filled && !self.is_decided() {
            return out.push(Output::Refuse(Refusal::NotStarted(self.handover.epoch)));
        }
        match self.phase {
            SenderPhase::Offered | SenderPhase::Ready => self.while_here(step, out),
            SenderPhase::Handing { .. } => self.while_handing(step, out),
            SenderPhase::Handed => self.while_in_doubt(step, out),
            SenderPhase::Serving => self.while_serving(step, out),
            SenderPhase::Releasing | SenderPhase::Gone => self.while_there(step, out),
            SenderPhase::Returning { .. } | SenderPhase::Returned => self.while_returned(step, out),
        }
    }

    /// Whether it is known who has the guest.
    fn is_decided(&self) -> bool {
        use SenderPhase as P;
        !matches!(self.phase, P::Offered | P::Ready | P::Handing { .. } | P::Handed)
    }

    // SPEC 11.10
    fn while_here(&mut self, step: Step, out: &mut Vec<Output>) {
        match step {
            Step::Said(Word::Ready) if self.phase == SenderPhase::Offered => {
                self.phase = SenderPhase::Ready;
                out.push(Output::Verified(self.handover));
            }
            // SPEC 11.5
            Step::Commit if self.phase == SenderPhase::Ready => {
                self.phase = SenderPhase::Handing { rejected: false };
                self.persist(RecordKind::Handed, out);
            }
            Step::Said(Word::Reject) | Step::Cancel | Step::Timeout => {
                out.push(Output::Resume(self.handover));
                self.give_back(true, out);
            }
            Step::Said(Word::Started) => out.push(Output::Refuse(Refusal::Early(self.handover.epoch))),
            Step::Commit | Step::Here | Step::There => out.push(Output::Refuse(Refusal::Nothing)),
            _ => {}
        }
    }

    fn while_handing(&mut self, step: Step, out: &mut Vec<Output>) {
        match step {
            Step::Durable(RecordKind::Handed) => match self.phase {
                SenderPhase::Handing { rejected: true } => self.give_back(false, out),
                _ => {
                    self.phase = SenderPhase::Handed;
                    self.say(Word::Commit, out);
                }
            },
            // Nobody knows whether HANDED is on the disk: RETURNED has to be, before the guest runs on.
            Step::Failed(RecordKind::Handed) => self.give_back(false, out),
            Step::Said(Word::Reject) => self.phase = SenderPhase::Handing { rejected: true },
            Step::Said(Word::Started) => out.push(Output::Refuse(Refusal::Early(self.handover.epoch))),
            _ => self.too_late(step, out),
        }
    }

    // SPEC 11.6
    fn while_in_doubt(&mut self, step: Step, out: &mut Vec<Output>) {
        match step {
            // A receiver that says READY again has not seen COMMIT.
            Step::Connected | Step::Said(Word::Ready) => self.say(Word::Commit, out),
            // SPEC 11.18
            Step::Said(Word::Started) if self.handover.post_copy => {
                self.phase = SenderPhase::Serving;
                out.push(Output::Fill(self.handover));
            }
            Step::Said(Word::Started) | Step::There => self.give_up(out),
            Step::Said(Word::Reject) | Step::Here | Step::Granted => self.give_back(false, out),
            Step::Timeout => {
                out.push(Output::InDoubt(self.handover));
                if self.handover.arbiter {
                    out.push(Output::AskArbiter(self.handover));
                }
            }
            // Granted to the receiver, which may still reject.
            Step::Denied => out.push(Output::InDoubt(self.handover)),
            _ => self.too_late(step, out),
        }
    }

    // SPEC 11.18
    fn while_serving(&mut self, step: Step, out: &mut Vec<Output>) {
        match step {
            Step::Said(Word::Started) => out.push(Output::Fill(self.handover)),
            // SPEC 11.20
            Step::Filled | Step::There => self.give_up(out),
            _ => self.too_late(step, out),
        }
    }

    fn while_there(&mut self, step: Step, out: &mut Vec<Output>) {
        match (self.phase, step) {
            (SenderPhase::Releasing, Step::Durable(RecordKind::Gone)) => {
                self.phase = SenderPhase::Gone;
                out.push(Output::Release(self.handover));
                self.say(Word::Gone, out);
            }
            (SenderPhase::Releasing, Step::Failed(RecordKind::Gone)) => self.persist(RecordKind::Gone, out),
            (SenderPhase::Gone, Step::Said(Word::Started)) => self.say(Word::Gone, out),
            _ => self.too_late(step, out),
        }
    }

    fn while_returned(&mut self, step: Step, out: &mut Vec<Output>) {
        match (self.phase, step) {
            // SPEC 11.9
            (SenderPhase::Returning { resumed }, Step::Durable(RecordKind::Returned)) => {
                self.phase = SenderPhase::Returned;
                if !resumed {
                    out.push(Output::Resume(self.handover));
                }
            }
            (SenderPhase::Returning { .. }, Step::Failed(RecordKind::Returned)) => {
                self.persist(RecordKind::Returned, out);
            }
            (_, Step::Said(Word::Started) | Step::Filled) => {
                out.push(Output::Refuse(Refusal::Conflict(self.handover.epoch)));
            }
            _ => {}
        }
    }

    /// What can no longer be asked for is refused; everything else changes nothing.
    fn too_late(&self, step: Step, out: &mut Vec<Output>) {
        if matches!(step, Step::Cancel | Step::Here | Step::There | Step::Commit) {
            out.push(Output::Refuse(Refusal::TooLate(self.handover.epoch)));
        }
    }

    fn give_up(&mut self, out: &mut Vec<Output>) {
        self.phase = SenderPhase::Releasing;
        self.persist(RecordKind::Gone, out);
    }

    fn give_back(&mut self, resumed: bool, out: &mut Vec<Output>) {
        self.phase = SenderPhase::Returning { resumed };
        self.persist(RecordKind::Returned, out);
    }

    fn persist(&self, kind: RecordKind, out: &mut Vec<Output>) {
        out.push(Output::Persist(Record { kind, handover: self.handover }));
    }

    fn say(&self, word: Word, out: &mut Vec<Output>) {
        out.push(Output::Send(Message { word, handover: self.handover }));
    }
}
