//! A host's journal: what it must still know of hand-overs after a crash, as files.
//!
//! ```text
//! JOURNAL/                   one host's; 0700
//!   host                     its identity: 32 random bytes, made once
//!   0f…d2/                   one guest, by lineage; locked by whoever decides about it
//!     name                   what people call it
//!     key                    what the pages of its last session that may end in post-copy are digested with
//!     EPOCH-BINDING.record   one for each hand-over (SPEC 11.17)
//! ```
//!
//! One [`GuestJournal`] at a time decides about a guest, whatever process it is in. Nothing that it says or lets happen
//! is ahead of the disk. A file that it did not write is an error that names it, and nothing is decided. Where the
//! journal lies on a file system that forgets, or is put back to an earlier state, no rule of the hand-over holds.

mod disk;
mod guest;
mod key;

#[cfg(test)]
mod crash;
#[cfg(test)]
mod tests;

pub use guest::GuestJournal;

use crate::entropy::random;
use disk::{ASIDE, Folder, Watcher};
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::handover::{Handover, Handovers, HostId, Record, RecordError, Whereabouts};
use pagewire_protocol::limits::{HANDOVERS_MAX, NAME_BYTES_MAX};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const HOST: &str = "host";
const NAME: &str = "name";
const KEY: &str = "key";
const RECORD: &str = ".record";
/// Files in the folder of a guest: its records, those that a crash kept from being removed, and what was being written.
const FILES_MAX: usize = 4 * HANDOVERS_MAX;
/// Guests that are listed: more than any host has run.
const GUESTS_MAX: usize = 1 << 16;
/// Between two attempts to write a record.
const PAUSE: Duration = Duration::from_millis(100);

/// Why the journal could not do something. Nothing was decided.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A folder or file is not what the journal made.
    #[error("{path}: {why}")]
    Refused {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A record that says nothing, or not what this host could have written there.
    #[error("{path}")]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: RecordError,
    },
    /// More files than the journal makes.
    #[error("{path}: holds more than {max} files")]
    Crowded {
        /// The folder.
        path: PathBuf,
        /// How many there may be.
        max: usize,
    },
    /// Another session, here or in another process, decides about the guest.
    #[error("guest {guest}: another session of it is open on this host")]
    Busy {
        /// Its name, or else its lineage.
        guest: String,
    },
    /// No folder to keep it in.
    #[error("neither XDG_STATE_HOME nor HOME names a folder for the journal: name one with --journal")]
    NoHome,
    /// The system gives no random bytes.
    #[error("no randomness from the system")]
    Entropy,
    /// The operating system refused.
    #[error("{path}: {what}")]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl JournalError {
    /// The file that it is about, if it is about one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Refused { path, .. } | Self::Record { path, .. } | Self::Crowded { path, .. } => Some(path),
            Self::Io { path, .. } => Some(path),
            Self::Busy { .. } | Self::NoHome | Self::Entropy => None,
        }
    }
}

/// One host's journal.
#[derive(Debug)]
pub struct Journal {
    folder: Folder,
    host: HostId,
    pause: Duration,
    living: Living,
}

/// Hand-overs by which this process has started guests with pages absent, until nothing is: what a restart loses.
#[derive(Clone, Debug, Default)]
struct Living(Arc<Mutex<BTreeSet<Handover>>>);

