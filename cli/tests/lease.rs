//! `--lease FILE` on storage that both hosts reach: what it decides when the other host does not answer, and what becomes
//! of a guest when the lease is damaged, unreadable or not there.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::handover::Whereabouts;
use pagewire_protocol::frame::FrameKind;
use std::fs;
use std::path::PathBuf;
use support::guest::{Guest, ended, stop};
use support::proxy::{Proxy, Then};
use support::*;

/// Two hosts and a folder of leases.
struct Hosts {
    guest: Guest,
    lease: String,
}

impl Hosts {
    fn new() -> Self {
        let guest = Guest::new();
        fs::create_dir(guest.path("shared")).unwrap();
        let lease = guest.path("shared/lease").to_str().unwrap().to_owned();
        Self { guest, lease }
    }

    /// The lease of an epoch.
    fn file(&self, epoch: u64) -> PathBuf {
        self.guest.path(&format!("shared/lease.{}.{epoch}", self.guest.lineage()))
    }

    fn at(&self) -> (Whereabouts, Whereabouts) {
        (self.guest.at("journal-a"), self.guest.at("journal-b"))
    }

    /// An attempt that ends before the guest is offered: the journal knows its lineage from then on, and its epoch is free.
    fn named(self) -> Self {
        let (receiver, to) = self.guest.receive(&["--leave-paused", "--lease", &self.lease]);
        let (code, said) = ended(self.guest.send_by(&to, "exit 3", None, &["--lease", &self.lease]).spawn().unwrap());
        assert_eq!(code, Some(1), "{said}");
        stop(receiver);
        assert_eq!(fs::read_dir(self.guest.path("shared")).unwrap().count(), 0, "nobody was asked");
        self
    }
}

#[test]
fn a_guest_is_started_by_the_lease_and_returns_by_the_next() {
    let hosts = Hosts::new();
    let (receiver, to) = hosts.guest.receive(&["--leave-paused", "--once", "--lease", &hosts.lease]);
    let (code, said) = ended(hosts.guest.send(&to, &["--lease", &hosts.lease]).spawn().unwrap());
    assert_eq!(code, Some(0), "{said}");
    ended(receiver);
    assert_eq!(hosts.at(), (Whereabouts::There, Whereabouts::Here));
    assert!(hosts.file(1).exists() && fs::read_dir(hosts.guest.path("shared")).unwrap().count() == 1);
}

/// A receiver that knows of no lease is no place for a guest whose sender wants one asked; the guest is not stopped for it.
#[test]
fn both_hosts_have_to_name_the_lease() {
    let hosts = Hosts::new();
    let (receiver, to) = hosts.guest.receive(&["--leave-paused"]);
    let (code, said) = ended(hosts.guest.send(&to, &["--lease", &hosts.lease]).spawn().unwrap());
    assert!(code == Some(1) && said.contains("lease"), "{said}");
    assert!(hosts.guest.runs() && !hosts.guest.path("paused").exists());
    stop(receiver);
    // The sender decides whether there is one.
    let (receiver, to) = hosts.guest.receive(&["--leave-paused", "--lease", &hosts.lease]);
    let (code, said) = ended(hosts.guest.send(&to, &[]).spawn().unwrap());
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(fs::read_dir(hosts.guest.path("shared")).unwrap().count(), 0);
    stop(receiver);
}

/// C19: COMMIT is lost, and nobody answers any more. Who asks the lease first is the sender: it takes the guest back, and
/// the receiver can never start it. Without a lease the doubt stays.
#[test]
fn a_sender_whose_commit_is_lost_takes_the_guest_back_by_the_lease_alone() {
    for with_lease in [true, false] {
        let hosts = Hosts::new();
        let (receiver, to) = hosts.guest.receive(&["--leave-paused", "--lease", &hosts.lease]);
        let proxy = Proxy::new(&hosts.guest.path("between"), &to, FrameKind::COMMIT, || Then::Cut);
        let lease = if with_lease { &["--lease", &hosts.lease][..] } else { &[] };
        let args = [lease, &["--patience", "0.5"]].concat();
        let (code, said) = ended(hosts.guest.send(&proxy.address, &args).spawn().unwrap());
        assert!(proxy.has_seen(), "{said}");
        if with_lease {
            assert_eq!(code, Some(1), "{said}");
            assert!(said.contains("the guest is at the sender") && hosts.guest.runs(), "{said}");
            assert!(hosts.file(1).exists());
            assert_eq!(hosts.guest.at("journal-a"), Whereabouts::Here);
            assert_ne!(hosts.guest.at("journal-b"), Whereabouts::Here);
            // It goes by the next epoch, and its lease.
            let (code, said) = ended(hosts.guest.send(&to, &["--lease", &hosts.lease]).spawn().unwrap());
            assert_eq!(code, Some(0), "{said}");
            assert!(hosts.file(2).exists());
            assert_eq!(hosts.at(), (Whereabouts::There, Whereabouts::Here));
            hosts.guest.arrived_whole();
        } else {
            assert_eq!(code, Some(3), "{said}");
            assert!(!hosts.guest.runs() && !hosts.file(1).exists(), "{said}");
            assert_eq!(hosts.guest.at("journal-a"), Whereabouts::InDoubt);
        }
        stop(receiver);
    }
}

