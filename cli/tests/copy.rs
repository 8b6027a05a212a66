//! `pagewire copy`: cold, warm, resumed, and everything that can be wrong with two files.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use support::*;

const MIB: usize = 1 << 20;

#[test]
fn copies_cold_then_only_what_changed() {
    let pair = Pair::new(8 * MIB + 1234);
    let (src, cold) = (pair.src(), pair.dir.path().join("cold"));
    let (src, cold, dst) = (src.to_str().unwrap(), cold.to_str().unwrap(), pair.dst());
    let pages = 2049;
    let first = report(&["copy", src, cold]);
    assert_eq!(
        (&first["schema"], &first["outcome"], &first["guest_at"]),
        (&"pagewire.report/1".into(), &"done".into(), &"receiver".into())
    );
    assert_eq!((&first["pages"]["inline"], &first["pages_total"]), (&pages.into(), &pages.into()));
    assert_eq!(fs::read(cold).unwrap(), pair.new);
    let again = report(&["copy", src, cold]);
    assert_eq!(again["pages"]["base"], pages);
    assert!(again["wire"]["sent_bytes"].as_u64().unwrap() < 2000);
    let warm = report(&["copy", src, dst.to_str().unwrap()]);
    assert_eq!(warm["pages"]["inline"], 512);
    assert_eq!(fs::read(dst).unwrap(), pair.new);
}

#[test]
fn every_option_ends_in_equal_bytes() {
    for options in [
        &["--inplace"][..],
        &["--fresh"],
        &["--fresh", "--inplace"],
        &["--no-dedup"],
        &["--no-compress"],
        &["--page-size", "64KiB"],
        &["--page-size", "2MiB", "--inplace"],
        &["--bandwidth-limit", "100MB/s"],
    ] {
        let pair = Pair::new(5 * MIB + 4097);
        let (src, dst) = (pair.src(), pair.dst());
        report(&pair.copy(src.to_str().unwrap(), dst.to_str().unwrap(), options));
        assert_eq!(fs::read(pair.dst()).unwrap(), pair.new, "{options:?}");
        assert!(!pair.dir.path().join(".pagewire").exists(), "nothing is left behind");
    }
}

#[test]
fn in_place_the_same_file_is_changed_and_unchanged_pages_are_not_written() {
    let pair = Pair::new(4 * MIB);
    let before = fs::metadata(pair.dst()).unwrap();
    let (src, dst) = (pair.src(), pair.dst());
    report(&pair.copy(src.to_str().unwrap(), dst.to_str().unwrap(), &["--inplace"]));
    assert_eq!(fs::metadata(pair.dst()).unwrap().ino(), before.ino());
    let unchanged = fs::metadata(pair.dst()).unwrap();
    fs::write(pair.src(), &pair.new).unwrap();
    report(&pair.copy(src.to_str().unwrap(), dst.to_str().unwrap(), &["--inplace"]));
    let after = fs::metadata(pair.dst()).unwrap();
    assert_eq!(
        (after.mtime(), after.mtime_nsec()),
        (unchanged.mtime(), unchanged.mtime_nsec()),
        "not one byte was written"
    );
}

#[test]
fn a_killed_copy_leaves_the_old_file_and_resumes() {
    for inplace in [false, true] {
        let pair = Pair::new(32 * MIB);
        let (src, dst) = (pair.src(), pair.dst());
        let (src, dst) = (src.to_str().unwrap(), dst.to_str().unwrap());
        let options: &[&str] = if inplace { &["--inplace"] } else { &[] };
        let slow = [options, &["--bandwidth-limit", "8MB"]].concat();
        let running = Running::start(&pair.copy(src, dst, &slow));
        let size = || fs::metadata(pair.partial()).map_or(0, |info| info.blocks());
        wait_until("some of it is there", || size() > 0);
        std::thread::sleep(std::time::Duration::from_millis(400));
        drop(running);
        assert_eq!(
            fs::read(pair.dst()).is_ok_and(|bytes| bytes == pair.old),
            !inplace,
            "whole under its name, or absent"
        );
        assert!(pair.partial().exists());
        let resumed = report(&pair.copy(src, dst, options));
        let inline = resumed["pages"]["inline"].as_u64().unwrap();
        assert!(inline < 2048, "{inline} of 2048 changed pages travelled again");
        assert_eq!(fs::read(pair.dst()).unwrap(), pair.new);
    }
}

