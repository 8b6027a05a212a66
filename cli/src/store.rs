//! `pagewire store`: what an operator sees of the visits on this host, and does to them.

use crate::args::{Prune, Remove, StoreAt, StoreVerb};
use crate::show::{hex, print_json, say, size};
use anyhow::{Result, anyhow};
use pagewire::store::{Finding, Removed, Repaired, Store, StoreError, StoreOptions, Verified, VisitHead, VisitId};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::process::ExitCode;

/// Something is wrong with what is kept, or was left undone.
const WRONG: u8 = 1;
/// There is no store, or none that may be used.
const USAGE: u8 = 2;

/// Does what the command line says.
pub(crate) fn run(verb: &StoreVerb) -> Result<ExitCode> {
    let (at, budget) = match verb {
        StoreVerb::List(at) | StoreVerb::Verify(at) | StoreVerb::Repair(at) => (at, None),
        StoreVerb::Prune(Prune { at, store_budget }) => (at, *store_budget),
        StoreVerb::Remove(Remove { at, .. }) => (at, None),
    };
    let store = match Store::open(&at.dir, StoreOptions { budget, existing: true }) {
        Ok(store) => store,
        Err(error) => return refused(error),
    };
    match verb {
        StoreVerb::List(at) => list(&store, at),
        StoreVerb::Verify(at) => told(&store.verify()?, at, false),
        StoreVerb::Repair(at) => told(&store.repair()?, at, true),
        StoreVerb::Prune(args) => {
            let gone = store.prune()?;
            gone.iter().for_each(|head| removed(head.id, Some(head), args.at.json));
            if !args.at.json && gone.is_empty() {
                say("nothing to remove");
            }
            Ok(ExitCode::SUCCESS)
        }
        StoreVerb::Remove(args) => remove(&store, args),
    }
}

/// A store that cannot be used, as an exit code.
pub(crate) fn refused(error: StoreError) -> Result<ExitCode> {
    let usage = match &error {
        StoreError::Refused { .. } => true,
        StoreError::Io { source, .. } => {
            matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied)
        }
        _ => false,
    };
    if !usage {
        return Err(error.into());
    }
    eprintln!("pagewire: {:#}", anyhow!(error));
    Ok(ExitCode::from(USAGE))
}

fn as_json(head: &VisitHead) -> Value {
    json!({
        "id": head.id.to_string(),
        "domain": head.domain.to_string(),
        "lineage": hex(&head.lineage.0),
        "name": head.name.as_str(),
        "kind": head.kind.name(),
        "session": hex(&head.session),
        "created": head.created,
        "sequence": head.sequence,
        "last_used": head.last_used.as_secs(),
        "bytes": head.layout.bytes(),
        "bytes_on_disk": head.bytes_on_disk,
        "pages_kept": head.pages_kept,
        "superseded": head.superseded,
        "root": head.root.to_string(),
    })
}

fn list(store: &Store, at: &StoreAt) -> Result<ExitCode> {
    let heads = store.heads()?;
    if at.json {
        heads.iter().for_each(|head| print_json(&as_json(head)));
        return Ok(ExitCode::SUCCESS);
    }
    if heads.is_empty() {
        say("no visits are kept");
        return Ok(ExitCode::SUCCESS);
    }
    let width = heads.iter().map(|head| head.name.as_str().len()).max().unwrap_or(0).max(4);
    say(&format!(
        "{:<32}  {:<width$}  {:<8}  {:<8}  {:<17}  {:>10}  {:>10}  keeps",
        "id", "name", "lineage", "kind", "created (UTC)", "image", "on disk"
    ));
    for head in &heads {
        let keeps = if head.pages_kept { "pages" } else { "digests only" };
        say(&format!(
            "{}  {:<width$}  {:<8.8}  {:<8}  {:<17}  {:>10}  {:>10}  {keeps}{}",
            head.id,
            head.name,
            hex(&head.lineage.0),
            head.kind.name(),
            utc(head.created),
            size(head.layout.bytes()),
            size(head.bytes_on_disk),
            if head.superseded { ", superseded" } else { "" }
        ));
    }
    let bytes = heads.iter().fold(0u64, |sum, head| sum.saturating_add(head.bytes_on_disk));
    say(&format!("{} visits, {} on disk", heads.len(), size(bytes)));
    Ok(ExitCode::SUCCESS)
}

