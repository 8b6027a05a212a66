//! Wrong variants of the rule, one a clause. The product knows nothing of them: each bends what goes into the real
//! machines, what comes out, or what the world does with it.

use crate::world::IDS;
use pagewire_protocol::handover::{
    Grant, Handover, Handovers, HostId, Input, Message, Output, ReceiverPhase, Record, RecordKind, SenderPhase, Word,
};

macro_rules! mutants {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum Mutant {
            $($(#[$doc])* $name,)*
        }

        impl Mutant {
            pub(crate) const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

mutants! {
    /// COMMIT goes out while HANDED is being written.
    CommitBeforeHanded;
    /// HANDED is not written at all.
    HandedNotWritten;
    /// The sender lets the guest run on when the answer is late.
    ResumesWhenLate;
    /// A cancel is followed after HANDED.
    CancelAfterHanded;
    /// The guest is let run on before RETURNED is durable.
    ResumesBeforeReturned;
    /// RETURNED is not written at all.
    ReturnedNotWritten;
    /// HANDED is dropped as soon as STARTED comes.
    HandedForgotten;
    /// GONE is said, and never written.
    GoneNotWritten;
    /// A sender whose records say HANDED runs its guest after a restart.
    HandedRunsAfterRestart;
    /// A second session may send the guest while a hand-over is open.
    SecondSessionAllowed;
    /// A write of HANDED that failed is taken as if it had left nothing on the disk.
    FailedHandedResumes;
    /// What failed to be written is taken as written.
    FailedIsWritten;
    /// REJECT is said, and REJECTED never written.
    RejectedNotWritten;
    /// REJECT is said before REJECTED is durable.
    RejectSaidEarly;
    /// REJECTED is dropped when REJECT has been said.
    RejectedForgotten;
    /// The receiver starts when COMMIT is late.
    StartsWhenLate;
    /// STARTED is said before it is durable.
    StartedSaidEarly;
    /// The guest runs before STARTED is durable.
    RunsBeforeStarted;
    /// STARTED is not written at all.
    StartedNotWritten;
    /// STARTED is dropped without GONE.
    StartedForgotten;
    /// The receiver does not run what its records say was started.
    StartedDoesNotRunAfterRestart;
    /// A receiver that has lost the guest in a crash says STARTED all the same.
    LostSaysStarted;
    /// A receiver that has started can still reject.
    RejectAfterStarted;
    /// A COMMIT of what is not known is not answered.
    UnknownCommitIgnored;
    /// A COMMIT of what is not known starts the guest.
    UnknownCommitStarts;
    /// A COMMIT of what is not known is answered without a record.
    UnknownCommitNotRecorded;
    /// A session of an epoch that is over is received again.
    OldEpochReceived;
    /// A message of another session is taken for one of this.
    SessionNotCompared;
    /// A message of another epoch is taken for one of this.
    EpochNotCompared;
    /// A message about another root is taken for one about this.
    RootNotCompared;
    /// A message about another guest is taken for one about this.
    LineageNotCompared;
    /// A message bound to another sender is taken for one to this.
    SenderNotCompared;
    /// A message bound to another receiver is taken for one by this.
    ReceiverNotCompared;
    /// A message of a hand-over with an arbiter is taken for one without.
    ArbiterNotCompared;
    /// Who says a message does not matter.
    SpeakerNotCompared;
    /// An operator may end the doubt though the other host is alive.
    ResolvedWithoutFence;
    /// The arbiter grants to whoever asks.
    ArbiterGrantsTwice;
    /// A grant to the other host is taken for one to this.
    GrantToOtherTaken;
    /// A grant of another epoch is taken for one of this.
    GrantOfOtherEpochTaken;
    /// The receiver starts without asking the arbiter.
    ReceiverDoesNotAsk;
    /// The sender takes the guest back without asking the arbiter.
    SenderDoesNotAsk;
    /// A message of a hand-over with post-copy is taken for one without.
    PostCopyNotCompared;
    /// STARTED leads to GONE though pages are absent.
    GoneAtStarted;
    /// STARTED does not lead to serving what is absent.
    NothingServed;
    /// What is served is let run when the receiver is late.
    ServedResumesWhenLate;
    /// A cancel is followed while pages are served.
    CancelWhileServing;
    /// The memory that is served is given up before GONE is durable.
    ReleasedBeforeGone;
    /// DONE is believed before STARTED was heard.
    FilledBeforeStarted;
    /// DONE in a fill session of another session is taken for one of this.
    FilledSessionNotCompared;
    /// DONE of another epoch is taken for one of this.
    FilledEpochNotCompared;
    /// DONE with another root is taken for one with this.
    FilledRootNotCompared;
    /// A receiver with pages absent says STARTED after a restart, as if it had them.
    LackingSaysStarted;
    /// GONE brings a guest with absent pages back that a restart has lost.
    LostTakesGone;
}

impl Mutant {
    /// Whether it bends what only hand-overs with pages absent have.
    pub(crate) fn is_of_post_copy(self) -> bool {
        use Mutant as M;
        let filled = matches!(
            self,
            M::FilledBeforeStarted | M::FilledSessionNotCompared | M::FilledEpochNotCompared | M::FilledRootNotCompared
        );
        let served = matches!(
            self,
            M::GoneAtStarted
                | M::NothingServed
                | M::ServedResumesWhenLate
                | M::CancelWhileServing
                | M::ReleasedBeforeGone
        );
        filled || served || matches!(self, M::PostCopyNotCompared | M::LackingSaysStarted | M::LostTakesGone)
    }

    /// Whether this record, of which the machine is told that it is durable, never reaches the disk.
    pub(crate) fn skips_write(self, at: usize, record: &Record) -> bool {
        let by_sender = record.handover.sender == IDS[at];
        match self {
            Self::HandedNotWritten => record.kind == RecordKind::Handed,
            Self::ReturnedNotWritten => record.kind == RecordKind::Returned,
            Self::GoneNotWritten => record.kind == RecordKind::Gone && by_sender,
            Self::RejectedNotWritten | Self::UnknownCommitNotRecorded => record.kind == RecordKind::Rejected,
            Self::StartedNotWritten => record.kind == RecordKind::Started,
            _ => false,
        }
    }

    /// What the code does with an input, bent.
    pub(crate) fn step(self, desk: &mut Handovers, input: Input) -> Vec<Output> {
        let sender = desk.outgoing().map(|sender| (sender.phase(), *sender.handover()));
        let receiver = desk.incoming().map(|receiver| (receiver.phase(), *receiver.handover()));
        let handed = sender.filter(|(phase, _)| *phase == SenderPhase::Handed).map(|(_, handover)| handover);
        let phase = receiver.map(|(phase, _)| phase);
        match (self, input) {
            (Self::ResumesWhenLate, Input::Timeout) | (Self::CancelAfterHanded, Input::Cancel) => {
                if let Some(handover) = handed {
                    return vec![Output::Resume(handover)];
                }
            }
            (Self::StartsWhenLate, Input::Timeout) if phase == Some(ReceiverPhase::Ready) => {
                return receiver.map(|(_, handover)| Output::Run(handover)).into_iter().collect();
            }
            (Self::RejectAfterStarted, Input::Cancel) if phase == Some(ReceiverPhase::Started) => {
                return receiver.map(|(_, handover)| say(Word::Reject, handover)).into_iter().collect();
            }
            (Self::ServedResumesWhenLate, Input::Timeout) | (Self::CancelWhileServing, Input::Cancel) => {
                if let Some((SenderPhase::Serving, handover)) = sender {
                    return vec![Output::Resume(handover)];
                }
            }
            (Self::FilledBeforeStarted, Input::Filled(handover)) if handed == Some(handover) => {
                let message = Message { word: Word::Started, handover };
                let mut outputs = desk.handle(Input::Message { from: handover.receiver, message });
                outputs.extend(desk.handle(input));
                return outputs;
            }
            (Self::LostTakesGone, Input::Message { message: Message { word: Word::Gone, handover }, .. }) => {
                desk.keep(&handover);
            }
            (Self::FailedHandedResumes, Input::Failed(record)) if record.kind == RecordKind::Handed => {
                return vec![Output::Resume(record.handover)];
            }
            _ => {}
        }
        let outputs = match self.bent_input(desk, input) {
            Some(input) => desk.handle(input),
            None => Vec::new(),
        };
        outputs.into_iter().flat_map(|output| self.bent_output(desk, output)).collect()
    }

    fn bent_input(self, desk: &Handovers, input: Input) -> Option<Input> {
        let live = desk.outgoing().map(|sender| *sender.handover());
        let live = live.or_else(|| desk.incoming().map(|receiver| *receiver.handover()));
        match input {
            Input::Filled(handover) => Some(Input::Filled(self.bent_filled(handover, live?))),
            Input::Failed(record) if self == Self::FailedIsWritten => Some(Input::Durable(record)),
            Input::Granted(grant) => {
                let live = live?;
                let me = if desk.outgoing().is_some() { live.sender } else { live.receiver };
                Some(Input::Granted(self.bent_grant(grant, live, me)))
            }
            Input::Message { from, message: Message { word, handover } } => {
                let unknown = desk.guest_at(&handover).is_none() && word == Word::Commit;
                if unknown && self == Self::UnknownCommitIgnored {
                    return None;
                }
                let Some(live) = live else { return Some(input) };
                let handover = self.bent_binding(handover, live);
                let speaker = if word.is_senders() { live.sender } else { live.receiver };
                let from = if self == Self::SpeakerNotCompared { speaker } else { from };
                Some(Input::Message { from, message: Message { word, handover } })
            }
            _ => Some(input),
        }
    }

    fn bent_binding(self, handover: Handover, live: Handover) -> Handover {
        match self {
            Self::SessionNotCompared => Handover { session: live.session, ..handover },
            Self::EpochNotCompared => Handover { epoch: live.epoch, ..handover },
            Self::RootNotCompared => Handover { root: live.root, ..handover },
            Self::LineageNotCompared => Handover { lineage: live.lineage, ..handover },
            Self::SenderNotCompared => Handover { sender: live.sender, ..handover },
            Self::ReceiverNotCompared => Handover { receiver: live.receiver, ..handover },
            Self::ArbiterNotCompared => Handover { arbiter: live.arbiter, ..handover },
            Self::PostCopyNotCompared => Handover { post_copy: live.post_copy, ..handover },
            _ => handover,
        }
    }

    fn bent_filled(self, handover: Handover, live: Handover) -> Handover {
        match self {
            Self::FilledSessionNotCompared => Handover { session: live.session, ..handover },
            Self::FilledEpochNotCompared => Handover { epoch: live.epoch, ..handover },
            Self::FilledRootNotCompared => Handover { root: live.root, ..handover },
            _ => handover,
        }
    }

    fn bent_grant(self, grant: Grant, live: Handover, me: HostId) -> Grant {
        match self {
            Self::GrantToOtherTaken => Grant { host: me, ..grant },
            Self::GrantOfOtherEpochTaken => Grant { epoch: live.epoch, ..grant },
            _ => grant,
        }
    }

    /// What takes the place of an output.
    fn bent_output(self, desk: &mut Handovers, output: Output) -> Vec<Output> {
        match output {
            Output::Persist(Record { kind, handover }) => self.bent_persist(desk, kind, handover, output),
            Output::Send(Message { word: Word::Reject, handover }) if self == Self::RejectedForgotten => {
                vec![output, Output::Forget(handover)]
            }
            Output::Send(Message { word: Word::Started, handover }) if self == Self::StartedForgotten => {
                vec![output, Output::Forget(handover)]
            }
            Output::Fill(handover) if self == Self::GoneAtStarted => desk.handle(Input::Filled(handover)),
            Output::Fill(_) if self == Self::NothingServed => Vec::new(),
            Output::AskArbiter(handover) => {
                let grant = |host| Input::Granted(Grant { lineage: handover.lineage, epoch: handover.epoch, host });
                let by_sender = desk.outgoing().is_some();
                match self {
                    Self::ReceiverDoesNotAsk if !by_sender => desk.handle(grant(handover.receiver)),
                    Self::SenderDoesNotAsk if by_sender => desk.handle(grant(handover.sender)),
                    _ => vec![output],
                }
            }
            _ => vec![output],
        }
    }

    fn bent_persist(self, desk: &mut Handovers, kind: RecordKind, handover: Handover, output: Output) -> Vec<Output> {
        let by_sender = desk.outgoing().is_some_and(|sender| *sender.handover() == handover);
        match (self, kind) {
            (Self::CommitBeforeHanded, RecordKind::Handed) => vec![output, say(Word::Commit, handover)],
            (Self::StartedSaidEarly, RecordKind::Started) => vec![output, say(Word::Started, handover)],
            (Self::RejectSaidEarly, RecordKind::Rejected) => vec![output, say(Word::Reject, handover)],
            (Self::RunsBeforeStarted, RecordKind::Started) => vec![output, Output::Run(handover)],
            (Self::ResumesBeforeReturned, RecordKind::Returned) => vec![output, Output::Resume(handover)],
            (Self::ReleasedBeforeGone, RecordKind::Gone) if by_sender => vec![output, Output::Release(handover)],
            (Self::HandedForgotten, RecordKind::Gone) if by_sender => vec![Output::Forget(handover), output],
            // The record of what is not known says that it was started.
            (Self::UnknownCommitStarts, RecordKind::Rejected) => vec![Output::Run(handover)],
            _ => vec![output],
        }
    }
}

fn say(word: Word, handover: Handover) -> Output {
    Output::Send(Message { word, handover })
}
