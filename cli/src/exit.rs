//! Exit codes by where the guest is, and errors as people read them.

use pagewire::{Error, GuestAt, chain};
use std::process::ExitCode;

/// Wrong usage.
const USAGE: u8 = 2;
/// Somebody stopped it: as a shell counts SIGINT.
const CANCELLED: u8 = 130;

/// The code of a failed transfer.
pub(crate) fn code(error: &Error) -> ExitCode {
    ExitCode::from(match error {
        _ if error.kind.is_cancelled() => CANCELLED,
        _ if error.kind.is_usage() => USAGE,
        Error { guest_at: GuestAt::Sender, .. } => 1,
        // It arrived, and something after that failed.
        Error { guest_at: GuestAt::Receiver, .. } => 5,
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
    ExitCode::from(error.downcast_ref::<Error>().map_or(1, |error| if error.kind.is_usage() { USAGE } else { 1 }))
}
