//! Stores on both sides, as a user runs them: guests that come back, and everything that can be wrong with what was
//! kept.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::store::{Store, StoreOptions};
use serde_json::Value;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use support::*;

const MIB: usize = 1 << 20;
/// Of the images here, 8 MiB, unless a test says otherwise.
const PAGES: u64 = 2048;
const VM: &str = "vm";

/// A folder with images and a store.
struct Host(tempfile::TempDir);

/// What both sides reported, and everything they printed.
struct Moved {
    sent: Value,
    received: Value,
    said: String,
}

impl Moved {
    fn wire(&self) -> u64 {
        count(&self.sent, "/wire/sent_bytes") + count(&self.sent, "/wire/received_bytes")
    }
}

fn count(report: &Value, pointer: &str) -> u64 {
    report.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer} in {report}"))
}

fn warnings(report: &Value) -> Vec<&str> {
    report["warnings"].as_array().map_or(Vec::new(), |all| all.iter().filter_map(Value::as_str).collect())
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("images")).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn image(&self, name: &str) -> PathBuf {
        self.0.path().join("images").join(name)
    }

    /// The visits, as `pagewire store list --json` tells them.
    fn visits(&self) -> Vec<Value> {
        let output = pagewire(&["store", "list", "--json", "--store", &self.path("store")]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The name, kind and pages of each visit.
    fn kept(&self) -> Vec<(String, String, bool)> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let told = |visit: &Value| (text(&visit["name"]), text(&visit["kind"]), visit["pages_kept"] == true);
        self.visits().iter().map(told).collect()
    }

    /// A file of its only visit.
    fn file(&self, suffix: &str) -> PathBuf {
        let visits = self.visits();
        let [visit] = visits.as_slice() else { panic!("{visits:?}") };
        let (domain, id) = (visit["domain"].as_str().unwrap(), visit["id"].as_str().unwrap());
        self.0.path().join(format!("store/domains/{domain}/{id}.{suffix}"))
    }

    fn receive(&self, more: &[&str]) -> Listening {
        let files = tempfile::tempdir().unwrap();
        let (said, report) = (files.path().join("said"), files.path().join("report"));
        let (images, store) = (self.path("images"), self.path("store"));
        let mut args = vec!["receive", "--listen", "tcp://127.0.0.1:0", "--once", "--into", &images];
        args.extend(["--store", &store, "--report", report.to_str().unwrap()]);
        args.extend(more);
        let log = File::create(&said).unwrap();
        let process = command(&args).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let process = Running(process);
        let mut address = None;
        wait_until("it listens", || {
            let said = fs::read_to_string(&said).unwrap();
            address = said.split_once('\n').and_then(|(line, _)| Some(line.strip_prefix("listening on ")?.to_owned()));
            address.is_some()
        });
        Listening { process, address: address.unwrap(), files }
    }

    fn send(&self, name: &str, to: &str, more: &[&str]) -> (Value, String) {
        let (image, store) = (self.image(name), self.path("store"));
        let report = tempfile::NamedTempFile::new().unwrap();
        let mut args = vec!["send", image.to_str().unwrap(), "--to", to, "--name", name, "--store", &store];
        args.extend(["--report", report.path().to_str().unwrap()]);
        args.extend(more);
        let output = pagewire(&args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        let sent = json(report.path());
        (sent, text(&output.stdout) + &text(&output.stderr))
    }
}

/// A receiver of one session.
struct Listening {
    process: Running,
    address: String,
    files: tempfile::TempDir,
}

impl Listening {
    /// Its report when it has ended, and has kept what it keeps; and what it said.
    fn end(mut self) -> (Value, String) {
        self.process.0.wait().unwrap();
        let said = fs::read_to_string(self.files.path().join("said")).unwrap();
        (json(&self.files.path().join("report")), said)
    }
}

/// Moves a guest: its image is at `to` alone then, and the same.
fn moves(from: &Host, to: &Host, name: &str, sender: &[&str], receiver: &[&str]) -> Moved {
    let before = fs::read(from.image(name)).unwrap();
    let receiver = to.receive(receiver);
    let (sent, said) = from.send(name, &receiver.address, sender);
    let (received, also) = receiver.end();
    assert!(fs::read(to.image(name)).unwrap() == before, "the image arrived as it was");
    fs::remove_file(from.image(name)).unwrap();
    Moved { sent, received, said: said + &also }
}

/// Two hosts, and a guest that has moved from the first to the second.
fn moved_there(sender: &[&str], receiver: &[&str]) -> (Host, Host) {
    let (a, b) = (Host::new(), Host::new());
    fs::write(a.image(VM), noise(1, 8 * MIB)).unwrap();
    let there = moves(&a, &b, VM, sender, receiver);
    assert_eq!(count(&there.sent, "/pages/inline"), PAGES);
    (a, b)
}

/// A guest writes new bytes to these pages.
fn rewrite(image: &Path, pages: impl Iterator<Item = u64>) {
    let file = File::options().write(true).open(image).unwrap();
    for page in pages {
        file.write_all_at(&noise(page + 1_000_000, PAGE), page * PAGE as u64).unwrap();
    }
}

fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[!byte[0]], offset).unwrap();
}

