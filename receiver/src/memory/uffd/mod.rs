//! Page faults of guest memory, answered by this program: Linux's userfaultfd, spoken by ourselves.
//!
//! [`Uffd`] is a descriptor of it: ranges are registered, messages read, pages put in. What the kernel says comes as
//! values: a [`Message`] for everything read, a [`Filled`] with at most one [`Stop`] for everything put in. Nothing here
//! decides what a page holds; that is [`PostcopyMemory`](super::PostcopyMemory)'s.
//!
//! All unsafe code is in `raw`. The judging of feature bits, of messages and of what an answer means are pure functions
//! beside it.

mod features;
mod fill;
mod message;
mod raw;

pub use features::{Features, Missing};
pub use fill::{Filled, Stop};
pub use message::{FaultKind, Message};
pub use raw::{FaultsOf, Ioctls, Uffd, UffdError, Wake, Watch};
