//! Asks a receiver what became of a guest that was handed to it, when the session that did so is long over.

use super::ASK_EVERY;
use crate::entropy::random;
use crate::error::{Error, ErrorKind};
use crate::journal::GuestJournal;
use pagewire_protocol::error::GuestAt;
use pagewire_protocol::handover::{Handover, Input, Message, Output, Whereabouts, Word};
use pagewire_sender::ErrorKind as Failure;
use pagewire_sender::driver::ask;
use pagewire_transport::Address;
use std::time::{Duration, Instant};

/// Asks the receiver at `to` about the hand-over that leaves `guest` in doubt, until it answers or `patience` is over;
/// what follows from its answer is on the disk when this returns. Nothing is transferred. Another host that answers there
/// is not believed: it is not the one that the hand-over names.
///
/// # Errors
/// It cannot be reached, or does not say: the guest is in doubt still.
pub fn ask_receiver(
    guest: &mut GuestJournal,
    handover: &Handover,
    to: &Address,
    patience: Duration,
) -> Result<Vec<Output>, Error> {
    let until = Instant::now() + patience;
    let commit = Message { word: Word::Commit, handover: *handover };
    let in_doubt = |kind| Error { kind, guest_at: GuestAt::InDoubt };
    loop {
        let mut outputs = Vec::new();
        let hear = |message| {
            let follows = guest.handle(Input::Message { from: handover.receiver, message });
            let says = follows.iter().filter_map(|output| match output {
                Output::Send(message) => Some(*message),
                _ => None,
            });
            let says = says.collect();
            outputs.extend(follows);
            says
        };
        let asked = ask(to, commit, random().map_err(in_doubt)?, hear);
        if guest.handovers().whereabouts() != Whereabouts::InDoubt {
            return Ok(outputs);
        }
        if Instant::now() + ASK_EVERY >= until {
            return Err(in_doubt(ErrorKind::Sender(asked.err().unwrap_or(Failure::InDoubt))));
        }
        std::thread::sleep(ASK_EVERY);
    }
}
