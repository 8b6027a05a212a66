//! Memory that is mapped into this process, and the kernel's watch over writes to it. The one room with unsafe code.
//!
//! No reference to the bytes of such memory is ever made, as a reference promises that nobody else writes.
#![allow(unsafe_code, reason = "mapping, copying out of what others write, and ioctls cannot be done without")]

mod mapping;
mod watch;

pub use mapping::{MappedRegion, Mapping};
pub(super) use watch::WriteWatch;
