//! How an image file comes to be: under its final name it is always whole.
//!
//! A new image grows as `NAME.partial` in the reserved subfolder `.pagewire` and replaces `NAME` at the end, after it is
//! synced. It begins as a clone of the old file where the file system can reflink; elsewhere the old file's bytes are
//! copied along as they are read for comparison, and the partial's length says how far that went. With `inplace` the
//! old file itself becomes the partial and is renamed back. Whatever breaks, a later landing resumes from the partial.
//! The partial is locked; nothing follows a symbolic link; all paths are resolved against descriptors opened once.

use rustix::fs::{self, AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The reserved subfolder.
const WORK: &str = ".pagewire";
/// How often a start that lost a race is tried again. It loses one only when another landing in the same folder came
/// to its end meanwhile.
const TRIES: usize = 100;

/// How to land.
#[derive(Clone, Copy, Debug, Default)]
pub struct LandingOptions {
    /// Change the old file where it lies; under its final name it is absent until whole.
    pub inplace: bool,
    /// Take nothing from the old file or a partial.
    pub fresh: bool,
}

/// Why an image cannot land.
#[derive(Debug, Error)]
pub enum LandingError {
    /// Something other than a regular file has the name.
    #[error("{path}: is {what}, not a regular file")]
    NotAFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Another session receives it.
    #[error("{path}: is being received by another session")]
    Busy {
        /// The partial.
        path: PathBuf,
    },
    /// The reserved subfolder is not ours alone.
    #[error("{path}: {why}; pagewire keeps partial images there and trusts no folder that others can write to")]
    WorkFolder {
        /// The subfolder.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// A file that must be filled as it is has another size.
    #[error("{path}: has {found} bytes, the image {expected}; make it that size, or empty")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        found: u64,
        /// The image's bytes.
        expected: u64,
    },
    /// The operating system refused.
    #[error("{path}: {what}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

/// Where the finished file goes.
#[derive(Debug)]
struct Target {
    dir: OwnedFd,
    work: OwnedFd,
    name: OsString,
    partial: OsString,
    /// How the partial came to be.
    origin: Origin,
}

/// How a partial came to be, and so what becomes of it if nothing new was written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It is the old file: it goes back under its name.
    Borrowed,
    /// This landing made it: it goes away.
    Made,
    /// An earlier landing left it: it stays.
    Left,
}

/// An image file on its way.
#[derive(Debug)]
pub struct Landing {
    path: PathBuf,
    file: File,
    /// The old file. The base is copied from it beyond `copied`, as it is read.
    old: Option<File>,
    /// The base is the old file, all of it and nothing else.
    stays: bool,
    over: bool,
    copied: u64,
    base_len: u64,
    len: u64,
    starts_zero: bool,
    touched: bool,
    target: Option<Target>,
}

impl Landing {
    /// Starts to land an image of `len` bytes as `dir/name`.
    ///
    /// # Errors
    /// See [`LandingError`]; nothing is changed then.
    pub fn start(dir: &Path, name: &OsStr, len: u64, options: LandingOptions) -> Result<Self, LandingError> {
        Self::look(dir, name, len, options, |found| found)
    }

    fn look(
        dir: &Path,
        name: &OsStr,
        len: u64,
        options: LandingOptions,
        change: impl FnOnce(Found) -> Found,
    ) -> Result<Self, LandingError> {
        let place = Place::open(dir, name)?;
        for _ in 0..TRIES {
            let attempt = place.work_folder().and_then(|work| Ok((place.attempt(&work, options)?, work)));
            match attempt {
                Ok((found, work)) => return Self::begin(place, work, change(found), len, options),
                // Somebody else made, finished or removed what was looked at: look again.
                Err(LandingError::Io { source, .. })
                    if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {}
                Err(error) => return Err(error),
            }
        }
        Err(LandingError::Busy { path: place.path })
    }

    /// As [`start`](Self::start), with `base` for the old file of that name: where an earlier landing left a partial, it
    /// supplies the rest. [`is_over`](Self::is_over) says whether it is all of the base.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn start_over(
        dir: &Path,
        name: &OsStr,
        len: u64,
        base: File,
        options: LandingOptions,
    ) -> Result<Self, LandingError> {
        let options = LandingOptions { inplace: false, fresh: options.fresh };
        Self::look(dir, name, len, options, |found| {
            let over = found.origin != Origin::Left;
            Found { old: Some(base), over, ..found }
        })
    }

    /// As [`start`](Self::start), over an image that `take` puts under the name it is given in the folder it is given:
    /// it becomes the new image where it lies. `None` if there is a partial already or nothing was taken.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn start_on(
        dir: &Path,
        name: &OsStr,
        len: u64,
        mut take: impl FnMut(BorrowedFd<'_>, &OsStr) -> bool,
    ) -> Result<Option<Self>, LandingError> {
        let place = Place::open(dir, name)?;
        for _ in 0..TRIES {
            let work = match place.work_folder() {
                Err(LandingError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                work => work?,
            };
            if take(work.as_fd(), &partial_name(name)) {
                let over = |found| Found { old: None, over: true, ..found };
                return Self::look(dir, name, len, LandingOptions::default(), over).map(Some);
            }
            // Nothing can be put into a folder that another landing has just removed as empty.
            if fs::fstat(&work).is_ok_and(|info| info.st_nlink > 0) {
                let _ = fs::unlinkat(&place.dir, WORK, AtFlags::REMOVEDIR);
                break;
            }
        }
        Ok(None)
    }

    /// Whether the base is all of the image that this landing was started over or on, and nothing else.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Fills the file at `path` where it lies, which somebody may hold open: it is neither renamed nor replaced.
    ///
    /// # Errors
    /// It cannot be opened, is locked, or is neither empty nor of the image's size.
    pub fn into_file(path: &Path, len: u64, fresh: bool) -> Result<Self, LandingError> {
        let error = |what, source| LandingError::Io { path: path.to_path_buf(), what, source };
        let file =
            File::options().read(true).write(true).open(path).map_err(|source| error("cannot be opened", source))?;
        let info = file.metadata().map_err(|source| error("cannot be examined", source))?;
        if !info.is_file() {
            return Err(LandingError::NotAFile { path: path.to_path_buf(), what: "something special" });
        }
        lock(&file, path)?;
        let found = info.len();
        if found != 0 && found != len {
            return Err(LandingError::Size { path: path.to_path_buf(), found, expected: len });
        }
        let base_len = if fresh { 0 } else { found };
        Ok(Self {
            path: path.to_path_buf(),
            file,
            old: None,
            stays: false,
            over: false,
            copied: base_len,
            base_len,
            len,
            starts_zero: base_len == found,
            touched: false,
            target: None,
        })
    }

    fn begin(
        place: Place,
        work: OwnedFd,
        found: Found,
        len: u64,
        options: LandingOptions,
    ) -> Result<Self, LandingError> {
        let Found { file, old, origin, over } = found;
        let error = |what, source| LandingError::Io { path: place.path.clone(), what, source };
        let length = |file: &File| file.metadata().map(|info| info.len());
        if options.fresh && origin != Origin::Borrowed {
            file.set_len(0).map_err(|source| error("cannot be emptied", source))?;
        }
        let mut copied = length(&file).map_err(|source| error("cannot be examined", source))?;
        let old = old.filter(|_| !options.fresh);
        let stays = old.is_some() && copied == 0;
        if let Some(whole) = &old
            && copied == 0
            && fs::ioctl_ficlone(&file, whole).is_ok()
        {
            copied = length(whole).map_err(|source| error("cannot be examined", source))?;
        }
        let old_len = old.as_ref().map_or(Ok(0), length).map_err(|source| error("cannot be examined", source))?;
        let base_len = if options.fresh { 0 } else { copied.max(old_len).min(len) };
        let partial = partial_name(&place.name);
        let starts_zero = !(options.fresh && copied > 0);
        let target = Some(Target { dir: place.dir, work, name: place.name, partial, origin });
        Ok(Self {
            path: place.path,
            file,
            old,
            stays,
            over,
            copied,
            base_len,
            len,
            starts_zero,
            touched: false,
            target,
        })
    }

    /// Bytes from the start that are worth comparing: the old file's, or a partial's.
    pub fn base_len(&self) -> u64 {
        self.base_len
    }

    /// Whether everything beyond the base reads as zeros already.
    pub fn starts_zero(&self) -> bool {
        self.starts_zero
    }

    /// Whether the base stays as it was until this landing is gone, and [`read_old`](Self::read_old) reads it.
    pub fn base_stays(&self) -> bool {
        self.stays
    }

    /// Whether all of the base is in the new image already.
    pub fn base_in_place(&self) -> bool {
        self.copied >= self.base_len
    }

    /// Reads the base as it was before anything landed. Beyond its end it has zeros, and where the disk fails too: a
    /// base is only ever a guess.
    ///
    /// # Errors
    /// There is none that [stays](Self::base_stays).
    pub fn read_old(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let Some(old) = self.old.as_ref().filter(|_| self.stays) else { return Err(io::ErrorKind::Unsupported.into()) };
        read_or_zero(old, offset, bytes);
        Ok(())
    }

    /// Reads base bytes, which become part of the new image on the way. Offsets only rise; what is left out has to be
    /// written, and is zeros to a later landing that resumes before it was.
    ///
    /// # Errors
    /// The new file cannot be read or written. What the old one does not give is zeros, in the new one too.
    pub fn read_base(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let in_file = usize::try_from(self.copied.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        let (here, there) = bytes.split_at_mut(in_file);
        self.file.read_exact_at(here, offset)?;
        let Some(old) = self.old.as_ref().filter(|_| !there.is_empty()) else {
            return if there.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        };
        let from = offset.saturating_add(in_file as u64);
        read_or_zero(old, from, there);
        // A hole in the new file reads as zeros already.
        if !pagewire_protocol::digest::is_zero(there) {
            self.file.write_all_at(there, from)?;
        }
        self.copied = from.saturating_add(there.len() as u64);
        Ok(())
    }

    /// Reads what the new image holds now.
    ///
    /// # Errors
    /// The file cannot be read or is shorter.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Writes part of the new image.
    ///
    /// # Errors
    /// The file cannot be written, the disk is full for instance.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.touched = true;
        self.file.write_all_at(bytes, offset)
    }

    /// Makes `len` bytes read as zeros, by a hole where the file system has them.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.touched = true;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fs::fallocate(&self.file, flags, offset, len) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
        static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let part = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(ZEROS.len());
            self.file.write_all_at(ZEROS.get(..part).unwrap_or_default(), at)?;
            at = at.saturating_add(part as u64);
        }
        Ok(())
    }

    /// The new file for whoever maps it: as long as the image, and zeros. What is written through a mapping is not known
    /// here: a new file that does not get its name goes away.
    ///
    /// # Errors
    /// The file cannot be changed.
    pub fn to_map(&mut self) -> io::Result<File> {
        let touched = self.touched;
        self.file.set_len(self.len)?;
        self.zero(0, self.len)?;
        self.touched = touched;
        self.file.try_clone()
    }

    /// Syncs the image and puts it under its final name. May take as long as the disk does.
    ///
    /// # Errors
    /// The operating system refused; the partial stays and resumes.
    pub fn finish(&mut self) -> Result<(), LandingError> {
        let path = self.path.clone();
        let error = |what| move |source: io::Error| LandingError::Io { path, what, source };
        let length = self.file.metadata().map(|info| info.len()).map_err(error.clone()("cannot be examined"))?;
        if length != self.len {
            self.file.set_len(self.len).map_err(error.clone()("cannot be given its length"))?;
        }
        self.file.sync_all().map_err(error.clone()("cannot be synced"))?;
        let Some(target) = self.target.take() else { return Ok(()) };
        let renamed = fs::renameat(&target.work, &target.partial, &target.dir, &target.name);
        renamed.map_err(|errno| error.clone()("cannot be put under its final name")(errno.into()))?;
        for folder in [&target.dir, &target.work] {
            fs::fsync(folder).map_err(|errno| error.clone()("folder cannot be synced")(errno.into()))?;
        }
        // Another session's partial may be in there; then it stays.
        let _ = fs::unlinkat(&target.dir, WORK, AtFlags::REMOVEDIR);
        Ok(())
    }
}

