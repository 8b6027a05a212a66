//! A guest that runs: sent in rounds, stopped, handed over and started by whoever holds it.
//!
//! Both sides keep what they decided in a [`Journal`] before they act on it, so a crash or a lost
//! connection leaves the guest at one of them, or in a doubt that both can name.

mod asking;
mod bringing;
mod giving;
mod resuming;
mod taking;

pub use asking::ask_receiver;
pub use bringing::PostCopy;
pub(crate) use bringing::bring;
pub(crate) use giving::give;
pub use resuming::{resume, resume_memory};
pub use taking::{GuestStarter, Started};
pub(crate) use taking::{MemorySlot, Taking};

use crate::journal::{Journal, JournalError};
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::handover::{Grant, Handover, HostId, Whereabouts};
use pagewire_protocol::time::Span;
use pagewire_sender::converge::Limits;
use pagewire_sender::memory::DirtyBitmap;
use pagewire_transport::CancellationToken;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How often a receiver that does not answer is asked.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// How a guest that runs is sent.
#[derive(Clone, Debug)]
pub struct LiveOptions {
    /// How long it may take and how long the guest may stand still.
    pub limits: Limits,
    /// Where hand-overs are recorded.
    pub journal: Arc<Journal>,
    /// Who grants a guest to one host, if anybody does.
    pub lease: Option<Arc<dyn Arbiter>>,
    /// Who is asked whether the guest may be handed over, when it stands still and the receiver has all of it; without
    /// it that goes on at once.
    pub pause_before_switchover: Option<Arc<dyn Operator>>,
    /// When the guest may start at the receiver before all of its pages are there. The receiver must be able to.
    pub post_copy: PostCopy,
    /// Bytes a second that follow at most when the guest runs at the receiver, beside the pages that it waits for;
    /// [`SendOptions::bandwidth_limit`](crate::SendOptions::bandwidth_limit) if none is given.
    pub background_limit: Option<u64>,
    /// How long a receiver that does not answer is asked what became of the guest, before that is left to an operator.
    pub patience: Duration,
    /// Who writes to the file of [`send_live`](crate::send_live) marks here what was written, over pages of 4 KiB. Without
    /// it each round reads all of the file again.
    pub writes: Option<DirtyBitmap>,
    /// Keep what the guest is found to write in this file, for simulations: see [`trace`](crate::trace).
    pub trace: Option<PathBuf>,
}

impl LiveOptions {
    /// The defaults, with the records in `journal`.
    pub fn new(journal: Arc<Journal>) -> Self {
        Self {
            limits: Limits::default(),
            journal,
            lease: None,
            pause_before_switchover: None,
            post_copy: PostCopy::Never,
            background_limit: None,
            patience: Duration::from_secs(30),
            writes: None,
            trace: None,
        }
    }
}

/// Has the last word before a guest is handed over.
pub trait Operator: std::fmt::Debug + Send + Sync + 'static {
    /// The guest stands still, and the receiver has all of it. Blocks until it may be handed over, for 90 s at most: then
    /// it stays. Called on a thread of its own, which returns soon when `over` is cancelled: the session has ended.
    ///
    /// # Errors
    /// It may not be handed over; it runs on here.
    fn approve(&self, over: &CancellationToken) -> Result<(), String>;
}

/// Grants each epoch of a guest to one host, durably, and tells everybody the same.
pub trait Arbiter: std::fmt::Debug + Send + Sync + 'static {
    /// Who may start the guest of this hand-over; `me` if nobody has asked before.
    ///
    /// # Errors
    /// It cannot be told; then nobody may.
    fn ask(&self, handover: &Handover, me: HostId) -> io::Result<Grant>;
}

/// How guests that run are taken over.
#[derive(Clone, Debug)]
pub struct TakeOptions {
    /// Where hand-overs are recorded.
    pub journal: Arc<Journal>,
    /// Who grants a guest to one host, if anybody does.
    pub lease: Option<Arc<dyn Arbiter>>,
    /// Starts them.
    pub starter: Arc<dyn GuestStarter>,
}

/// The guest that is sent, as its hypervisor knows it.
pub trait GuestHooks: Send + 'static {
    /// Stops it, for as short as can be; what comes back goes with its memory: device state.
    ///
    /// # Errors
    /// It cannot be stopped, or has no state to give. It is let run then.
    fn pause(&mut self) -> Result<Blobs, String>;

    /// Lets it run on here. It was paused, or was to be.
    ///
    /// # Errors
    /// It cannot be; this becomes a warning of the report.
    fn resume(&mut self) -> Result<(), String>;

    /// Whether it can be slowed down.
    fn throttles(&self) -> bool {
        false
    }

    /// Slows it down to so many per cent less; 0 is full speed again, and is always said in the end where another
    /// figure was, wherever the guest is then.
    ///
    /// Other than that of 0 it is called while the session goes on, on its thread: what takes long goes to another.
    ///
    /// # Errors
    /// It cannot be; this becomes a warning of the report.
    fn throttle(&mut self, percent: u8) -> Result<(), String> {
        Err(format!("it cannot be slowed down by {percent} %"))
    }
}

/// The blob that holds a hypervisor's device state.
///
/// # Panics
/// Never: the name is legal.
pub fn device_state_name() -> Option<ImageName> {
    ImageName::new("device-state").ok()
}

/// What this host calls a guest.
fn name_of(journal: &Journal, lineage: LineageId) -> Option<ImageName> {
    journal.guests().ok()?.into_iter().find(|guest| guest.lineage == lineage)?.name
}

/// The guest that this host calls `name`; of several the one that is here.
fn lineage_of(journal: &Journal, name: &ImageName) -> Result<Option<LineageId>, JournalError> {
    let mut known = journal.guests()?;
    known.retain(|guest| guest.name.as_ref() == Some(name));
    let is_here =
        |whereabouts| matches!(whereabouts, Some(Whereabouts::Here | Whereabouts::Filling | Whereabouts::Unrecorded));
    let here = known.iter().find(|guest| is_here(guest.whereabouts));
    Ok(here.or_else(|| known.first()).map(|guest| guest.lineage))
}

/// A span of so many milliseconds, for [`Limits`].
pub fn milliseconds(milliseconds: u32) -> Span {
    Span::from_millis(u64::from(milliseconds))
}