#[test]
fn a_guest_that_comes_back_sends_only_what_changed() {
    let (a, b) = moved_there(&[], &[]);
    rewrite(&b.image(VM), (0..PAGES).step_by(100));
    let changed = PAGES.div_ceil(100);
    let back = moves(&b, &a, VM, &[], &[]);
    assert_eq!(count(&back.sent, "/pages/inline"), changed);
    assert_eq!(count(&back.sent, "/pages/base"), PAGES - changed);
    let most = PAGES * PAGE as u64 * 15 / 1000;
    assert!(back.wire() < most, "1 % changed, {} of at most {most} bytes travelled", back.wire());
    assert_eq!(count(&back.received, "/reuse/damaged") + count(&back.received, "/reuse/unverified"), 0);
    assert!(warnings(&back.sent).is_empty() && warnings(&back.received).is_empty());
    // And on and on: each host knows what it had last.
    for (round, (from, to)) in [(&a, &b), (&b, &a), (&a, &b)].into_iter().enumerate() {
        rewrite(&from.image(VM), [7, 700 + round as u64].into_iter());
        let again = moves(from, to, VM, &[], &[]);
        assert!(count(&again.sent, "/pages/inline") <= changed + 2, "{}", again.sent);
    }
}

#[test]
fn without_changes_next_to_nothing_travels() {
    let (a, b) = moved_there(&[], &[]);
    let back = moves(&b, &a, VM, &[], &[]);
    assert_eq!(count(&back.sent, "/pages/base"), PAGES);
    assert!(back.wire() < 4096, "{} bytes", back.wire());
}

#[test]
fn keeps_what_it_is_told_to() {
    let departed = |pages| vec![(VM.to_owned(), "departed".to_owned(), pages)];
    let arrived = |pages| vec![(VM.to_owned(), "arrived".to_owned(), pages)];
    for (keep, there, here) in [
        (&[][..], departed(true), arrived(false)),
        (&["--keep", "none"], vec![], vec![]),
        (&["--keep", "manifest"], departed(false), arrived(false)),
        (&["--keep", "visit"], departed(true), arrived(true)),
    ] {
        let (a, b) = moved_there(keep, keep);
        assert_eq!((a.kept(), b.kept()), (there, here), "{keep:?}");
        let back = moves(&b, &a, VM, &[], &[]);
        let reused = count(&back.sent, "/pages/base");
        let expected = if keep.is_empty() || keep.contains(&"visit") { PAGES } else { 0 };
        assert_eq!(reused, expected, "{keep:?}: a manifest alone is no base");
    }
    let said = fails(2, &["send", "x", "--to", "127.0.0.1:1", "--name", "vm", "--keep", "visit"]);
    assert!(said.contains("--store"), "{said}");
}

#[test]
fn a_newer_visit_supersedes_the_older_ones() {
    let (a, b) = moved_there(&[], &[]);
    moves(&b, &a, VM, &[], &[]);
    rewrite(&a.image(VM), [5].into_iter());
    moves(&a, &b, VM, &[], &[]);
    assert_eq!(a.kept(), [(VM.to_owned(), "departed".to_owned(), true)]);
}

#[test]
fn where_the_arrival_was_kept_pages_travel_as_what_differs() {
    let (a, b) = moved_there(&[], &["--keep", "visit"]);
    (0..PAGES).step_by(10).for_each(|page| flip(&b.image(VM), page * PAGE as u64 + 100));
    let back = moves(&b, &a, VM, &[], &[]);
    let changed = PAGES.div_ceil(10);
    assert_eq!(count(&back.sent, "/pages/delta"), changed, "{}", back.sent);
    assert!(back.wire() < changed * 100, "{} bytes", back.wire());
}

