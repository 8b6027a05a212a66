//! Exit codes by where the guest is, and errors as people read them.

use crate::show::warn;
use pagewire::{Error, GuestAt, JournalError, chain};
use std::process::ExitCode;

/// The guest is where it was.
const FAILED: u8 = 1;
/// Wrong usage.
const USAGE: u8 = 2;
/// The guest was handed over and nobody answers: it stays paused until that is resolved.
const IN_DOUBT: u8 = 3;
/// The guest runs at the receiver and lacks pages.
const SPLIT: u8 = 4;
/// The guest is at the receiver and has all, which is not recorded here.
const UNRECORDED: u8 = 5;
/// Somebody stopped it: as a shell counts SIGINT.
const CANCELLED: u8 = 130;

/// The code of a failed transfer.
pub(crate) fn code(error: &Error) -> ExitCode {
    ExitCode::from(match error {
        _ if error.kind.is_cancelled() && error.guest_at != GuestAt::InDoubt => CANCELLED,
        _ if error.kind.is_usage() => USAGE,
        _ if error.guest_at == GuestAt::InDoubt => IN_DOUBT,
        _ if error.kind.is_split() => SPLIT,
        _ if error.kind.is_unrecorded() => UNRECORDED,
        _ => FAILED,
    })
}

/// Prints a failed transfer and where the guest is.
pub(crate) fn explain_transfer(error: &Error) -> ExitCode {
    warn(&chain(error));
    if error.guest_at == GuestAt::InDoubt {
        warn(
            "the guest is in doubt: keep it paused here; `pagewire status` shows the hand-over, and `pagewire resolve` \
             ends the doubt when you know where it is",
        );
    } else if error.kind.is_split() {
        warn(
            "the guest runs at the receiver and must not run here: keep its memory as it is, and bring what it lacks by \
             `pagewire resume SRC --to ADDR --name NAME`, with the same --journal, as often as it takes",
        );
    } else if error.kind.is_unrecorded() {
        warn(
            "the guest is at the receiver, has all of it, and must not run here: mend the journal's disk, and say it \
             again by `pagewire resume` (after post-copy) or `pagewire resolve --ask`",
        );
    } else if error.guest_at == GuestAt::Receiver {
        warn("the guest is at the receiver and must not run here");
    } else if !error.kind.is_usage() {
        warn(&format!(
            "the guest is at the {}; what has arrived is kept and resumed by the next attempt",
            error.guest_at.name()
        ));
    }
    code(error)
}

/// Prints any other error with its causes.
pub(crate) fn explain(error: &anyhow::Error) -> ExitCode {
    warn(&format!("{error:#}"));
    ExitCode::from(if is_usage(error) { USAGE } else { FAILED })
}

/// Prints an error from before anything was connected to send a guest.
pub(crate) fn explain_untouched(error: &anyhow::Error) -> ExitCode {
    let code = explain(error);
    warn("the guest is where it was: nothing was paused, and nothing sent");
    code
}

/// Whether another command line would have helped.
fn is_usage(error: &anyhow::Error) -> bool {
    let of_journal = |error: &JournalError| matches!(error, JournalError::Refused { .. } | JournalError::NoHome);
    error.downcast_ref::<Error>().is_some_and(|error| error.kind.is_usage())
        || error.downcast_ref::<JournalError>().is_some_and(of_journal)
}
