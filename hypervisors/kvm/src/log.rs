//! KVM's dirty log: a bitmap a slot, copied out and cleared.

use crate::raw::Slot;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use std::io;

/// Pages that are cleared, and so protected, by one call: 1 GiB, so that vCPUs that fault need not wait for all of it.
const CLEAR_PAGES: u64 = 1 << 18;

/// How a dirty log is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyLog {
    /// Showing it clears it: all that every KVM has.
    ShowingClears,
    /// It is cleared by a call of its own.
    Manual,
    /// As `Manual`, and it begins with every page dirty, so that starting does not protect all pages in one go.
    InitiallySet,
}

impl DirtyLog {
    /// The last of the ways that this VM has.
    pub fn best(vm: &VmFd) -> Self {
        let has = u32::try_from(vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2))).unwrap_or(0);
        if has & KVM_DIRTY_LOG_INITIALLY_SET != 0 {
            Self::InitiallySet
        } else if has & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 {
            Self::Manual
        } else {
            Self::ShowingClears
        }
    }

    /// Makes all logs of the VM behave so.
    pub(crate) fn choose(self, vm: &VmFd) -> io::Result<()> {
        let options = match self {
            Self::ShowingClears => 0,
            Self::Manual => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            Self::InitiallySet => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
        };
        let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..kvm_enable_cap::default() };
        cap.args = [u64::from(options), 0, 0, 0];
        match vm.enable_cap(&cap) {
            // A KVM that does not know of other ways has this one.
            Err(_) if self == Self::ShowingClears => Ok(()),
            result => {
                result.map_err(|error| io::Error::other(format!("KVM has no dirty log of the kind {self:?}: {error}")))
            }
        }
    }

    /// Starts to log writes to a slot.
    pub(crate) fn start(self, vm: &VmFd, slot: &Slot) -> io::Result<()> {
        slot.set_log(vm, true)?;
        if self == Self::InitiallySet {
            let mut all = vec![u64::MAX; usize::try_from(CLEAR_PAGES / 64).unwrap_or(0)];
            for first in (0..slot.pages()).step_by(usize::try_from(CLEAR_PAGES).unwrap_or(usize::MAX)) {
                slot.clear(vm, first, &mut all)?;
            }
        }
        Ok(())
    }

    /// Takes the log of a slot: one bit a page.
    pub(crate) fn take(self, vm: &VmFd, slot: &Slot) -> io::Result<Vec<u64>> {
        let mut bitmap = slot.log(vm)?;
        if self != Self::ShowingClears {
            let words = usize::try_from(CLEAR_PAGES / 64).unwrap_or(usize::MAX);
            let firsts = (0u64..).step_by(usize::try_from(CLEAR_PAGES).unwrap_or(usize::MAX));
            // What was shown is cleared, and nothing else: a bit that came since stays for the next harvest.
            for (part, first) in bitmap.chunks_mut(words).zip(firsts) {
                if part.iter().any(|&word| word != 0) {
                    slot.clear(vm, first, part)?;
                }
            }
        }
        Ok(bitmap)
    }
}
