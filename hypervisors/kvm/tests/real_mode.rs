//! A guest under KVM is followed without missing a write, by each of the ways to tell of them.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a guest that cannot be followed has failed its test")]

mod vmm;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use pagewire_kvm::{DirtyLog, DirtyRings, KvmMemory};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::page::InstallSize;
use pagewire_sender::GuestMemory;
use pagewire_sender::memory::{MappedMemory, MappedRegion};
use pagewire_test_support::follower::{Follower, check_one_edge};
use pagewire_test_support::skip;
use vmm::{Machine, OFFSET, PAGES, PAGES_AN_EXIT, machine};

const ROUNDS: usize = 25;
const WRITES_A_ROUND: u64 = 1500;
/// Few enough that the guest fills its ring between two rounds.
const RING_ENTRIES: u32 = 1024;

fn mapped(machine: &Machine) -> MappedMemory {
    MappedMemory::new(vec![MappedRegion::of(machine.memory.clone(), InstallSize::KIB_4)]).unwrap()
}

fn logged(machine: &Machine, log: DirtyLog) -> KvmMemory<MappedMemory> {
    KvmMemory::logged(mapped(machine), machine.vm.clone(), vec![machine.slot], log).unwrap()
}

/// Follows a guest for some rounds, some of which are attempts that fail, and pauses it after each. Says how often a
/// ring was full.
fn follows<M: GuestMemory>(machine: &Machine, memory: &mut M, rings: Option<&DirtyRings>) -> u64 {
    let pages = PAGES as u64;
    let (mut guest, mut full) = (machine.run(machine.vcpu(rings), rings.cloned()), 0);
    // Tracking starts in the middle of it.
    guest.wait(pages + WRITES_A_ROUND);
    let mut follower = Follower::start(memory).unwrap();
    for round in 0..ROUNDS {
        guest.wait(WRITES_A_ROUND);
        let mut harvested = PageBitmap::new(pages);
        if round % 3 == 1 {
            memory.harvest(&mut harvested).unwrap();
            guest.wait(WRITES_A_ROUND);
            memory.put_back(&harvested);
        }
        let dirty = follower.round(memory).unwrap();
        // Of the writes that were waited for, those up to the first exit may have been in the round before.
        assert!(dirty.count() >= WRITES_A_ROUND - PAGES_AN_EXIT, "{} dirty pages in round {round}", dirty.count());
        // Paused soon, before it can make up for a write that was missed by another to that page.
        full += guest.rings_full();
        let vcpu = guest.pause();
        follower.round(memory).unwrap();
        check_one_edge(&follower.image, OFFSET);
        follower.check(memory);
        assert_eq!(follower.round(memory).unwrap().count(), 0, "nobody writes");
        guest = machine.run(vcpu, rings.cloned());
    }

    // The attempt ends for good while a harvest is out; what it had is dirty for the next one.
    guest.wait(WRITES_A_ROUND);
    let mut harvested = PageBitmap::new(pages);
    memory.harvest(&mut harvested).unwrap();
    guest.wait(WRITES_A_ROUND);
    guest.pause();
    memory.put_back(&harvested);
    memory.stop_tracking();
    memory.start_tracking().unwrap();
    follower.round(memory).unwrap();
    check_one_edge(&follower.image, OFFSET);
    follower.check(memory);
    full
}

fn follows_by(log: DirtyLog) {
    let Some(machine) = machine() else { return };
    _ = follows(&machine, &mut logged(&machine, log), None);
}

#[test]
fn follows_a_guest_by_a_log_that_is_cleared_when_it_is_shown() {
    follows_by(DirtyLog::ShowingClears);
}

#[test]
fn follows_a_guest_by_a_log_that_is_cleared_apart() {
    follows_by(DirtyLog::Manual);
}

#[test]
fn follows_a_guest_by_a_log_that_begins_full() {
    let Some(machine) = machine() else { return };
    let best = DirtyLog::best(&machine.vm);
    if best == DirtyLog::InitiallySet {
        _ = follows(&machine, &mut logged(&machine, best), None);
    } else {
        skip(format!("a log that begins full: this KVM's best is {best:?}"));
    }
}

#[test]
fn follows_a_guest_by_dirty_rings_that_run_full() {
    let Some(machine) = machine() else { return };
    match DirtyRings::enable(machine.vm.clone(), RING_ENTRIES) {
        Ok(rings) => {
            let slots = vec![machine.slot];
            let memory = KvmMemory::with_rings(mapped(&machine), machine.vm.clone(), slots, rings.clone());
            assert_ne!(follows(&machine, &mut memory.unwrap(), Some(&rings)), 0, "no ring was ever full");
        }
        Err(error) => skip(format!("dirty rings: {error}")),
    }
}

/// What `MappedMemory` says of vCPUs.
#[test]
fn follows_a_guest_by_the_traces_in_page_tables() {
    let Some(machine) = machine() else { return };
    let mut memory = mapped(&machine);
    match memory.start_tracking() {
        Ok(()) => _ = follows(&machine, &mut memory, None),
        Err(error) => skip(error),
    }
}

/// The memory's slot of the machine with other flags or another length.
#[expect(unsafe_code, reason = "memory slots are given to KVM by address")]
fn set(machine: &Machine, memory_size: u64, flags: u32) {
    let region = kvm_userspace_memory_region { memory_size, flags, ..machine.region };
    // SAFETY: the slot as it was, or none.
    unsafe { machine.vm.set_user_memory_region(region) }.unwrap();
}

#[test]
fn a_harvest_that_fails_leaves_every_page_dirty() {
    let Some(machine) = machine() else { return };
    let mut memory = logged(&machine, DirtyLog::ShowingClears);
    memory.start_tracking().unwrap();
    set(&machine, 0, 0);
    let mut dirty = PageBitmap::new(PAGES as u64);
    assert!(memory.harvest(&mut dirty).unwrap_err().to_string().starts_with("slot 0 of the VM does not show its log"));
    set(&machine, machine.region.memory_size, KVM_MEM_LOG_DIRTY_PAGES);
    memory.harvest(&mut dirty).unwrap();
    assert_eq!(dirty, PageBitmap::full(PAGES as u64));
}

#[test]
fn harvests_what_a_device_marked() {
    let Some(machine) = machine() else { return };
    let mut memory = logged(&machine, DirtyLog::best(&machine.vm));
    let mut dirty = PageBitmap::new(PAGES as u64);
    assert!(memory.harvest(&mut dirty).is_err(), "nobody watches yet");
    memory.start_tracking().unwrap();
    memory.harvest(&mut dirty).unwrap();
    assert_eq!(dirty.count(), 0);
    memory.marks().mark(7..9);
    memory.harvest(&mut dirty).unwrap();
    assert_eq!(dirty.runs(0..u64::MAX).flatten().collect::<Vec<_>>(), [7, 8]);
}

#[test]
fn rejects_slots_that_are_not_the_regions() {
    let Some(machine) = machine() else { return };
    let slots = vec![machine.slot; 2];
    assert!(KvmMemory::logged(mapped(&machine), machine.vm.clone(), slots, DirtyLog::ShowingClears).is_err());
}
