//! Mapped memory: mapping and unmapping it, and the one way in which bytes are copied out while others write.

use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{InstallSize, Region};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Memory that this process maps and holds until the last handle goes: a guest's, for whoever has none yet.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    mapped: usize,
    file: Option<File>,
}

// SAFETY: it is an address range that stays mapped while the value lives, and a descriptor. All access through it is by
// atomic operations or by the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeros of this process alone.
    ///
    /// # Errors
    /// There is no memory, or no byte was asked for.
    pub fn private(bytes: usize) -> io::Result<Self> {
        let mapped = bytes.next_multiple_of(PAGE_BYTES);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is asked for, so no mapping that is there is touched.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), mapped, ProtFlags::READ | ProtFlags::WRITE, flags)
        }?;
        Self::at(start, bytes, mapped, None)
    }

    /// Zeros in a memory file, which other processes map too if they are handed its descriptor.
    ///
    /// # Errors
    /// As those of [`private`](Self::private).
    pub fn shared(bytes: usize) -> io::Result<Self> {
        Self::of_memfd(bytes, bytes.next_multiple_of(PAGE_BYTES), MemfdFlags::empty())
    }

    /// As [`shared`](Self::shared), in huge pages of 2 MiB out of the system's pool.
    ///
    /// # Errors
    /// As those of [`private`](Self::private), or the pool has not enough of them.
    pub fn shared_huge(bytes: usize) -> io::Result<Self> {
        Self::of_memfd(bytes, bytes.next_multiple_of(2 << 20), MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
    }

    fn of_memfd(bytes: usize, mapped: usize, flags: MemfdFlags) -> io::Result<Self> {
        let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("pagewire-guest", flags)?);
        file.set_len(mapped as u64)?;
        // Who got the descriptor cannot take pages away under the mapping: touching them would be a SIGBUS.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: as in `private`.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), mapped, protection, MapFlags::SHARED, &file, 0) }?;
        Self::at(start, bytes, mapped, Some(file))
    }

    fn at(start: *mut c_void, bytes: usize, mapped: usize, file: Option<File>) -> io::Result<Self> {
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("memory was mapped at address zero"))?;
        Ok(Self { start, bytes, mapped, file })
    }

    /// Where it begins, for KVM and for devices. It ends after [`len`](Self::len) bytes.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no byte; it always has one.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The memory file.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// The byte at `offset`, to be read and written while others do; `None` beyond the end.
    pub fn byte(&self, offset: usize) -> Option<&AtomicU8> {
        // SAFETY: inside the mapping, which is readable, writable, and there as long as `self`.
        (offset < self.bytes).then(|| unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset)) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by this value and nobody else unmaps it. Whoever took its address was told that
        // it ends here, and regions hold a handle.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.mapped) };
        debug_assert!(unmapped.is_ok(), "a range of our own can be unmapped");
    }
}

/// Where the bytes of a region are read.
#[derive(Debug)]
enum Source {
    Address,
    /// A shared mapping's file, and where in it the region begins.
    File(File, u64),
    Mapping(Arc<Mapping>),
}

/// A region of guest memory that is mapped into this process.
#[derive(Debug)]
pub struct MappedRegion {
    start: NonNull<u8>,
    region: Region,
    source: Source,
}

// SAFETY: who made it promised that the range stays readable from any thread until it is dropped.
unsafe impl Send for MappedRegion {}

