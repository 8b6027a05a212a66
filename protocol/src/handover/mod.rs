//! The hand-over of a guest: at no time two hosts that may run it, and no crash that loses it while one side holds all
//! of it.
//!
//! ```text
//! sender                                        receiver
//! guest frozen, ROOT said                       all verified
//!              ◄──────────────── READY ──────
//! HANDED durable
//!              ─────── COMMIT ──────────────►
//!                                               STARTED durable, the guest runs    (or REJECTED durable)
//!              ◄─────────────── STARTED ─────   (REJECT)
//! GONE durable  (RETURNED durable, it resumes)
//!              ──────── GONE ───────────────►   GONE durable
//! ```
//!
//! Between HANDED and an answer nobody but the receiver can know who has the guest: the sender is *in doubt*, keeps it
//! frozen and says so. STARTED, REJECT, an arbiter, or an operator who has fenced the other host off end that, and
//! nothing else does: no time that passes, no connection that breaks, no restart.
//!
//! With *post-copy* the guest starts while pages of it are absent. STARTED then says whose it is, and not yet that the
//! sender's memory can go: that is served from until the receiver lacks nothing ([`Output::Fill`], [`Input::Filled`]).
//!
//! This module is pure. [`Handovers`] holds all hand-overs of one guest at one host, a [`Sender`] or [`Receiver`]
//! machine for each; inputs go in, outputs come out, in the order in which they have to be carried out. What depends on
//! a record comes out only after [`Input::Durable`] has said that the record will survive a crash. A restart rebuilds
//! everything from the records. `tests/suite/tests/handover_model.rs` checks this very code, and that no clause of the
//! rule can be left out.

mod binding;
mod guest;
mod receiver;
mod record;
mod sender;

#[cfg(test)]
mod post_copy_tests;
#[cfg(test)]
mod tests;

pub use binding::{Epoch, Handover, HostId, Message, Word};
pub use guest::{Handovers, Whereabouts};
pub use receiver::{Receiver, ReceiverPhase};
pub use record::{Record, RecordError, RecordKind};
pub use sender::{Sender, SenderPhase};

use crate::domain::LineageId;
use thiserror::Error;

/// What happens to a host's hand-overs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Input {
    /// `from`, as its connection has proven it, says something.
    Message {
        /// The other host.
        from: HostId,
        /// What it says.
        message: Message,
    },
    /// A new connection to this host stands: what may have been lost is said again.
    Connected(HostId),
    /// This record will survive a crash.
    Durable(Record),
    /// This record could not be made durable. Whether it is there after a crash, nobody knows.
    Failed(Record),
    /// Sender: READY has come, and whoever embeds it lets go of the guest. From here on it cannot be cancelled.
    Commit,
    /// A user wants the guest to stay where it is.
    Cancel,
    /// The other side has been waited for long enough.
    Timeout,
    /// An operator ends the doubt.
    Resolve(Resolve),
    /// The arbiter has granted an epoch of the guest, perhaps to the other host.
    Granted(Grant),
    /// Sender: the receiver has said, in a session that served the absent pages of this hand-over's guest, that it has
    /// all of them, with the root that they should have.
    Filled(Handover),
}

/// How an operator ends the doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resolve {
    /// The guest is this host's: the other one is fenced off.
    Here(Fence),
    /// The guest is the other host's.
    There(Epoch),
}

/// An operator's word that a host neither runs the guest nor ever will under this epoch: it is off, or cut off from the
/// guest's disks, and its records are dealt with before it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence {
    /// The hand-over in doubt.
    pub epoch: Epoch,
    /// The host that is fenced off.
    pub host: HostId,
}

/// The arbiter's decision. It decides once for each epoch of a guest, durably, and tells everybody the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Grant {
    /// The guest.
    pub lineage: LineageId,
    /// The hand-over.
    pub epoch: Epoch,
    /// Who may start it.
    pub host: HostId,
}

