//! The receiving side of a session.
//!
//! [`ReceiverEngine`] decides; it has no senses of its own and runs under any driver. It owns what the receiver knows
//! of the image ([`PageMap`]) and checks every page against its digest before it is used. Memory is reached through
//! [`GuestSink`]. The `driver` feature adds tokio and nothing else.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests choose their numbers"))]

mod bring;
#[cfg(feature = "driver")]
pub mod driver;
mod engine;
mod error;
pub mod fill;
pub mod memory;
mod page_map;
mod receiving;
mod report;
mod resolve;
mod scan;
mod waiting;
mod wants;

pub use engine::{Agreed, Event, FinishJob, FinishOutput, Offer, ReceiverEngine, Terms};
pub use error::{ErrorKind, ReceiverError};
pub use memory::{GuestSink, OtherPages};
pub use page_map::PageMap;
pub use report::{Counts, FillCounts};
