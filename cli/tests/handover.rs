//! `pagewire status` and `pagewire resolve`: what an operator sees of hand-overs, and does where two hosts cannot know.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::handover::{Epoch, Handover, HostId, Input, Message, Whereabouts, Word};
use pagewire::{Digest, ImageName, Journal, LineageId};
use std::fs;
use std::path::PathBuf;
use support::*;

const OTHER: HostId = HostId([0x2b; 32]);
const OTHER_DIGITS: &str = "2b2b2b2b";

/// A host with a journal.
struct Host {
    dir: tempfile::TempDir,
    journal: Journal,
}

fn lineage(who: u8) -> LineageId {
    LineageId([who; 16])
}

fn says(word: Word, handover: Handover) -> Input {
    Input::Message { from: OTHER, message: Message { word, handover } }
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("journal")).unwrap();
        Self { dir, journal }
    }

    fn handover(&self, who: u8, out: bool) -> Handover {
        let (sender, receiver) = if out { (self.journal.host(), OTHER) } else { (OTHER, self.journal.host()) };
        let (lineage, epoch, root) = (lineage(who), Epoch::new(1), Digest([9; 32]));
        Handover { lineage, session: [who; 16], epoch, root, sender, receiver, arbiter: false, post_copy: false }
    }

    /// A guest that was handed over, without an answer.
    fn in_doubt(&self, who: u8, name: &str) -> Handover {
        self.hand_over(self.handover(who, true), who, name)
    }

    fn hand_over(&self, handover: Handover, who: u8, name: &str) -> Handover {
        let mut guest = self.journal.guest(lineage(who), Some(&ImageName::new(name).unwrap()), true).unwrap();
        guest.open(handover.session).unwrap();
        guest.send(handover).unwrap();
        guest.handle(says(Word::Ready, handover));
        guest.handle(Input::Commit);
        handover
    }

    /// The same with pages absent.
    fn lacking(&self, who: u8, name: &str) -> Handover {
        self.hand_over(Handover { post_copy: true, ..self.handover(who, true) }, who, name)
    }

    /// A guest that was started here.
    fn started(&self, who: u8, name: &str) -> Handover {
        self.take_over(self.handover(who, false), who, name)
    }

    fn take_over(&self, handover: Handover, who: u8, name: &str) -> Handover {
        let mut guest = self.journal.guest(lineage(who), Some(&ImageName::new(name).unwrap()), true).unwrap();
        guest.receive(OTHER, handover);
        guest.handle(says(Word::Commit, handover));
        handover
    }

    fn whereabouts(&self, who: u8) -> Option<Whereabouts> {
        let guests = self.journal.guests().unwrap();
        guests.iter().find(|guest| guest.lineage == lineage(who)).and_then(|guest| guest.whereabouts)
    }

    fn record(&self, who: u8) -> PathBuf {
        let folder = self.journal.path().join(format!("{who:02x}").repeat(16));
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files.into_iter().find(|path| path.extension().is_some_and(|suffix| suffix == "record")).unwrap()
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let output = pagewire(&[args, &["--journal", self.journal.path().to_str().unwrap()]].concat());
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }
}

#[test]
fn shows_where_guests_are_and_ends_with_3_in_doubt() {
    let host = Host::new();
    let (code, said, _) = host.run(&["status"]);
    assert!(code == 0 && said.contains("no guest was handed over"), "{said}");
    host.started(1, "db");
    let (code, said, _) = host.run(&["status"]);
    assert!(code == 0 && said.contains("db  0101") && said.contains("is on this host"), "{said}");
    host.in_doubt(2, "web");
    let (code, said, _) = host.run(&["status"]);
    assert!(code == 3 && said.contains("web  0202") && said.contains("IN DOUBT"), "{said}");
    assert!(said.contains(&"2b".repeat(32)) && said.contains("pagewire resolve"), "{said}");
    let (code, said, _) = host.run(&["status", "--json"]);
    let guests: Vec<serde_json::Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((code, guests.len()), (3, 2));
    assert_eq!(guests[1]["whereabouts"], "in_doubt");
    assert_eq!(
        (&guests[1]["records"][0]["kind"], &guests[1]["records"][0]["role"]),
        (&"handed".into(), &"sender".into())
    );
    assert_eq!(guests[0]["records"][0]["other"], "2b".repeat(32));
}

