//! The calls of userfaultfd. One of the receiver's two rooms with unsafe code, the other being `mapping`.
//!
//! What makes this safe to call: the kernel puts pages in only where memory is registered with this very descriptor, and
//! never over a page that is there. So whoever registers memory answers for it: the safe way takes only mappings of our
//! own, whose bytes no Rust object holds, and the other is unsafe. A descriptor that was handed over is its giver's word
//! in the same way.
#![allow(unsafe_code, reason = "ioctls cannot be done without")]

use super::super::mapping::Mapping;
use super::features::{Features, Missing};
use super::fill::{Filled, Step, fill};
use super::message::{Judged, MESSAGE_BYTES, Message, judge};
use linux_raw_sys::general::{
    _UFFDIO_CONTINUE, _UFFDIO_COPY, _UFFDIO_POISON, _UFFDIO_WRITEPROTECT, _UFFDIO_ZEROPAGE, UFFD_API,
    UFFD_USER_MODE_ONLY, UFFDIO_COPY_MODE_DONTWAKE, UFFDIO_COPY_MODE_WP, UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, UFFDIO_ZEROPAGE_MODE_DONTWAKE, uffdio_api, uffdio_continue,
    uffdio_copy, uffdio_poison, uffdio_range, uffdio_register, uffdio_writeprotect, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT,
    UFFDIO_ZEROPAGE,
};
use pagewire_protocol::limits::PAGE_BYTES;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::{BitOr, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use thiserror::Error;

/// Messages that one read takes at most: 2 KiB on the stack.
const MESSAGES: usize = 64;
/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`, and `UFFDIO_POISON`: bindings leave them out.
const IOC_NEW: Opcode = opcode::none(0xAA, 0);
const IOC_POISON: Opcode = opcode::read_write::<uffdio_poison>(0xAA, 8);
const _: () = assert!(_UFFDIO_POISON == 8, "the number in the opcode");
/// `UFFDIO_WRITEPROTECT_MODE_WP` and `UFFDIO_CONTINUE_MODE_DONTWAKE`, `UFFDIO_POISON_MODE_DONTWAKE`: shifts in the headers.
const PROTECT: u64 = 1 << 0;
const DONTWAKE: u64 = 1 << 0;

/// Whose faults are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultsOf {
    /// Programs and the kernel, as KVM, which a guest needs. Wants `CAP_SYS_PTRACE`, or `/dev/userfaultfd`, or
    /// `vm.unprivileged_userfaultfd`.
    Everybody,
    /// Programs alone, which needs no privilege: a system call or KVM that touches a missing page fails instead.
    Programs,
}

/// Why there is no userfaultfd.
#[derive(Debug, Error)]
pub enum UffdError {
    /// The system knows it but does not let us have it.
    #[error(
        "userfaultfd is not permitted ({0}): it needs CAP_SYS_PTRACE, the right to open /dev/userfaultfd or \
         vm.unprivileged_userfaultfd=1; without it a guest can arrive by pre-copy"
    )]
    NotPermitted(io::Error),
    /// The kernel was built without it.
    #[error("this kernel has no userfaultfd; a guest can arrive by pre-copy")]
    NotThere,
    /// The kernel is too old, or was built without a part of it.
    #[error(transparent)]
    Lacks(#[from] Missing),
    /// What was handed over as one is something else.
    #[error("the descriptor is no userfaultfd")]
    Foreign,
    /// A call failed.
    #[error("userfaultfd: {what}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        error: io::Error,
    },
}

/// For what a range is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch(u32);

impl Watch {
    /// Pages that are not there.
    pub const MISSING: Self = Self(UFFDIO_REGISTER_MODE_MISSING);
    /// Pages that are in the file but not in the page table.
    pub const MINOR: Self = Self(UFFDIO_REGISTER_MODE_MINOR);
    /// Writes to protected pages.
    pub const WRITES: Self = Self(UFFDIO_REGISTER_MODE_WP);
}

impl BitOr for Watch {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The ways in which faults of a range can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ioctls(u64);

impl Ioctls {
    const fn has(self, number: u32) -> bool {
        self.0 & (1 << number) != 0
    }

    /// By [`Uffd::copy`].
    pub const fn copies(self) -> bool {
        self.has(_UFFDIO_COPY)
    }

    /// By [`Uffd::zero`]; huge pages are copied from zeros instead.
    pub const fn zeroes(self) -> bool {
        self.has(_UFFDIO_ZEROPAGE)
    }

    /// By [`Uffd::map`].
    pub const fn maps(self) -> bool {
        self.has(_UFFDIO_CONTINUE)
    }

    /// By [`Uffd::poison`].
    pub const fn poisons(self) -> bool {
        self.has(_UFFDIO_POISON)
    }

    /// By [`Uffd::protect`].
    pub const fn protects(self) -> bool {
        self.has(_UFFDIO_WRITEPROTECT)
    }
}

/// Whether those are woken who wait for pages that are put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// At once.
    Now,
    /// By a call of [`Uffd::wake`].
    Later,
}

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

/// `USERFAULTFD_IOC_NEW`: its argument is a number, its result a descriptor.
struct New(usize);

// SAFETY: the argument is no address, so the kernel follows none.
unsafe impl Ioctl for New {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: a call that succeeded returned a descriptor that is new, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

/// A userfaultfd.
///
/// Once nobody has it open, missing pages of what is registered with it read as zeros: whoever cannot bear that keeps a
/// [duplicate](Self::duplicate), and the faults wait for the next handler.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    features: Features,
}

impl Uffd {
    /// A new one for memory of this process, with exactly the features that are `wanted`.
    ///
    /// # Errors
    /// There is none to be had, or it lacks a feature; the error names it.
    pub fn open(of: FaultsOf, wanted: Features) -> Result<Self, UffdError> {
        let fd = open(of)?;
        let mut api = uffdio_api { api: u64::from(UFFD_API), features: wanted.bits(), ioctls: 0 };
        match call(&fd, UFFDIO_API, &mut api) {
            Ok(_) => Ok(Self { fd, features: wanted }),
            Err(Errno::PERM) => Err(UffdError::NotPermitted(Errno::PERM.into())),
            Err(error) => {
                // It does not say what it lacks.
                Self::available(of)?.satisfy(wanted)?;
                Err(UffdError::Call { what: "the handshake failed", error: error.into() })
            }
        }
    }

    /// The features of this kernel.
    ///
    /// # Errors
    /// There is no userfaultfd to be had.
    pub fn available(of: FaultsOf) -> Result<Features, UffdError> {
        let mut api = uffdio_api { api: u64::from(UFFD_API), features: 0, ioctls: 0 };
        let failed = |error: Errno| UffdError::Call { what: "the handshake failed", error: error.into() };
        call(open(of)?, UFFDIO_API, &mut api).map_err(failed)?;
        Ok(Features::from_bits(api.features))
    }

    /// One that another process, or an earlier handler, made and registered memory with: its
    /// [features](Self::features) are not known. It is made non-blocking for all who have it, as it cannot be waited for
    /// otherwise.
    ///
    /// # Errors
    /// The descriptor is something else.
    pub fn handed_over(fd: OwnedFd) -> Result<Self, UffdError> {
        let failed = |error: io::Error| UffdError::Call { what: "the descriptor cannot be judged", error };
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(failed)?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(UffdError::Foreign);
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|error| failed(error.into()))?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|error| failed(error.into()))?;
        Ok(Self { fd, features: Features::NONE })
    }

    /// The features that were asked for; none of one that was handed over.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Another descriptor of the same: while either is open, faults wait to be answered.
    ///
    /// # Errors
    /// There are too many descriptors.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// Watches a part of a mapping, in whole pages; its end is cut to the mapping's.
    pub(in crate::memory) fn register_mapping(
        &self,
        mapping: &Mapping,
        part: Range<usize>,
        watch: Watch,
    ) -> io::Result<Ioctls> {
        let (start, bytes) = (mapping.start().addr().get(), mapping.bytes());
        let at = |offset: usize| start.saturating_add(offset.min(bytes)) as u64;
        // SAFETY: a mapping of our own, which is reached by copying alone.
        unsafe { self.register(at(part.start)..at(part.end), watch) }
    }

    /// Watches addresses of this process, in whole pages.
    ///
    /// # Errors
    /// They are not mapped, or are of a kind of memory that cannot be watched so.
    ///
    /// # Safety
    /// What is put in where pages are missing is what that memory then holds: no Rust object may lie there that expects
    /// anything else, such as zeros.
    pub unsafe fn register(&self, addresses: Range<u64>, watch: Watch) -> io::Result<Ioctls> {
        let mut register = uffdio_register { range: range(&addresses), mode: u64::from(watch.0), ioctls: 0 };
        call(&self.fd, UFFDIO_REGISTER, &mut register)?;
        Ok(Ioctls(register.ioctls))
    }

    /// Watches addresses no more, and wakes who waits there: what is still missing reads as zeros.
    ///
    /// # Errors
    /// They are not mapped.
    pub fn unregister(&self, addresses: Range<u64>) -> io::Result<()> {
        call(&self.fd, UFFDIO_UNREGISTER, &mut range(&addresses))?;
        Ok(())
    }

    /// Puts `bytes` in from `address` on, in pages of `page_bytes`, which both are whole pages of. Pages that are there
    /// stay, and who waits for them is woken if anybody is.
    pub fn copy(&self, address: u64, bytes: &[u8], page_bytes: u64, wake: Wake) -> Filled {
        self.copy_with(address, bytes, page_bytes, mode(wake, UFFDIO_COPY_MODE_DONTWAKE))
    }

    /// As [`copy`](Self::copy), and the pages are protected against writes from the start.
    pub fn copy_protected(&self, address: u64, bytes: &[u8], page_bytes: u64, wake: Wake) -> Filled {
        let mode = mode(wake, UFFDIO_COPY_MODE_DONTWAKE) | u64::from(UFFDIO_COPY_MODE_WP);
        self.copy_with(address, bytes, page_bytes, mode)
    }

    fn copy_with(&self, address: u64, bytes: &[u8], page_bytes: u64, mode: u64) -> Filled {
        let step = |at: u64| {
            let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
            let (dst, src) = (address.saturating_add(at), rest.as_ptr().expose_provenance() as u64);
            let mut copy = uffdio_copy { dst, src, len: rest.len() as u64, mode, copy: 0 };
            let result = call(&self.fd, UFFDIO_COPY, &mut copy).map(drop);
            Step::judge(result, copy.copy, copy.len)
        };
        self.fill(address, bytes.len() as u64, page_bytes, mode, step)
    }

    /// Puts zeros in. Not on huge pages: see [`Ioctls::zeroes`].
    pub fn zero(&self, addresses: Range<u64>, wake: Wake) -> Filled {
        let mode = mode(wake, UFFDIO_ZEROPAGE_MODE_DONTWAKE);
        let step = |at: u64| {
            let rest = addresses.start.saturating_add(at)..addresses.end;
            let mut zero = uffdio_zeropage { range: range(&rest), mode, zeropage: 0 };
            let result = call(&self.fd, UFFDIO_ZEROPAGE, &mut zero).map(drop);
            Step::judge(result, zero.zeropage, zero.range.len)
        };
        self.fill(addresses.start, length(&addresses), PAGE_BYTES as u64, mode, step)
    }

    /// Puts in what the file has, in pages of `page_bytes`: the answer to a minor fault.
    pub fn map(&self, addresses: Range<u64>, page_bytes: u64, wake: Wake) -> Filled {
        let mode = if wake == Wake::Later { DONTWAKE } else { 0 };
        let step = |at: u64| {
            let rest = addresses.start.saturating_add(at)..addresses.end;
            let mut map = uffdio_continue { range: range(&rest), mode, mapped: 0 };
            let result = call(&self.fd, UFFDIO_CONTINUE, &mut map).map(drop);
            Step::judge(result, map.mapped, map.range.len)
        };
        self.fill(addresses.start, length(&addresses), page_bytes, mode, step)
    }

    /// Makes the touch of missing pages a signal (`SIGBUS`), which KVM passes on as a memory failure.
    pub fn poison(&self, addresses: Range<u64>, page_bytes: u64, wake: Wake) -> Filled {
        let mode = if wake == Wake::Later { DONTWAKE } else { 0 };
        let step = |at: u64| {
            let rest = addresses.start.saturating_add(at)..addresses.end;
            let mut poison = uffdio_poison { range: range(&rest), mode, updated: 0 };
            let result = call(&self.fd, IOC_POISON, &mut poison).map(drop);
            Step::judge(result, poison.updated, poison.range.len)
        };
        self.fill(addresses.start, length(&addresses), page_bytes, mode, step)
    }

    fn fill(&self, address: u64, bytes: u64, page_bytes: u64, mode: u64, step: impl FnMut(u64) -> Step) -> Filled {
        let wake = |at: u64| {
            let page = address.saturating_add(at);
            // Who waits for a page that another handler put in may have come too late for its wake.
            if mode & DONTWAKE == 0 {
                let _ = self.wake(page..page.saturating_add(PAGE_BYTES as u64));
            }
        };
        fill(address, bytes, page_bytes, step, wake)
    }

    /// Wakes who waits for pages of these addresses: they touch them again.
    ///
    /// # Errors
    /// The addresses are no whole pages, or no addresses.
    pub fn wake(&self, addresses: Range<u64>) -> io::Result<()> {
        call(&self.fd, UFFDIO_WAKE, &mut range(&addresses))?;
        Ok(())
    }

    /// Protects pages against writes, or lifts that and wakes who waits to write.
    ///
    /// # Errors
    /// They are not watched for writes; or the address space is being changed: read messages, and try again.
    pub fn protect(&self, addresses: Range<u64>, protect: bool) -> io::Result<()> {
        let mode = if protect { PROTECT } else { 0 };
        call(&self.fd, UFFDIO_WRITEPROTECT, &mut uffdio_writeprotect { range: range(&addresses), mode })?;
        Ok(())
    }

    /// Appends the messages that are there, at most 64; gives how many. None is no error.
    ///
    /// # Errors
    /// They cannot be read; so it is while there is no descriptor free for a child's.
    pub fn read(&self, messages: &mut Vec<Message>) -> io::Result<usize> {
        let mut bytes = [0; MESSAGES * MESSAGE_BYTES];
        let count = match rustix::io::read(&self.fd, &mut bytes) {
            Ok(count) => count / MESSAGE_BYTES,
            Err(Errno::AGAIN) => 0,
            Err(error) => return Err(error.into()),
        };
        let (whole, _) = bytes.as_chunks::<MESSAGE_BYTES>();
        messages.extend(whole.iter().take(count).map(|message| match judge(message) {
            Judged::Message(message) => message,
            Judged::Forked(number) => match RawFd::try_from(number) {
                // SAFETY: the kernel just made this descriptor for who read the message.
                Ok(number) if number >= 0 => Message::Forked(unsafe { OwnedFd::from_raw_fd(number) }),
                _ => Message::Odd { kind: 0, word: u64::from(number) },
            },
        }));
        Ok(count)
    }
}

/// Readable when there are messages.
impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn length(addresses: &Range<u64>) -> u64 {
    addresses.end.saturating_sub(addresses.start)
}

fn range(addresses: &Range<u64>) -> uffdio_range {
    uffdio_range { start: addresses.start, len: length(addresses) }
}

fn mode(wake: Wake, dontwake: u32) -> u64 {
    if wake == Wake::Later { u64::from(dontwake) } else { 0 }
}

fn call<T>(fd: impl AsFd, opcode: Opcode, argument: &mut T) -> rustix::io::Result<IoctlOutput> {
    // SAFETY: each caller, all of them in this module, pairs the opcode with its structure. What the structures point
    // to is either bytes that outlive the call, which the kernel reads, or ranges that somebody registered with this
    // descriptor, and answers for.
    unsafe { ioctl(fd, Call { opcode, argument }) }
}

/// By the system call, else by the device.
fn open(of: FaultsOf) -> Result<OwnedFd, UffdError> {
    let mut flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    if of == FaultsOf::Programs {
        flags |= UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
    }
    // SAFETY: what is done with the descriptor is in this module.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(fd) => Ok(fd),
        Err(Errno::NOSYS) => Err(UffdError::NotThere),
        Err(Errno::PERM) => {
            let device = File::options().read(true).write(true).open("/dev/userfaultfd");
            let device = device.map_err(|_| UffdError::NotPermitted(Errno::PERM.into()))?;
            let bits = usize::try_from(flags.bits()).unwrap_or(0);
            // SAFETY: the device has this call, whose argument is a number.
            unsafe { ioctl(device, New(bits)) }.map_err(|error| UffdError::NotPermitted(error.into()))
        }
        Err(error) => Err(UffdError::Call { what: "it cannot be opened", error: error.into() }),
    }
}

#[cfg(test)]
mod tests;
