//! `pagewire send --live` as a script uses it: what it draws and what it keeps.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::trace::{Reader, Seen};
use std::fs;
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
