//! The sending side of a session.
//!
//! [`SenderEngine`] decides what of an image travels and how; it has no senses of its own and runs under any driver.
//! Memory is reached through [`GuestMemory`]. The `driver` feature adds tokio and nothing else.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests choose their numbers"))]

mod again;
mod answers;
mod ask;
mod base;
mod classify;
pub mod converge;
#[cfg(feature = "driver")]
pub mod driver;
mod engine;
mod error;
pub mod fill;
mod goodput;
mod history;
mod holdings;
mod lanes;
mod leave;
pub mod memory;
mod pace;
mod report;
mod reuse;
mod rounds;
mod sending;
mod switch;
mod tally;
mod trace;

pub use ask::AskEngine;
pub use base::Base;
pub use engine::{Event, Live, SenderConfig, SenderEngine};
pub use error::{ErrorKind, SenderError};
pub use lanes::{EncodeJob, EncodeOutput};
pub use memory::{GuestMemory, Tracking};
pub use report::{Counts, Decision, FillCounts, RoundReport};
pub use reuse::STRAY_MAX;
pub use trace::Trace;
