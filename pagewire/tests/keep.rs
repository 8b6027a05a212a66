//! A guest runs as soon as it has arrived; what is kept of it is kept afterwards.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::KeepWhat;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use support::{Host, PAGE, noise};

const PAGES: usize = 2000;

/// The store's lock is held from the start, so the copying begins when the test has written.
#[test]
fn what_a_guest_writes_before_its_visit_is_kept_is_left_out() {
    let (a, b) = (Host::new(), Host::new());
    let image = noise(1, PAGES);
    fs::write(a.image(), &image).unwrap();
    let (to, received) = b.serve(b.folder(), b.reuse(KeepWhat::Visit), |_| ());
    let lock = File::open(b.dir.path().join("store/lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    a.send_file(&to, KeepWhat::Visit).into_result().unwrap();

    let runs = File::options().write(true).open(b.image()).unwrap();
    let written: Vec<u64> = (0..PAGES as u64 / 2).step_by(7).collect();
    for &page in &written {
        runs.write_all_at(b"the guest was here", page * PAGE as u64 + 100).unwrap();
    }
    flock(&lock, FlockOperation::Unlock).unwrap();
    let received = received.recv().unwrap();
    assert_eq!((received.reuse.unkept, received.warnings.len()), (written.len() as u64, 0));

    let head = b.store.heads().unwrap().remove(0);
    let visit = b.store.open_visit(&head).unwrap().unwrap();
    let gone: Vec<u64> = visit.present().unwrap().gaps(0..PAGES as u64).flatten().collect();
    assert_eq!(gone, written);
    assert!(b.store.verify().unwrap().findings.is_empty(), "no page is kept under another page's digest");

    // It leaves again: what both hosts have the old bytes of travels as what differs, the rest as it is.
    let ran: Vec<u64> = (0..PAGES as u64).step_by(25).filter(|page| !written.contains(page)).collect();
    for &page in &ran {
        runs.write_all_at(b"and here", page * PAGE as u64 + 300).unwrap();
    }
    let (to, back) = a.serve(a.folder(), a.reuse(KeepWhat::Nothing), |_| ());
    fs::remove_file(a.image()).unwrap();
    let sent = b.send_file(&to, KeepWhat::Nothing).into_result().unwrap();
    back.recv().unwrap();
    assert!(fs::read(a.image()).unwrap() == fs::read(b.image()).unwrap());
    assert_eq!(sent.pages.inline + sent.pages.delta, (written.len() + ran.len()) as u64, "{:?}", sent.pages);
    assert!(sent.pages.delta > 0 && sent.wants == 0, "no delta rested on bytes that are not here: {sent:?}");

    // And it comes as it came first, over the visit that lacks what was written.
    let (to, again) = b.serve(b.folder(), b.reuse(KeepWhat::Nothing), |_| ());
    fs::remove_file(b.image()).unwrap();
    fs::write(a.image(), &image).unwrap();
    let sent = a.send_file(&to, KeepWhat::Nothing).into_result().unwrap();
    let again = again.recv().unwrap();
    assert!(fs::read(b.image()).unwrap() == image);
    assert_eq!((sent.pages.inline, sent.wants), (written.len() as u64, written.len() as u64));
    assert_eq!(again.reuse.damaged, 0, "a page that was not kept is not damaged");
}
