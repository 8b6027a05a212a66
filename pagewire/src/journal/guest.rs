//! One guest's hand-overs, carried out: what the core wants written is on the disk before anything that depends on it
//! is said or done.

use super::disk::{ASIDE, Folder};
use super::{FILES_MAX, JournalError, KEY, Living, NAME, file_of, judge, key, read_name};
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::handover::{
    Epoch, Handover, Handovers, HostId, Input, Output, Record, RecordKind, Refusal, SenderPhase,
};
use pagewire_store::Lineage;
use std::collections::VecDeque;
use std::time::Duration;

/// How often a record is tried to be written before the core hears that it failed.
const TRIES: usize = 3;

/// Decides about one guest on this host, as long as it lives.
///
/// Calls write and sync files: some milliseconds, and on a disk that fails `TRIES` attempts with a pause between them.
/// What must be written and cannot is *owed*: the guest stays frozen, as whoever asks after a crash must not find less
/// than what was done. It is tried again by [`retry`](Self::retry), and before whatever comes next.
#[derive(Debug)]
pub struct GuestJournal {
    folder: Folder,
    name: Option<ImageName>,
    handovers: Handovers,
    owed: Vec<Record>,
    failure: Option<JournalError>,
    pause: Duration,
    living: Living,
    /// There may be a key.
    keyed: bool,
}

impl GuestJournal {
    // SPEC 11.16
    pub(super) fn restore(
        folder: Folder,
        host: HostId,
        lineage: LineageId,
        name: Option<&ImageName>,
        kept: bool,
        pause: Duration,
    ) -> Result<Self, JournalError> {
        // Whoever was here may have been killed between a rename and its sync. What is read is acted upon, so first it
        // has to be durable.
        folder.sync()?;
        let (mut records, mut keyed) = (Vec::new(), false);
        for file in folder.names(FILES_MAX)? {
            if file.to_str().is_some_and(|file| file.ends_with(ASIDE)) {
                folder.unlink(&file)?;
            }
            keyed |= *file == *KEY;
            records.extend(judge(&folder, &file, host, lineage)?);
        }
        let path = folder.path().to_owned();
        let restored = Handovers::restore(host, lineage, &records, kept);
        let (handovers, outputs) = restored.map_err(|source| JournalError::Record { path, source })?;
        let living = Living::default();
        let mut guest = Self { folder, name: None, handovers, owed: vec![], failure: None, pause, living, keyed };
        guest.carry_out(outputs);
        guest.call(name)?;
        Ok(guest)
    }

    // SPEC 11.16
    /// What this process has started with pages absent is not lost, and what it will start belongs to it.
    pub(super) fn live_on(&mut self, living: Living) {
        living.with(|living| living.iter().for_each(|handover| self.handovers.keep(handover)));
        self.living = living;
    }

    /// Keeps what the guest is called.
    fn call(&mut self, name: Option<&ImageName>) -> Result<(), JournalError> {
        // What else the file may be, it is replaced when there is a name.
        let called = read_name(&self.folder).unwrap_or_default();
        if let Some(name) = name.filter(|name| called.as_ref() != Some(name)) {
            self.folder.put(NAME, format!("{name}\n").as_bytes())?;
        }
        self.name = name.cloned().or(called);
        Ok(())
    }

    /// What the guest is called on this host.
    pub fn name(&self) -> Option<&ImageName> {
        self.name.as_ref()
    }

    /// Where the hand-overs stand.
    pub fn handovers(&self) -> &Handovers {
        &self.handovers
    }

    /// A session wants to send the guest away: the epoch for it.
    ///
    /// # Errors
    /// See [`Handovers::open`].
    pub fn open(&mut self, session: [u8; 16]) -> Result<Epoch, Refusal> {
        self.handovers.open(session)
    }

    /// The session ends before it has handed the guest over.
    pub fn close(&mut self, session: [u8; 16]) {
        self.handovers.close(session);
        self.drop_key();
    }

    /// The session has frozen the guest and stated all of it.
    ///
    /// # Errors
    /// See [`Handovers::send`].
    pub fn send(&mut self, handover: Handover) -> Result<(), Refusal> {
        self.handovers.send(handover)
    }

    /// Whether a session may bring the guest at this epoch.
    ///
    /// # Errors
    /// See [`Handovers::may_begin`].
    pub fn may_begin(&self, epoch: Epoch) -> Result<(), Refusal> {
        self.handovers.may_begin(epoch)
    }

