//! Memory of this process in one piece: anonymous, in parts copy-on-write over a file.
//!
//! One of the receiver's two rooms with unsafe code, the other being `uffd/raw`. A mapping is reached by copying to and from addresses inside it,
//! never by a reference: a guest may run in it, and what lies over a file is the page cache's until it is written to.
//! Whoever maps a file answers for it: one that shrinks, or a disk that cannot give back a page, is SIGBUS for the
//! process that touches it.
#![allow(unsafe_code, reason = "memory is mapped by address")]

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use rustix::param::page_size;
use std::fs::File;
use std::io;
use std::ptr::{NonNull, copy_nonoverlapping, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};

/// A mapping, gone when it is dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is no thread's own, and nothing but this value unmaps it.
unsafe impl Send for Mapping {}
// SAFETY: through a shared reference it is only read, by copying out.
unsafe impl Sync for Mapping {}

/// Bytes of a huge page.
const HUGE_BYTES: usize = 2 << 20;
const ACCESS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

impl Mapping {
    /// So many bytes of zeros, and those that fill the system's last page.
    pub(super) fn new(bytes: usize) -> io::Result<Self> {
        let bytes = bytes.max(1).checked_next_multiple_of(page_size()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: no address is asked for, so what is mapped already stays as it is.
        let start = unsafe { mmap_anonymous(null_mut(), bytes, ACCESS, MapFlags::PRIVATE) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    /// As [`new`](Self::new), in a memory file, and in huge pages of 2 MiB if `huge`.
    pub(super) fn shared(bytes: usize, huge: bool) -> io::Result<(Self, File)> {
        let (flags, page) = if huge {
            (MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, HUGE_BYTES)
        } else {
            (MemfdFlags::empty(), page_size())
        };
        let bytes = bytes.max(1).checked_next_multiple_of(page).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("pagewire-guest", flags)?);
        file.set_len(bytes as u64)?;
        // Who gets the descriptor cannot cut the file under the mapping, which would make a touch a signal.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::of_file(&file, 0, bytes)?, file))
    }

    /// So many bytes of a file from a place on, which is a multiple of the page size, and those that fill its last page.
    /// Others see what is written.
    pub(super) fn of_file(file: &File, from: u64, bytes: usize) -> io::Result<Self> {
        let bytes = bytes.max(1).checked_next_multiple_of(page_size()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: no address is asked for, so what is mapped already stays as it is.
        let start = unsafe { mmap(null_mut(), bytes, ACCESS, MapFlags::SHARED, file, from) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    /// Where it begins.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Its bytes, in whole pages.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Keeps the mapping from children of this process: a child that touches it gets a signal, never a zero.
    pub(super) fn keep_from_children(&self) -> io::Result<()> {
        // SAFETY: all of it is this mapping's, and the advice changes nothing in this process.
        Ok(unsafe { madvise(self.start.as_ptr().cast(), self.bytes, Advice::LinuxDontFork) }?)
    }

    /// Throws pages away, also from the memory file: they are missing then. Places are multiples of the page size.
    pub(super) fn discard(&self, offset: usize, bytes: usize, shared: bool) -> io::Result<()> {
        let at = self.whole_pages(offset, bytes)?;
        let advice = if shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        // SAFETY: `at` and the bytes behind it are this mapping's, and no Rust object lies there that would change.
        Ok(unsafe { madvise(at.as_ptr().cast(), bytes, advice) }?)
    }

    /// Lays bytes of a file over this memory. What is written to them stays here, and changes of the file show until
    /// then. Places are multiples of the system's page size.
    pub(super) fn lay(&mut self, offset: usize, bytes: usize, file: &File, from: u64) -> io::Result<()> {
        let at = self.whole_pages(offset, bytes)?;
        // SAFETY: `at` and the bytes behind it are this mapping's, in whole pages, and no reference leads there.
        let laid = unsafe { mmap(at.as_ptr().cast(), bytes, ACCESS, MapFlags::PRIVATE | MapFlags::FIXED, file, from) };
        self.replaced(laid.map(drop))
    }

    /// Makes bytes zeros that take no memory. Places are multiples of the system's page size.
    pub(super) fn clear(&mut self, offset: usize, bytes: usize) -> io::Result<()> {
        let at = self.whole_pages(offset, bytes)?;
        // SAFETY: `at` and the bytes behind it are this mapping's, in whole pages, and no reference leads there.
        let laid = unsafe { mmap_anonymous(at.as_ptr().cast(), bytes, ACCESS, MapFlags::PRIVATE | MapFlags::FIXED) };
        self.replaced(laid.map(drop))
    }

    /// The system may have unmapped what it then could not replace, and may give that place to somebody else: the whole
    /// mapping is given up, and never unmapped.
    fn replaced(&mut self, result: rustix::io::Result<()>) -> io::Result<()> {
        if result.is_err() {
            self.bytes = 0;
        }
        Ok(result?)
    }

    /// Copies bytes out.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) -> io::Result<()> {
        let from = self.at(offset, bytes.len())?;
        // SAFETY: `from` and the bytes behind it are mapped, readable, and in no Rust object, so not in `bytes`.
        unsafe { copy_nonoverlapping(from.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies bytes in.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: `to` and the bytes behind it are mapped, writable, and in no Rust object, so not in `bytes`.
        unsafe { copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Writes a word, while others may read and write it; `offset` is a multiple of eight.
    pub(super) fn store(&self, offset: usize, word: u64) -> io::Result<()> {
        let at = self.at(offset, size_of::<u64>())?.cast::<AtomicU64>();
        if !at.is_aligned() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the beginning of a word"));
        }
        // SAFETY: `at` is aligned, mapped and writable, and in no Rust object but this atomic one.
        unsafe { at.as_ref() }.store(word, Ordering::Relaxed);
        Ok(())
    }

    /// The address of `offset`, if so many bytes from there on are this mapping's.
    fn at(&self, offset: usize, bytes: usize) -> io::Result<NonNull<u8>> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        if !inside {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not inside the guest's memory"));
        }
        // SAFETY: `offset` is at most the mapping's length.
        Ok(unsafe { self.start.add(offset) })
    }

    fn whole_pages(&self, offset: usize, bytes: usize) -> io::Result<NonNull<u8>> {
        if !offset.is_multiple_of(page_size()) || !bytes.is_multiple_of(page_size()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not whole pages of this system"));
        }
        self.at(offset, bytes)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: all of it is this mapping's, and whoever was given its address was told how long it lasts.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_written_over_a_file_stays_here() {
        let page = page_size();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 3 * page], 0).unwrap();
        let mut mapping = Mapping::new(4 * page - 5).unwrap();
        mapping.lay(page, 2 * page, &file, page as u64).unwrap();
        mapping.write(2 * page - 1, &[1, 2]).unwrap();
        mapping.clear(0, page).unwrap();
        let mut bytes = vec![9; 4 * page];
        mapping.read(0, &mut bytes).unwrap();
        let mut expected = [vec![0; page], vec![7; 2 * page], vec![0; page]].concat();
        expected[2 * page - 1..=2 * page].copy_from_slice(&[1, 2]);
        assert!(bytes == expected);
        let mut kept = vec![0; 3 * page];
        file.read_exact_at(&mut kept, 0).unwrap();
        assert!(kept == vec![7; 3 * page]);
        mapping.clear(page, 2 * page).unwrap();
        mapping.read(0, &mut bytes).unwrap();
        assert!(bytes == vec![0; 4 * page]);
    }

    #[test]
    fn rejects_what_is_not_inside() {
        let page = page_size();
        let mut mapping = Mapping::new(page).unwrap();
        assert!(mapping.read(1, &mut vec![0; page]).is_err());
        assert!(mapping.write(usize::MAX, &[1]).is_err() && mapping.write(page, &[1]).is_err());
        assert!(mapping.store(4, 1).is_err() && mapping.store(page, 1).is_err() && mapping.store(page - 8, 1).is_ok());
        assert!(mapping.clear(0, 2 * page).is_err() && mapping.clear(8, page).is_err());
        assert!(mapping.write(page - 1, &[1]).is_ok() && Mapping::new(usize::MAX).is_err());
    }

    #[test]
    fn is_given_up_when_a_part_of_it_could_not_be_replaced() {
        let mut mapping = Mapping::new(page_size()).unwrap();
        let folder = File::open(tempfile::tempdir().unwrap().path()).unwrap();
        assert!(mapping.lay(0, page_size(), &folder, 0).is_err(), "a folder cannot be mapped");
        assert!(mapping.read(0, &mut [0]).is_err());
    }
}
