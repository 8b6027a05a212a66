//! `pagewire status`: where guests are, as this host's records say. It only looks.

use crate::args::{JournalAt, Status};
use crate::show::{hex, print_json, say};
use anyhow::Result;
use pagewire::handover::{HostId, Record, RecordKind, Whereabouts};
use pagewire::{GuestStatus, Journal, JournalError, chain};
use serde_json::{Value, json};
use std::process::ExitCode;

/// Something is wrong with the journal's files.
pub(crate) const WRONG: u8 = 1;
/// There is no journal, or none that may be used; or nothing there that was asked for.
pub(crate) const USAGE: u8 = 2;
/// Nobody on this host knows where a guest is.
pub(crate) const IN_DOUBT: u8 = 3;

pub(crate) fn run(args: &Status) -> Result<ExitCode> {
    let journal = match open(&args.at) {
        Ok(Some(journal)) => journal,
        // Named by hand it should be there.
        Ok(None) => return Ok(ExitCode::from(if args.at.dir.is_some() { USAGE } else { 0 })),
        Err(error) => return refused(error),
    };
    let guests = journal.guests()?;
    let host = journal.host();
    if args.at.json {
        guests.iter().for_each(|guest| print_json(&as_json(guest, host)));
    } else {
        say(&format!("this host is {}", hex(&host.0)));
        guests.iter().for_each(|guest| show(guest, host));
        if guests.is_empty() {
            say("no guest was handed over from here or to here");
        }
    }
    Ok(ExitCode::from(if guests.iter().any(is_in_doubt) {
        IN_DOUBT
    } else if guests.iter().any(|guest| !guest.damaged.is_empty()) {
        WRONG
    } else {
        0
    }))
}

/// The journal that a command line names; where there is none, that is said.
pub(crate) fn open(at: &JournalAt) -> Result<Option<Journal>, JournalError> {
    let dir = at.dir.clone().map_or_else(Journal::default_dir, Ok)?;
    let journal = Journal::existing(&dir)?;
    if journal.is_none() {
        eprintln!("pagewire: {}: there is no journal: no guest was handed over from here or to here", dir.display());
    }
    Ok(journal)
}

/// A journal that cannot be used, as an exit code.
pub(crate) fn refused(error: JournalError) -> Result<ExitCode> {
    if !matches!(error, JournalError::Refused { .. } | JournalError::NoHome) {
        return Err(error.into());
    }
    eprintln!("pagewire: {}", plain(&chain(&error)));
    Ok(ExitCode::from(USAGE))
}

/// Whether the other host may lack pages that only the memory here has.
pub(crate) fn is_lacking(record: &Record) -> bool {
    record.kind == RecordKind::Handed && record.handover.post_copy
}

pub(crate) fn is_in_doubt(guest: &GuestStatus) -> bool {
    guest.whereabouts == Some(Whereabouts::InDoubt)
}

/// What people call the guest.
pub(crate) fn called(guest: &GuestStatus) -> String {
    guest.name.as_ref().map_or_else(|| hex(&guest.lineage.0), |name| name.as_str().to_owned())
}

/// The host on the other side.
pub(crate) fn other_host(record: &Record, me: HostId) -> HostId {
    let handover = &record.handover;
    if handover.sender == me { handover.receiver } else { handover.sender }
}

/// A file's name may hold what a terminal would obey.
pub(crate) fn plain(text: &str) -> String {
    let shown = |char: char| if char.is_control() { char.escape_default().to_string() } else { char.to_string() };
    text.chars().map(shown).collect()
}

