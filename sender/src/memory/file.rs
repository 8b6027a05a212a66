//! A file as guest memory, at rest or while others write to it: one region, holes not read.
//!
//! Bytes are read, not mapped: a file that somebody truncates is an error here, never a SIGBUS. A change of a file at
//! rest is found by size and times, and by every digest that is computed twice. Nothing tells which pages of a file
//! were written that is open elsewhere, mapped perhaps: who follows it reads it again and compares.

use super::{GuestMemory, Tracking};
use pagewire_protocol::error::DecodeError;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{InstallSize, Layout, Region, RegionId};
use rustix::fs::{self, SeekFrom};
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// An image file, or a file in shared memory that is a guest's.
#[derive(Debug)]
pub struct FileMemory {
    file: File,
    path: PathBuf,
    layout: Layout,
    opened_as: Metadata,
    /// Others write to it while it is read. Its length must not change even so.
    is_live: bool,
    /// It has as many blocks as bytes: looking for holes would only cost.
    is_dense: bool,
    /// The hole or data that was found last, and whether it was a hole.
    extent: (Range<u64>, bool),
}

impl FileMemory {
    /// Opens an image file of one region that is at rest.
    ///
    /// # Errors
    /// It is no regular file, cannot be read, or is larger than an image can be.
    pub fn open(path: &Path, install_size: InstallSize) -> io::Result<Self> {
        Self::open_as(path, install_size, false)
    }

    /// Opens a file of one region that others go on writing to, such as the shared memory of a guest that runs.
    ///
    /// # Errors
    /// As those of [`open`](Self::open).
    pub fn open_live(path: &Path, install_size: InstallSize) -> io::Result<Self> {
        Self::open_as(path, install_size, true)
    }

