//! A guest runs in the memory of a hypervisor of its own process, which hands over its userfaultfd as Firecracker does,
//! while its pages come over a network that breaks.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]
#![allow(clippy::cast_possible_truncation, reason = "tests choose their numbers")]

#[path = "support/database.rs"]
mod database;
mod support;
#[path = "support/workload.rs"]
mod workload;

use pagewire::{Backing, FaultsOf, InstallSize, Layout, PageBitmap, PostcopyMemory, Region};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::guest::ended;
use support::network::Network;
use support::*;

/// Memory of two regions that waits for its pages, if this system lets us have it.
fn memory() -> Option<PostcopyMemory> {
    let region = |bytes| Region { bytes, install_size: InstallSize::KIB_4 };
    let regions = vec![region(workload::FIRST_BYTES), region(workload::BYTES - workload::FIRST_BYTES)];
    let layout = Layout::new(regions).unwrap();
    let memory = PostcopyMemory::new(layout.clone(), Backing::Private).unwrap();
    let armed = memory.arm(&PageBitmap::full(layout.pages()), FaultsOf::Programs);
    armed.map_err(|error| println!("SKIPPED: a guest in a hypervisor's memory: {error}")).ok()?;
    Some(memory)
}

/// The hypervisor: started by `--on-start`, it hands its memory over and runs the guest in it.
#[test]
#[ignore = "a process of its own, which the other tests have started"]
fn hypervisor() {
    let (Some(socket), Some(memory)) = (std::env::var_os("PAGEWIRE_SOCKET").map(PathBuf::from), memory()) else {
        return;
    };
    let dir = socket.parent().unwrap();
    // Somebody else was here first, and said something else.
    let mut other = UnixStream::connect(&socket).unwrap();
    other.write_all(b"[]").unwrap();
    assert_eq!(other.read(&mut [0]).unwrap_or(0), 0, "it is dropped");
    let table = memory.table();
    let mut offset = 0;
    let mut regions: Vec<Value> = Vec::new();
    for region in &table {
        regions.push(json!({
            "base_host_virt_addr": region.address, "size": region.bytes, "offset": offset,
            "page_size": region.page_bytes, "page_size_kib": region.page_bytes,
        }));
        offset += region.bytes;
    }
    regions.reverse();
    let message = Value::from(regions).to_string();
    let (stream, uffd) = (UnixStream::connect(&socket).unwrap(), memory.duplicate().unwrap());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [uffd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&stream, &[IoSlice::new(message.as_bytes())], &mut control, SendFlags::empty()).unwrap();
    fs::write(dir.join("runs"), "").unwrap();
    let said = workload::run(&memory).map_or_else(|error| error, |()| "right".to_owned());
    fs::write(dir.join("said.new"), said).unwrap();
    fs::rename(dir.join("said.new"), dir.join("said")).unwrap();
    // It runs on until the test is over, whose folder goes with it.
    let begin = Instant::now();
    while dir.exists() && begin.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Two hosts, and a network between them.
struct Scene {
    dir: tempfile::TempDir,
    receiver: Child,
    direct: String,
    network: Network,
}

impl Scene {
    fn set(bytes_a_second: u64) -> Option<Self> {
        memory()?;
        Some(Self::in_dir(tempfile::tempdir().unwrap(), bytes_a_second, &[]))
    }

    fn in_dir(dir: tempfile::TempDir, bytes_a_second: u64, more: &[&str]) -> Self {
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("there")).unwrap();
        fs::write(at("ram"), workload::image()).unwrap();
        let direct = format!("unix:{}", at("socket").display());
        let exe = std::env::current_exe().unwrap();
        let on_start =
            format!("'{}' hypervisor --exact --ignored > {} 2>&1 &", exe.display(), at("hypervisor").display());
        let receiver = command(&["receive", "--listen", &direct, "--on-start", &on_start, "--report"])
            .arg(at("received"))
            .arg("--into-uffd")
            .arg(at("there"))
            .arg("--journal")
            .arg(at("journal-there"))
            .args(more)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("the receiver listens", || at("socket").exists());
        let network = Network::to(&direct, &at("network"), bytes_a_second);
        Self { dir, receiver, direct, network }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn send(&self, args: &[&str]) -> Command {
        let mut command = command(&["send", "--live", "--no-compress", "--name", "vm", "--on-pause", "true"]);
        command.arg(self.path("ram")).args(["--to", &self.network.address]).arg("--report").arg(self.path("sent"));
        command.arg("--journal").arg(self.path("journal-here")).args(args);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn resume(&self) -> std::process::Output {
        self.resume_at(&self.direct, &[]).output().unwrap()
    }

    fn resume_at(&self, to: &str, more: &[&str]) -> Command {
        let mut command = command(&["resume", "--name", "vm", "--to", to]);
        command.arg(self.path("ram")).arg("--journal").arg(self.path("journal-here"));
        command.arg("--report").arg(self.path("resumed")).args(more);
        command
    }

    fn report(&self, name: &str) -> Value {
        support::json(&self.path(name))
    }

    /// What the receiver says, once it says that; it writes a report for each session.
    fn received(&self, says: impl Fn(&Value) -> bool) -> Value {
        let read = || fs::read(self.path("received")).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let mut received = None;
        wait_until("the receiver reports the end", || {
            received = read().filter(&says);
            received.is_some()
        });
        received.unwrap()
    }

    fn wait_until_it_runs(&self) {
        wait_until("the hypervisor has handed its memory over", || self.path("there/runs").exists());
    }

    /// The workload has come to the right answer.
    fn is_right(&self) {
        let (said, begin) = (self.path("there/said"), Instant::now());
        while !said.exists() {
            let log = fs::read_to_string(self.path("hypervisor")).unwrap_or_default();
            assert!(begin.elapsed() < Duration::from_secs(60), "the guest does not come to an end: {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(fs::read_to_string(said).unwrap(), "right");
    }

    fn whereabouts(&self, journal: &str) -> String {
        let journal = self.path(journal);
        let output = pagewire(&["status", "--json", "--journal", journal.to_str().unwrap()]);
        let guest: Value = serde_json::from_slice(&output.stdout).unwrap();
        guest["whereabouts"].as_str().unwrap().to_owned()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.receiver.kill();
        let _ = self.receiver.wait();
    }
}

#[test]
fn a_workload_in_served_memory_comes_to_the_right_answer_though_the_network_is_cut_six_times() {
    let Some(scene) = Scene::set(2 << 20) else { return };
    let sender = scene.send(&["--post-copy", "now"]).spawn().unwrap();
    scene.wait_until_it_runs();
    for cut in 1..=6 {
        std::thread::sleep(Duration::from_millis(300));
        assert!(!scene.path("there/said").exists(), "it is not done before cut {cut}");
        scene.network.cut();
    }
    let (code, said) = ended(sender);
    assert_eq!(code, Some(0), "{said}");
    scene.is_right();
    let sent = scene.report("sent");
    let faults = &sent["faults"];
    assert!(faults["sessions"].as_u64().unwrap() >= 7 && faults["lacking"] == 0, "{faults}");
    assert!(faults["remote"].as_u64().unwrap() > 100, "pages were touched before they came: {faults}");
    assert!(sent["downtime_seconds"].as_f64().unwrap() > 0.0 && sent["guest_at"] == "receiver", "{sent}");
    wait_until("the receiver knows it", || scene.whereabouts("journal-there") == "here");
    let received = scene.received(|report| {
        report["outcome"] == "done" && report["faults"]["count"] != 0 && report["faults"]["lacking"] == 0
    });
    assert!(received["name"] == "vm" && received["bytes_total"] == workload::BYTES, "{received}");
    assert!(received["wire"]["received_bytes"].as_u64().unwrap() > 0, "{received}");
    let faults = &received["faults"];
    assert!(
        faults["count"].as_u64().unwrap() > 100 && faults["p99_us"].as_f64() >= faults["p50_us"].as_f64(),
        "{faults}"
    );
    assert!(faults["threads"].as_array().is_some_and(|threads| !threads.is_empty()), "{faults}");
    assert_eq!(scene.whereabouts("journal-here"), "there");
}

#[test]
fn another_process_brings_the_rest_when_a_sender_has_given_up_or_was_killed() {
    let Some(scene) = Scene::set(1 << 20) else { return };
    let sender = scene.send(&["--post-copy", "now", "--patience", "1"]).spawn().unwrap();
    scene.wait_until_it_runs();
    std::thread::sleep(Duration::from_millis(300));
    scene.network.end();
    let (code, said) = ended(sender);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("pagewire resume") && said.contains("lacks"), "{said}");
    let report = scene.report("sent");
    assert!(report["guest_at"] == "receiver" && report["faults"]["lacking"].as_u64().unwrap() > 0, "{report}");
    assert!(!scene.path("there/said").exists(), "it waits for pages");
    // One that is killed at once, by the network that is slow no more, and one that comes to the end.
    let mut killed = command(&["resume", "--name", "vm", "--bandwidth-limit", "1MB", "--to", &scene.direct]);
    let killed = killed.arg(scene.path("ram")).arg("--journal").arg(scene.path("journal-here"));
    let mut killed = killed.stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(700));
    killed.kill().unwrap();
    killed.wait().unwrap();
    let output = scene.resume();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    scene.is_right();
    assert_eq!(scene.report("resumed")["faults"]["lacking"], 0);
    assert_eq!(scene.whereabouts("journal-here"), "there");
    // Once more: there is nothing to do, and that is no failure.
    let output = scene.resume();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("nothing was sent"), "{}", text(&output.stderr));
}

#[test]
fn a_guest_that_has_all_and_cannot_be_recorded_as_gone_ends_with_5_until_it_can() {
    let Some(scene) = Scene::set(4 << 20) else { return };
    let journal = scene.path("journal-here");
    fs::create_dir(&journal).unwrap();
    let Some(mounted) = Mounted::tmpfs(&journal, "size=4m,mode=700") else { return };
    let sender = scene.send(&["--post-copy", "now"]).spawn().unwrap();
    scene.wait_until_it_runs();
    mounted.remount("remount,ro");
    let (code, said) = ended(sender);
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("has all of it") && said.contains("pagewire resume"), "{said}");
    scene.is_right();
    let report = scene.report("sent");
    assert!(report["guest_at"] == "receiver" && report["faults"]["lacking"] == 0, "{report}");
    mounted.remount("remount,rw");
    let output = scene.resume();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(scene.whereabouts("journal-here"), "there");
    wait_until("the receiver knows it", || scene.whereabouts("journal-there") == "here");
    let sent = scene.report("resumed")["wire"]["sent_bytes"].as_u64().unwrap();
    assert!(sent < 64 << 10, "nothing is sent again: {sent} bytes");
}