impl MappedRegion {
    /// The `bytes` bytes that are mapped at `start`, such as a VMM's guest memory.
    ///
    /// Memory of a shared mapping should have its file [named](Self::backed_by), too.
    ///
    /// # Errors
    /// `start` is not at the beginning of a page.
    ///
    /// # Safety
    /// The range is mapped readable until the region is dropped, and no file behind it shrinks below it. Whoever writes
    /// to it meanwhile is outside of this program's language (a vCPU, a device, the kernel, another process), or
    /// writes by atomic or volatile operations.
    pub unsafe fn new(start: NonNull<u8>, bytes: usize, install_size: InstallSize) -> io::Result<Self> {
        if !start.addr().get().is_multiple_of(PAGE_BYTES) {
            let what = format!("the region at {start:p} does not begin with a page");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Ok(Self { start, region: Region { bytes: bytes as u64, install_size }, source: Source::Address })
    }

    /// All of a mapping.
    pub fn of(mapping: Arc<Mapping>, install_size: InstallSize) -> Self {
        let region = Region { bytes: mapping.bytes as u64, install_size };
        Self { start: mapping.start, region, source: Source::Mapping(mapping) }
    }

    /// Says that the region is a shared mapping of `file` from `offset` on, so that its bytes are read from there: then
    /// pages that nobody has touched stay unused, where reading them in the mapping would allocate each of them.
    #[must_use]
    pub fn backed_by(self, file: File, offset: u64) -> Self {
        Self { source: Source::File(file, offset), ..self }
    }

    pub(in crate::memory) fn region(&self) -> Region {
        self.region
    }

    /// The addresses of its pages, the last of them whole.
    pub(in crate::memory) fn addresses(&self) -> Range<u64> {
        let start = self.start.addr().get() as u64;
        start..start.saturating_add(self.region.bytes.next_multiple_of(PAGE_BYTES as u64))
    }

    /// Copies pages out from page `first` on; zeros beyond the end.
    pub(in crate::memory) fn read(&self, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let offset = first.saturating_mul(PAGE_BYTES as u64);
        let left = usize::try_from(self.region.bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (real, padding) = bytes.split_at_mut(left.min(bytes.len()));
        padding.fill(0);
        let (file, start) = match &self.source {
            Source::File(file, start) => (Some(file), *start),
            Source::Mapping(mapping) => (mapping.file.as_ref(), 0),
            Source::Address => (None, 0),
        };
        match file {
            Some(file) => file.read_exact_at(real, start.saturating_add(offset))?,
            None => self.copy_out(offset, real),
        }
        Ok(())
    }

    /// Copies what lies inside the region and begins at a page, while others may write to it.
    ///
    /// By relaxed loads of words: the compiler may neither repeat nor split nor invent them, and what comes is in a
    /// private buffer before anybody looks at it. A copy by `memcpy` would be a data race, and a slice over the source
    /// a promise that nobody keeps.
    fn copy_out(&self, offset: u64, bytes: &mut [u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        debug_assert!(offset.is_multiple_of(PAGE_BYTES) && (offset + bytes.len()) as u64 <= self.region.bytes);
        let (words, tail) = bytes.as_chunks_mut::<8>();
        let tail_at = offset.saturating_add(words.len().saturating_mul(8));
        for (word, at) in words.iter_mut().zip((offset..).step_by(8)) {
            // SAFETY: `read` cut the bytes to those inside the region, which is readable; a page's beginning and whole
            // words behind it are aligned. A relaxed load of a word writes nothing, even on memory mapped read-only.
            let source = unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(at).cast()) };
            *word = source.load(Ordering::Relaxed).to_ne_bytes();
        }
        for (byte, at) in tail.iter_mut().zip(tail_at..) {
            // SAFETY: as above.
            *byte = unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(at)) }.load(Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_regions_out_that_end_inside_a_word() {
        let mapping = Arc::new(Mapping::private(4096 + 13).unwrap());
        (0..mapping.len()).for_each(|at| mapping.byte(at).unwrap().store(at as u8 | 1, Ordering::Relaxed));
        assert!(mapping.byte(mapping.len()).is_none());
        // SAFETY: the mapping outlives the region.
        let region = unsafe { MappedRegion::new(mapping.start, mapping.len(), InstallSize::KIB_4) }.unwrap();
        let mut bytes = vec![99; 8192];
        region.read(0, &mut bytes).unwrap();
        let expected: Vec<u8> = (0..8192).map(|at| if at < mapping.len() { at as u8 | 1 } else { 0 }).collect();
        assert_eq!(bytes, expected);
        region.read(1, &mut bytes[..4096]).unwrap();
        assert_eq!(bytes[..4096], expected[4096..]);
        // SAFETY: as above.
        assert!(unsafe { MappedRegion::new(mapping.start.add(8), 100, InstallSize::KIB_4) }.is_err());
    }
}