    fn open_as(path: &Path, install_size: InstallSize, is_live: bool) -> io::Result<Self> {
        let file = File::open(path)?;
        let opened_as = file.metadata()?;
        if !opened_as.is_file() {
            let what = if opened_as.is_dir() { "is a directory" } else { "is not a regular file" };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let region = Region { bytes: opened_as.len(), install_size };
        let layout = Layout::new(vec![region]).map_err(|error: DecodeError| io::Error::other(error.to_string()))?;
        let is_dense = opened_as.blocks().saturating_mul(512) >= opened_as.len();
        Ok(Self { file, is_live, is_dense, path: path.to_path_buf(), layout, opened_as, extent: (0..0, false) })
    }

    /// Whether all of `start..end` is a hole, by the file system's word.
    fn is_hole(&mut self, start: u64, end: u64) -> bool {
        if self.is_dense {
            return false;
        }
        if self.is_live {
            return self.is_hole_now(start, end);
        }
        if !self.extent.0.contains(&start) {
            let (end, hole) = match fs::seek(&self.file, SeekFrom::Data(start)) {
                Ok(data) if data > start => (data, true),
                Ok(_) => (fs::seek(&self.file, SeekFrom::Hole(start)).unwrap_or(u64::MAX), false),
                // No data up to the end of the file, unless that came nearer: then the read finds out.
                Err(rustix::io::Errno::NXIO) => (self.opened_as.len(), self.has_its_length()),
                Err(_) => (u64::MAX, false),
            };
            self.extent = (start..end, hole);
        }
        self.extent.1 && end <= self.extent.0.end
    }

    /// As [`is_hole`](Self::is_hole), of a live file: what was a hole a moment ago may have been written since, so nothing
    /// is remembered. Nor is it asked where data ends: in memory that takes a walk over all pages up to there, for each
    /// read.
    fn is_hole_now(&self, start: u64, end: u64) -> bool {
        match fs::seek(&self.file, SeekFrom::Data(start)) {
            Ok(data) => data >= end,
            Err(rustix::io::Errno::NXIO) => self.has_its_length(),
            Err(_) => false,
        }
    }

    fn has_its_length(&self) -> bool {
        self.file.metadata().is_ok_and(|now| now.len() == self.opened_as.len())
    }

    fn changed(&self, what: &str) -> io::Error {
        let rule = if self.is_live {
            "the length of a live file must not change"
        } else {
            "a file that is being written needs to be at rest"
        };
        io::Error::other(format!("{} {what} while it was read; {rule}", self.path.display()))
    }
}

impl GuestMemory for FileMemory {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&mut self, _region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let offset = first.saturating_mul(PAGE_BYTES as u64);
        let left = usize::try_from(self.opened_as.len().saturating_sub(offset)).unwrap_or(usize::MAX);
        let (real, padding) = bytes.split_at_mut(left.min(bytes.len()));
        padding.fill(0);
        if self.is_hole(offset, offset.saturating_add(real.len() as u64)) {
            real.fill(0);
            return Ok(());
        }
        match self.file.read_exact_at(real, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.changed("shrank")),
            result => result,
        }
    }

    fn tracking(&self) -> Tracking {
        if self.is_live { Tracking::Unknown } else { Tracking::AtRest }
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        let now = self.file.metadata()?;
        let then = &self.opened_as;
        match now.len().cmp(&then.len()) {
            std::cmp::Ordering::Less => return Err(self.changed("shrank")),
            std::cmp::Ordering::Greater => return Err(self.changed("grew")),
            std::cmp::Ordering::Equal => {}
        }
        let times = |info: &Metadata| (info.mtime(), info.mtime_nsec());
        if !self.is_live && times(&now) != times(then) { Err(self.changed("changed")) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_BYTES;

    fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn reads_back_and_forth_over_holes() {
        let (_dir, path) = file(&[]);
        let holes = File::options().write(true).open(&path).unwrap();
        holes.write_all_at(&[1; PAGE], 0).unwrap();
        holes.write_all_at(&[2; PAGE], 64 * PAGE as u64).unwrap();
        holes.set_len(100 * PAGE as u64).unwrap();
        let mut memory = FileMemory::open(&path, InstallSize::KIB_4).unwrap();
        for (page, byte) in [(99, 0), (0, 1), (64, 2), (5, 0), (0, 1), (99, 0), (64, 2)] {
            let mut bytes = [9; PAGE];
            memory.read(RegionId(0), page, &mut bytes).unwrap();
            assert_eq!(bytes, [byte; PAGE], "page {page}");
        }
    }

    #[test]
    fn names_what_became_of_a_file_while_it_was_read() {
        for (what, length) in [("shrank", 100), ("grew", 9000)] {
            let (_dir, path) = file(&[1; 8192]);
            let mut memory = FileMemory::open(&path, InstallSize::KIB_4).unwrap();
            File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
            assert!(memory.check_unchanged().unwrap_err().to_string().contains(what));
        }
        let (_dir, path) = file(&[1; 8192]);
        let mut memory = FileMemory::open(&path, InstallSize::KIB_4).unwrap();
        assert!(memory.check_unchanged().is_ok());
        std::thread::sleep(std::time::Duration::from_millis(20));
        File::options().write(true).open(&path).unwrap().write_all_at(b"x", 0).unwrap();
        assert!(memory.check_unchanged().unwrap_err().to_string().contains("changed"));
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_of_the_read() {
        for open in [FileMemory::open, FileMemory::open_live] {
            let (_dir, path) = file(&[1; 8192]);
            let mut memory = open(&path, InstallSize::KIB_4).unwrap();
            File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
            assert!(memory.read(RegionId(0), 1, &mut [0; PAGE]).unwrap_err().to_string().contains("shrank"));
        }
    }

    #[test]
    fn a_live_file_may_change_in_all_but_its_length() {
        let (_dir, path) = file(&[]);
        let live = File::options().write(true).open(&path).unwrap();
        live.set_len(100 * PAGE as u64).unwrap();
        let mut memory = FileMemory::open_live(&path, InstallSize::KIB_4).unwrap();
        assert_eq!(memory.tracking(), Tracking::Unknown);
        let mut bytes = [9; 2 * PAGE];
        memory.read(RegionId(0), 98, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 2 * PAGE]);
        // No time passes in between, and what was a hole is one no more.
        live.write_all_at(&[3; PAGE], 99 * PAGE as u64).unwrap();
        memory.read(RegionId(0), 98, &mut bytes).unwrap();
        assert_eq!((bytes[PAGE - 1], bytes[PAGE]), (0, 3));
        assert!(memory.check_unchanged().is_ok());
        live.set_len(101 * PAGE as u64).unwrap();
        assert!(memory.check_unchanged().unwrap_err().to_string().contains("the length of a live file"));
    }

    /// Twice the data in front of a hole must not make each read take twice as long.
    #[test]
    fn a_live_file_is_not_asked_where_its_data_ends() {
        let (_dir, path) = file(&[]);
        let live = File::options().write(true).open(&path).unwrap();
        live.write_all_at(&[1; 50 * PAGE], 0).unwrap();
        live.set_len(100 * PAGE as u64).unwrap();
        let mut memory = FileMemory::open_live(&path, InstallSize::KIB_4).unwrap();
        for (page, byte) in [(0, 1), (49, 1), (50, 0), (99, 0)] {
            let mut bytes = [9; PAGE];
            memory.read(RegionId(0), page, &mut bytes).unwrap();
            assert_eq!(bytes, [byte; PAGE], "page {page}");
            assert_eq!(memory.extent, (0..0, false), "nothing is found out that is of no use");
        }
        let mut both = [9; 2 * PAGE];
        memory.read(RegionId(0), 49, &mut both).unwrap();
        assert_eq!((both[0], both[PAGE]), (1, 0), "half of it is a hole");
    }

    #[test]
    fn rejects_what_is_no_regular_file() {
        let dir = tempfile::tempdir().unwrap();
        assert!(FileMemory::open(dir.path(), InstallSize::KIB_4).unwrap_err().to_string().contains("is a directory"));
        assert!(FileMemory::open(Path::new("/dev/null"), InstallSize::KIB_4).is_err());
    }
}