#[test]
fn empty_short_and_sparse_images_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for len in [0, 1, 4095, 4096, 4097, MIB, MIB + 1] {
        fs::write(path("src"), noise(3, len)).unwrap();
        report(&["copy", &path("src"), &path("dst")]);
        assert_eq!(fs::read(path("dst")).unwrap(), noise(3, len), "{len}");
    }
    let sparse = File::create(path("sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    sparse.write_all_at(b"end", (1 << 30) - 5000).unwrap();
    let sent = report(&["copy", &path("sparse"), &path("holes")]);
    assert_eq!((&sent["pages"]["zero"], &sent["pages"]["inline"]), (&(262_144 - 1).into(), &1.into()));
    let holes = fs::metadata(path("holes")).unwrap();
    assert_eq!(holes.len(), 1 << 30);
    assert!(holes.blocks() < 200, "zero pages are holes: {} blocks", holes.blocks());
}

#[test]
fn rejects_wrong_usage_with_code_2() {
    let pair = Pair::new(PAGE);
    let src = pair.src();
    let src = src.to_str().unwrap();
    assert!(fails(2, &["copy", src, src]).contains("source and destination at once"));
    assert!(fails(2, &["copy", src, "host:there"]).contains("ssh is not there yet"));
    assert!(fails(2, &["copy", src, "/nonexistent/"]).contains("does not name a file"));
    assert!(fails(2, &["copy", src]).contains("<DST>"));
    assert!(fails(2, &["copy", src, "x", "--bandwidth-limit", "0"]).contains("more than zero"));
    assert!(fails(2, &["copy", src, "x", "--bandwidth-limit", "fast"]).contains("125MB"));
    assert!(fails(2, &["copy", src, "x", "--deadline", "0"]).contains("deadline"));
    assert!(fails(2, &["copy", src, "x", "--page-size", "5"]).contains("4KiB"));
    // The pages that are left have the domain that they were sent with.
    let resume = ["resume", src, "--to", "unix:/nonexistent", "--name", "vm", "--store", "x", "--domain", "y"];
    assert!(fails(2, &resume).contains("--domain"));
}

#[test]
fn rejects_files_that_are_none_and_leaves_all_as_it_was() {
    let pair = Pair::new(PAGE);
    let (src, dst, dir) = (pair.src(), pair.dst(), pair.dir.path());
    let (src, dst) = (src.to_str().unwrap(), dst.to_str().unwrap());
    assert!(fails(1, &["copy", "/nonexistent", dst]).contains("No such file"));
    assert!(fails(1, &["copy", dir.to_str().unwrap(), dst]).contains("is a directory"));
    assert!(fails(1, &["copy", src, "/nonexistent/x"]).contains("No such file"));
    symlink(dst, dir.join("link")).unwrap();
    assert!(fails(1, &["copy", src, dir.join("link").to_str().unwrap()]).contains("a symbolic link"));
    fs::create_dir_all(dir.join("folder/src")).unwrap();
    let said = fails(1, &["copy", src, dir.join("folder").to_str().unwrap()]);
    assert!(said.contains("a directory") && said.contains("the guest is at the sender"), "{said}");
    assert_eq!(fs::read(dst).unwrap(), pair.old);
}

#[test]
fn a_full_disk_leaves_the_old_file_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_mounted) = Mounted::tmpfs(dir.path(), "size=6m") else { return };
    let source = tempfile::tempdir().unwrap();
    let (src, dst) = (source.path().join("src"), dir.path().join("dst"));
    fs::write(&src, noise(5, 4 * MIB)).unwrap();
    fs::write(&dst, noise(6, 4 * MIB)).unwrap();
    let said = fails(1, &["copy", src.to_str().unwrap(), dst.to_str().unwrap()]);
    assert!(said.contains("No space left") && said.contains("destination"), "{said}");
    assert_eq!(fs::read(&dst).unwrap(), noise(6, 4 * MIB));
    report(&["copy", src.to_str().unwrap(), dst.to_str().unwrap(), "--inplace"]);
    assert_eq!(fs::read(&dst).unwrap(), noise(5, 4 * MIB), "in place there is room");
}

