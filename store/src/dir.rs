//! Folders of the store as open handles, and the one place that changes anything on disk.
//!
//! A folder is opened once, never through a symbolic link, and only if it is ours and closed to everybody else; what is
//! in it is reached by `*at` calls on that handle. Only a regular file with one name, ours, and not writable by others
//! counts; anything else is `Planted`: not followed, not written through, not removed. Every change is announced to a
//! [`Watch`] before it is made, so a test can record a run, cut it anywhere, or let any single change fail.

use crate::error::StoreError;
use rustix::fs::{self, AtFlags, Dir, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The store's lock.
const LOCK: &str = "lock";
/// How often a lock file that was replaced while we waited for it is opened again.
const TRIES: usize = 16;
const PRIVATE: Mode = Mode::RWXU;
// STORE 1.3
const OPEN: OFlags = OFlags::NOFOLLOW.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// A change that is about to be made. Paths are the store's, temporary names included.
#[derive(Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests look at what is about to be done"))]
pub(crate) enum Change<'a> {
    MakeFolder(&'a Path),
    RemoveFolder(&'a Path),
    SyncFolder(&'a Path),
    Create(&'a Path),
    SetLen(&'a Path, u64),
    Write(&'a Path, u64, &'a [u8]),
    Punch(&'a Path, u64, u64),
    Clone,
    Sync(&'a Path),
    Rename(&'a Path, &'a Path),
    /// Out of the store.
    RenameOut(&'a Path),
    Unlink(&'a Path),
}

/// Sees every change before it is made, and may refuse it.
pub(crate) trait Watch: std::fmt::Debug + Send + Sync {
    fn before(&self, change: &Change<'_>) -> io::Result<()>;
}

type Watcher = Option<Arc<dyn Watch>>;

fn announce(watch: &Watcher, change: &Change<'_>) -> io::Result<()> {
    watch.as_ref().map_or(Ok(()), |watch| watch.before(change))
}

/// What a name leads to.
#[derive(Debug)]
pub(crate) enum Found {
    Nothing,
    /// Something the store never put there, and what it is.
    Planted(&'static str),
    File(File, Stat),
}

impl Found {
    pub(crate) fn file(self) -> Option<(File, Stat)> {
        match self {
            Self::File(file, info) => Some((file, info)),
            Self::Nothing | Self::Planted(_) => None,
        }
    }
}

/// Bytes that a file takes on disk.
pub(crate) fn allocated(info: &Stat) -> u64 {
    u64::try_from(info.st_blocks).unwrap_or(0).saturating_mul(512)
}

/// An open folder.
#[derive(Debug)]
pub(crate) struct Folder {
    fd: OwnedFd,
    path: PathBuf,
    watch: Watcher,
}

impl Folder {
    /// Opens the store's own folder; makes it if it is not there and `make` says so.
    pub(crate) fn open_root(path: &Path, make: bool, watch: Watcher) -> Result<Self, StoreError> {
        // A slash at the end would lead through a symbolic link.
        let path: PathBuf = path.components().collect();
        let io = |what, errno: Errno| StoreError::Io { path: path.clone(), what, source: errno.into() };
        if make {
            match fs::mkdir(&path, PRIVATE) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(io("the store's folder cannot be made", errno)),
            }
        }
        match fs::open(&path, OPEN | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => Self::judged(fd, path, watch),
            Err(errno @ (Errno::LOOP | Errno::NOTDIR)) => Err(not_a_folder(path, errno)),
            Err(errno) => Err(io("the store's folder cannot be opened", errno)),
        }
    }

    // STORE 1.2
    fn judged(fd: OwnedFd, path: PathBuf, watch: Watcher) -> Result<Self, StoreError> {
        let info = match fs::fstat(&fd) {
            Ok(info) => info,
            Err(errno) => return Err(StoreError::Io { path, what: "cannot be examined", source: errno.into() }),
        };
        let why = if info.st_uid != rustix::process::geteuid().as_raw() {
            "belongs to another user; give the store a folder of its own"
        } else if info.st_mode & 0o077 != 0 {
            "others have access to it; a store holds guests' memory: chmod 700 it, or name a new folder"
        } else {
            return Ok(Self { fd, path, watch });
        };
        Err(StoreError::Refused { path, why })
    }

    /// The path it was opened by, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn io(&self, name: &OsStr, what: &'static str, source: impl Into<io::Error>) -> StoreError {
        StoreError::Io { path: self.path.join(name), what, source: source.into() }
    }

    /// A folder in this one; `None` if there is none.
    pub(crate) fn folder(&self, name: &str) -> Result<Option<Self>, StoreError> {
        let path = self.path.join(name);
        match fs::openat(&self.fd, name, OPEN | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => Self::judged(fd, path, self.watch.clone()).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(errno @ (Errno::LOOP | Errno::NOTDIR)) => Err(not_a_folder(path, errno)),
            Err(errno) => Err(self.io(name.as_ref(), "cannot be opened", errno)),
        }
    }

    /// A folder in this one, made if there is none.
    pub(crate) fn make_folder(&self, name: &str) -> Result<Self, StoreError> {
        if let Some(folder) = self.folder(name)? {
            return Ok(folder);
        }
        let path = self.path.join(name);
        let made = announce(&self.watch, &Change::MakeFolder(&path));
        let made = made.and_then(|()| match fs::mkdirat(&self.fd, name, PRIVATE) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(errno.into()),
        });
        made.map_err(|error| self.io(name.as_ref(), "cannot be made", error))?;
        self.sync()?;
        let folder = self.folder(name)?;
        folder.ok_or_else(|| self.io(name.as_ref(), "went away as soon as it was made", Errno::NOENT))
    }

    /// Removes a folder in this one if it is empty.
    pub(crate) fn remove_folder(&self, name: &OsStr) -> bool {
        let announced = announce(&self.watch, &Change::RemoveFolder(&self.path.join(name)));
        announced.is_ok() && fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR).is_ok()
    }

    /// Everything in it, sorted.
    pub(crate) fn names(&self) -> Result<Vec<OsString>, StoreError> {
        let fail = |errno: Errno| StoreError::Io {
            path: self.path.clone(),
            what: "its entries cannot be read",
            source: errno.into(),
        };
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(OsStr::from_bytes(name).to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// What a name is, without opening it; `None` if it is a file that counts, or nothing.
    pub(crate) fn planted(&self, name: &OsStr) -> Option<&'static str> {
        judge(&fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).ok()?)
    }

    /// Opens a file that counts, for reading or for changing.
    pub(crate) fn open(&self, name: &OsStr, write: bool) -> Result<Found, StoreError> {
        let fail = |errno| self.io(name, "cannot be opened", errno);
        match fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(info) => {
                if let Some(what) = judge(&info) {
                    return Ok(Found::Planted(what));
                }
            }
            Err(Errno::NOENT) => return Ok(Found::Nothing),
            Err(errno) => return Err(fail(errno)),
        }
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let file = match fs::openat(&self.fd, name, OPEN | access, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT) => return Ok(Found::Nothing),
            Err(Errno::LOOP) => return Ok(Found::Planted("a symbolic link")),
            Err(errno) => return Err(fail(errno)),
        };
        // Judged again: the name may have led elsewhere a moment ago.
        let info = fs::fstat(&file).map_err(fail)?;
        Ok(judge(&info).map_or(Found::File(file, info), Found::Planted))
    }

    /// Makes a new file and locks it, so that nobody takes it for a leftover.
    pub(crate) fn create(&self, name: &OsStr) -> Result<Draft, StoreError> {
        let path = self.path.join(name);
        let fail = |error: io::Error| self.io(name, "cannot be made", error);
        announce(&self.watch, &Change::Create(&path)).map_err(fail)?;
        let flags = OPEN | OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let made = fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(made.map_err(|errno| fail(errno.into()))?);
        fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| fail(errno.into()))?;
        Ok(Draft { file, path, watch: self.watch.clone() })
    }

    /// Renames inside the folder, over whatever has the new name.
    pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> Result<(), StoreError> {
        let announced = announce(&self.watch, &Change::Rename(&self.path.join(from), &self.path.join(to)));
        let done = announced.and_then(|()| Ok(fs::renameat(&self.fd, from, &self.fd, to)?));
        done.map_err(|error| self.io(from, "cannot be renamed", error))
    }

    /// Renames out of the store, never over anything.
    pub(crate) fn rename_out(&self, from: &OsStr, into: BorrowedFd<'_>, to: &OsStr) -> io::Result<()> {
        announce(&self.watch, &Change::RenameOut(&self.path.join(from)))?;
        Ok(fs::renameat_with(&self.fd, from, into, to, RenameFlags::NOREPLACE)?)
    }

    /// Removes a name that is no folder; what a symbolic link leads to is not touched.
    pub(crate) fn unlink(&self, name: &OsStr) -> Result<(), StoreError> {
        let announced = announce(&self.watch, &Change::Unlink(&self.path.join(name)));
        let done = announced.and_then(|()| match fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        });
        done.map_err(|error| self.io(name, "cannot be removed", error))
    }

    /// Makes names durable.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        let announced = announce(&self.watch, &Change::SyncFolder(&self.path));
        let done = announced.and_then(|()| Ok(fs::fsync(&self.fd)?));
        done.map_err(|source| StoreError::Io { path: self.path.clone(), what: "cannot be synced", source })
    }

    /// The file system it is on.
    pub(crate) fn device(&self) -> Option<u64> {
        fs::fstat(&self.fd).ok().map(|info| info.st_dev)
    }

    // STORE 4.1
    /// Waits for the store's lock. Whoever only looks shares it; the lock ends with the returned file.
    pub(crate) fn lock(&self, shared: bool) -> Result<File, StoreError> {
        let fail = |errno| self.io(LOCK.as_ref(), "cannot be locked", errno);
        let operation = if shared { FlockOperation::LockShared } else { FlockOperation::LockExclusive };
        for _ in 0..TRIES {
            let opened = fs::openat(&self.fd, LOCK, OPEN | OFlags::RDWR | OFlags::CREATE, Mode::RUSR | Mode::WUSR);
            let refuse = |why| StoreError::Refused { path: self.path.join(LOCK), why };
            let lock = match opened {
                Ok(fd) => File::from(fd),
                Err(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => {
                    return Err(refuse("is not the lock file of a store; remove it"));
                }
                Err(errno) => return Err(fail(errno)),
            };
            let ours = fs::fstat(&lock).map_err(fail)?;
            if ours.st_nlink > 0 && judge(&ours).is_some() {
                return Err(refuse("is not the lock file of a store; remove it"));
            }
            while let Err(errno) = fs::flock(&lock, operation) {
                if errno != Errno::INTR {
                    return Err(fail(errno));
                }
            }
            let linked = fs::statat(&self.fd, LOCK, AtFlags::SYMLINK_NOFOLLOW);
            if linked.is_ok_and(|linked| (linked.st_dev, linked.st_ino) == (ours.st_dev, ours.st_ino)) {
                return Ok(lock);
            }
        }
        Err(fail(Errno::AGAIN))
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn not_a_folder(path: PathBuf, errno: Errno) -> StoreError {
    let link = errno == Errno::LOOP || std::fs::symlink_metadata(&path).is_ok_and(|info| info.is_symlink());
    let why = if link {
        "is a symbolic link; name the folder itself"
    } else {
        "is not a folder; a store needs a folder of its own"
    };
    StoreError::Refused { path, why }
}

// STORE 1.4
/// What keeps a file from counting.
fn judge(info: &Stat) -> Option<&'static str> {
    match FileType::from_raw_mode(info.st_mode) {
        FileType::RegularFile => {}
        FileType::Symlink => return Some("a symbolic link"),
        FileType::Directory => return Some("a directory"),
        _ => return Some("something special"),
    }
    if info.st_nlink > 1 {
        Some("a file with a second name")
    } else if info.st_uid != rustix::process::geteuid().as_raw() {
        Some("another user's file")
    } else if info.st_mode & 0o022 != 0 {
        Some("a file that others can write to")
    } else {
        None
    }
}

/// Takes a lock without waiting; whether it was free.
pub(crate) fn try_lock(file: &File, shared: bool) -> bool {
    let operation =
        if shared { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    fs::flock(file, operation).is_ok()
}

/// Lets go of a lock, also for those who share the open file.
pub(crate) fn unlock(file: &File) {
    let _ = fs::flock(file, FlockOperation::Unlock);
}

/// A new file under a temporary name.
#[derive(Debug)]
pub(crate) struct Draft {
    file: File,
    path: PathBuf,
    watch: Watcher,
}

impl Draft {
    /// Lets go of the lock, also for those who share the open file.
    pub(crate) fn unlock(&self) {
        unlock(&self.file);
    }

    /// What is in it, to be read.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn io(&self, what: &'static str, source: io::Error) -> StoreError {
        StoreError::Io { path: self.path.clone(), what, source }
    }

    pub(crate) fn set_len(&self, len: u64) -> Result<(), StoreError> {
        let done = announce(&self.watch, &Change::SetLen(&self.path, len)).and_then(|()| self.file.set_len(len));
        done.map_err(|error| self.io("cannot be given its length", error))
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let announced = announce(&self.watch, &Change::Write(&self.path, offset, bytes));
        let done = announced.and_then(|()| self.file.write_all_at(bytes, offset));
        done.map_err(|error| self.io("cannot be written", error))
    }

    /// Frees what is kept no longer; where the file system has no holes it stays.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let announced = announce(&self.watch, &Change::Punch(&self.path, offset, len));
        let done = announced.and_then(|()| match fs::fallocate(&self.file, flags, offset, len) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(errno) => Err(errno.into()),
        });
        done.map_err(|error| self.io("cannot be given a hole", error))
    }

    /// Shares all blocks of `from`; false where the file system cannot.
    pub(crate) fn clone_from(&self, from: &File) -> bool {
        announce(&self.watch, &Change::Clone).is_ok() && fs::ioctl_ficlone(&self.file, from).is_ok()
    }

    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        let done = announce(&self.watch, &Change::Sync(&self.path)).and_then(|()| self.file.sync_all());
        done.map_err(|error| self.io("cannot be synced", error))
    }
}

#[cfg(test)]
mod tests;