#[test]
fn trusted_pages_are_counted_as_unverified() {
    for (trust, unverified) in [(&["--inplace", "--trust-store"][..], PAGES - 1), (&["--inplace"], 0)] {
        let (a, b) = moved_there(&[], &[]);
        rewrite(&b.image(VM), [3].into_iter());
        let back = moves(&b, &a, VM, &[], trust);
        assert_eq!(count(&back.received, "/reuse/unverified"), unverified, "{trust:?}");
        assert_eq!(back.said.contains("taken on trust"), unverified > 0, "{}", back.said);
    }
    // Not in place they are read where the file system cannot clone, and then they are verified, too.
    let (a, b) = moved_there(&[], &[]);
    let back = moves(&b, &a, VM, &[], &["--trust-store"]);
    let unverified = count(&back.received, "/reuse/unverified");
    assert!([0, PAGES].contains(&unverified), "{}", back.received);
    let said = fails(2, &["receive", "--listen", "127.0.0.1:0", "--into", "/tmp", "--trust-store"]);
    assert!(said.contains("--store"), "{said}");
}

#[test]
fn damaged_pages_are_repaired_and_counted() {
    for inplace in [&[][..], &["--inplace"]] {
        for changed in [0, 1, PAGES / 2] {
            let (a, b) = moved_there(&[], &[]);
            [9, 10, 1500].iter().for_each(|page| flip(&a.file("img"), page * PAGE as u64 + 77));
            // The damaged ones are not among them.
            rewrite(&b.image(VM), 20..20 + changed);
            let back = moves(&b, &a, VM, &[], inplace);
            assert_eq!(count(&back.received, "/reuse/damaged"), 3, "{inplace:?}, {changed} changed: {}", back.received);
            assert_eq!(count(&back.sent, "/pages/inline"), changed + 3);
        }
    }
}