#[test]
fn takes_a_guest_back_only_with_a_fence_around_its_other_host() {
    let host = Host::new();
    host.in_doubt(2, "web");
    for wrong in [
        &["resolve", "web"][..],
        &["resolve", "web", "--here"],
        &["resolve", "web", "--here", "--there", "--fenced", OTHER_DIGITS],
        &["resolve", "web", "--there", "--fenced", OTHER_DIGITS],
        &["resolve", "web", "--here", "--fenced", "2b2b2b2"],
        &["resolve", "web", "--here", "--fenced", "2b2b2b2c"],
        &["resolve", "web", "--here", "--fenced", OTHER_DIGITS, "--epoch", "2"],
        &["resolve", "other", "--there"],
    ] {
        assert_eq!(host.run(wrong).0, 2, "{wrong:?}");
        assert_eq!(host.whereabouts(2), Some(Whereabouts::InDoubt), "{wrong:?}");
    }
    let (code, said, _) = host.run(&["resolve", "web", "--here", "--fenced", OTHER_DIGITS]);
    assert!(code == 0 && said.contains("may run here"), "{said}");
    assert_eq!(host.whereabouts(2), Some(Whereabouts::Here));
    let (code, _, said) = host.run(&["resolve", "web", "--here", "--fenced", OTHER_DIGITS]);
    assert!(code == 2 && said.contains("not in doubt"), "{said}");
}

#[test]
fn gives_a_guest_away_by_name_and_by_lineage() {
    let host = Host::new();
    host.in_doubt(0x21, "web");
    host.in_doubt(0x22, "web");
    let (code, _, said) = host.run(&["resolve", "web", "--there"]);
    assert!(code == 2 && said.contains("more than one"), "{said}");
    assert_eq!(host.run(&["resolve", "2", "--there"]).0, 2);
    let (code, said, _) = host.run(&["resolve", "21", "--there", "--json"]);
    let event: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &event["whereabouts"]), (0, &"there".into()));
    assert_eq!(
        (host.whereabouts(0x21), host.whereabouts(0x22)),
        (Some(Whereabouts::There), Some(Whereabouts::InDoubt))
    );
}

#[test]
fn a_guest_that_was_started_here_is_given_back_only_by_its_epoch() {
    let host = Host::new();
    host.started(1, "db");
    let (code, _, said) = host.run(&["resolve", "db", "--there"]);
    assert!(code == 2 && said.contains("--there --epoch 1"), "{said}");
    assert_eq!(host.whereabouts(1), Some(Whereabouts::Here));
    let (code, said, _) = host.run(&["resolve", "db", "--here", "--fenced", OTHER_DIGITS, "--epoch", "1"]);
    assert!(code == 0 && said.contains("stays this host's"), "{said}");
    assert_eq!(host.run(&["resolve", "db", "--there", "--epoch", "1"]).0, 2, "that is settled");

    host.started(3, "lost");
    let (code, said, _) = host.run(&["resolve", "lost", "--there", "--epoch", "1"]);
    assert!(code == 0 && said.contains("never runs here"), "{said}");
    assert_eq!(host.whereabouts(3), Some(Whereabouts::Unrecorded));
}

#[test]
fn a_guest_with_an_open_session_stays_in_doubt() {
    let host = Host::new();
    host.in_doubt(2, "web");
    let session = host.journal.guest(lineage(2), None, true).unwrap();
    let (code, _, said) = host.run(&["resolve", "web", "--there"]);
    assert!(code == 3 && said.contains("session"), "{said}");
    drop(session);
    assert_eq!(host.whereabouts(2), Some(Whereabouts::InDoubt));
}