/// Minutes are enough to know which visit it was.
fn utc(seconds: u64) -> String {
    let (mut days, minutes) = (seconds / 86_400, seconds / 60 % 1440);
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // A clock that far off is shown as it is, and years are counted no further.
    let mut year = 1970u64;
    while year < 9999 && days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths.into_iter().take_while(|_| year < 9999) {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02} {:02}:{:02}", days + 1, minutes / 60, minutes % 60)
}

/// Names what is wrong, and ends with code 1 if something is still so.
fn told(seen: &Verified, at: &StoreAt, repair: bool) -> Result<ExitCode> {
    for finding in &seen.findings {
        if at.json {
            print_json(&finding_json(finding));
        } else {
            let what = match finding.repaired {
                Repaired::Left if repair => " (left as it is: in use, or not the store's)",
                Repaired::Left => "",
                Repaired::Removed => " (removed)",
                Repaired::PagesDropped => " (those pages are dropped, the others stay)",
                _ => " (repaired)",
            };
            let name = finding.visit.as_ref().map_or(String::new(), |head| format!(" [{}]", head.name));
            say(&format!("{finding}{name}{what}"));
        }
    }
    let left = seen.findings.iter().filter(|finding| finding.repaired == Repaired::Left).count();
    let Verified { visits, pages, findings, .. } = seen;
    if at.json {
        let found = findings.len();
        print_json(&json!({"event": "finished", "visits": visits, "pages": pages, "findings": found, "left": left}));
    } else if findings.is_empty() {
        say(&format!("{visits} visits, {pages} pages: everything is as it was kept"));
    } else {
        say(&format!("{visits} visits, {pages} pages, {} faults, {left} of them left", findings.len()));
    }
    Ok(ExitCode::from(if left == 0 { 0 } else { WRONG }))
}

fn finding_json(finding: &Finding) -> Value {
    let repaired = match finding.repaired {
        Repaired::Left => "left",
        Repaired::Removed => "removed",
        Repaired::PagesDropped => "pages_dropped",
        _ => "repaired",
    };
    json!({
        "event": "finding",
        "path": finding.path,
        "fault": finding.fault.to_string(),
        "visit": finding.visit.as_ref().map(as_json),
        "repaired": repaired,
    })
}

fn removed(id: VisitId, head: Option<&VisitHead>, json: bool) {
    if json {
        print_json(&json!({"event": "removed", "id": id.to_string(), "visit": head.map(as_json)}));
    } else {
        let name = head.map_or(String::new(), |head| format!("  {}", head.name));
        say(&format!("removed {id}{name}"));
    }
}

fn remove(store: &Store, args: &Remove) -> Result<ExitCode> {
    let heads = store.heads()?;
    let ids: Vec<VisitId> = if args.all {
        store.ids()?
    } else if let Some(name) = &args.name {
        heads.iter().filter(|head| head.name == *name).map(|head| head.id).collect()
    } else {
        let all = store.ids()?;
        args.ids.iter().map(|text| resolve(&all, text)).collect::<Result<_>>()?
    };
    let mut code = ExitCode::SUCCESS;
    if ids.is_empty() && !args.all {
        eprintln!("pagewire: no visit has that name; see `pagewire store list`");
        code = ExitCode::from(WRONG);
    }
    for id in ids {
        match store.remove(id)? {
            Removed::Yes => removed(id, heads.iter().find(|head| head.id == id), args.at.json),
            Removed::Busy => {
                eprintln!("pagewire: {id}: is in use by a session; try again when that has ended");
                code = ExitCode::from(WRONG);
            }
            _ => {}
        }
    }
    Ok(code)
}

/// The one visit whose id begins so.
fn resolve(all: &[VisitId], text: &str) -> Result<VisitId> {
    let mut fitting = all.iter().filter(|id| !text.is_empty() && id.to_string().starts_with(text));
    match (fitting.next(), fitting.next()) {
        (Some(id), None) => Ok(*id),
        (Some(_), Some(_)) => Err(anyhow!("{text}: fits more than one visit; give more digits")),
        (None, _) => Err(anyhow!("{}: no such visit; see `pagewire store list`", text.escape_default())),
    }
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn shows_times_as_calendars_do() {
        assert_eq!(utc(0), "1970-01-01 00:00");
        assert_eq!(utc(1_700_000_000), "2023-11-14 22:13");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00");
        assert_eq!(utc(4_102_444_800), "2100-01-01 00:00");
        assert!(utc(u64::MAX).starts_with("9999-"));
    }
}
