//! The ioctls and the mapping that kvm-ioctls has no safe calls for. The one module with unsafe code.
#![allow(unsafe_code, reason = "ioctls on memory slots and rings shared with the kernel cannot be had without")]

use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_dirty_gfn, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::ioctl::{Ioctl, IoctlOutput, NoArg, Opcode, Updater, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const KVMIO: u8 = 0xae;
const CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<kvm_clear_dirty_log>(KVMIO, 0xc0);
const RESET_DIRTY_RINGS: Opcode = opcode::none(KVMIO, 0xc7);
const PAGE_BYTES: u64 = 4096;

/// A memory slot of a VM.
#[derive(Clone, Copy, Debug)]
pub struct Slot(kvm_userspace_memory_region);

impl Slot {
    /// The slot as it was given to `KVM_SET_USER_MEMORY_REGION`.
    ///
    /// # Safety
    /// The VM that it will be used with has this slot over this memory, and keeps both as long as anything that was made
    /// of this value lives.
    pub unsafe fn new(region: kvm_userspace_memory_region) -> Self {
        Self(region)
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.slot
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.0.memory_size
    }

    pub(crate) fn pages(&self) -> u64 {
        self.0.memory_size / PAGE_BYTES
    }

    /// Turns the log of writes on or off; else the slot stays as it is.
    pub(crate) fn set_log(&self, vm: &VmFd, on: bool) -> io::Result<()> {
        let flags = self.0.flags & !KVM_MEM_LOG_DIRTY_PAGES | if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        // SAFETY: whoever made the slot promised that the VM has it already, over memory that stays.
        unsafe { vm.set_user_memory_region(kvm_userspace_memory_region { flags, ..self.0 }) }
            .map_err(|error| named(self, if on { "start to log" } else { "cease to log" }, error.into()))
    }

    /// `KVM_GET_DIRTY_LOG`: one bit a page.
    pub(crate) fn log(&self, vm: &VmFd) -> io::Result<Vec<u64>> {
        let bytes = usize::try_from(self.0.memory_size).map_err(io::Error::other)?;
        vm.get_dirty_log(self.0.slot, bytes).map_err(|error| named(self, "show its log", error.into()))
    }

    /// `KVM_CLEAR_DIRTY_LOG`: clears the bits of `bitmap`, whose first is that of page `first`, and protects their pages.
    pub(crate) fn clear(&self, vm: &VmFd, first: u64, bitmap: &mut [u64]) -> io::Result<()> {
        let left = self.pages().saturating_sub(first);
        let pages = left.min((bitmap.len() as u64).saturating_mul(64));
        let mut argument = kvm_clear_dirty_log {
            slot: self.0.slot,
            num_pages: u32::try_from(pages).map_err(io::Error::other)?,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
        };
        // SAFETY: opcode and structure belong together, and the bitmap is as long as the pages it is for.
        unsafe { ioctl(descriptor(vm), Updater::<CLEAR_DIRTY_LOG, _>::new(&mut argument)) }
            .map_err(|error| named(self, "clear its log", error.into()))
    }
}

fn named(slot: &Slot, what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("slot {} of the VM does not {what}: {error}", slot.id()))
}

fn descriptor(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as its owner, which is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// `KVM_RESET_DIRTY_RINGS`: pages of entries that were given back are protected again; says how many entries that were.
pub(crate) fn reset_rings(vm: &VmFd) -> io::Result<i32> {
    /// An ioctl without an argument that returns a number.
    struct Reset(NoArg<RESET_DIRTY_RINGS>);
    // SAFETY: as `NoArg`, but for the number that is returned.
    unsafe impl Ioctl for Reset {
        type Output = IoctlOutput;
        const IS_MUTATING: bool = false;

        fn opcode(&self) -> Opcode {
            self.0.opcode()
        }

        fn as_ptr(&mut self) -> *mut std::ffi::c_void {
            self.0.as_ptr()
        }

        unsafe fn output_from_ptr(output: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<IoctlOutput> {
            Ok(output)
        }
    }
    // SAFETY: the opcode takes no argument; KVM protects pages and touches no memory of this process.
    unsafe { ioctl(descriptor(vm), Reset(NoArg::new())) }
        .map_err(|error| io::Error::other(format!("the dirty rings cannot be reset: {error}")))
}

/// The kernel has filled an entry; the reader gives it back.
const DIRTY: u32 = 1 << 0;
const RESET: u32 = 1 << 1;

/// The ring of one vCPU, shared with the kernel.
#[derive(Debug)]
pub(crate) struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: u32,
    next: u32,
}

// SAFETY: a mapping of its own that any thread may read, one at a time.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of a vCPU, which has `count` entries.
    pub(crate) fn map(vcpu: &VcpuFd, count: u32) -> io::Result<Self> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET).saturating_mul(PAGE_BYTES);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let bytes = Self::bytes(count);
        // SAFETY: no address is asked for, so no mapping that is there is touched.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, descriptor(vcpu), offset)
        }
        .map_err(|error| io::Error::other(format!("the dirty ring of a vCPU cannot be mapped: {error}")))?;
        let entries =
            NonNull::new(start.cast()).ok_or_else(|| io::Error::other("a ring was mapped at address zero"))?;
        Ok(Self { entries, count, next: 0 })
    }

    fn bytes(count: u32) -> usize {
        usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(size_of::<kvm_dirty_gfn>())
    }

    /// Gives the slot and page of each entry that is there, and gives them back to the kernel, which can use them again
    /// after [`reset_rings`].
    pub(crate) fn collect(&mut self, mut found: impl FnMut(u32, u64)) {
        // One turn at most: the kernel may not fill an entry again before it is reset.
        for _ in 0..self.count {
            let Ok(at) = usize::try_from(self.next.checked_rem(self.count).unwrap_or(0)) else { return };
            // SAFETY: an entry of the mapping, whose fields are aligned words that the kernel and we access atomically.
            let (flags, slot, offset) = unsafe {
                let entry = self.entries.as_ptr().add(at);
                (
                    AtomicU32::from_ptr(&raw mut (*entry).flags),
                    AtomicU32::from_ptr(&raw mut (*entry).slot),
                    AtomicU64::from_ptr(&raw mut (*entry).offset),
                )
            };
            // Acquire: the flag comes after the other fields; release: and they are read before it is given back.
            if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                return;
            }
            found(slot.load(Ordering::Relaxed), offset.load(Ordering::Relaxed));
            flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped by this value, and nobody else knows of it.
        let unmapped = unsafe { rustix::mm::munmap(self.entries.as_ptr().cast(), Self::bytes(self.count)) };
        debug_assert!(unmapped.is_ok(), "a range of our own can be unmapped");
    }
}