    /// A session by `from` has brought everything, and all of it is verified: what has to be done, in this order.
    pub fn receive(&mut self, from: HostId, handover: Handover) -> Vec<Output> {
        let mut told = self.retry();
        let outputs = self.handovers.receive(from, handover);
        told.extend(self.carry_out(outputs));
        told
    }

    /// What has to be done upon an input, in this order. Records are written, and forgotten, already: neither
    /// [`Output::Persist`] nor [`Output::Forget`] is among it, and [`Input::Durable`] and [`Input::Failed`] are never the
    /// caller's to say.
    pub fn handle(&mut self, input: Input) -> Vec<Output> {
        let mut told = self.retry();
        let outputs = self.handovers.handle(input);
        told.extend(self.carry_out(outputs));
        told
    }

    /// The hand-over whose absent pages this host has to serve.
    pub fn serving(&self) -> Option<Handover> {
        let sender = self.handovers.outgoing().filter(|sender| sender.phase() == SenderPhase::Serving);
        sender.map(|sender| *sender.handover())
    }

    /// Keeps what the pages of a session are digested with, which was opened and may leave some of them behind, until the
    /// memory is given up or the guest is this host's again.
    ///
    /// # Errors
    /// It cannot be made to last; the session must not begin.
    pub(crate) fn keep_key(&mut self, session: [u8; 16], lineage: &Lineage) -> Result<(), JournalError> {
        self.keyed = true;
        key::put(&self.folder, session, lineage)
    }

    /// What the pages of a session are digested with; `None` is the public domain.
    ///
    /// # Errors
    /// What was kept is damaged.
    pub(crate) fn key_of(&self, session: [u8; 16]) -> Result<Option<Lineage>, JournalError> {
        key::get(&self.folder, session)
    }

    // SPEC 11.20
    /// The receiver has said DONE, with the root of `handover`, in a fill session of it: what has to be done. The memory
    /// may go upon [`Output::Release`], and not before.
    pub fn filled(&mut self, handover: Handover) -> Vec<Output> {
        self.handle(Input::Filled(handover))
    }

    /// Tries again to write what is [owed](Self::owed).
    pub fn retry(&mut self) -> Vec<Output> {
        let owed = std::mem::take(&mut self.owed);
        self.carry_out(owed.into_iter().map(Output::Persist).collect())
    }

    /// Why records that must be written are not, if there are such: the guest stays frozen until a
    /// [`retry`](Self::retry) succeeds.
    pub fn owed(&self) -> Option<&JournalError> {
        self.failure.as_ref().filter(|_| !self.owed.is_empty())
    }

    fn carry_out(&mut self, outputs: Vec<Output>) -> Vec<Output> {
        let mut left = VecDeque::from(outputs);
        let mut told = Vec::new();
        while let Some(output) = left.pop_front() {
            match output {
                Output::Persist(record) => left.extend(self.persist(record)),
                // What stays is found, and forgotten again, by the next one who restores.
                Output::Forget(handover) => drop(self.folder.unlink(file_of(&handover).as_ref())),
                Output::Run(handover) if handover.post_copy => {
                    self.living.with(|living| living.insert(handover));
                    told.push(output);
                }
                output => told.push(output),
            }
        }
        self.drop_key();
        told
    }

    /// Removes the key when nobody can need it any more: the record that says so is durable, or there never was one. What
    /// stays is found, and removed, by the next one who restores.
    fn drop_key(&mut self) {
        let is_needed = self.handovers.is_sending() || self.handovers.outgoing().is_some();
        if self.keyed && !is_needed {
            self.keyed = self.folder.unlink(KEY.as_ref()).is_err();
        }
    }

    /// Writes a record; what follows from it.
    fn persist(&mut self, record: Record) -> Vec<Output> {
        let (file, bytes) = (file_of(&record.handover), record.encode());
        for attempt in 0..TRIES {
            if attempt > 0 {
                std::thread::sleep(self.pause);
            }
            match self.folder.put(&file, &bytes) {
                Ok(()) => {
                    if record.kind != RecordKind::Started {
                        self.living.with(|living| living.remove(&record.handover));
                    }
                    return self.handovers.handle(Input::Durable(record));
                }
                Err(error) => self.failure = Some(error),
            }
        }
        let mut outputs = self.handovers.handle(Input::Failed(record));
        // What the core asks for again at once would be tried for ever: the caller gets the time to do something else.
        let asked = outputs.len();
        outputs.retain(|output| *output != Output::Persist(record));
        if outputs.len() < asked {
            self.owed.push(record);
        }
        outputs
    }
}
