//! The streams under a session, and the pump that moves frames between them and a machine.
//!
//! Everything here knows bytes, sockets and time, and nothing of pages: the pump drives any
//! [`Machine`](pagewire_protocol::session::Machine). A session runs on a thread of its own, so a disk that makes it
//! wait makes nobody else wait.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests choose their numbers"))]

mod address;
mod lane;
mod listener;
mod pump;
mod socket;

pub use address::{Address, AddressError};
pub use listener::{Arrival, Joining, Listener, Registration, Sessions};
pub use pump::{PROGRESS_EVERY, Progress, Pump, Wire};
pub use socket::{Socket, Stream};
pub use tokio_util::sync::CancellationToken;

use std::future::Future;
use std::io;

/// Runs a session's future on the current thread.
///
/// # Errors
/// The runtime cannot start: the process has no more descriptors.
pub fn block_on<F: Future>(future: F) -> io::Result<F::Output> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let output = runtime.block_on(future);
    // A job may still wait for a disk; its result is of no use any more.
    runtime.shutdown_background();
    Ok(output)
}
