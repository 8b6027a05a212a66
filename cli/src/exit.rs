//! Exit codes by where the guest is, and errors as people read them.

use pagewire::{Error, chain};
use std::process::ExitCode;

/// The guest is where it was.
const FAILED: u8 = 1;
/// Wrong usage.
const USAGE: u8 = 2;
/// Somebody stopped it: as a shell counts SIGINT.
const CANCELLED: u8 = 130;

/// The code of a failed transfer.
pub(crate) fn code(error: &Error) -> ExitCode {
    ExitCode::from(match error {
        _ if error.kind.is_cancelled() => CANCELLED,
        _ if error.kind.is_usage() => USAGE,
        // No transfer fails behind DONE: the guest is at the sender.
        _ => FAILED,
    })
}

/// Prints a failed transfer and where the guest is.
pub(crate) fn explain_transfer(error: &Error) -> ExitCode {
    eprintln!("pagewire: {}", chain(error));
    if !error.kind.is_usage() {
        eprintln!(
            "pagewire: the guest is at the {}; what has arrived is kept and resumed by the next attempt",
            error.guest_at.name()
        );
    }
    code(error)
}

/// Prints any other error with its causes.
pub(crate) fn explain(error: &anyhow::Error) -> ExitCode {
    eprintln!("pagewire: {error:#}");
    ExitCode::from(error.downcast_ref::<Error>().filter(|error| error.kind.is_usage()).map_or(FAILED, |_| USAGE))
}
