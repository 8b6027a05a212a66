//! `pagewire resolve`: an operator says where a guest is that two hosts cannot agree about.

use crate::args::Resolve as Args;
use crate::show::{hex, print_json, say};
use crate::status::{IN_DOUBT, USAGE, WRONG, called, is_lacking, name_of, open, other_host, plain, refused};
use anyhow::Result;
use pagewire::handover::{
    Epoch, Fence, Handover, HostId, Input, Output, Record, RecordKind, Resolve, Whereabouts, Word,
};
use pagewire::{Address, GuestStatus, Journal, JournalError, ask_receiver, chain};
use serde_json::json;
use std::process::ExitCode;

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let journal = match open(&args.at) {
        Ok(Some(journal)) => journal,
        Ok(None) => return Ok(ExitCode::from(USAGE)),
        Err(error) => return refused(error),
    };
    let guests = journal.guests()?;
    let usage = |why: String| {
        eprintln!("pagewire: {why}");
        Ok(ExitCode::from(USAGE))
    };
    let guest = match find(&guests, &args.guest) {
        Ok(guest) => guest,
        Err(why) => return usage(why),
    };
    // First: what is damaged may be the very record that is asked about.
    if !guest.damaged.is_empty() {
        eprintln!("pagewire: {}: nothing can be decided about it, as files of the journal are damaged", called(guest));
        guest.damaged.iter().for_each(|error| eprintln!("pagewire: {}", plain(&chain(error))));
        return Ok(ExitCode::from(WRONG));
    }
    let way = match &args.ask {
        Some(to) => question(args, guest, journal.host()).map(|handover| Way::Ask(handover, to)),
        None => input(args, guest, journal.host()).map(Way::Say),
    };
    match way {
        Ok(way) => settle(args, &journal, guest, &way),
        Err(why) => usage(why),
    }
}

/// How the doubt ends.
enum Way<'a> {
    /// The operator says where the guest is.
    Say(Resolve),
    /// The other host is asked about this hand-over.
    Ask(Handover, &'a Address),
}

/// The hand-over that the other host can be asked about: one from here, without an answer.
fn question(args: &Args, guest: &GuestStatus, me: HostId) -> Result<Handover, String> {
    let is_it = |record: &&Record| {
        let is_asked = args.epoch.is_none_or(|epoch| record.handover.epoch == Epoch::new(epoch));
        is_asked && record.kind == RecordKind::Handed && record.handover.sender == me
    };
    let record = guest.records.iter().rev().find(is_it);
    let name = called(guest);
    record.map(|record| record.handover).ok_or_else(|| {
        format!(
            "{name}: no hand-over of it from here is without an answer: there is nothing to ask; see `pagewire status`"
        )
    })
}

/// The one guest that is called so, or whose lineage begins so.
fn find<'a>(guests: &'a [GuestStatus], text: &str) -> Result<&'a GuestStatus, String> {
    let digits = text.to_ascii_lowercase();
    let fits = |guest: &&GuestStatus| {
        let by_name = guest.name.as_ref().is_some_and(|name| name.as_str() == text);
        by_name || (!digits.is_empty() && hex(&guest.lineage.0).starts_with(&digits))
    };
    let mut fitting = guests.iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(guest), None) => Ok(guest),
        (Some(_), Some(_)) => Err(format!("{}: fits more than one guest; give its lineage", plain(text))),
        (None, _) => Err(format!("{}: no such guest; see `pagewire status`", plain(text))),
    }
}

