//! The kernel's watch over writes: three ioctls of userfaultfd, which protect pages so that the first write to each
//! leaves a trace in its page table entry, and one of the pagemap, which collects the traces and protects the pages anew.
//!
//! Nobody is called and no thread waits when a page is written: the kernel lifts the protection itself.

use linux_raw_sys::general::{
    PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, UFFD_API, UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, UFFD_USER_MODE_ONLY, page_region, pm_scan_arg,
    uffdio_api, uffdio_range, uffdio_register, uffdio_writeprotect,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

/// What userfaultfd has to be able to do: lift the protection itself; protect what is not there yet, so that an
/// untouched page does not count as written; and protect memory files.
const FEATURES: [(u32, &str); 3] = [
    (UFFD_FEATURE_WP_ASYNC, "WP_ASYNC (Linux 6.7)"),
    (UFFD_FEATURE_WP_UNPOPULATED, "WP_UNPOPULATED (Linux 6.4)"),
    (UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM (Linux 5.19)"),
];
/// `_UFFDIO_REGISTER` mode and `UFFDIO_WRITEPROTECT` mode; the headers have them as shifts, which bindings leave out.
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);
/// Runs that one scan gives at most: 12 KiB on the stack, and one call for every 512 separate pages.
const RUNS: usize = 512;

/// An ioctl whose argument is a structure that the kernel reads and writes; gives what the call returned.
struct Call<'a, T> {
    opcode: Opcode,
    argument: &'a mut T,
}

// SAFETY: the opcode and the structure belong together wherever a `Call` is made, and the structure is borrowed
// mutably while the kernel has its address.
unsafe impl<T> Ioctl for Call<'_, T> {
    type Output = IoctlOutput;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.argument).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<IoctlOutput> {
        Ok(output)
    }
}

/// Page ranges whose writes leave traces, until it is dropped.
#[derive(Debug)]
pub(in crate::memory) struct WriteWatch {
    /// Closing it lifts all protection.
    _uffd: OwnedFd,
    pub(in crate::memory) pagemap: File,
}

impl WriteWatch {
    /// Watches ranges of whole pages: what is written after this call leaves a trace.
    ///
    /// It changes no byte and no permission, whatever memory it is: a write to it just takes longer once.
    pub(in crate::memory) fn start(ranges: &[Range<u64>]) -> io::Result<Self> {
        let uffd = open_uffd()?;
        let without = |error: io::Error| cannot_watch(&format!("/proc/self/pagemap cannot be opened: {error}"));
        let pagemap = File::open("/proc/self/pagemap").map_err(without)?;
        let watch = Self { _uffd: uffd, pagemap };
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let named = |error: rustix::io::Errno| {
                cannot_watch(&format!("the region at {:#x} cannot be protected: {error}", range.start))
            };
            let len = range.end.saturating_sub(range.start);
            let range = uffdio_range { start: range.start, len };
            let mut register = uffdio_register { range, mode: REGISTER_MODE_WP, ioctls: 0 };
            call(&watch._uffd, UFFDIO_REGISTER, &mut register).map_err(named)?;
            let mut protect = uffdio_writeprotect { range, mode: WRITEPROTECT_MODE_WP };
            call(&watch._uffd, UFFDIO_WRITEPROTECT, &mut protect).map_err(named)?;
        }
        Ok(watch)
    }

    /// Gives the addresses of written pages in `range`, in runs, and watches them anew: when it returns, each later
    /// write to them leaves a trace again.
    ///
    /// After an error some may be protected again that were not given.
    pub(in crate::memory) fn take(&self, range: &Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        let mut runs = [page_region { start: 0, end: 0, categories: 0 }; RUNS];
        let mut start = range.start;
        loop {
            let mut scan = pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                // A range that is not watched any more is an error, not a range without traces.
                flags: u64::from(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC),
                start,
                end: range.end,
                walk_end: 0,
                vec: runs.as_mut_ptr().expose_provenance() as u64,
                vec_len: RUNS as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: u64::from(PAGE_IS_WRITTEN),
                category_anyof_mask: 0,
                return_mask: u64::from(PAGE_IS_WRITTEN),
            };
            let count = call(&self.pagemap, PAGEMAP_SCAN, &mut scan).map_err(|error| {
                cannot_watch(&format!("PAGEMAP_SCAN (Linux 6.7) of the region at {:#x}: {error}", range.start))
            })?;
            let count = usize::try_from(count).unwrap_or(RUNS).min(RUNS);
            runs.iter().take(count).for_each(|run| found(run.start..run.end));
            // Fewer runs than there was room for are all; where the walk ended says less.
            match runs.last() {
                Some(last) if count == RUNS && last.end < range.end => start = last.end,
                _ => return Ok(()),
            }
        }
    }
}

