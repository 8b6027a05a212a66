//! The hooks of `pagewire send --live`: who has the last word before a hand-over, and what slows a guest down. Whatever
//! they do, the guest runs at one host, at its full speed, and nothing that they started stays behind.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::handover::Whereabouts;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::guest::whereabouts;
use support::*;

const PAGES: u64 = 256;

/// A guest that changes a page a millisecond, or as many as it can. Files beside it stop it and slow it down.
struct Guest {
    dir: tempfile::TempDir,
    ends: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Guest {
    fn new(fast: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let memory = dir.path().join("ram");
        fs::write(&memory, noise(3, PAGE * 256)).unwrap();
        fs::create_dir(dir.path().join("there")).unwrap();
        let (ends, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop, count, root) = (Arc::clone(&ends), Arc::clone(&writes), dir.path().to_path_buf());
        let thread = std::thread::spawn(move || {
            let file = File::options().write(true).open(memory).unwrap();
            while !stop.load(Ordering::Relaxed) {
                if root.join("pause").exists() {
                    // Only what has stopped says so.
                    fs::write(root.join("paused"), "").ok();
                } else {
                    let pages = if fast && !root.join("slow").exists() { PAGES } else { 1 };
                    for _ in 0..pages {
                        let number = count.fetch_add(1, Ordering::Relaxed);
                        file.write_all_at(&noise(number, PAGE), number % PAGES * PAGE as u64).unwrap();
                    }
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self { dir, ends, writes, thread: Some(thread) }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn hook(&self, script: &str) -> String {
        format!("cd {}; {script}", self.dir.path().display())
    }

    fn receive(&self, more: &[&str]) -> Receiver {
        let journal = self.at("journal-there").display().to_string();
        Receiver::start(&self.at("there"), &[&["--leave-paused", "--journal", &journal], more].concat())
    }

    fn send(&self, receiver: &Receiver, more: &[&str]) -> Running {
        let path = |name: &str| self.at(name).display().to_string();
        let (ram, journal, report) = (path("ram"), path("journal-here"), path("report"));
        let pause = self.hook("touch pause; until [ -e paused ]; do sleep 0.002; done");
        let resume = self.hook("rm -f pause paused");
        let args = ["send", "--live", &ram, "--to", &receiver.address, "--name", "vm", "--journal", &journal];
        let hooks = ["--on-pause", &pause, "--on-resume", &resume, "--report", &report];
        Running::start(&[&args[..], &hooks[..], more].concat())
    }

    /// Whether it goes on writing.
    fn runs(&self) -> bool {
        let before = self.writes.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(100));
        self.writes.load(Ordering::Relaxed) > before
    }

    /// What a host's journal says.
    fn whereabouts(&self, journal: &str) -> Whereabouts {
        whereabouts(&self.at(journal))
    }

    fn report(&self) -> serde_json::Value {
        json(&self.at("report"))
    }

    /// Waits until a hook has made this file.
    fn wait_for(&self, name: &str) {
        wait_until(name, || self.at(name).exists());
    }

    /// The process whose number a hook wrote is no more.
    fn is_gone(&self, pid: &str) -> bool {
        let pid = fs::read_to_string(self.at(pid)).unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", pid.trim()));
        status.is_err() || status.is_ok_and(|status| status.contains("State:\tZ"))
    }

    fn log(&self) -> Vec<String> {
        fs::read_to_string(self.at("log")).unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

#[test]
fn a_guest_stands_still_at_its_sender_until_the_last_word_is_said() {
    let guest = Guest::new(false);
    let receiver = guest.receive(&[]);
    let word = guest.hook("echo $PAGEWIRE_NAME > asked; until [ -e go ]; do sleep 0.01; done");
    let sender = guest.send(&receiver, &["--downtime", "5000", "--pause-before-switchover", &word]);
    guest.wait_for("asked");
    assert!(!guest.runs(), "it was paused");
    assert_eq!(fs::read(guest.at("there/vm")).unwrap(), fs::read(guest.at("ram")).unwrap(), "all of it is there");
    assert_eq!(guest.whereabouts("journal-there"), Whereabouts::Unrecorded);
    fs::write(guest.at("go"), "").unwrap();
    let (status, said) = sender.end();
    assert_eq!(status.code(), Some(0), "{said}");
    assert_eq!(fs::read_to_string(guest.at("asked")).unwrap(), "vm\n");
    assert_eq!(
        (guest.whereabouts("journal-here"), guest.whereabouts("journal-there")),
        (Whereabouts::There, Whereabouts::Here)
    );
    let decided = guest.report()["decisions"].to_string();
    assert!(decided.contains("the operator, asked for 0.") && decided.contains("hand over"), "{decided}");
}

#[test]
fn a_last_word_that_is_no_lets_the_guest_run_on() {
    let guest = Guest::new(false);
    let receiver = guest.receive(&[]);
    let sender = guest.send(&receiver, &["--downtime", "5000", "--pause-before-switchover", "echo no; exit 4"]);
    let (status, said) = sender.end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("--pause-before-switchover") && said.contains("exit status: 4"), "{said}");
    assert!(said.contains("the guest is at the sender") && guest.runs(), "{said}");
    assert_eq!(guest.whereabouts("journal-here"), Whereabouts::Here);
    // It can be sent again, and goes.
    let (status, said) = guest.send(&receiver, &["--downtime", "5000", "--pause-before-switchover", "true"]).end();
    assert_eq!(status.code(), Some(0), "{said}");
}

#[test]
fn a_last_word_that_nobody_waits_for_any_more_is_ended_and_the_guest_runs_on() {
    for (how, code) in [("signal", 130), ("receiver", 1), ("deadline", 1)] {
        let guest = Guest::new(false);
        let receiver = guest.receive(&[]);
        let word = guest.hook("sleep 1000 & echo $! > pid; mv pid asked; wait");
        let mut args = vec!["--downtime", "5000", "--pause-before-switchover", &word];
        if how == "deadline" {
            args.extend(["--deadline", "1.5"]);
        }
        let sender = guest.send(&receiver, &args);
        guest.wait_for("asked");
        assert!(!guest.runs() && !guest.is_gone("asked"), "{how}");
        let begin = Instant::now();
        match how {
            "signal" => sender.signal("-TERM"),
            "receiver" => receiver.process.signal("-KILL"),
            _ => {}
        }
        let (status, said) = sender.end();
        assert_eq!(status.code(), Some(code), "{how}: {said}");
        assert!(begin.elapsed() < Duration::from_secs(10), "{how}");
        assert!(guest.runs() && said.contains("the guest is at the sender"), "{how}: {said}");
        wait_until("the hook is gone", || guest.is_gone("asked"));
        assert_eq!(guest.whereabouts("journal-here"), Whereabouts::Here, "{how}");
    }
}

/// What slows it down, and what that says.
const THROTTLE: &str = "echo $PAGEWIRE_NAME $PAGEWIRE_THROTTLE >> log; \
                        if [ $PAGEWIRE_THROTTLE = 0 ]; then rm -f slow; else touch slow; fi";
/// Such that the guest changes all of its pages faster than they are sent.
const SLOW_LINK: [&str; 4] = ["--bandwidth-limit", "4MB", "--downtime", "50"];

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_until_it_has_moved() {
    let guest = Guest::new(true);
    let receiver = guest.receive(&[]);
    let throttle = guest.hook(THROTTLE);
    let (status, said) = guest.send(&receiver, &[&SLOW_LINK[..], &["--on-throttle", &throttle]].concat()).end();
    assert_eq!(status.code(), Some(0), "{said}");
    let log = guest.log();
    assert_eq!((log.first().unwrap().as_str(), log.last().unwrap().as_str()), ("vm 20", "vm 0"));
    assert!(!guest.at("slow").exists());
    assert!(guest.report()["decisions"].to_string().contains("slowed down by 20 %"));
    assert_eq!(guest.whereabouts("journal-there"), Whereabouts::Here);
}

#[test]
fn a_guest_that_was_slowed_down_is_not_when_it_stays() {
    // It pays no heed, and there is no further step; somebody stops it; its receiver is gone.
    for (how, code) in [("in vain", 1), ("signal", 130), ("receiver", 1)] {
        let guest = Guest::new(true);
        let receiver = guest.receive(&[]);
        let heed = if how == "in vain" { "echo $PAGEWIRE_NAME $PAGEWIRE_THROTTLE >> log" } else { THROTTLE };
        let throttle = guest.hook(&format!("{heed}; touch throttled"));
        // Those that are stopped could not end by themselves.
        let limits: &[&str] = if how == "in vain" { &["--rounds", "6"] } else { &["--downtime", "0"] };
        let link = if how == "in vain" { &SLOW_LINK[..] } else { &SLOW_LINK[..2] };
        let sender = guest.send(&receiver, &[link, limits, &["--on-throttle", &throttle]].concat());
        guest.wait_for("throttled");
        match how {
            "signal" => sender.signal("-TERM"),
            "receiver" => receiver.process.signal("-KILL"),
            _ => {}
        }
        let (status, said) = sender.end();
        assert_eq!(status.code(), Some(code), "{how}: {said}");
        let log = guest.log();
        assert_eq!((log.first().unwrap().as_str(), log.last().unwrap().as_str()), ("vm 20", "vm 0"), "{how}");
        assert!(guest.runs() && !guest.at("slow").exists() && !guest.at("pause").exists(), "{how}");
        assert!(said.contains("the guest is at the sender"), "{how}: {said}");
    }
}

#[test]
fn what_slows_a_guest_down_and_fails_is_a_warning() {
    let guest = Guest::new(true);
    let receiver = guest.receive(&[]);
    let args = ["--rounds", "5", "--at-limit", "force", "--on-throttle", "exit 7"];
    let (status, said) = guest.send(&receiver, &[&SLOW_LINK[..], &args].concat()).end();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains("--on-throttle at 20 %") && said.contains("exit status: 7"), "{said}");
}

#[test]
fn hooks_of_guests_that_run_are_wrong_usage_without_live() {
    for option in ["--on-throttle", "--pause-before-switchover"] {
        fails(2, &["send", "x", "--to", "unix:/nowhere", "--name", "vm", option, "true"]);
    }
}