#[test]
fn a_read_only_destination_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::tmpfs(dir.path(), "size=6m") else { return };
    let source = tempfile::tempdir().unwrap();
    let (src, dst) = (source.path().join("src"), dir.path().join("dst"));
    fs::write(&src, noise(5, PAGE)).unwrap();
    fs::write(&dst, b"old").unwrap();
    mounted.remount("remount,ro");
    for options in [&[][..], &["--inplace"]] {
        let said = fails(1, &[&["copy", src.to_str().unwrap(), dst.to_str().unwrap()], options].concat());
        assert!(said.contains("Read-only file system"), "{said}");
    }
    assert_eq!(fs::read(&dst).unwrap(), b"old");
}

#[test]
fn a_source_that_changes_while_it_is_read_is_named_and_nothing_is_lost() {
    let grow = |file: &File| file.set_len(40 * MIB as u64).unwrap();
    let shrink = |file: &File| file.set_len(5000).unwrap();
    let rewrite = |file: &File| file.write_all_at(&noise(77, 16 * MIB), 8 * MIB as u64).unwrap();
    type Change<'a> = (&'a str, &'a dyn Fn(&File));
    let changes: [Change<'_>; 3] = [("grew", &grow), ("shrank", &shrink), ("changed", &rewrite)];
    for (what, change) in changes {
        let pair = Pair::new(32 * MIB);
        let (src, dst) = (pair.src(), pair.dst());
        let running = Running::start(&pair.copy(
            src.to_str().unwrap(),
            dst.to_str().unwrap(),
            &["--fresh", "--bandwidth-limit", "6MB"],
        ));
        wait_until("it has begun", || pair.partial().exists());
        std::thread::sleep(std::time::Duration::from_millis(100));
        change(&File::options().write(true).open(pair.src()).unwrap());
        let (status, said) = running.end();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(what), "{what}: {said}");
        assert_eq!(fs::read(pair.dst()).unwrap(), pair.old);
    }
}

#[test]
fn speaks_json_lines_on_a_pipe_and_nothing_else() {
    let pair = Pair::new(4 * MIB);
    let (src, dst) = (pair.src(), pair.dst());
    let output = pagewire(&pair.copy(src.to_str().unwrap(), dst.to_str().unwrap(), &["--json"]));
    assert!(output.status.success() && output.stderr.is_empty());
    let lines: Vec<serde_json::Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.first().unwrap()["event"], "started");
    assert_eq!(lines.last().unwrap()["event"], "finished");
    assert_eq!(lines.last().unwrap()["report"]["outcome"], "done");
    let plain = pagewire(&["copy", src.to_str().unwrap(), dst.to_str().unwrap()]);
    assert!(plain.stderr.is_empty(), "no progress bar on a pipe");
}

#[test]
fn a_deadline_and_a_signal_end_it_with_their_codes() {
    let pair = Pair::new(32 * MIB);
    let (src, dst) = (pair.src(), pair.dst());
    let (src, dst) = (src.to_str().unwrap(), dst.to_str().unwrap());
    let said = fails(1, &pair.copy(src, dst, &["--bandwidth-limit", "4MB", "--deadline", "0.3"]));
    assert!(said.contains("not complete after 300ms"), "{said}");
    for signal in ["-INT", "-TERM"] {
        let mut running = Running::start(&pair.copy(src, dst, &["--bandwidth-limit", "4MB", "--json"]));
        assert!(running.first_line().contains("started"));
        running.signal(signal);
        let (status, said) = running.end();
        assert_eq!(status.code(), Some(130), "{said}");
        assert!(said.contains("cancelled"), "{said}");
    }
    assert_eq!(fs::read(dst).unwrap(), pair.old);
}

#[test]
fn inspect_counts_every_page_once() {
    let pair = Pair::new(4 * MIB);
    let mut image = pair.new.clone();
    image.extend_from_slice(&[0; 4 * PAGE]);
    image.extend_from_slice(&pair.new[..2 * PAGE]);
    image.extend_from_slice(&pair.old[PAGE..2 * PAGE]);
    fs::write(pair.src(), &image).unwrap();
    let (src, dst) = (pair.src(), pair.dst());
    let output = pagewire(&["inspect", src.to_str().unwrap(), "--against", dst.to_str().unwrap(), "--json"]);
    let seen: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let count = |name: &str| seen[name].as_u64().unwrap();
    assert_eq!(count("pages_total"), 1024 + 7);
    assert_eq!((count("zero"), count("unchanged"), count("distinct")), (4, 768, 256));
    assert_eq!((count("elsewhere"), count("duplicate")), (2, 1));
    assert!(fails(1, &["inspect", "/nonexistent"]).contains("No such file"));
}