impl Living {
    fn with<T>(&self, run: impl FnOnce(&mut BTreeSet<Handover>) -> T) -> T {
        run(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What the journal says about one guest.
#[derive(Debug)]
pub struct GuestStatus {
    /// The guest.
    pub lineage: LineageId,
    /// What it is called here.
    pub name: Option<ImageName>,
    /// Where it is, if the memory of a guest that was started here has not been lost and whoever started one with pages
    /// absent still lives; `None` if files are damaged, as nothing is decided then.
    pub whereabouts: Option<Whereabouts>,
    /// Its records, by epoch.
    pub records: Vec<Record>,
    /// What is in its folder and should not be.
    pub damaged: Vec<JournalError>,
}

impl Journal {
    /// Opens the journal in folder `dir`, and makes it if there is none.
    ///
    /// # Errors
    /// A folder that others have access to, an identity that is damaged, or a folder full of something else.
    pub fn open(dir: &Path) -> Result<Self, JournalError> {
        Self::open_watched(dir, None)
    }

    fn open_watched(dir: &Path, watch: Watcher) -> Result<Self, JournalError> {
        Folder::make(dir, &watch)?;
        let folder = Folder::open(dir, watch)?;
        let gone = || JournalError::Refused { path: dir.to_owned(), why: "went away as soon as it was made" };
        let folder = folder.ok_or_else(gone)?;
        let host = match read_host(&folder)? {
            Some(host) => host,
            None => {
                folder.lock()?;
                let made = make_host(&folder);
                folder.unlock();
                made?
            }
        };
        Ok(Self { folder, host, pause: PAUSE, living: Living::default() })
    }

    /// Opens the journal in folder `dir` if there is one, and makes nothing.
    ///
    /// # Errors
    /// See [`open`](Self::open).
    pub fn existing(dir: &Path) -> Result<Option<Self>, JournalError> {
        let Some(folder) = Folder::open(dir, None)? else { return Ok(None) };
        match read_host(&folder)? {
            Some(host) => Ok(Some(Self { folder, host, pause: PAUSE, living: Living::default() })),
            None => is_new(&folder).map(|()| None),
        }
    }

    /// Where a user's journal is: `$XDG_STATE_HOME/pagewire/journal`, else `$HOME/.local/state/pagewire/journal`.
    ///
    /// # Errors
    /// Neither is set to an absolute path.
    pub fn default_dir() -> Result<PathBuf, JournalError> {
        default_dir(std::env::var_os("XDG_STATE_HOME"), std::env::var_os("HOME"))
    }

    /// Who this host is, where its connections prove nothing.
    pub fn host(&self) -> HostId {
        self.host
    }

    /// The folder, for messages.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Begins to decide about a guest. `name` is kept for people; `kept` says that the memory of the guest, had it been
    /// started here, has outlived whatever ended the last session. One that was started with pages absent has done so as
    /// long as this journal lives, through which it was started, unless it was [lost](Self::lose). Nobody else decides
    /// until the answer is dropped.
    ///
    /// # Errors
    /// Another session has it, or something is wrong with its files.
    pub fn guest(
        &self,
        lineage: LineageId,
        name: Option<&ImageName>,
        kept: bool,
    ) -> Result<GuestJournal, JournalError> {
        let folder = self.folder.make_folder(&hex(&lineage.0))?;
        if !folder.try_lock()? {
            let called = name.cloned().or_else(|| read_name(&folder).ok().flatten());
            let guest = called.map_or_else(|| hex(&lineage.0), |name| name.as_str().to_owned());
            return Err(JournalError::Busy { guest });
        }
        let mut guest = GuestJournal::restore(folder, self.host, lineage, name, kept, self.pause)?;
        guest.live_on(self.living.clone());
        Ok(guest)
    }

    /// The guest that this process has started by `handover` with pages absent is given up: it is lost, as after a
    /// restart.
    pub fn lose(&self, handover: &Handover) {
        self.living.with(|living| living.remove(handover));
    }

    /// What the journal says about every guest, by lineage. Takes no lock: what changes meanwhile is seen as it was, or
    /// as it is.
    ///
    /// # Errors
    /// A folder that cannot be read. What is wrong with a guest's files is part of the answer.
    pub fn guests(&self) -> Result<Vec<GuestStatus>, JournalError> {
        let names = self.folder.names(GUESTS_MAX)?;
        let lineages = names.iter().filter_map(|name| unhex(name.to_str()?));
        Ok(lineages.map(|lineage| self.status(LineageId(lineage))).collect())
    }

    fn status(&self, lineage: LineageId) -> GuestStatus {
        let mut status = GuestStatus { lineage, name: None, whereabouts: None, records: vec![], damaged: vec![] };
        if let Err(error) = self.look_at(&mut status) {
            status.damaged.push(error);
        }
        status.records.sort_by_key(|record| record.handover.epoch);
        if status.damaged.is_empty() {
            let restored = Handovers::restore(self.host, lineage, &status.records, true);
            status.whereabouts = restored.ok().map(|(mut handovers, _)| {
                status.records.iter().for_each(|record| handovers.keep(&record.handover));
                handovers.whereabouts()
            });
        }
        status
    }

    fn look_at(&self, status: &mut GuestStatus) -> Result<(), JournalError> {
        let Some(folder) = self.folder.folder(&hex(&status.lineage.0))? else { return Ok(()) };
        for name in folder.names(FILES_MAX)? {
            match judge(&folder, &name, self.host, status.lineage) {
                Ok(Some(record)) => status.records.push(record),
                Ok(None) => {}
                Err(error) => status.damaged.push(error),
            }
        }
        status.name = read_name(&folder)?;
        Ok(())
    }
}

fn default_dir(state: Option<OsString>, home: Option<OsString>) -> Result<PathBuf, JournalError> {
    let absolute = |dir: Option<OsString>| dir.map(PathBuf::from).filter(|dir| dir.is_absolute());
    let state = absolute(state).or_else(|| absolute(home).map(|home| home.join(".local/state")));
    state.map(|state| state.join("pagewire/journal")).ok_or(JournalError::NoHome)
}

fn read_host(folder: &Folder) -> Result<Option<HostId>, JournalError> {
    let Some(bytes) = folder.read(HOST.as_ref(), 32)? else { return Ok(None) };
    match <[u8; 32]>::try_from(bytes) {
        Ok(host) if host != [0; 32] => Ok(Some(HostId(host))),
        _ => Err(JournalError::Refused {
            path: folder.path().join(HOST),
            why: "is damaged: this host's identity is 32 random bytes, and no record can be judged without it",
        }),
    }
}

/// Whether a folder without an identity is one that nobody has used: another identity would make strangers of guests.
fn is_new(folder: &Folder) -> Result<(), JournalError> {
    let is_left = |name: &OsString| *name == *format!("{HOST}{ASIDE}");
    if folder.names(FILES_MAX)?.iter().all(is_left) {
        return Ok(());
    }
    let why = "holds files, and no identity of a host: it is not a journal, or has lost the file `host`";
    Err(JournalError::Refused { path: folder.path().to_owned(), why })
}

/// Gives the host an identity, unless somebody was faster.
fn make_host(folder: &Folder) -> Result<HostId, JournalError> {
    if let Some(host) = read_host(folder)? {
        return Ok(host);
    }
    is_new(folder)?;
    // The folders above may be new, too. From here on only names in the journal itself have to be synced.
    folder.sync_all()?;
    let host = random::<32>().map_err(|_| JournalError::Entropy)?;
    folder.put(HOST, &host)?;
    Ok(HostId(host))
}

/// What the guest is called; a file that says nothing of the kind is none.
fn read_name(folder: &Folder) -> Result<Option<ImageName>, JournalError> {
    let bytes = folder.read(NAME.as_ref(), NAME_BYTES_MAX.saturating_add(1))?.unwrap_or_default();
    let text = String::from_utf8(bytes).unwrap_or_default();
    Ok(text.strip_suffix('\n').and_then(|name| ImageName::new(name).ok()))
}

/// The record in a file of a guest's folder; `None` for a file that says nothing about hand-overs, or is gone.
fn judge(folder: &Folder, name: &OsStr, host: HostId, lineage: LineageId) -> Result<Option<Record>, JournalError> {
    let path = || folder.path().join(name);
    let text = name.to_str().unwrap_or_default();
    if text == NAME || text == KEY || text.ends_with(ASIDE) {
        return Ok(None);
    }
    if !text.ends_with(RECORD) {
        return Err(JournalError::Refused { path: path(), why: "is no file of a journal" });
    }
    let Some(bytes) = folder.read(name, Record::BYTES)? else { return Ok(None) };
    let record = Record::decode(&bytes).map_err(|source| JournalError::Record { path: path(), source })?;
    if text != file_of(&record.handover) {
        return Err(JournalError::Refused {
            path: path(),
            why: "is the record of another hand-over than its name says",
        });
    }
    // Each by itself, so that the error can say which file it is.
    Handovers::restore(host, lineage, &[record], true)
        .map_err(|source| JournalError::Record { path: path(), source })?;
    Ok(Some(record))
}

/// What the record of a hand-over is called: by its epoch, for people, and by all that it is bound to. Two hand-overs
/// never have one file, whatever a peer chooses.
fn file_of(handover: &Handover) -> String {
    let mut binding = Vec::new();
    handover.encode(&mut binding);
    let binding = hex(&pagewire_protocol::digest::record_check(&binding));
    format!("{:020}-{binding}{RECORD}", handover.epoch.number())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The lineage that a folder is named by.
fn unhex(text: &str) -> Option<[u8; 16]> {
    let number = u128::from_str_radix(text, 16).ok()?.to_be_bytes();
    (hex(&number) == text).then_some(number)
}