#[test]
fn a_damaged_manifest_is_a_miss() {
    let truncate = |path: &Path| File::options().write(true).open(path).unwrap().set_len(5000).unwrap();
    let empty = |path: &Path| fs::write(path, b"").unwrap();
    let garbage = |path: &Path| fs::write(path, noise(3, 70_000)).unwrap();
    let header = |path: &Path| flip(path, 40);
    let digests = |path: &Path| flip(path, path.metadata().unwrap().len() - 100);
    type Harm<'a> = (&'a str, &'a dyn Fn(&Path));
    let harms: [Harm<'_>; 5] =
        [("cut", &truncate), ("empty", &empty), ("garbage", &garbage), ("header", &header), ("digests", &digests)];
    for (what, harm) in harms {
        for at_sender in [false, true] {
            let (a, b) = moved_there(&[], &[]);
            harm(&if at_sender { &b } else { &a }.file("manifest"));
            let back = moves(&b, &a, VM, &[], &[]);
            assert_eq!(back.sent["outcome"], "done");
            let reused = count(&back.sent, "/pages/base");
            assert_eq!(reused, 0, "{what}, at the sender: {at_sender}: {}", back.sent);
            if !at_sender {
                // What is left of it does no harm to the visits that follow. A sender began a new lineage.
                let again = moves(&a, &b, VM, &[], &[]);
                assert_eq!(count(&again.sent, "/pages/base"), PAGES, "{what}: {}", again.sent);
            }
        }
    }
}

#[test]
fn rejects_a_store_that_others_can_read_with_code_2() {
    let host = Host::new();
    fs::write(host.image(VM), noise(1, PAGE)).unwrap();
    let (image, store) = (host.image(VM), host.path("store"));
    fs::create_dir(&store).unwrap();
    fs::set_permissions(&store, Permissions::from_mode(0o755)).unwrap();
    let send = ["send", image.to_str().unwrap(), "--to", "127.0.0.1:1", "--name", VM, "--store", &store];
    let images = host.path("images");
    let receive = ["receive", "--listen", "127.0.0.1:0", "--into", &images, "--store", &store];
    for args in [&send[..], &receive] {
        let said = fails(2, args);
        assert!(said.contains("chmod 700") && said.contains(&store), "{said}");
    }
    fs::remove_dir(&store).unwrap();
    fs::write(&store, b"a file").unwrap();
    for args in [&send[..], &receive] {
        let said = fails(2, args);
        assert!(said.contains(&store), "{said}");
    }
}

#[test]
fn rejects_a_store_on_a_read_only_file_system() {
    let host = Host::new();
    fs::create_dir(host.path("store")).unwrap();
    let Some(mounted) = Mounted::tmpfs(Path::new(&host.path("store")), "size=1m,mode=700") else { return };
    mounted.remount("remount,ro");
    fs::write(host.image(VM), noise(1, PAGE)).unwrap();
    let (image, store) = (host.image(VM), host.path("store"));
    let said = fails(2, &["send", image.to_str().unwrap(), "--to", "127.0.0.1:1", "--name", VM, "--store", &store]);
    assert!(said.contains("Read-only file system") && said.contains(&store), "{said}");
}

#[test]
fn a_store_without_room_is_a_warning_and_keeps_nothing() {
    let (a, b) = (Host::new(), Host::new());
    fs::create_dir(a.path("store")).unwrap();
    let Some(_mounted) = Mounted::tmpfs(Path::new(&a.path("store")), "size=4m,mode=700") else { return };
    fs::write(a.image(VM), noise(1, 8 * MIB)).unwrap();
    let there = moves(&a, &b, VM, &[], &[]);
    let told = warnings(&there.sent);
    assert!(told.len() == 1 && told[0].contains("No space left"), "{told:?}");
    assert_eq!((a.kept(), files(Path::new(&a.path("store"))).len()), (vec![], 1), "but for the lock");
}

/// The store's own folder is replaced under running processes.
#[test]
fn a_store_that_breaks_on_the_way_is_one_warning_and_the_guest_moves() {
    let ruin = |host: &Host| {
        fs::remove_dir_all(host.path("store/domains")).unwrap();
        fs::write(host.path("store/domains"), b"no folder").unwrap();
    };
    let (a, b) = moved_there(&[], &[]);
    let receiver = a.receive(&[]);
    ruin(&a);
    let (sent, _) = b.send(VM, &receiver.address, &[]);
    let (received, said) = receiver.end();
    assert!(fs::read(a.image(VM)).unwrap() == fs::read(b.image(VM)).unwrap());
    assert_eq!((&sent["outcome"], warnings(&sent).len()), (&"done".into(), 0), "{sent}");
    assert_eq!((&received["outcome"], warnings(&received).len()), (&"done".into(), 1), "{received}");
    assert!(warnings(&received)[0].contains("not kept"), "{received}");
    assert_eq!(said.matches("warning").count(), 1, "{said}");

    let (a, b) = moved_there(&[], &[]);
    rewrite(&b.image(VM), 0..PAGES);
    let receiver = a.receive(&[]);
    let (image, store) = (b.image(VM), b.path("store"));
    let mut args = vec!["send", image.to_str().unwrap(), "--to", &receiver.address, "--name", VM];
    args.extend(["--store", &store, "--bandwidth-limit", "8MB"]);
    let sender = Running::start(&args);
    wait_until("it has begun", || a.image(".pagewire/vm.partial").exists());
    ruin(&b);
    let (status, said) = sender.end();
    receiver.end();
    assert!(status.success() && said.matches("warning").count() == 1, "{said}");
    assert!(fs::read(a.image(VM)).unwrap() == fs::read(b.image(VM)).unwrap());
}

/// Whoever opens a visit holds the store's lock.
#[test]
fn a_visit_that_cannot_be_opened_is_a_warning_and_the_guest_moves() {
    for (domain, told) in
        [(&[][..], &["a visit is not used"][..]), (&["--domain", "shop"], &["pages of other", "a visit"])]
    {
        let (a, b) = moved_there(domain, domain);
        let receiver = a.receive(&[&["--keep", "none"], domain].concat());
        fs::remove_file(a.path("store/lock")).unwrap();
        fs::create_dir(a.path("store/lock")).unwrap();
        let (sent, _) = b.send(VM, &receiver.address, domain);
        let (received, _) = receiver.end();
        assert_eq!((&received["outcome"], count(&sent, "/pages/inline")), (&"done".into(), PAGES), "{received}");
        let warnings = warnings(&received);
        assert_eq!(warnings.len(), told.len(), "{warnings:?}");
        for (warning, what) in warnings.iter().zip(told) {
            assert!(warning.starts_with(what) && warning.contains("lock file of a store"), "{warning}");
        }
    }
}

#[test]
fn a_named_domain_finds_pages_of_other_guests_and_nothing_else_does() {
    let other = [noise(1, 4 * MIB), noise(50, 4 * MIB)].concat();
    let named = &["--domain", "shop"][..];
    let cases = [
        (named, named, named, PAGES / 2),
        (named, named, &[][..], 0),
        (named, &[], named, 0),
        (&[], named, named, 0),
        (named, &["--domain", "bank"], named, 0),
        (&[], &[], &[], 0),
    ];
    for (first, sender, receiver, found) in cases {
        let (a, b) = moved_there(first, first);
        fs::write(b.image("other"), &other).unwrap();
        let moved = moves(&b, &a, "other", sender, receiver);
        let others = count(&moved.received, "/reuse/others");
        assert_eq!(others, found, "{first:?} {sender:?} {receiver:?}: {}", moved.received);
        assert_eq!(count(&moved.sent, "/pages/inline"), PAGES - found, "{first:?} {sender:?} {receiver:?}");
    }
}

#[test]
fn guests_of_one_name_and_two_lineages_do_not_mix() {
    let (a, b) = moved_there(&[], &[]);
    let c = Host::new();
    // The same memory but for one page: only the lineage tells the two apart.
    let stranger = fs::read(b.image(VM)).unwrap();
    fs::write(c.image(VM), &stranger).unwrap();
    rewrite(&c.image(VM), [1].into_iter());
    let came = moves(&c, &a, VM, &[], &[]);
    assert_eq!(count(&came.sent, "/pages/inline"), PAGES, "a stranger finds nothing of the guest that was here");
    fs::remove_file(a.image(VM)).unwrap();
    rewrite(&b.image(VM), [2].into_iter());
    let back = moves(&b, &a, VM, &[], &[]);
    assert_eq!((count(&back.sent, "/pages/inline"), count(&back.sent, "/pages/base")), (1, PAGES - 1));
    let mut lineages: Vec<Value> = a.visits().iter().map(|visit| visit["lineage"].clone()).collect();
    lineages.dedup();
    assert_eq!(lineages.len(), 2, "both are kept, each as its own");
}

#[test]
fn in_place_the_visit_becomes_the_image() {
    let (a, b) = moved_there(&[], &[]);
    let (kept, visit) = (a.file("img").metadata().unwrap(), a.file("manifest"));
    rewrite(&b.image(VM), [2, 1000].into_iter());
    let back = moves(&b, &a, VM, &[], &["--inplace"]);
    assert_eq!(count(&back.sent, "/pages/base"), PAGES - 2);
    assert_eq!(a.image(VM).metadata().unwrap().ino(), kept.ino(), "nothing was copied");
    assert!(!visit.exists());
    assert_eq!(a.kept(), [(VM.to_owned(), "arrived".to_owned(), false)]);
    let (a, b) = moved_there(&[], &[]);
    let visit = a.file("manifest");
    moves(&b, &a, VM, &[], &["--keep", "none"]);
    assert!(visit.exists(), "otherwise the visit stays");
}

#[test]
fn an_image_that_grew_or_shrank_builds_on_its_visit() {
    let bytes = PAGES * PAGE as u64;
    for len in [bytes + 3 * MIB as u64, bytes + 5, bytes - MIB as u64 - 1234] {
        for inplace in [&[][..], &["--inplace"]] {
            let (a, b) = moved_there(&[], &[]);
            let file = File::options().write(true).open(b.image(VM)).unwrap();
            file.set_len(len).unwrap();
            file.write_all_at(&noise(9, 5), len - 5).unwrap();
            drop(file);
            let back = moves(&b, &a, VM, &[], inplace);
            let inline = count(&back.sent, "/pages/inline");
            assert!((1..=2).contains(&inline), "{len} {inplace:?}: {}", back.sent);
            assert!(back.wire() < 64 * 1024, "{len} {inplace:?}: {} bytes", back.wire());
        }
    }
}

#[test]
fn a_name_of_64_characters_is_as_good() {
    let name = "n".repeat(64);
    for inplace in [&[][..], &["--inplace"]] {
        let (a, b) = (Host::new(), Host::new());
        fs::write(a.image(&name), noise(4, MIB)).unwrap();
        moves(&a, &b, &name, &[], &[]);
        rewrite(&b.image(&name), [2].into_iter());
        let back = moves(&b, &a, &name, &[], inplace);
        assert_eq!((count(&back.sent, "/pages/inline"), count(&back.sent, "/pages/base")), (1, 255));
        assert_eq!(a.visits()[0]["name"], name.as_str());
    }
}

#[test]
fn a_return_that_was_killed_resumes() {
    for inplace in [&[][..], &["--inplace"]] {
        let (a, b) = moved_there(&[], &[]);
        rewrite(&b.image(VM), (0..PAGES).step_by(2));
        let changed = PAGES / 2;
        let receiver = a.receive(inplace);
        let (image, store) = (b.image(VM), b.path("store"));
        let mut args = vec!["send", image.to_str().unwrap(), "--to", &receiver.address, "--name", VM];
        args.extend(["--store", &store, "--bandwidth-limit", "2MB"]);
        let killed = Running::start(&args);
        let partial = a.image(".pagewire/vm.partial");
        let page_of = |path: &Path| {
            let mut page = [0; PAGE];
            let read = File::open(path).and_then(|file| file.read_exact_at(&mut page, (changed / 4 * 2) * PAGE as u64));
            read.ok().map(|()| page)
        };
        let last = page_of(&image).unwrap();
        wait_until("a quarter of what changed has come", || page_of(&partial) == Some(last));
        drop(killed);
        let (cut, _) = receiver.end();
        assert_eq!((&cut["outcome"], &cut["guest_at"]), (&"failed".into(), &"sender".into()));
        assert!(partial.exists() && !a.image(VM).exists());
        let back = moves(&b, &a, VM, &[], inplace);
        let (before, again) = (count(&cut, "/pages/inline"), count(&back.sent, "/pages/inline"));
        assert!(before + again <= changed, "{inplace:?}: {again} of {changed} pages travelled behind {before}");
        assert!(!partial.exists());
    }
}

/// A29: what a store knows stays in the store, and in the files of its domain.
#[test]
fn keys_and_memory_are_nowhere_else() {
    let (a, b) = moved_there(&["--keep", "visit", "--json"], &["--keep", "visit", "--json"]);
    let canary = b"a canary of the guest vm, thirty-nine..";
    let file = File::options().write(true).open(b.image(VM)).unwrap();
    file.write_all_at(canary, 5 * PAGE as u64 + 9).unwrap();
    let keep = &["--keep", "visit", "--json"][..];
    let mut said = moves(&b, &a, VM, keep, keep).said;
    fs::write(b.image("other"), noise(8, MIB)).unwrap();
    said += &moves(&b, &a, "other", keep, keep).said;
    for host in [&a, &b] {
        for verb in [&["list"][..], &["list", "--json"], &["verify"], &["verify", "--json"], &["repair", "--json"]] {
            let output = pagewire(&[&["store"], verb, &["--store", &host.path("store")]].concat());
            said += &(text(&output.stdout) + &text(&output.stderr));
        }
    }
    for host in [&a, &b] {
        let store = Store::open(host.0.path().join("store").as_path(), StoreOptions::default()).unwrap();
        let heads = store.heads().unwrap();
        assert!(!heads.is_empty());
        for head in heads {
            let key = *store.open_visit(&head).unwrap().unwrap().key();
            let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(!said.contains(&hex) && !said.contains(&format!("{key:?}")) && !holds(said.as_bytes(), &key));
            let own = host.0.path().join(format!("store/domains/{}", head.domain));
            for path in files(host.0.path()) {
                let bytes = fs::read(&path).unwrap();
                assert!(path.starts_with(&own) || !holds(&bytes, &key), "the key of {} in {path:?}", head.name);
                let is_guests = head.name.as_str() != VM || path.starts_with(&own) || path == host.image(VM);
                assert!(is_guests || !holds(&bytes, canary), "memory in {path:?}");
            }
        }
        for path in files(&host.0.path().join("store")) {
            assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600, "{path:?}");
            assert_eq!(path.parent().unwrap().metadata().unwrap().mode() & 0o7777, 0o700, "{path:?}");
        }
    }
    assert!(!holds(said.as_bytes(), canary));
}

fn holds(bytes: &[u8], wanted: &[u8]) -> bool {
    let first = wanted[0];
    let mut at = 0;
    while let Some(next) = bytes[at..].iter().position(|byte| *byte == first) {
        if bytes[at + next..].starts_with(wanted) {
            return true;
        }
        at += next + 1;
    }
    false
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let below = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path) } else { vec![path] }
    };
    fs::read_dir(folder).unwrap().flat_map(below).collect()
}