#[test]
fn a_guest_in_post_copy_is_refused_where_it_cannot_come_so_and_runs_on() {
    let Some(scene) = Scene::set(100 << 20) else { return };
    // Nothing can be stored before the memory is handed over.
    let (code, said) = ended(scene.send(&["--post-copy", "auto", "--on-resume", "true"]).spawn().unwrap());
    assert!(code == Some(1) && said.contains("--post-copy now"), "{said}");
    let (code, said) = ended(scene.send(&["--on-resume", "true"]).spawn().unwrap());
    assert!(code == Some(1) && said.contains("--live --post-copy now"), "{said}");
    let (code, said) = ended(scene.send(&["--post-copy", "never", "--at-limit", "post-copy"]).spawn().unwrap());
    assert!(code == Some(2) && said.contains("exclude"), "{said}");
    let ram = scene.path("ram");
    let said = fails(1, &["send", ram.to_str().unwrap(), "--to", &scene.direct, "--name", "vm"]);
    assert!(said.contains("--live --post-copy now"), "{said}");
    assert!(!scene.path("there/vm.sock").exists(), "nobody is waited for");
    // Nobody has sent this one.
    let output = scene.resume();
    assert!(output.status.code() == Some(1) && text(&output.stderr).contains("nothing is to be brought"));
    // A receiver whose guests land in files.
    let (dir, journal) = (scene.path("files"), scene.path("journal-files"));
    fs::create_dir(&dir).unwrap();
    let files = Receiver::start(&dir, &["--leave-paused", "--journal", journal.to_str().unwrap()]);
    let output = command(&["send", "--live", "--post-copy", "now", "--on-pause", "true", "--name", "vm"])
        .arg(&ram)
        .args(["--to", &files.address, "--journal"])
        .arg(scene.path("journal-here"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot run a guest before all of its memory is there"));
}

/// Two hosts with stores: the guest was there, left, and goes back as the workload wants it, a twentieth of it changed.
fn been_there(bytes_a_second: u64) -> Option<Scene> {
    memory()?;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let mut earlier = workload::image();
    earlier.chunks_mut(PAGE).step_by(20).for_each(|page| page.copy_from_slice(&noise(page[8].into(), page.len())));
    fs::write(at("earlier"), earlier).unwrap();
    fs::create_dir(at("here")).unwrap();
    let kept = ["--store", &at("kept-here"), "--once"];
    let mut home = Receiver::start(dir.path().join("here").as_path(), &kept);
    let left = report(&["send", &at("earlier"), "--to", &home.address, "--name", "vm", "--store", &at("kept-there")]);
    assert_eq!(left["outcome"], "done", "{left}");
    assert!(home.process.0.wait().unwrap().success());
    let kept = at("kept-there");
    Some(Scene::in_dir(dir, bytes_a_second, &["--store", &kept]))
}

impl Scene {
    /// What the receiver says when the guest has all.
    fn filled(&self) -> Value {
        self.received(|report| report["outcome"] == "done" && report["faults"]["local"] != 0)
    }

    /// Kinds of files that a store has.
    fn kept(&self, store: &str) -> Vec<String> {
        let domains = fs::read_dir(self.path(store).join("domains")).unwrap();
        let files = domains.flat_map(|domain| fs::read_dir(domain.unwrap().path()).unwrap());
        let kind = |path: PathBuf| path.extension().unwrap().to_str().unwrap().to_owned();
        let mut kinds: Vec<String> = files.map(|file| kind(file.unwrap().path())).collect();
        kinds.sort();
        kinds
    }
}

#[test]
fn what_the_receivers_store_has_does_not_travel_though_the_network_is_cut() {
    let Some(scene) = been_there(200 << 10) else { return };
    let store = scene.path("kept-here").display().to_string();
    let sender = scene.send(&["--post-copy", "now", "--store", &store]).spawn().unwrap();
    scene.wait_until_it_runs();
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(300));
        scene.network.cut();
    }
    let (code, said) = ended(sender);
    assert_eq!(code, Some(0), "{said}");
    scene.is_right();
    let (sent, received) = (scene.report("sent"), scene.filled());
    let (pages, local) = (workload::BYTES / PAGE as u64, received["faults"]["local"].as_u64().unwrap());
    assert!(sent["faults"]["sessions"].as_u64().unwrap() >= 2, "{sent}");
    assert!(local > pages / 2, "most pages are here: {received}");
    assert!(sent["wire"]["sent_bytes"].as_u64().unwrap() < workload::BYTES / 3, "{sent}");
    // The visit with its pages, and what came now with what was touched first.
    wait_until("the receiver keeps what came", || {
        scene.kept("kept-there") == ["img", "manifest", "manifest", "touches"]
    });
    assert_eq!(scene.kept("kept-here"), ["img", "manifest"], "the sender has what left");
    let verified = pagewire(&["store", "verify", "--store", scene.path("kept-there").to_str().unwrap()]);
    assert!(verified.status.success(), "{}", text(&verified.stdout));
}

