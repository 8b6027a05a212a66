//! `pagewire store`: what an operator sees and removes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::ImageName;
use pagewire::store::{Keep, KeepImage, Lineage, Store, StoreOptions, VisitHead, VisitKind};
use pagewire_protocol::digest::{PageHasher, page_digest};
use pagewire_protocol::domain::{DedupDomain, LineageId};
use pagewire_protocol::page::{InstallSize, Layout, Region};
use pagewire_protocol::tree::{DigestTree, image_root};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::PathBuf;
use support::*;

const PAGES: usize = 64;

struct Host {
    dir: tempfile::TempDir,
    store: Store,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
        Self { dir, store }
    }

    fn keep(&self, name: &str, who: u8, seed: u64) -> VisitHead {
        let bytes = noise(seed, PAGES * PAGE);
        let region = Region { bytes: (PAGES * PAGE) as u64, install_size: InstallSize::KIB_4 };
        let layout = Layout::new(vec![region]).unwrap();
        let hasher = PageHasher::new(&DedupDomain::new(&[who; 32]));
        let mut trees = [DigestTree::new(&hasher, PAGES as u64)];
        for (page, bytes) in (0..).zip(bytes.as_chunks::<PAGE>().0) {
            trees[0].set(page, page_digest(hasher.domain(), bytes));
        }
        let keep = Keep {
            lineage: Lineage { id: LineageId([who; 16]), key: [who; 32] },
            name: ImageName::new(name).unwrap(),
            session: [1; 16],
            kind: VisitKind::Departed,
            root: image_root(hasher.domain(), &layout, &mut trees),
            layout: &layout,
        };
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&bytes, 0).unwrap();
        self.store.keep(&keep, &trees, None, Some(KeepImage::File(&image))).unwrap().head
    }

    fn file(&self, head: &VisitHead, suffix: &str) -> PathBuf {
        self.store.path().join(format!("domains/{}/{}.{suffix}", head.domain, head.id))
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let store = self.store.path().to_str().unwrap();
        let output = pagewire(&[&["store"], args, &["--store", store]].concat());
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }

    fn json(&self, args: &[&str]) -> (i32, Vec<serde_json::Value>) {
        let (code, said, _) = self.run(&[args, &["--json"]].concat());
        (code, said.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }
}