/// What the operator says, held against the records.
fn input(args: &Args, guest: &GuestStatus, me: HostId) -> Result<Resolve, String> {
    let name = called(guest);
    let find = |fits: &dyn Fn(&Record) -> bool| guest.records.iter().rev().find(|record| fits(record));
    let record = match args.epoch {
        Some(number) => find(&|record| record.handover.epoch == Epoch::new(number)),
        None => find(&|record| record.kind == RecordKind::Handed),
    };
    // A guest that was started here is not in doubt, and whoever types this on the wrong host must not lose it.
    let started = find(&|record| record.kind == RecordKind::Started).map(|record| record.handover);
    let record = record.ok_or_else(|| match (args.epoch, started) {
        (Some(number), _) => format!("{name}: there is no record of hand-over {number}; see `pagewire status`"),
        (None, Some(Handover { epoch, post_copy: true, .. })) => format!(
            "{name}: is not in doubt: it was started here by hand-over {epoch}, with pages absent, which its sender \
             serves. If whoever started it has ended, it is lost: say --there --epoch {epoch}"
        ),
        (None, Some(Handover { epoch, .. })) => format!(
            "{name}: is not in doubt: it was started here by hand-over {epoch}. If a crash has taken its memory, say \
             --there --epoch {epoch}; if its sender is gone for good, --here --fenced HOST --epoch {epoch}"
        ),
        (None, None) => format!("{name}: is not in doubt; see `pagewire status`"),
    })?;
    let epoch = record.handover.epoch;
    // Whoever has merely seen it run there must not take from it what it lacks.
    if is_lacking(record) && args.epoch.is_none() && !args.here {
        return Err(format!(
            "{name}: the other host may lack pages of it: keep its memory here, and run `pagewire resume`. If it lacks \
             none, or is lost there, say --there --epoch {epoch}: the memory here is given up then"
        ));
    }
    let Some(fenced) = args.fenced.as_ref().filter(|_| args.here) else { return Ok(Resolve::There(epoch)) };
    let host = other_host(record, me);
    if !hex(&host.0).starts_with(fenced.as_str()) {
        return Err(format!("{name}: the other host of hand-over {epoch} is {}, not {fenced}", hex(&host.0)));
    }
    Ok(Resolve::Here(Fence { epoch, host }))
}

fn settle(args: &Args, journal: &Journal, guest: &GuestStatus, way: &Way<'_>) -> Result<ExitCode> {
    let name = called(guest);
    // What was started here and is given away is not here any more: that is what the operator says.
    let mut desk = match journal.guest(guest.lineage, None, args.here) {
        Ok(desk) => desk,
        Err(JournalError::Busy { .. }) => {
            eprintln!("pagewire: {name}: a session of it is open on this host: let it end, or end it, and try again");
            return Ok(ExitCode::from(IN_DOUBT));
        }
        Err(error) => return Err(error.into()),
    };
    let outputs = match way {
        Way::Say(resolve) => desk.handle(Input::Resolve(*resolve)),
        Way::Ask(handover, to) => match ask_receiver(&mut desk, handover, to, args.patience) {
            Ok(outputs) => outputs,
            Err(error) => {
                eprintln!("pagewire: {name}: the other host does not say where it is: {}", plain(&chain(&error)));
                eprintln!("pagewire: {name}: it is in doubt still, and must not run here");
                return Ok(ExitCode::from(IN_DOUBT));
            }
        },
    };
    let refusal = outputs.iter().find_map(|output| match output {
        Output::Refuse(refusal) => Some(refusal),
        _ => None,
    });
    if let Some(refusal) = refusal {
        eprintln!("pagewire: {name}: {refusal}");
        return Ok(ExitCode::from(USAGE));
    }
    if let Some(error) = desk.owed() {
        eprintln!("pagewire: {name}: it is not decided, as that cannot be written: {}", plain(&chain(error)));
        return Ok(ExitCode::from(IN_DOUBT));
    }
    let whereabouts = desk.handovers().whereabouts();
    let epoch = match way {
        Way::Say(Resolve::Here(fence)) => fence.epoch,
        Way::Say(Resolve::There(epoch)) => *epoch,
        Way::Ask(handover, _) => handover.epoch,
    };
    if args.at.json {
        let (lineage, epoch) = (hex(&guest.lineage.0), epoch.number());
        let name = guest.name.as_ref().map(|name| name.as_str());
        let at = name_of(whereabouts);
        print_json(&json!({"event": "resolved", "lineage": lineage, "name": name, "epoch": epoch, "whereabouts": at}));
    } else {
        say(&format!("{name}: hand-over {epoch} is resolved: {}", meaning(&outputs, way)));
    }
    Ok(ExitCode::from(if whereabouts == Whereabouts::InDoubt { IN_DOUBT } else { 0 }))
}

/// What it means for whoever runs the guest.
fn meaning(outputs: &[Output], way: &Way<'_>) -> &'static str {
    let found = outputs.iter().find_map(|output| match output {
        Output::Resume(_) if matches!(way, Way::Ask(..)) => {
            Some("the other host has rejected it: the guest is this host's and may run here")
        }
        Output::Resume(_) => {
            Some("the guest is this host's and may run here; the host that is fenced off must stay so")
        }
        Output::Release(_) => Some("the guest is the other host's; what is left of it here can be given up"),
        Output::Send(message) if message.word == Word::Reject => {
            Some("the guest never runs here by it; the other host hears that when it asks, and may run it")
        }
        _ => None,
    });
    found.unwrap_or("the guest stays this host's, and the other host's answer is not waited for any more")
}