#[test]
fn damaged_records_are_named_and_nothing_is_decided() {
    let host = Host::new();
    host.in_doubt(2, "web");
    let record = host.record(2);
    let mut bytes = fs::read(&record).unwrap();
    bytes[90] ^= 1;
    fs::write(&record, bytes).unwrap();
    let (code, said, _) = host.run(&["status"]);
    assert!(code == 1 && said.contains(record.to_str().unwrap()) && said.contains("damaged"), "{said}");
    fs::write(record.with_file_name("a\u{1b}[31m"), b"?").unwrap();
    assert!(!host.run(&["status"]).1.contains('\u{1b}'), "no terminal obeys a file's name");
    for args in [&["resolve", "web", "--there", "--epoch", "1"][..], &["resolve", "web", "--there"]] {
        let (code, _, said) = host.run(args);
        assert!(code == 1 && said.contains(record.to_str().unwrap()), "{said}");
    }
}

#[test]
fn rejects_folders_that_are_no_journals_with_code_2() {
    let host = Host::new();
    let path = |name: &str| host.dir.path().join(name).to_str().unwrap().to_owned();
    for verb in [&["status"][..], &["resolve", "web", "--there"]] {
        let said = fails(2, &[verb, &["--journal", &path("none")]].concat());
        assert!(said.contains(&path("none")), "{said}");
    }
    assert!(!host.dir.path().join("none").exists());
    fs::write(path("file"), b"").unwrap();
    assert!(fails(2, &["status", "--journal", &path("file")]).contains("not a folder"));
    // The user's own journal: nothing there is nothing in doubt.
    let output = command(&["status"]).env("XDG_STATE_HOME", path("state")).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let output = command(&["status"]).env_remove("XDG_STATE_HOME").env_remove("HOME").output().unwrap();
    assert!(output.status.code() == Some(2) && text(&output.stderr).contains("--journal"));
}

// SPEC 11.18, 11.20
#[test]
fn memory_that_another_host_may_lack_is_kept_until_an_operator_names_the_hand_over() {
    let host = Host::new();
    host.lacking(2, "web");
    let (code, said, _) = host.run(&["status"]);
    assert!(code == 3 && said.contains("its memory must be kept") && said.contains("pagewire resume"), "{said}");
    let (_, said, _) = host.run(&["status", "--json"]);
    let guest: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(guest["records"][0]["post_copy"], true);
    let (code, _, said) = host.run(&["resolve", "web", "--there"]);
    assert!(code == 2 && said.contains("may lack pages") && said.contains("--there --epoch 1"), "{said}");
    assert_eq!(host.whereabouts(2), Some(Whereabouts::InDoubt));
    let (code, said, _) = host.run(&["resolve", "web", "--there", "--epoch", "1"]);
    assert!(code == 0 && said.contains("can be given up"), "{said}");
    assert_eq!(host.whereabouts(2), Some(Whereabouts::There));
    let (_, said, _) = host.run(&["status"]);
    assert!(!said.contains("pagewire resume"), "{said}");
}

// SPEC 11.16, 11.21
#[test]
fn a_guest_that_was_started_with_pages_absent_is_not_settled_here_by_an_operator() {
    let host = Host::new();
    host.take_over(Handover { post_copy: true, ..host.handover(1, false) }, 1, "db");
    let (code, said, _) = host.run(&["status"]);
    assert!(code == 0 && said.contains("pages of it may be absent") && said.contains("started here"), "{said}");
    let (code, _, said) = host.run(&["resolve", "db", "--there"]);
    assert!(code == 2 && said.contains("--there --epoch 1") && !said.contains("--here"), "{said}");
    let (code, _, said) = host.run(&["resolve", "db", "--here", "--fenced", OTHER_DIGITS, "--epoch", "1"]);
    assert!(code == 2 && said.contains("lost in a crash"), "{said}");
    assert_eq!(host.whereabouts(1), Some(Whereabouts::Filling));
}
