//! A manifest's digests where they lie: a shared mapping of the file, read-only.
//!
//! The store's only room with unsafe code. Digests of a large image fill memory that a host may first have to find (32
//! MiB for 4 GiB of pages), while the page cache has them. A manifest never changes under its name, nor is it ever cut
//! short: it is written aside and renamed, and goes by being unlinked, which a mapping outlives. Whoever breaks that has
//! the rights of the store's owner.
#![allow(unsafe_code, reason = "a file is mapped")]

use pagewire_protocol::limits::SUBTREE_PAGES;
use pagewire_protocol::tree::{KeptLeaves, Leaves};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use rustix::param::page_size;
use std::fs::File;
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

/// All of a file, as long as it was when it was mapped.
#[derive(Debug)]
pub(crate) struct Mapped {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is no thread's own, and nothing but this value unmaps it.
unsafe impl Send for Mapped {}
// SAFETY: it is only read.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        let bytes = usize::try_from(file.metadata()?.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        // SAFETY: no address is asked for, so what is mapped already stays as it is.
        let start = unsafe { mmap(null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    /// Brings `bytes` bytes from `offset` in, so that an error of the disk is one here, and no signal later.
    ///
    /// # Errors
    /// The disk's; they are not in the file; and the kernel cannot do that before Linux 5.14.
    pub(crate) fn populate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let end = offset.checked_add(bytes).and_then(|end| usize::try_from(end).ok());
        let end = end.filter(|end| *end <= self.bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let from = offset - offset % page_size();
        // SAFETY: inside the mapping, which keeps its bytes.
        let start = unsafe { self.start.as_ptr().add(from) };
        // SAFETY: as above.
        unsafe { madvise(start.cast(), end - from, Advice::LinuxPopulateRead) }?;
        Ok(())
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, readable, initialised by the kernel, and there as long as `self`. Nobody writes to a manifest:
        // see the head of this file.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by this value, and nobody has a reference into it any more.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "a range of our own can be unmapped");
    }
}

/// The digests of one region.
#[derive(Debug)]
pub(crate) struct MappedDigests {
    pub(crate) file: Arc<Mapped>,
    /// Where the region's first digest lies in the file.
    pub(crate) first: usize,
}

impl KeptLeaves for MappedDigests {
    fn leaves(&self, index: u64) -> Option<&Leaves> {
        let at = usize::try_from(index).ok()?.checked_mul(size_of::<Leaves>())?.checked_add(self.first)?;
        let (digests, _) = self.file.bytes().get(at..)?.as_chunks();
        digests.first_chunk::<SUBTREE_PAGES>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn digests_are_found_up_to_the_last_whole_subtree_of_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3 * size_of::<Leaves>() as u32 + 100).map(|at| (at / 32) as u8).collect();
        file.write_all(&bytes).unwrap();
        let mapped = Arc::new(Mapped::new(&file).unwrap());
        for first in [0usize, 100, 4096, 8292] {
            let digests = MappedDigests { file: Arc::clone(&mapped), first };
            for index in 0..5u64 {
                let from = first + index as usize * size_of::<Leaves>();
                let expected = bytes.get(from..from + size_of::<Leaves>());
                assert_eq!(digests.leaves(index).map(|leaves| leaves.as_flattened()), expected, "{first} {index}");
            }
            assert!(digests.leaves(u64::MAX).is_none());
        }
        for (offset, more) in [(0, bytes.len() as u64 + 1), (bytes.len() as u64, 1), (u64::MAX, 1)] {
            assert!(mapped.populate(offset, more).is_err());
        }
        assert!(mapped.populate(5000, bytes.len() as u64 - 5000).is_ok());
    }

    /// A file that was cut short behind the store's back: an error where it is brought in, not a signal.
    #[test]
    fn what_cannot_be_brought_in_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 10 * page_size()]).unwrap();
        let mapped = Mapped::new(&file).unwrap();
        file.set_len(page_size() as u64).unwrap();
        let page = page_size() as u64;
        assert!(mapped.populate(0, page).is_ok() && mapped.populate(5 * page, page).is_err());
    }
}
