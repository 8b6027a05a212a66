//! What is kept when not all of it can be.

use super::*;
use crate::report::Role;
use pagewire_protocol::frame::Open;
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::tree::image_root;
use pagewire_store::StoreOptions;
use std::process::Command;

/// A guest of zeros, as it was offered and as it came.
fn came() -> (Open, Manifest) {
    let key = [3; 32];
    let layout = Layout::new(vec![Region { bytes: 1 << 20, install_size: InstallSize::KIB_4 }]).unwrap();
    let hasher = PageHasher::new(&DedupDomain::new(&key));
    let mut trees = vec![DigestTree::new(&hasher, layout.pages())];
    let manifest = Manifest { root: image_root(hasher.domain(), &layout, &mut trees), layout: layout.clone(), trees };
    let open = Open {
        transcript: [0; 32],
        session: [1; 16],
        name: ImageName::new("vm").unwrap(),
        fresh: false,
        live: None,
        single_stream: false,
        lanes: 1,
        domain_key: key,
        layout,
        lineage: LineageId([2; 16]),
        known: Vec::new(),
    };
    (open, manifest)
}

#[test]
#[ignore = "a process whose files may not grow, which the next test starts"]
fn keeper() {
    let dir = tempfile::tempdir().unwrap();
    let reuse = Reuse::new(Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap());
    let (open, manifest) = came();
    let keep = |touches: &[Place]| {
        let mut report = Report::new(Role::Receiver, "vm".to_owned());
        keep_arrived(&reuse, &Came { open: &open, manifest: &manifest, touches }, None, &mut report);
        (report.warnings, reuse.store.heads().unwrap())
    };
    let (warnings, first) = keep(&[Place(7), Place(3)]);
    assert!(warnings.is_empty() && first.len() == 1, "{warnings:?}");
    let lineage = claimed(&open).unwrap();
    // What is known goes on with the next visit.
    let (warnings, second) = keep(&[]);
    assert!(warnings.is_empty() && second.len() == 1 && second[0].id != first[0].id, "{warnings:?}");
    assert_eq!(reuse.first_touches(&lineage, &open.layout), [Place(7), Place(3)]);
    // 4 MiB of them.
    let (warnings, third) = keep(&vec![Place(0); 1 << 20]);
    assert!(
        matches!(&warnings[..], [one] if one.starts_with("what the guest touched first was not kept")),
        "{warnings:?}"
    );
    assert!(third.len() == 1 && third[0].id != second[0].id, "the image was kept, and supersedes the other");
    println!("kept");
}

/// A disk that is full when the order of first touches is written costs that order and nothing else.
#[test]
fn an_image_is_kept_and_supersedes_others_though_what_was_touched_first_cannot_be_written() {
    // A write beyond the limit, 1 or 2 MiB by the shell, is an error where nobody dies of its signal.
    let run = "trap '' XFSZ; ulimit -f 2048; exec \"$0\" reuse::tests::keeper --exact --ignored --nocapture";
    let exe = std::env::current_exe().unwrap();
    let output = Command::new("sh").args(["-c", run]).arg(exe).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("kept"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