#[test]
fn lists_what_is_kept() {
    let host = Host::new();
    assert_eq!(host.run(&["list"]), (0, "no visits are kept\n".to_owned(), String::new()));
    let old = host.keep("web-1", 1, 1);
    let new = host.keep("web-1", 1, 2);
    fs::remove_file(host.file(&old, "img")).unwrap();
    let (code, said, _) = host.run(&["list"]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!((code, lines.len()), (0, 4), "{said}");
    assert!(lines[1].starts_with(&new.id.to_string()) && lines[1].ends_with("pages"), "{said}");
    assert!(lines[2].starts_with(&old.id.to_string()) && lines[2].ends_with("digests only, superseded"), "{said}");
    assert!(lines[1].contains("01010101") && lines[1].contains("departed") && lines[1].contains("256.0 KiB"), "{said}");
    let (_, rows) = host.json(&["list"]);
    assert_eq!((&rows[0]["id"], &rows[0]["superseded"]), (&new.id.to_string().into(), &false.into()));
    assert_eq!((&rows[1]["pages_kept"], &rows[1]["bytes"]), (&false.into(), &(PAGES * PAGE).into()));
    assert!(!said.contains(&"01".repeat(32)), "the key is nowhere");
}

#[test]
fn verifies_names_and_repairs() {
    let host = Host::new();
    let (first, second, third) = (host.keep("a", 1, 1), host.keep("b", 2, 2), host.keep("c", 3, 3));
    let (code, said, _) = host.run(&["verify"]);
    assert_eq!((code, said.as_str()), (0, "3 visits, 192 pages: everything is as it was kept\n"));
    File::options().write(true).open(host.file(&first, "img")).unwrap().write_all_at(b"x", 9 * 4096).unwrap();
    File::options().write(true).open(host.file(&second, "manifest")).unwrap().write_all_at(b"x", 9000).unwrap();
    let stranger = host.file(&third, "img").with_file_name("notes");
    fs::write(&stranger, b"?").unwrap();
    let (code, said, _) = host.run(&["verify"]);
    assert_eq!(code, 1);
    assert!(said.contains("1 of 64 pages are not what was kept, the first is 9 of region 0 [a]"), "{said}");
    assert!(said.contains(host.file(&second, "manifest").to_str().unwrap()) && said.contains("notes"), "{said}");
    let (code, events) = host.json(&["repair"]);
    assert_eq!((code, &events.last().unwrap()["left"]), (1, &1.into()), "the stranger is not the store's to remove");
    let done: Vec<&str> = events.iter().filter_map(|event| event["repaired"].as_str()).collect();
    assert!(done.contains(&"pages_dropped") && done.contains(&"removed") && done.contains(&"left"), "{events:?}");
    fs::remove_file(stranger).unwrap();
    let (code, said, _) = host.run(&["verify"]);
    assert_eq!((code, said.as_str()), (0, "2 visits, 127 pages: everything is as it was kept\n"));
}

#[test]
fn prunes_superseded_visits_and_what_is_over_the_budget() {
    let host = Host::new();
    let old = host.keep("a", 1, 1);
    let new = host.keep("a", 1, 2);
    let other = host.keep("b", 2, 3);
    let (code, said, _) = host.run(&["prune"]);
    assert_eq!((code, said), (0, format!("removed {}  a\n", old.id)));
    assert_eq!(host.run(&["prune"]).1, "nothing to remove\n");
    let reader = host.store.open_visit(&other).unwrap();
    let (_, gone) = host.json(&["prune", "--store-budget", "4KiB"]);
    assert_eq!(gone.len(), 1);
    assert_eq!(gone[0]["id"], new.id.to_string());
    drop(reader);
}

#[test]
fn removes_by_id_by_name_and_all() {
    let host = Host::new();
    let heads: Vec<VisitHead> =
        [("a", 1), ("a", 2), ("b", 3), ("c", 4)].map(|(name, who)| host.keep(name, who, 1)).into();
    let (code, _, said) = host.run(&["rm", "zz"]);
    assert!(code == 1 && said.contains("no such visit"), "{said}");
    let reader = host.store.open_visit(&heads[2]).unwrap();
    let (code, _, said) = host.run(&["rm", &heads[2].id.to_string()]);
    assert!(code == 1 && said.contains("in use"), "{said}");
    drop(reader);
    let short = heads[2].id.to_string()[..20].to_owned();
    assert_eq!(host.run(&["rm", &short]).1, format!("removed {}  b\n", heads[2].id));
    assert_eq!(host.run(&["rm", "--name", "a"]).1.lines().count(), 2);
    assert_eq!(host.run(&["rm", "--name", "a"]).0, 1);
    fs::write(host.file(&heads[3], "manifest"), b"damaged").unwrap();
    assert_eq!(host.run(&["rm", "--all"]).0, 0);
    assert_eq!(fs::read_dir(host.store.path().join("domains")).unwrap().count(), 0, "damaged or not");
}

#[test]
fn rejects_folders_that_are_no_stores_with_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let said = fails(2, &["store", "list", "--store", &path("none")]);
    assert!(said.contains(&path("none")) && !dir.path().join("none").exists(), "{said}");
    fs::create_dir(path("open")).unwrap();
    fs::set_permissions(path("open"), fs::Permissions::from_mode(0o755)).unwrap();
    let said = fails(2, &["store", "verify", "--store", &path("open")]);
    assert!(said.contains("chmod 700"), "{said}");
    symlink(path("open"), path("link")).unwrap();
    assert!(fails(2, &["store", "list", "--store", &path("link")]).contains("symbolic link"));
    fails(2, &["store", "list"]);
    fails(2, &["store", "rm", "--store", &path("open")]);
    fails(2, &["store", "rm", "--all", "--name", "x", "--store", &path("open")]);
}

/// A process that lists, one that prunes and one that verifies, while visits come and go.
#[test]
fn processes_share_a_store_with_whoever_keeps_visits() {
    let host = Host::new();
    std::thread::scope(|scope| {
        for args in [&["prune"][..], &["verify"], &["list", "--json"], &["repair"]] {
            let host = &host;
            scope.spawn(move || (0..5).for_each(|_| assert_eq!(host.run(args).0, 0, "{args:?}")));
        }
        for seed in 0..20 {
            let head = host.keep("vm", 1, seed);
            // It is the newest of its guest: pruning leaves it.
            assert!(host.store.open_visit(&head).unwrap().is_some_and(|visit| visit.image().is_some()));
        }
    });
    assert!(host.dir.path().exists() && host.store.verify().unwrap().findings.is_empty());
}