/// More than what is said before pages go.
const SOME_BYTES: u64 = 16 << 10;

/// The process that sends may be gone, and its store, too: the key of the session is where its record is.
#[test]
fn a_sender_that_was_killed_needs_no_store_to_go_on() {
    let Some(scene) = been_there(30 << 10) else { return };
    let store = scene.path("kept-here").display().to_string();
    let mut sender = scene.send(&["--post-copy", "now", "--store", &store]).spawn().unwrap();
    scene.wait_until_it_runs();
    std::thread::sleep(Duration::from_millis(400));
    sender.kill().unwrap();
    sender.wait().unwrap();
    fs::remove_dir_all(&store).unwrap();
    assert!(!scene.path("there/said").exists(), "it waits for pages");
    // One that cannot be used is no reason to leave the guest alone.
    fs::write(&store, "").unwrap();
    let mut stopped = scene.resume_at(&scene.network.address, &["--store", &store, "--json"]);
    let mut stopped = Running(stopped.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut events = BufReader::new(stopped.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let goes =
        |event: String| serde_json::from_str::<Value>(&event).unwrap()["sent_bytes"].as_u64() >= Some(SOME_BYTES);
    assert!(events.any(goes), "pages go: {}", stopped.end().1);
    stopped.signal("-INT");
    events.for_each(drop);
    let (status, said) = stopped.end();
    assert!(status.code() == Some(4) && said.contains("the store is not used"), "{status}: {said}");
    let resumed = scene.report("resumed");
    let warned = resumed["warnings"].as_array().unwrap().iter().any(|warning| {
        let warning = warning.as_str().unwrap();
        warning.starts_with("the store is not used") && warning.contains(&store)
    });
    assert!(warned && resumed["wire"]["sent_bytes"].as_u64() >= Some(SOME_BYTES), "{resumed}");
    fs::remove_file(&store).unwrap();
    let output = scene.resume_at(&scene.direct, &["--store", &store]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    scene.is_right();
    let received = scene.filled();
    assert!(received["faults"]["local"].as_u64().unwrap() > workload::BYTES / PAGE as u64 / 2, "{received}");
    assert!(scene.report("resumed")["wire"]["sent_bytes"].as_u64().unwrap() < workload::BYTES / 3);
    assert_eq!(scene.kept("kept-here"), ["img", "manifest"], "what left is kept by who came to the end");
}

#[test]
fn a_key_that_is_damaged_is_named_and_the_guest_waits_for_it() {
    let Some(scene) = been_there(30 << 10) else { return };
    let store = scene.path("kept-here").display().to_string();
    let mut sender = scene.send(&["--post-copy", "now", "--store", &store]).spawn().unwrap();
    scene.wait_until_it_runs();
    sender.kill().unwrap();
    sender.wait().unwrap();
    let guest = fs::read_dir(scene.path("journal-here")).unwrap().map(|entry| entry.unwrap().path());
    let key = guest.filter(|path| path.is_dir()).map(|dir| dir.join("key")).find(|key| key.exists()).unwrap();
    let whole = fs::read(&key).unwrap();
    fs::write(&key, &whole[..whole.len() - 1]).unwrap();
    let output = scene.resume();
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(4) && said.contains("/key") && said.contains("damaged"), "{said}");
    fs::write(&key, &whole).unwrap();
    assert_eq!(scene.resume().status.code(), Some(0));
    scene.is_right();
    assert!(!key.exists(), "nobody needs it any more");
}
