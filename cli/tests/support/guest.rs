//! A guest that runs while its memory file is sent, with a host's folder and journal on either side.

use super::{PAGE, json, noise, text};
use pagewire::handover::Whereabouts;
use pagewire::{ImageName, Journal};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub const PAGES: usize = 2048;

/// A guest that increments one byte a page, in order, again and again, until a file tells it to stop.
pub struct Guest {
    pub dir: tempfile::TempDir,
    ends: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Guest {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["a", "b"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let memory = dir.path().join("a/vm");
        fs::write(&memory, noise(7, PAGES * PAGE)).unwrap();
        let (ends, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop, count, root) = (Arc::clone(&ends), Arc::clone(&writes), dir.path().to_path_buf());
        let thread = std::thread::spawn(move || {
            let file = File::options().read(true).write(true).open(memory).unwrap();
            let (mut page, mut byte) = (0, [0]);
            while !stop.load(Ordering::Relaxed) {
                if root.join("pause").exists() {
                    // Only what has stopped says so.
                    fs::write(root.join("paused"), "").ok();
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                for _ in 0..4 {
                    file.read_exact_at(&mut byte, (page * PAGE) as u64).unwrap();
                    byte[0] = byte[0].wrapping_add(1);
                    file.write_all_at(&byte, (page * PAGE) as u64).unwrap();
                    page = (page + 1) % PAGES;
                    count.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self { dir, ends, writes, thread: Some(thread) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn hook(&self, script: &str) -> String {
        format!("cd {}; {script}", self.dir.path().display())
    }

    /// Whether it goes on writing; a busy machine may keep it from that for a while.
    pub fn runs(&self) -> bool {
        let before = self.writes.load(Ordering::Relaxed);
        let stands_still = || self.path("pause").exists() && self.path("paused").exists();
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(100));
            let goes_on = self.writes.load(Ordering::Relaxed) > before;
            if goes_on || stands_still() {
                return goes_on;
            }
        }
        false
    }

    pub fn receive(&self, args: &[&str]) -> (Child, String) {
        let (b, journal) = (self.path("b"), self.path("journal-b"));
        let address = format!("unix:{}", self.path("socket").display());
        let _ = fs::remove_file(self.path("socket"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagewire"));
        command.args(["receive", "--listen", &address, "--into"]).arg(b).arg("--journal").arg(journal).args(args);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while !self.path("socket").exists() {
            assert!(Instant::now() < until, "the receiver does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        (child, address)
    }

    /// The guest is stopped by a file, and writes its state when it has been. A hook whose program was killed ends with the
    /// test.
    pub fn pause_hook(&self) -> String {
        let waits = format!("while [ ! -e paused -a -e {} ]", self.path("a").display());
        self.hook(&format!("rm -f paused; touch pause; {waits}; do sleep 0.002; done; echo 5 > state"))
    }

    pub fn resume_hook(&self) -> String {
        self.hook("rm -f pause paused")
    }

    pub fn send(&self, to: &str, args: &[&str]) -> Command {
        self.send_by(to, &self.pause_hook(), Some(&self.resume_hook()), args)
    }

    /// `send --live` with hooks of the caller's.
    pub fn send_by(&self, to: &str, on_pause: &str, on_resume: Option<&str>, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagewire"));
        command.args(["send", "--live"]).arg(self.path("a/vm")).args(["--to", to, "--name", "vm"]);
        command.args(["--on-pause", on_pause, "--downtime", "5000"]);
        command.args(on_resume.iter().flat_map(|on_resume| ["--on-resume", on_resume]));
        command.arg("--journal").arg(self.path("journal-a")).arg("--report").arg(self.path("report"));
        if !args.contains(&"--state") {
            command.arg("--state").arg(self.path("state"));
        }
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// What the guest is called in the names of records and leases, once a session has named it.
    pub fn lineage(&self) -> String {
        let guests = Journal::existing(&self.path("journal-a")).unwrap().unwrap().guests().unwrap();
        guests[0].lineage.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What a host's journal says.
    pub fn at(&self, journal: &str) -> Whereabouts {
        whereabouts(&self.path(journal))
    }

    pub fn report(&self) -> serde_json::Value {
        json(&self.path("report"))
    }

    pub fn arrived_whole(&self) {
        let (one, other) = (fs::read(self.path("a/vm")).unwrap(), fs::read(self.path("b/vm")).unwrap());
        assert!(one == other, "it is as it was when it stopped");
        // Written in order, each page once a turn: there is one edge at most.
        let original = noise(7, PAGES * PAGE);
        let turns: Vec<u8> = (0..PAGES).map(|page| other[page * PAGE].wrapping_sub(original[page * PAGE])).collect();
        assert!(turns.windows(2).filter(|pair| pair[0] != pair[1]).count() <= 1, "one edge");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// What a journal says of the guest `vm`.
pub fn whereabouts(journal: &Path) -> Whereabouts {
    let Some(journal) = Journal::existing(journal).unwrap() else { return Whereabouts::Unrecorded };
    let guests = journal.guests().unwrap();
    let vm = ImageName::new("vm").unwrap();
    let known = guests.iter().find(|guest| guest.name.as_ref() == Some(&vm));
    known.map_or(Whereabouts::Unrecorded, |guest| guest.whereabouts.unwrap())
}

pub fn ended(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), text(&output.stderr))
}

pub fn stop(mut child: Child) {
    child.kill().ok();
    child.wait().unwrap();
}