impl Drop for Landing {
    /// A landing that brought nothing new leaves everything as it found it.
    fn drop(&mut self) {
        if let Some(Target { dir, work, name, partial, origin }) = &self.target {
            // Nothing can be done about an error here, and a partial left behind is only resumed.
            let _ = match origin {
                Origin::Borrowed if !self.touched => {
                    fs::renameat_with(work, partial, dir, name, RenameFlags::NOREPLACE)
                }
                Origin::Made if !self.touched => fs::unlinkat(work, partial, AtFlags::empty()),
                _ => Ok(()),
            };
            let _ = fs::unlinkat(dir, WORK, AtFlags::REMOVEDIR);
        }
        // A process that forks right now has the file open, too: closing alone would leave it locked until that is gone.
        let _ = fs::flock(&self.file, FlockOperation::Unlock);
    }
}

/// A folder and a name in it.
struct Place {
    dir: OwnedFd,
    name: OsString,
    path: PathBuf,
}

/// The partial, locked, and what it is to be filled from.
struct Found {
    file: File,
    old: Option<File>,
    origin: Origin,
    /// The old file is an image that the landing was started with.
    over: bool,
}

impl Place {
    fn open(dir: &Path, name: &OsStr) -> Result<Self, LandingError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = fs::open(dir, flags, Mode::empty());
        let path = dir.join(name);
        let dir = opened.map_err(|errno| LandingError::Io {
            path: dir.into(),
            what: "cannot be opened",
            source: errno.into(),
        })?;
        Ok(Self { dir, name: name.to_owned(), path })
    }

    fn error(&self, what: &'static str, errno: Errno) -> LandingError {
        LandingError::Io { path: self.path.clone(), what, source: errno.into() }
    }

    /// The reserved subfolder: ours, and closed to everybody else.
    fn work_folder(&self) -> Result<OwnedFd, LandingError> {
        match fs::mkdirat(&self.dir, WORK, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(self.error("the folder for its partial cannot be made", errno)),
        }
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let refuse = |why| LandingError::WorkFolder { path: self.path.with_file_name(WORK), why };
        let work = match fs::openat(&self.dir, WORK, flags, Mode::empty()) {
            Ok(work) => work,
            Err(Errno::LOOP | Errno::NOTDIR) => return Err(refuse("is not a folder")),
            Err(errno) => return Err(self.error("the folder for its partial cannot be opened", errno)),
        };
        let info =
            fs::fstat(&work).map_err(|errno| self.error("the folder for its partial cannot be examined", errno))?;
        if info.st_uid != rustix::process::geteuid().as_raw() {
            return Err(refuse("belongs to somebody else"));
        }
        if info.st_mode & 0o022 != 0 {
            return Err(refuse("others can write to it"));
        }
        Ok(work)
    }

    /// One look at what is there. `NotFound` and `AlreadyExists` mean that it changed meanwhile.
    fn attempt(&self, work: &OwnedFd, options: LandingOptions) -> Result<Found, LandingError> {
        let partial = partial_name(&self.name);
        let whole =
            self.open_regular(&self.dir, &self.name, if options.inplace { OFlags::RDWR } else { OFlags::RDONLY })?;
        let old_partial = self.open_regular(work, &partial, OFlags::RDWR)?;
        if let Some(file) = &old_partial {
            self.lock_linked(file, work, &partial)?;
        }
        match (options.inplace, whole, old_partial) {
            (true, Some(whole), stale) => {
                self.lock_linked(&whole, &self.dir, &self.name)?;
                // A stale partial is given up for the whole file: in place means no second copy.
                let flags = if stale.is_some() { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
                let renamed = fs::renameat_with(&self.dir, &self.name, work, &partial, flags);
                renamed.map_err(|errno| self.error("cannot become the partial", errno))?;
                Ok(Found { file: whole, old: None, origin: Origin::Borrowed, over: false })
            }
            (_, whole, Some(file)) => Ok(Found { file, old: whole, origin: Origin::Left, over: false }),
            (_, whole, None) => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = fs::openat(work, &partial, flags, Mode::RUSR | Mode::WUSR);
                let file = File::from(made.map_err(|errno| self.error("its partial cannot be made", errno))?);
                self.lock_linked(&file, work, &partial)?;
                if let Some(info) = whole.as_ref().and_then(|whole| fs::fstat(whole).ok()) {
                    let _ = fs::fchmod(&file, Mode::from_raw_mode(info.st_mode & 0o777));
                }
                Ok(Found { file, old: whole, origin: Origin::Made, over: false })
            }
        }
    }

    /// Opens a regular file for reading or changing; `None` if there is nothing of that name.
    fn open_regular(&self, folder: &OwnedFd, name: &OsStr, access: OFlags) -> Result<Option<File>, LandingError> {
        let info = match fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(info) => info,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(self.error("cannot be examined", errno)),
        };
        let what = match FileType::from_raw_mode(info.st_mode) {
            FileType::RegularFile => None,
            FileType::Symlink => Some("a symbolic link"),
            FileType::Directory => Some("a directory"),
            _ => Some("something special"),
        };
        if let Some(what) = what {
            return Err(LandingError::NotAFile { path: self.path.clone(), what });
        }
        let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = fs::openat(folder, name, flags, Mode::empty());
        opened.map(|fd| Some(File::from(fd))).map_err(|errno| self.error("cannot be opened", errno))
    }

    /// Locks a file and makes sure that it still is what its name leads to.
    fn lock_linked(&self, file: &File, folder: impl AsFd, name: &OsStr) -> Result<(), LandingError> {
        lock(file, &self.path)?;
        let ours = fs::fstat(file).map_err(|errno| self.error("cannot be examined", errno))?;
        let linked = fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW);
        let linked = linked.map_err(|errno| self.error("cannot be examined", errno))?;
        if (ours.st_dev, ours.st_ino) != (linked.st_dev, linked.st_ino) {
            return Err(self.error("was replaced meanwhile", Errno::EXIST));
        }
        Ok(())
    }
}

/// Reads what a file has; the rest is zeros.
fn read_or_zero(file: &File, offset: u64, bytes: &mut [u8]) {
    if file.read_exact_at(bytes, offset).is_err() {
        bytes.fill(0);
        let (mut at, end) = (0usize, bytes.len());
        while at < end {
            let Some(rest) = bytes.get_mut(at..) else { return };
            match file.read_at(rest, offset.saturating_add(at as u64)) {
                Ok(read) if read > 0 => at = at.saturating_add(read),
                _ => return rest.fill(0),
            }
        }
    }
}

fn partial_name(name: &OsStr) -> OsString {
    let mut partial = name.to_owned();
    partial.push(".partial");
    partial
}

fn lock(file: &File, path: &Path) -> Result<(), LandingError> {
    match fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(LandingError::Busy { path: path.into() }),
        Err(errno) => Err(LandingError::Io { path: path.into(), what: "cannot be locked", source: errno.into() }),
    }
}

#[cfg(test)]
mod tests;