fn call<T>(fd: impl AsFd, opcode: Opcode, argument: &mut T) -> rustix::io::Result<IoctlOutput> {
    // SAFETY: each caller, all of them in this module, pairs the opcode with its structure. What the structures point
    // to is watched page ranges, whose bytes the kernel does not touch, and the runs of a scan, which outlive the call.
    unsafe { ioctl(fd, Call { opcode, argument }) }
}

/// A userfaultfd with all of [`FEATURES`].
fn open_uffd() -> io::Result<OwnedFd> {
    let open = || {
        // Faults of user mode only: that needs no privilege, and asynchronous protection has no faults to handle, so
        // writes by the kernel and by KVM are traced all the same.
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        // SAFETY: the descriptor stays in this module, which only protects pages with it.
        unsafe { rustix::mm::userfaultfd(flags) }
            .map_err(|error| cannot_watch(&format!("userfaultfd is not to be had: {error}")))
    };
    let wanted = FEATURES.iter().fold(0, |bits, (bit, _)| bits | u64::from(*bit));
    let uffd = open()?;
    let mut api = uffdio_api { api: u64::from(UFFD_API), features: wanted, ioctls: 0 };
    if call(&uffd, UFFDIO_API, &mut api).is_ok() {
        return Ok(uffd);
    }
    // It does not say what it lacks; one that is asked for nothing tells what it has.
    let mut api = uffdio_api { api: u64::from(UFFD_API), features: 0, ioctls: 0 };
    call(open()?, UFFDIO_API, &mut api)?;
    Err(cannot_watch(&format!("userfaultfd of this kernel lacks {}", lacking(api.features))))
}

fn lacking(features: u64) -> String {
    let lacks = FEATURES.iter().filter(|(bit, _)| features & u64::from(*bit) == 0);
    lacks.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
}

