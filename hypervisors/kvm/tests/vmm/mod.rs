//! The smallest VMM that shows what it has to: one vCPU in real mode that increments a byte in each page, in order,
//! without end.
//!
//! The guest's code is in a slot of its own, which nobody follows. Its data segment reaches beyond the first megabyte
//! (a limit of 4 GiB, as real mode has it after a visit to protected mode).
#![allow(unsafe_code, reason = "memory slots are given to KVM by address")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a guest that cannot run has failed its test")]

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use pagewire_kvm::{DirtyRings, Slot};
use pagewire_sender::memory::Mapping;
use pagewire_test_support::skip;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

pub(crate) const PAGES: usize = 4096;
const PAGE: usize = 4096;
/// Where in a page the guest writes.
pub(crate) const OFFSET: usize = 1001;
/// The guest comes out of `KVM_RUN` after so many pages, and is stopped there.
pub(crate) const PAGES_AN_EXIT: u64 = 64;
const CODE_AT: u64 = 0x1000;
const MEMORY_AT: u64 = 0x10_0000;

pub(crate) struct Machine {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: Arc<Mapping>,
    pub(crate) slot: Slot,
    /// The memory's, without flags.
    pub(crate) region: kvm_userspace_memory_region,
    code: Arc<Mapping>,
}

/// A machine without a vCPU; `None`, said aloud, where KVM cannot be had.
pub(crate) fn machine() -> Option<Machine> {
    let skip = |error| skip(format!("a guest under KVM: {error}"));
    let vm = Arc::new(Kvm::new().and_then(|kvm| kvm.create_vm()).map_err(skip).ok()?);
    let (memory, code) = (Arc::new(Mapping::private(PAGES * PAGE).unwrap()), Arc::new(Mapping::private(PAGE).unwrap()));
    program().iter().enumerate().for_each(|(at, &byte)| code.byte(at).unwrap().store(byte, Ordering::Relaxed));
    let region = |slot, guest_phys_addr, mapping: &Mapping| kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr,
        memory_size: mapping.len() as u64,
        userspace_addr: mapping.as_ptr().expose_provenance() as u64,
    };
    let region_of_code = region(1, CODE_AT, &code);
    let region = region(0, MEMORY_AT, &memory);
    // SAFETY: the machine holds both mappings as long as the VM, and so does the vCPU's thread.
    let slot = unsafe {
        vm.set_user_memory_region(region_of_code).unwrap();
        vm.set_user_memory_region(region).unwrap();
        Slot::new(region)
    };
    Some(Machine { vm, memory, slot, region, code })
}

fn program() -> Vec<u8> {
    let word = |value: u64| u32::try_from(value).unwrap().to_le_bytes();
    let end = word(MEMORY_AT + (PAGES * PAGE) as u64);
    let mut code = vec![0x66, 0xbb]; //                  start: mov ebx, MEMORY_AT
    code.extend(word(MEMORY_AT));
    code.extend([0x67, 0xfe, 0x83]); //                  page:  inc byte [ebx + OFFSET]
    code.extend(word(OFFSET as u64));
    code.extend([0x66, 0x81, 0xc3]); //                         add ebx, PAGE
    code.extend(word(PAGE as u64));
    code.extend([0x66, 0xf7, 0xc3]); //                         test ebx, PAGES_AN_EXIT * PAGE - 1
    code.extend(word(PAGES_AN_EXIT * PAGE as u64 - 1));
    code.extend([0x75, 0x02, 0xe6, 0x10]); //                   jnz over; out 0x10, al
    code.extend([0x66, 0x81, 0xfb]); //                  over:  cmp ebx, end
    code.extend(end);
    let page = 6i8 - i8::try_from(code.len() + 2).unwrap();
    code.extend([0x72, page.to_le_bytes()[0]]); //              jb page
    let start = -i8::try_from(code.len() + 2).unwrap();
    code.extend([0xeb, start.to_le_bytes()[0]]); //             jmp start
    code
}

/// A guest that runs.
pub(crate) struct Guest {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    full: Arc<AtomicU64>,
    thread: JoinHandle<VcpuFd>,
}

impl Machine {
    /// A vCPU that will begin at the beginning. Its ring is added to `rings`.
    pub(crate) fn vcpu(&self, rings: Option<&DirtyRings>) -> VcpuFd {
        let vcpu = self.vm.create_vcpu(0).unwrap();
        let mut system = vcpu.get_sregs().unwrap();
        (system.cs.base, system.cs.selector) = (0, 0);
        (system.ds.base, system.ds.selector, system.ds.limit, system.ds.g) = (0, 0, u32::MAX, 1);
        vcpu.set_sregs(&system).unwrap();
        let mut registers = vcpu.get_regs().unwrap();
        (registers.rip, registers.rflags) = (CODE_AT, 2);
        vcpu.set_regs(&registers).unwrap();
        rings.iter().for_each(|rings| rings.add(&vcpu).unwrap());
        vcpu
    }

    /// Lets a vCPU run on, on a thread.
    pub(crate) fn run(&self, mut vcpu: VcpuFd, rings: Option<DirtyRings>) -> Guest {
        let (stop, written, full) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::default());
        let (stopped, mappings) = (stop.clone(), (self.memory.clone(), self.code.clone()));
        let (count, full_count): (Arc<AtomicU64>, Arc<AtomicU64>) = (Arc::clone(&written), Arc::clone(&full));
        let thread = std::thread::spawn(move || {
            let _mappings = mappings;
            while !stopped.load(Ordering::Relaxed) {
                match vcpu.run().unwrap() {
                    VcpuExit::IoOut(..) => _ = count.fetch_add(PAGES_AN_EXIT, Ordering::Relaxed),
                    VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                        full_count.fetch_add(1, Ordering::Relaxed);
                        rings.as_ref().unwrap().collect().unwrap();
                    }
                    exit => panic!("the guest stopped: {exit:?}"),
                }
            }
            vcpu
        });
        Guest { stop, written, full, thread }
    }
}

impl Guest {
    /// Waits until it has written to `pages` more pages.
    pub(crate) fn wait(&self, pages: u64) {
        let until = self.written.load(Ordering::Relaxed) + pages;
        while self.written.load(Ordering::Relaxed) < until {
            assert!(!self.thread.is_finished(), "the guest stopped");
            std::thread::yield_now();
        }
    }

    /// How often its ring was full.
    pub(crate) fn rings_full(&self) -> u64 {
        self.full.load(Ordering::Relaxed)
    }

    /// Pauses it, between two exits.
    pub(crate) fn pause(self) -> VcpuFd {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