/// What has to be done, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Output {
    /// Make this record durable in place of an earlier one of the same hand-over, then say [`Input::Durable`], or
    /// [`Input::Failed`]. Records of one hand-over are written one after the other. What must be written is asked for
    /// again after a failure; a driver waits a moment before it says that it failed.
    Persist(Record),
    /// This record is no longer needed. Nothing depends on when it goes.
    Forget(Handover),
    /// Say this to the other host, if there is a connection. What is lost is said again on the next one.
    Send(Message),
    /// Sender: the receiver is ready. [`Input::Commit`] goes on, now or when the embedder has done what it must before
    /// the guest changes hosts.
    Verified(Handover),
    /// Receiver: start the guest, or leave it paused; it is this host's.
    Run(Handover),
    /// Sender: let the guest run on; it stays this host's.
    Resume(Handover),
    /// Sender: the guest is the receiver's for good, which lacks pages: keep the memory and serve them, in as many
    /// sessions as it takes, until [`Input::Filled`]. Comes again each time that STARTED does.
    Fill(Handover),
    /// Sender: the guest is the receiver's for good, and the memory here can be given up.
    Release(Handover),
    /// Ask the arbiter for this epoch of the guest, in this host's name; its answer is [`Input::Granted`].
    AskArbiter(Handover),
    /// Tell whoever watches that nobody here knows where the guest is.
    InDoubt(Handover),
    /// Nothing has changed, and this is why.
    Refuse(Refusal),
}

/// Why something is not done. Nothing has changed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Error)]
pub enum Refusal {
    /// A cancel that comes too late.
    #[error("hand-over {0} can no longer be cancelled: it is decided by the receiver now")]
    TooLate(Epoch),
    /// A cancel, a commit or a resolve without anything it could be about.
    #[error("no hand-over here is waiting for that")]
    Nothing,
    /// A second hand-over while one is open.
    #[error("hand-over {0} of this guest is not ended: one at a time")]
    Busy(Epoch),
    /// A session that wants to send while another prepares to.
    #[error("another session is sending this guest")]
    Sending,
    /// A guest to be sent that is not here.
    #[error("the records say that the guest is not on this host")]
    NotHere,
    /// A guest of which not all has come.
    #[error("pages of the guest may still be absent on this host, and its sender has them")]
    Lacking,
    /// A guest to be received that is here.
    #[error("the records say that the guest is on this host already")]
    IsHere,
    /// An epoch that the records have reached.
    #[error("epoch {epoch} is over: the records have reached {floor}")]
    EpochOver {
        /// The epoch of the hand-over.
        epoch: Epoch,
        /// The highest in the records.
        floor: Epoch,
    },
    /// An epoch that is too far above the records to be honest.
    #[error("epoch {epoch} is too far above {floor}")]
    EpochFar {
        /// The epoch of the hand-over.
        epoch: Epoch,
        /// The highest in the records.
        floor: Epoch,
    },
    /// Another guest, or hosts that are not this one and the one that speaks.
    #[error("the message is bound to another guest or to other hosts")]
    Foreign,
    /// A message about a hand-over that there is not.
    #[error("no hand-over {0} is known here that this could be about")]
    Unknown(Epoch),
    /// A receiver that says it has started what was never committed to it.
    #[error("hand-over {0} was started by the receiver without a COMMIT")]
    Early(Epoch),
    /// A receiver that says it has started what was taken back.
    #[error("hand-over {0} was taken back, and the receiver says that it runs the guest: the fence did not hold")]
    Conflict(Epoch),
    /// Pages that are said to have come before the receiver has said that it runs the guest.
    #[error("hand-over {0}: the receiver has not said that it started the guest, so its memory is kept")]
    NotStarted(Epoch),
    /// The guest had started here, and its memory went in a crash.
    #[error("hand-over {0}: the guest was started here and was lost in a crash")]
    Lost(Epoch),
    /// A fence around neither this hand-over's epoch nor its other host.
    #[error("the fence is not for hand-over {0} and its other host")]
    WrongFence(Epoch),
    /// More hand-overs wait for their sender's GONE than a host keeps.
    #[error("{0} hand-overs of this guest wait for their sender: resolve them first")]
    Full(usize),
}