fn cannot_watch(why: &str) -> io::Error {
    io::Error::other(format!(
        "{why}; without it writes can be told by a dirty bitmap of the VMM's own, or found in a memory file by reading it again"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::{MappedRegion, Mapping};
    use super::*;
    use pagewire_protocol::limits::PAGE_BYTES;
    use pagewire_protocol::page::InstallSize;
    use rustix::mm::{MapFlags, ProtFlags};
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    #[test]
    fn names_the_features_that_a_kernel_lacks() {
        assert_eq!(
            lacking(u64::from(UFFD_FEATURE_WP_UNPOPULATED)),
            "WP_ASYNC (Linux 6.7), WP_HUGETLBFS_SHMEM (Linux 5.19)"
        );
        assert_eq!(lacking(u64::MAX), "");
        assert!(cannot_watch("x").to_string().contains("dirty bitmap of the VMM's own"));
    }

    const PAGE: u64 = PAGE_BYTES as u64;

    /// Pages of `mapping` with traces, by number.
    fn taken(watch: &WriteWatch, region: &MappedRegion) -> Vec<u64> {
        let addresses = region.addresses();
        let mut found = Vec::new();
        let page = |address: u64| (address - addresses.start) / PAGE;
        watch.take(&addresses, |run| found.extend(page(run.start)..page(run.end))).unwrap();
        found
    }

    fn watched(mapping: io::Result<Mapping>) -> Option<(Arc<Mapping>, MappedRegion, WriteWatch)> {
        let start = || {
            let mapping = Arc::new(mapping?);
            let region = MappedRegion::of(mapping.clone(), InstallSize::KIB_4);
            let watch = WriteWatch::start(&[region.addresses()])?;
            Ok((mapping, region, watch))
        };
        let skip = |error: io::Error| writeln!(io::stderr(), "SKIPPED: a watch over writes: {error}").unwrap();
        start().map_err(skip).ok()
    }

    #[test]
    fn gives_each_written_page_once_and_no_page_that_was_only_read() {
        for mapping in [Mapping::private, Mapping::shared] {
            let Some((mapping, region, watch)) = watched(mapping(2000 * PAGE_BYTES)) else { return };
            assert_eq!(taken(&watch, &region), [], "nobody has touched anything");
            region.read(0, &mut vec![0; 2000 * PAGE_BYTES]).unwrap();
            (0..2000).for_each(|page| _ = mapping.byte(page * PAGE_BYTES).unwrap().load(Ordering::Relaxed));
            assert_eq!(taken(&watch, &region), []);
            // More runs than one scan gives.
            (0..2000).step_by(2).for_each(|page| mapping.byte(page * PAGE_BYTES).unwrap().store(1, Ordering::Relaxed));
            assert_eq!(taken(&watch, &region), (0..2000).step_by(2).collect::<Vec<_>>());
            assert_eq!(taken(&watch, &region), []);
        }
    }

    #[test]
    fn finds_what_the_kernel_writes_for_a_system_call() {
        let Some((mapping, region, watch)) = watched(Mapping::private(8 * PAGE_BYTES)) else { return };
        // SAFETY: nobody else knows of these bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(mapping.as_ptr().add(3 * PAGE_BYTES), 10) };
        File::open("/dev/zero").unwrap().read_exact_at(bytes, 0).unwrap();
        assert_eq!(taken(&watch, &region), [3]);
    }

    #[test]
    fn private_memory_that_is_thrown_away_is_written() {
        const PAGES: usize = 2048;
        for thrown in [5..6, 0..PAGES] {
            let Some((mapping, region, watch)) = watched(Mapping::private(PAGES * PAGE_BYTES)) else { return };
            (0..PAGES).for_each(|page| mapping.byte(page * PAGE_BYTES).unwrap().store(1, Ordering::Relaxed));
            assert_eq!(taken(&watch, &region).len(), PAGES);
            // SAFETY: nobody else knows of these bytes, which become zeros.
            unsafe {
                let from = mapping.as_ptr().add(thrown.start * PAGE_BYTES).cast();
                rustix::mm::madvise(from, thrown.len() * PAGE_BYTES, rustix::mm::Advice::LinuxDontNeed).unwrap();
            }
            assert_eq!(taken(&watch, &region), (thrown.start as u64..thrown.end as u64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn huge_pages_come_as_whole_runs() {
        let Some((mapping, region, watch)) = watched(Mapping::shared_huge(8 << 20)) else { return };
        assert_eq!(taken(&watch, &region), []);
        mapping.byte((2 << 20) + 77).unwrap().store(1, Ordering::Relaxed);
        assert_eq!(taken(&watch, &region), (512..1024).collect::<Vec<_>>());
        assert_eq!(taken(&watch, &region), []);
        let mut bytes = vec![0; 4096];
        region.read(512, &mut bytes).unwrap();
        assert_eq!(bytes[77], 1);
    }

    #[test]
    fn transparent_huge_pages_lose_no_write() {
        let mapping = Mapping::private(8 << 20).unwrap();
        // SAFETY: an advice that changes no byte.
        unsafe { rustix::mm::madvise(mapping.as_ptr().cast(), 8 << 20, rustix::mm::Advice::LinuxHugepage) }.unwrap();
        (0..2048).for_each(|page| mapping.byte(page * PAGE_BYTES).unwrap().store(1, Ordering::Relaxed));
        let Some((mapping, region, watch)) = watched(Ok(mapping)) else { return };
        assert_eq!(taken(&watch, &region), []);
        mapping.byte(5 << 20).unwrap().store(2, Ordering::Relaxed);
        let found = taken(&watch, &region);
        assert!(found.contains(&1280), "{found:?}");
        assert_eq!(taken(&watch, &region), []);
    }

    #[test]
    fn a_range_that_is_not_watched_any_more_is_an_error() {
        let Some((mapping, region, watch)) = watched(Mapping::private(8 * PAGE_BYTES)) else { return };
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: over a page of a mapping that nobody uses.
        let over = unsafe {
            let page = mapping.as_ptr().add(PAGE_BYTES).cast();
            rustix::mm::mmap_anonymous(page, PAGE_BYTES, ProtFlags::READ | ProtFlags::WRITE, flags)
        };
        over.unwrap();
        assert!(watch.take(&region.addresses(), |_| ()).unwrap_err().to_string().contains("PAGEMAP_SCAN"));
    }
}
