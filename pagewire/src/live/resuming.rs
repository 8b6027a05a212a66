//! Post-copy gone on with in a new process: all that is known of the hand-over is its record, and the memory was kept.

use super::bringing::gone;
use super::{ask_receiver, bring};
use crate::error::{Error, ErrorKind};
use crate::journal::{GuestJournal, GuestStatus, Journal, JournalError};
use crate::observe::{Event, Observer, Phase};
use crate::report::{Outcome, Report, Role};
use crate::reuse::{Departed, keep_departed};
use crate::send::{SendOptions, check_plaintext};
use pagewire_protocol::error::{GuestAt, chain};
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::handover::{Handover, HostId, Message, Output, Record, RecordKind, Whereabouts};
use pagewire_sender::fill::Remainder;
use pagewire_sender::memory::FileMemory;
use pagewire_sender::{ErrorKind as Failure, GuestMemory};
use pagewire_transport::Address;
use std::path::Path;
use std::time::{Duration, Instant};

/// Brings what the guest `name` lacks, which was handed over from here to the receiver at `to` and runs there: from the
/// file `source` that it left, which must be as it was then. Blocks until the guest has all, or nothing has gone on for
/// `patience`; the report and the error say where the guest is then. It may be called any number of times.
///
/// A guest whose start was not heard of is asked about first.
pub fn resume(
    source: &Path,
    name: &ImageName,
    to: &Address,
    (journal, patience): (&Journal, Duration),
    options: &SendOptions,
    observer: &mut dyn Observer,
) -> Outcome {
    match FileMemory::open(source, options.install_size) {
        Ok(memory) => go_on((memory, Some(source)), name, to, (journal, patience), options, observer),
        Err(error) => {
            let kind = ErrorKind::Source { path: source.to_path_buf(), source: error };
            Report::new(Role::Sender, name.to_string()).close(Some(kind.at_sender()))
        }
    }
}

/// As [`resume`], for memory of any kind.
pub fn resume_memory<M: GuestMemory>(
    memory: M,
    name: &ImageName,
    to: &Address,
    (journal, patience): (&Journal, Duration),
    options: &SendOptions,
    observer: &mut dyn Observer,
) -> Outcome {
    go_on((memory, None), name, to, (journal, patience), options, observer)
}

fn go_on<M: GuestMemory>(
    (memory, source): (M, Option<&Path>),
    name: &ImageName,
    to: &Address,
    (journal, patience): (&Journal, Duration),
    options: &SendOptions,
    observer: &mut dyn Observer,
) -> Outcome {
    let began = Instant::now();
    let mut report = Report::new(Role::Sender, name.to_string());
    (report.bytes_total, report.pages_total) = (memory.layout().bytes(), memory.layout().pages());
    let (bytes_total, pages_total) = (report.bytes_total, report.pages_total);
    let (mut guest, handover) = match find(journal, name).and_then(|found| {
        check_plaintext(to, options.insecure_plaintext).map_err(|kind| Error { kind, guest_at: GuestAt::InDoubt })?;
        Ok(found)
    }) {
        Ok(Found::Lacking(guest, handover)) => (*guest, handover),
        Ok(Found::Whole) => {
            report
                .warnings
                .push("the guest has all of its pages, as the record here says: nothing was sent".to_owned());
            return report.close(None);
        }
        Err(error) => return report.close(Some(error)),
    };
    observer.event(&Event::Started { bytes_total, pages_total });
    if let Err(error) = is_started(&mut guest, &handover, (to, patience), observer) {
        return report.close(Some(error));
    }
    let lineage = match guest.key_of(handover.session) {
        Ok(lineage) => lineage,
        Err(error) => {
            let kind = ErrorKind::Sender(Failure::Split { pages: pages_total, why: chain(&error) });
            return report.close(Some(Error { kind, guest_at: GuestAt::Receiver }));
        }
    };
    let key = lineage.as_ref().map_or(NO_KEY, |lineage| lineage.key);
    let remainder = match Remainder::recover(memory, &key, handover) {
        Ok(remainder) => remainder,
        Err(error) => {
            let (pages, why) = (pages_total, format!("its memory cannot be read: {}", chain(&error)));
            let kind = ErrorKind::Sender(Failure::Split { pages, why });
            return report.close(Some(Error { kind, guest_at: GuestAt::Receiver }));
        }
    };
    report.seconds = began.elapsed().as_secs_f64();
    let gone = || filled(&mut guest, handover);
    let brought = bring(remainder, to, (options, None, patience), gone, (&mut report, observer));
    report.seconds = began.elapsed().as_secs_f64();
    if let (Ok(manifest), Some(reuse), Some(lineage)) = (&brought, &options.reuse, lineage) {
        let departed = Departed { name, session: handover.session, manifest, source, hot: None };
        keep_departed(reuse, lineage, &departed, &mut report);
    }
    report.close(brought.err())
}

