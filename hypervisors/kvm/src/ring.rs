//! KVM's dirty rings: each vCPU leaves the pages it wrote in a ring of its own.

use crate::raw::{Ring, reset_rings};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_dirty_gfn, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use pagewire_sender::memory::DirtyBitmap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The rings of all vCPUs of a VM. Clones are handles of the same rings.
#[derive(Clone, Debug)]
pub struct DirtyRings {
    vm: Arc<VmFd>,
    entries: u32,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    rings: Vec<Ring>,
    /// Where the pages of which slot are marked; nowhere until somebody wants to know.
    places: Vec<(u32, Range<u64>)>,
    marks: Option<DirtyBitmap>,
}

impl DirtyRings {
    /// Gives the VM rings of `entries` entries, a power of two. To be called before it has a vCPU; from then on the VM
    /// has no dirty log.
    ///
    /// # Errors
    /// KVM has no rings, or none of this length.
    pub fn enable(vm: Arc<VmFd>, entries: u32) -> io::Result<Self> {
        // The first is the one for all processors; an older KVM has the second, for x86 alone.
        let has = |cap: &u32| vm.check_extension_raw(u64::from(*cap)) > 0;
        let cap = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING].into_iter().find(has);
        let cap = cap.ok_or_else(|| io::Error::other("this KVM has no dirty rings; its dirty log needs none"))?;
        let mut enable = kvm_enable_cap { cap, ..kvm_enable_cap::default() };
        enable.args = [u64::from(entries).saturating_mul(size_of::<kvm_dirty_gfn>() as u64), 0, 0, 0];
        let failed = |error| io::Error::other(format!("KVM gives no dirty rings of {entries} entries: {error}"));
        vm.enable_cap(&enable).map_err(failed)?;
        Ok(Self { vm, entries, state: Arc::default() })
    }

    /// Adds the ring of a vCPU. To be called for every vCPU before it runs.
    ///
    /// # Errors
    /// The ring cannot be mapped.
    pub fn add(&self, vcpu: &VcpuFd) -> io::Result<()> {
        let ring = Ring::map(vcpu, self.entries)?;
        self.state().rings.push(ring);
        Ok(())
    }

    /// Empties all rings. A vCPU whose ring is full comes out of `KVM_RUN` with `KVM_EXIT_DIRTY_RING_FULL`; its thread
    /// calls this and runs it again.
    ///
    /// # Errors
    /// KVM cannot reset them. All pages are dirty then.
    pub fn collect(&self) -> io::Result<()> {
        let mut state = self.state();
        let State { rings, places, marks } = &mut *state;
        let mut found = Vec::new();
        rings.iter_mut().for_each(|ring| ring.collect(|slot, page| found.push((slot, page))));
        let reset = if found.is_empty() { Ok(0) } else { reset_rings(&self.vm) };
        let Some(marks) = marks else { return reset.map(drop) };
        // After the reset, as a mark has to come after the write that it stands for: before it, a vCPU may still be
        // about to write to a page that it has entered already, and whoever took the mark would read too early.
        for (slot, page) in found {
            let range = places.iter().find(|(id, _)| *id == slot).map_or(0..0, |(_, range)| range.clone());
            let place = range.start.saturating_add(page);
            if range.contains(&place) {
                marks.mark(place..place.saturating_add(1));
            }
        }
        reset.map(drop).inspect_err(|_| marks.mark_all())
    }

    /// From now on the pages of these slots are marked there.
    pub(crate) fn mark_in(&self, marks: DirtyBitmap, places: Vec<(u32, Range<u64>)>) {
        let mut state = self.state();
        (state.marks, state.places) = (Some(marks), places);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in it is left half done by a panic: entries that were collected and not marked are the panic's.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
