//! Guest memory whose writes KVM tells of.
//!
//! [`KvmMemory`] puts KVM's knowledge of writes over any memory that can be read: the *dirty log*, a bitmap a slot that
//! is copied out and cleared, or *dirty rings*, in which each vCPU leaves the pages it wrote. What device models write
//! through the VMM's own mapping is in neither; they [mark](KvmMemory::marks) it.
//!
//! A page is taken out of KVM's log, and protected again, before it is read, never after: a write in between comes again.
//! The last harvest sees everything once all vCPUs have come out of `KVM_RUN`.
#![deny(unsafe_code)]
#![cfg(target_os = "linux")]

mod log;
mod memory;
mod raw;
mod ring;

pub use log::DirtyLog;
pub use memory::KvmMemory;
pub use raw::Slot;
pub use ring::DirtyRings;