/// The key of the public domain, as OPEN states it.
const NO_KEY: [u8; 32] = [0; 32];

/// What the records say of a guest.
enum Found {
    /// It may lack pages.
    Lacking(Box<GuestJournal>, Handover),
    /// It came to the receiver for good.
    Whole,
}

/// The last hand-over of the guest from here, in post-copy.
fn find(journal: &Journal, name: &ImageName) -> Result<Found, Error> {
    let me = journal.host();
    let of_journal = |error: JournalError| Error { kind: ErrorKind::Journal(error), guest_at: GuestAt::InDoubt };
    let guests = journal.guests().map_err(of_journal)?;
    let last = |guest: &GuestStatus| guest.records.iter().max_by_key(|record| record.handover.epoch).copied();
    let named = guests.iter().filter(|guest| guest.name.as_ref() == Some(name));
    let mut known: Vec<(&GuestStatus, Record)> = named.filter_map(|guest| Some((guest, last(guest)?))).collect();
    // Of several that were called so, the one that needs it.
    known.sort_by_key(|(_, record)| !is_lacking(record, me));
    let refused = |why: String, guest_at| {
        Err(Error { kind: ErrorKind::Sender(Failure::Handover(format!("guest {name}: {why}"))), guest_at })
    };
    match known.first() {
        Some((guest, record)) if is_lacking(record, me) => {
            let guest = journal.guest(guest.lineage, None, true).map_err(of_journal)?;
            Ok(Found::Lacking(Box::new(guest), record.handover))
        }
        Some((_, record)) if record.kind == RecordKind::Gone && record.handover.sender == me => Ok(Found::Whole),
        Some((_, record)) if record.kind == RecordKind::Handed && record.handover.sender == me => refused(
            "it was handed over with all of its pages, and is in doubt: ask its receiver by `pagewire resolve`"
                .to_owned(),
            GuestAt::InDoubt,
        ),
        _ => refused("it was not handed over from here, so nothing is to be brought".to_owned(), GuestAt::Sender),
    }
}

fn is_lacking(record: &Record, me: HostId) -> bool {
    record.kind == RecordKind::Handed && record.handover.post_copy && record.handover.sender == me
}

/// The receiver has started it, as it says itself.
fn is_started(
    guest: &mut GuestJournal,
    handover: &Handover,
    (to, patience): (&Address, Duration),
    observer: &mut dyn Observer,
) -> Result<(), Error> {
    if guest.serving() != Some(*handover) {
        observer.event(&Event::Phase { seconds: 0.0, phase: Phase::InDoubt });
        ask_receiver(guest, handover, to, patience)?;
    }
    match guest.handovers().whereabouts() {
        _ if guest.serving() == Some(*handover) => Ok(()),
        Whereabouts::Here => Err(ErrorKind::Sender(Failure::Rejected).at_sender()),
        _ => Err(Error { kind: ErrorKind::Sender(Failure::InDoubt), guest_at: GuestAt::InDoubt }),
    }
}

/// The guest has all: that is made durable, and this word says so.
fn filled(guest: &mut GuestJournal, handover: Handover) -> Result<Message, String> {
    let said = guest.filled(handover).into_iter().filter_map(|output| match output {
        Output::Send(message) => Some(message),
        _ => None,
    });
    gone(said, guest)
}