fn show(guest: &GuestStatus, me: HostId) {
    let at = match guest.whereabouts {
        None => "nothing is decided about it: files of the journal are damaged",
        Some(Whereabouts::Unrecorded) => "no hand-over of it has ended here: whoever runs guests here knows",
        Some(Whereabouts::Here) => "is on this host",
        Some(Whereabouts::Lost) => "was on this host, and is lost",
        Some(Whereabouts::Filling) => "is on this host while whoever took it over lives: pages of it may be absent",
        Some(Whereabouts::There) => "is on another host",
        Some(Whereabouts::Serving) => "is on another host, which lacks pages of it: its memory here must be kept",
        Some(Whereabouts::InDoubt) if guest.records.iter().any(is_lacking) => {
            "IN DOUBT: it was handed over with pages absent; it must not run here, and its memory must be kept"
        }
        Some(Whereabouts::InDoubt) => "IN DOUBT: it was handed over, and no answer came; it must not run here",
    };
    say(&format!("{}  {}  {at}", guest.name.as_ref().map_or("(no name)", |name| name.as_str()), hex(&guest.lineage.0)));
    for record in &guest.records {
        let other = hex(&other_host(record, me).0);
        let what = match (record.kind, record.handover.sender == me) {
            (RecordKind::Handed, _) if is_lacking(record) => "handed over, pages may still be absent, to",
            (RecordKind::Handed, _) => "handed over, unanswered, to",
            (RecordKind::Started, _) if record.handover.post_copy => "started here, pages may still be absent, from",
            (RecordKind::Started, _) => "started here, from",
            (RecordKind::Rejected, _) => "rejected here, from",
            (RecordKind::Returned, _) => "stayed here, not gone to",
            (RecordKind::Gone, true) => "gone for good to",
            (RecordKind::Gone, false) => "come for good from",
        };
        say(&format!("  hand-over {}: {what} {other}", record.handover.epoch));
    }
    for error in &guest.damaged {
        say(&format!("  damaged: {}", plain(&chain(error))));
    }
    if guest.records.iter().any(is_lacking) {
        let name = called(guest);
        say(&format!(
            "  the other host may lack pages of it: keep its memory here, and bring them: pagewire resume SRC --to \
             tcp://HOST:PORT --name {name}"
        ));
    }
    if is_in_doubt(guest) {
        let name = called(guest);
        say(&format!("  ask the other host where it receives: pagewire resolve {name} --ask tcp://HOST:PORT"));
        say(&format!("  if it cannot answer: pagewire resolve --help, then resolve {name} --here or --there"));
    }
}

fn as_json(guest: &GuestStatus, me: HostId) -> Value {
    let damaged = |error: &JournalError| json!({"path": error.path(), "why": chain(error)});
    json!({
        "host": hex(&me.0),
        "lineage": hex(&guest.lineage.0),
        "name": guest.name.as_ref().map(|name| name.as_str()),
        "whereabouts": guest.whereabouts.map(name_of),
        "records": guest.records.iter().map(|record| record_json(record, me)).collect::<Vec<_>>(),
        "damaged": guest.damaged.iter().map(damaged).collect::<Vec<_>>(),
    })
}

pub(crate) fn name_of(whereabouts: Whereabouts) -> &'static str {
    match whereabouts {
        Whereabouts::Unrecorded => "unrecorded",
        Whereabouts::Here => "here",
        Whereabouts::Lost => "lost",
        Whereabouts::Filling => "filling",
        Whereabouts::There => "there",
        Whereabouts::Serving => "serving",
        Whereabouts::InDoubt => "in_doubt",
    }
}

fn record_json(record: &Record, me: HostId) -> Value {
    let handover = &record.handover;
    let kind = match record.kind {
        RecordKind::Handed => "handed",
        RecordKind::Started => "started",
        RecordKind::Rejected => "rejected",
        RecordKind::Returned => "returned",
        RecordKind::Gone => "gone",
    };
    json!({
        "kind": kind,
        "epoch": handover.epoch.number(),
        "role": if handover.sender == me { "sender" } else { "receiver" },
        "other": hex(&other_host(record, me).0),
        "session": hex(&handover.session),
        "root": handover.root.to_string(),
        "arbiter": handover.arbiter,
        "post_copy": handover.post_copy,
    })
}