/// C22: STARTED is lost: the receiver was granted the guest, so the lease does not give it back, however long nobody answers.
#[test]
fn a_sender_whose_receiver_was_granted_the_guest_stays_in_doubt() {
    let hosts = Hosts::new();
    let (receiver, to) = hosts.guest.receive(&["--leave-paused", "--lease", &hosts.lease]);
    let proxy = Proxy::new(&hosts.guest.path("between"), &to, FrameKind::STARTED, || Then::Cut);
    let args = ["--lease", &hosts.lease, "--patience", "0.5"];
    let (code, said) = ended(hosts.guest.send(&proxy.address, &args).spawn().unwrap());
    assert_eq!(code, Some(3), "{said}");
    assert!(!hosts.guest.runs() && hosts.file(1).exists(), "{said}");
    assert_eq!(hosts.at(), (Whereabouts::InDoubt, Whereabouts::Here));
    hosts.guest.arrived_whole();
    stop(receiver);
}

/// A receiver that cannot read the lease starts nothing: it rejects, and the guest runs on where it was.
#[test]
fn a_lease_that_the_receiver_cannot_use_leaves_the_guest_where_it_was() {
    type Harm = fn(&Hosts);
    let harms: [(Harm, &str); 4] = [
        (|hosts| fs::write(hosts.file(1), b"").unwrap(), "too short"),
        (|hosts| fs::write(hosts.file(1), noise(9, 224)).unwrap(), "check does not fit"),
        (|hosts| fs::create_dir(hosts.file(1)).unwrap(), "is no file"),
        (|hosts| fs::remove_dir(hosts.guest.path("shared")).unwrap(), "No such file"),
    ];
    for (harm, why) in harms {
        let hosts = Hosts::new().named();
        harm(&hosts);
        let (receiver, to) = hosts.guest.receive(&["--leave-paused", "--lease", &hosts.lease, "--once"]);
        let (code, said) = ended(hosts.guest.send(&to, &["--lease", &hosts.lease]).spawn().unwrap());
        assert_eq!(code, Some(1), "{why}: {said}");
        assert!(said.contains("rejected") && said.contains("the guest is at the sender"), "{why}: {said}");
        let (_, there) = ended(receiver);
        assert!(there.contains("lease: ") && there.contains(why), "{why}: {there}");
        assert!(hosts.guest.runs(), "{why}");
        assert_ne!(hosts.guest.at("journal-b"), Whereabouts::Here, "{why}");
        if why != "No such file" {
            // What is damaged stays as it is, and the next epoch has a lease of its own.
            let (receiver, to) = hosts.guest.receive(&["--leave-paused", "--lease", &hosts.lease, "--once"]);
            let (code, said) = ended(hosts.guest.send(&to, &["--lease", &hosts.lease]).spawn().unwrap());
            assert_eq!(code, Some(0), "{why}: {said}");
            ended(receiver);
            assert!(hosts.file(2).exists());
            assert_eq!(hosts.at(), (Whereabouts::There, Whereabouts::Here), "{why}");
        }
    }
}

/// A sender in doubt that cannot read the lease stays in doubt: silence of an arbiter grants nothing.
#[test]
fn a_lease_that_the_sender_cannot_use_leaves_it_in_doubt() {
    type Harm = fn(&Hosts);
    let harms: [(Harm, &str); 3] = [
        (|hosts| fs::write(hosts.file(1), noise(9, 224)).unwrap(), "check does not fit"),
        (|hosts| fs::create_dir(hosts.file(1)).unwrap(), "is no file"),
        (|hosts| fs::remove_dir(hosts.guest.path("shared")).unwrap(), "No such file"),
    ];
    for (harm, why) in harms {
        let hosts = Hosts::new().named();
        harm(&hosts);
        let (receiver, to) = hosts.guest.receive(&["--leave-paused", "--lease", &hosts.lease]);
        let proxy = Proxy::new(&hosts.guest.path("between"), &to, FrameKind::COMMIT, || Then::Cut);
        let args = ["--lease", &hosts.lease, "--patience", "0.5"];
        let (code, said) = ended(hosts.guest.send(&proxy.address, &args).spawn().unwrap());
        assert_eq!(code, Some(3), "{why}: {said}");
        assert!(said.contains("lease: ") && said.contains(why) && said.contains("in doubt"), "{why}: {said}");
        assert!(!hosts.guest.runs(), "{why}");
        assert_eq!(hosts.guest.at("journal-a"), Whereabouts::InDoubt, "{why}");
        assert_ne!(hosts.guest.at("journal-b"), Whereabouts::Here, "{why}");
        stop(receiver);
    }
}
