//! `pagewire send --live` as a script uses it: what it tells, what it draws and what it keeps.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::trace::{Reader, Seen};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use support::*;

/// A guest of 2 MiB, and where its journals, its drawing and its trace are.
struct Guest {
    dir: tempfile::TempDir,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ram"), noise(5, 512 * PAGE)).unwrap();
        fs::create_dir(dir.path().join("there")).unwrap();
        Self { dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The pause writes to two pages, as a guest does that is stopped late.
    fn send(&self, to: &str, plot: &Path, trace: &Path) -> std::process::Output {
        let ram = self.at("ram").display().to_string();
        let on_pause = format!(
            "for page in 3 77; do printf written | dd of='{ram}' bs=4096 seek=$page conv=notrunc status=none; done"
        );
        let journal = self.at("journal-here").display().to_string();
        let (plot, trace) = (plot.display().to_string(), trace.display().to_string());
        pagewire(&[
            "send",
            &ram,
            "--to",
            to,
            "--name",
            "vm",
            "--live",
            "--on-pause",
            &on_pause,
            "--on-resume",
            "true",
            "--journal",
            &journal,
            "--downtime",
            "5000",
            "--plot",
            &plot,
            "--record-trace",
            &trace,
        ])
    }
}

#[test]
fn draws_the_rounds_and_keeps_what_the_guest_wrote() {
    let guest = Guest::new();
    let journal = guest.at("journal-there").display().to_string();
    let receiver = Receiver::start(&guest.at("there"), &["--leave-paused", "--journal", &journal]);
    let (plot, trace) = (guest.at("plot.svg"), guest.at("trace"));
    let output = guest.send(&receiver.address, &plot, &trace);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(fs::read(guest.at("there/vm")).unwrap(), fs::read(guest.at("ram")).unwrap());
    let svg = fs::read_to_string(plot).unwrap();
    assert!(svg.contains(">vm</text>") && svg.contains(">switchover</text>"), "{svg}");
    let mut reader = Reader::open(&trace).unwrap();
    assert_eq!(reader.layout().pages(), 512);
    let mut last = None;
    while let Some(record) = reader.next_record().unwrap() {
        assert_eq!(record.seen, Seen::Compare);
        last = Some(record);
    }
    let pages = last.unwrap().pages;
    assert_eq!(pages.runs(0..512).collect::<Vec<_>>(), [3..4, 77..78]);
}

#[test]
fn draws_a_session_that_failed_and_moves_a_guest_that_can_be_neither_drawn_nor_traced() {
    let guest = Guest::new();
    let (plot, trace) = (guest.at("plot.svg"), guest.at("trace"));
    let nobody = format!("unix:{}", guest.at("nobody").display());
    assert_eq!(guest.send(&nobody, &plot, &trace).status.code(), Some(1));
    let svg = fs::read_to_string(&plot).unwrap();
    assert!(svg.contains("no round was finished") && svg.contains("failed, guest: sender"), "{svg}");

    let journal = guest.at("journal-there").display().to_string();
    let receiver = Receiver::start(&guest.at("there"), &["--leave-paused", "--journal", &journal]);
    let nowhere = guest.at("no/folder");
    let output = guest.send(&receiver.address, &nowhere, &nowhere);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    for warning in ["warning: --plot", "warning: the trace"] {
        assert!(said.contains(warning), "{said}");
    }
}

#[test]
fn tells_every_phase_round_and_decision_while_the_guest_moves() {
    let guest = Guest::new();
    let journal = guest.at("journal-there").display().to_string();
    let receiver = Receiver::start(&guest.at("there"), &["--leave-paused", "--journal", &journal]);
    let ram = guest.at("ram").display().to_string();
    let journal = guest.at("journal-here").display().to_string();
    let word = format!("until [ -e {} ]; do sleep 0.01; done", guest.at("go").display());
    let args = ["send", "--live", &ram, "--to", &receiver.address, "--name", "vm", "--journal", &journal, "--json"];
    let limits = ["--bandwidth-limit", "8MB", "--on-pause", "true", "--downtime", "5000"];
    let hooks = ["--pause-before-switchover", &word];
    let mut sender = Running::start(&[&args[..], &limits, &hooks].concat());
    let lines = BufReader::new(sender.0.stdout.take().unwrap()).lines();
    let mut events: Vec<Value> = Vec::new();
    for line in lines {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        if event["phase"] == "waiting" {
            // It goes on only now: what was told so far was told while it happened.
            let rounds = events.iter().filter(|event| event["event"] == "round").count();
            assert_eq!(rounds, 3, "{events:?}");
            fs::write(guest.at("go"), "").unwrap();
        }
        events.push(event);
    }
    let (status, said) = sender.end();
    assert_eq!(status.code(), Some(0), "{said}");

    let phases: Vec<&str> = events.iter().filter_map(|event| event["phase"].as_str()).collect();
    assert_eq!(phases, ["sending", "pausing", "paused", "offered", "ready", "waiting", "handed", "started"]);
    // Each round comes with its figures, and what was decided after it follows it at once.
    let told: Vec<&Value> = events.iter().filter(|event| event["event"] != "progress").collect();
    for (number, figures) in [(0, 512), (1, 0), (2, 0)] {
        let at = told.iter().position(|event| event["event"] == "round" && event["number"] == number).unwrap();
        let round = told[at];
        assert_eq!((&round["looked_at"], &round["pages"]), (&512.into(), &figures.into()), "{round}");
        for figure in ["bytes", "seconds", "dirty_rate", "rate"] {
            assert!(round[figure].is_number(), "{figure}: {round}");
        }
        if number < 2 {
            let decided = told[at + 1]["what"].as_str().unwrap();
            assert!(decided.starts_with(&format!("after round {number}:")), "{decided}");
        }
        assert_eq!(round["predicted_downtime_seconds"].is_number(), number == 1, "{round}");
    }
    // The report has the same, and the operator's word.
    let report = &events.last().unwrap()["report"];
    let rounds = events.iter().filter(|event| event["event"] == "round").count();
    assert_eq!(report["rounds"].as_array().unwrap().len(), rounds);
    let decisions = events.iter().filter(|event| event["event"] == "decision").count();
    assert_eq!(report["decisions"].as_array().unwrap().len(), decisions + 1);
    // Times are those of one clock.
    let times: Vec<f64> =
        told.iter().filter(|event| event["event"] != "round").filter_map(|event| event["seconds"].as_f64()).collect();
    assert!(times.is_sorted(), "{times:?}");
}

#[test]
fn tells_that_a_guest_stays() {
    let guest = Guest::new();
    let journal = guest.at("journal-there").display().to_string();
    let receiver = Receiver::start(&guest.at("there"), &["--leave-paused", "--journal", &journal]);
    let ram = guest.at("ram").display().to_string();
    let journal = guest.at("journal-here").display().to_string();
    let args = ["send", "--live", &ram, "--to", &receiver.address, "--name", "vm", "--journal", &journal, "--json"];
    let output = pagewire(&[&args[..], &["--on-pause", "exit 1", "--downtime", "5000"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let events: Vec<Value> = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let phases: Vec<&str> = events.iter().filter_map(|event| event["phase"].as_str()).collect();
    assert_eq!(phases, ["sending", "pausing", "stays"]);
    assert_eq!(events.last().unwrap()["report"]["guest_at"], "sender");
}

#[test]
fn a_guest_that_has_moved_ends_with_code_0_whoever_reads_of_it() {
    // Nothing can be written: not the report, and on a full disk nor what is printed.
    for json in [&["--json"][..], &[]] {
        let guest = Guest::new();
        let journal = guest.at("journal-there").display().to_string();
        let receiver = Receiver::start(&guest.at("there"), &["--leave-paused", "--journal", &journal]);
        let ram = guest.at("ram").display().to_string();
        let (journal, report) = (guest.at("journal-here"), guest.at("no/report"));
        let (journal, report) = (journal.display().to_string(), report.display().to_string());
        let args = ["send", "--live", &ram, "--to", &receiver.address, "--name", "vm", "--journal", &journal];
        let more = ["--on-pause", "true", "--downtime", "5000", "--report", &report];
        let full = || fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = command(&[&args[..], &more, json].concat());
        let status = command.stdout(full()).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(0), "{json:?}");
        assert!(guest.at("there/vm").exists());
    }
}

/// As a person sees it: `script` of util-linux gives it a terminal.
#[test]
fn a_terminal_shows_rounds_and_phases_beside_the_bar() {
    if std::process::Command::new("script").arg("--version").output().is_err() {
        println!("SKIPPED: there is no `script` to give it a terminal");
        return;
    }
    let guest = Guest::new();
    let journal = guest.at("journal-there").display().to_string();
    let receiver = Receiver::start(&guest.at("there"), &["--leave-paused", "--journal", &journal]);
    let (ram, journal) = (guest.at("ram").display().to_string(), guest.at("journal-here").display().to_string());
    let line = format!(
        "{} send --live {ram} --to {} --name vm --journal {journal} --on-pause true --downtime 5000 --bandwidth-limit 8MB",
        env!("CARGO_BIN_EXE_pagewire"),
        receiver.address,
    );
    let output = std::process::Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for part in ["on the wire", "round 0: 512 of 512", "after round 1:", "being paused", "stood still for"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}
