//! Folders of the journal as open handles, and the one place that changes anything in them.
//!
//! A folder is opened once, never through a symbolic link, and only if it is ours and closed to everybody else; what is
//! in it is reached by `*at` calls on that handle. A file is whole or absent under its name: it is written aside, synced,
//! renamed, and the folder is synced. Every change is announced to a [`Watch`] before it is made, so a test can cut a run
//! anywhere, or let any single change fail.

use super::JournalError;
use rustix::fs::{self, AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a file is called until it is whole.
pub(super) const ASIDE: &str = ".new";
const OPEN: OFlags = OFlags::NOFOLLOW.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// A change that is about to be made.
#[derive(Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests look at what is about to be done"))]
pub(super) enum Change<'a> {
    MakeFolder(&'a Path),
    SyncFolder(&'a Path),
    SyncAll,
    Create(&'a Path),
    Write(&'a Path),
    Sync(&'a Path),
    Rename(&'a Path, &'a Path),
    Unlink(&'a Path),
}

/// Sees every change before it is made, and may refuse it.
pub(super) trait Watch: std::fmt::Debug + Send + Sync {
    fn before(&self, change: &Change<'_>) -> io::Result<()>;
}

pub(super) type Watcher = Option<Arc<dyn Watch>>;

fn announce(watch: &Watcher, change: &Change<'_>) -> io::Result<()> {
    watch.as_ref().map_or(Ok(()), |watch| watch.before(change))
}

/// An open folder.
#[derive(Debug)]
pub(super) struct Folder {
    fd: OwnedFd,
    path: PathBuf,
    watch: Watcher,
}

impl Folder {
    /// Makes a folder and those above it, closed to others; one that is there is left as it is.
    pub(super) fn make(path: &Path, watch: &Watcher) -> Result<(), JournalError> {
        let is_missing = |path: &&Path| !path.as_os_str().is_empty() && std::fs::symlink_metadata(path).is_err();
        let missing: Vec<&Path> = path.ancestors().take_while(is_missing).collect();
        for folder in missing.into_iter().rev() {
            let made = announce(watch, &Change::MakeFolder(folder));
            let made = made.and_then(|()| match fs::mkdir(folder, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(errno) => Err(errno.into()),
            });
            made.map_err(|source| JournalError::Io { path: folder.to_owned(), what: "cannot be made", source })?;
        }
        Ok(())
    }

    /// Opens a folder; `None` if there is none.
    pub(super) fn open(path: &Path, watch: Watcher) -> Result<Option<Self>, JournalError> {
        // A slash at the end would lead through a symbolic link.
        let path: PathBuf = path.components().collect();
        let opened = fs::open(&path, OPEN | OFlags::DIRECTORY, Mode::empty());
        Self::opened(opened, path, watch)
    }

    /// A folder in this one; `None` if there is none.
    pub(super) fn folder(&self, name: &str) -> Result<Option<Self>, JournalError> {
        let opened = fs::openat(&self.fd, name, OPEN | OFlags::DIRECTORY, Mode::empty());
        Self::opened(opened, self.path.join(name), self.watch.clone())
    }

    fn opened(opened: Result<OwnedFd, Errno>, path: PathBuf, watch: Watcher) -> Result<Option<Self>, JournalError> {
        match opened {
            Ok(fd) => Self::judged(fd, path, watch).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::LOOP | Errno::NOTDIR) => {
                let link = std::fs::symlink_metadata(&path).is_ok_and(|info| info.is_symlink());
                let why = if link { "is a symbolic link; name the folder itself" } else { "is not a folder" };
                Err(JournalError::Refused { path, why })
            }
            Err(errno) => Err(JournalError::Io { path, what: "cannot be opened", source: errno.into() }),
        }
    }

    fn judged(fd: OwnedFd, path: PathBuf, watch: Watcher) -> Result<Self, JournalError> {
        let info = match fs::fstat(&fd) {
            Ok(info) => info,
            Err(errno) => return Err(JournalError::Io { path, what: "cannot be examined", source: errno.into() }),
        };
        let why = if info.st_uid != rustix::process::geteuid().as_raw() {
            "belongs to another user; give the journal a folder of its own"
        } else if info.st_mode & 0o077 != 0 {
            "others have access to it, and who can write a journal can start its guests: chmod 700 it, or name a new folder"
        } else {
            return Ok(Self { fd, path, watch });
        };
        Err(JournalError::Refused { path, why })
    }

    /// The path it was opened by, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A folder in this one, made if there is none. Its name is durable when this returns, whoever made it.
    pub(super) fn make_folder(&self, name: &str) -> Result<Self, JournalError> {
        let path = self.path.join(name);
        let made = self.announce(&Change::MakeFolder(&path));
        let made = made.and_then(|()| match fs::mkdirat(&self.fd, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(errno.into()),
        });
        made.map_err(|source| self.io(name.as_ref(), "cannot be made", source))?;
        self.sync()?;
        let folder = self.folder(name)?;
        folder.ok_or_else(|| self.io(name.as_ref(), "went away as soon as it was made", Errno::NOENT.into()))
    }

    /// Everything in it, sorted.
    ///
    /// # Errors
    /// More than `max` names, too.
    pub(super) fn names(&self, max: usize) -> Result<Vec<OsString>, JournalError> {
        let fail = |errno: Errno| JournalError::Io {
            path: self.path.clone(),
            what: "its entries cannot be read",
            source: errno.into(),
        };
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            if names.len() == max {
                return Err(JournalError::Crowded { path: self.path.clone(), max });
            }
            names.push(OsStr::from_bytes(name).to_owned());
        }
        names.sort();
        Ok(names)
    }

    /// The bytes of a file, one more than `max` at the most; `None` if there is none.
    ///
    /// # Errors
    /// What is planted is not read.
    pub(super) fn read(&self, name: &OsStr, max: usize) -> Result<Option<Vec<u8>>, JournalError> {
        let fail = |errno: Errno| self.io(name, "cannot be opened", errno.into());
        let refuse = |why| Err(JournalError::Refused { path: self.path.join(name), why });
        match fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).map(|info| planted(&info)) {
            Ok(None) => {}
            Ok(Some(why)) => return refuse(why),
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(fail(errno)),
        }
        let file = match fs::openat(&self.fd, name, OPEN | OFlags::RDONLY, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(fail(errno)),
        };
        // Judged again: the name may have led elsewhere a moment ago. One that was replaced meanwhile has no name left.
        if let Some(why) = planted(&fs::fstat(&file).map_err(fail)?) {
            return refuse(why);
        }
        let mut bytes = Vec::new();
        let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
        let read = file.take(limit).read_to_end(&mut bytes);
        read.map_err(|source| self.io(name, "cannot be read", source))?;
        Ok(Some(bytes))
    }

    // SPEC 11.17
    /// Puts a file under a name, in place of what is there. When this returns it is there after a crash; when it fails,
    /// nobody knows. Nothing of a failed attempt is relied on by the next one.
    pub(super) fn put(&self, name: &str, bytes: &[u8]) -> Result<(), JournalError> {
        let aside = format!("{name}{ASIDE}");
        self.unlink(aside.as_ref())?;
        if let Err(error) = self.write(&aside, bytes) {
            // On a full disk that is a little room.
            let _ = self.unlink(aside.as_ref());
            return Err(error);
        }
        let (from, to) = (self.path.join(&aside), self.path.join(name));
        let renamed = self.announce(&Change::Rename(&from, &to));
        let renamed = renamed.and_then(|()| Ok(fs::renameat(&self.fd, &aside, &self.fd, name)?));
        renamed.map_err(|source| self.io(name.as_ref(), "cannot be renamed", source))?;
        self.sync()
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), JournalError> {
        let path = self.path.join(name);
        let fail = |what| move |source: io::Error| self.io(name.as_ref(), what, source);
        self.announce(&Change::Create(&path)).map_err(fail("cannot be made"))?;
        let flags = OPEN | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let made = fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR);
        let mut file = File::from(made.map_err(|errno| fail("cannot be made")(errno.into()))?);
        let written = self.announce(&Change::Write(&path)).and_then(|()| file.write_all(bytes));
        written.map_err(fail("cannot be written"))?;
        let synced = self.announce(&Change::Sync(&path)).and_then(|()| file.sync_all());
        synced.map_err(fail("cannot be synced"))
    }

    /// Removes a name that is no folder; what a symbolic link leads to is not touched.
    pub(super) fn unlink(&self, name: &OsStr) -> Result<(), JournalError> {
        let announced = self.announce(&Change::Unlink(&self.path.join(name)));
        let done = announced.and_then(|()| match fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        });
        done.map_err(|source| self.io(name, "cannot be removed", source))
    }

    /// Makes names durable.
    pub(super) fn sync(&self) -> Result<(), JournalError> {
        let announced = self.announce(&Change::SyncFolder(&self.path));
        let done = announced.and_then(|()| Ok(fs::fsync(&self.fd)?));
        done.map_err(|source| JournalError::Io { path: self.path.clone(), what: "cannot be synced", source })
    }

    /// Makes everything on the file system durable: the folders above this one, too, which may be unreadable.
    pub(super) fn sync_all(&self) -> Result<(), JournalError> {
        let done = self.announce(&Change::SyncAll).and_then(|()| Ok(fs::syncfs(&self.fd)?));
        done.map_err(|source| JournalError::Io { path: self.path.clone(), what: "cannot be synced", source })
    }

    /// Locks the folder for as long as it is open; `false` if somebody else has.
    pub(super) fn try_lock(&self) -> Result<bool, JournalError> {
        match fs::flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(self.not_locked(errno)),
        }
    }

    /// Waits for the folder's lock, and holds it until [`unlock`](Self::unlock).
    pub(super) fn lock(&self) -> Result<(), JournalError> {
        while let Err(errno) = fs::flock(&self.fd, FlockOperation::LockExclusive) {
            if errno != Errno::INTR {
                return Err(self.not_locked(errno));
            }
        }
        Ok(())
    }

    pub(super) fn unlock(&self) {
        let _ = fs::flock(&self.fd, FlockOperation::Unlock);
    }

    fn not_locked(&self, errno: Errno) -> JournalError {
        JournalError::Io { path: self.path.clone(), what: "cannot be locked", source: errno.into() }
    }

    fn announce(&self, change: &Change<'_>) -> io::Result<()> {
        announce(&self.watch, change)
    }

    fn io(&self, name: &OsStr, what: &'static str, source: io::Error) -> JournalError {
        JournalError::Io { path: self.path.join(name), what, source }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A process that forks right now has the folder open, too: closing alone would leave it locked until that is gone.
        self.unlock();
    }
}

/// What keeps a file from counting.
fn planted(info: &Stat) -> Option<&'static str> {
    match FileType::from_raw_mode(info.st_mode) {
        FileType::RegularFile => {}
        FileType::Symlink => return Some("is a symbolic link"),
        FileType::Directory => return Some("is a folder"),
        _ => return Some("is something special"),
    }
    if info.st_nlink > 1 {
        Some("is a file with a second name")
    } else if info.st_uid != rustix::process::geteuid().as_raw() {
        Some("is another user's file")
    } else if info.st_mode & 0o022 != 0 {
        Some("is a file that others can write to")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_ends_with_its_folder_even_if_a_child_has_it_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("guest");
        Folder::make(&path, &None).unwrap();
        let open = || Folder::open(&path, None).unwrap().unwrap();
        let folder = open();
        assert!(folder.try_lock().unwrap());
        assert!(!open().try_lock().unwrap());
        let childs = folder.fd.try_clone().unwrap();
        drop(folder);
        assert!(open().try_lock().unwrap());
        drop(childs);
    }
}
