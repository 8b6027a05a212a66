//! Guests that run, over real sockets: moved while they write, left running by whatever fails, and at one host or in a
//! doubt with a name when a process is killed at any moment.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::handover::Whereabouts;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::guest::{Guest, ended, stop};
use support::*;

#[test]
fn a_guest_that_writes_moves_whole_and_is_started_once() {
    let guest = Guest::new();
    let start = guest.hook("echo $PAGEWIRE_NAME $PAGEWIRE_EPOCH >> started; cp $PAGEWIRE_STATE state-there");
    let (receiver, to) = guest.receive(&["--on-start", &start, "--once"]);
    let (code, said) = ended(guest.send(&to, &["--bandwidth-limit", "20MB"]).spawn().unwrap());
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(ended(receiver).0, Some(0));
    assert!(!guest.runs());
    guest.arrived_whole();
    assert_eq!(fs::read_to_string(guest.path("started")).unwrap(), "vm 1\n");
    assert_eq!(fs::read_to_string(guest.path("state-there")).unwrap(), "5\n");
    assert_eq!((guest.at("journal-a"), guest.at("journal-b")), (Whereabouts::There, Whereabouts::Here));
    let report = guest.report();
    assert_eq!(report["guest_at"], "receiver");
    assert!(report["rounds"].as_array().unwrap().len() >= 3, "{report}");
    assert!(report["downtime_seconds"].as_f64().unwrap() > 0.0, "{report}");

    // What has left cannot leave again.
    let (code, said) = ended(guest.send(&to, &[]).spawn().unwrap());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("not on this host") && said.contains("is at the receiver"), "{said}");
}

#[test]
fn a_guest_goes_and_comes_back_with_the_next_epoch() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--leave-paused", "--once"]);
    assert_eq!(ended(guest.send(&to, &[]).spawn().unwrap()).0, Some(0));
    ended(receiver);
    let address = format!("unix:{}", guest.path("back").display());
    let mut back = Command::new(env!("CARGO_BIN_EXE_pagewire"));
    back.args(["receive", "--listen", &address, "--into"]).arg(guest.path("a"));
    back.arg("--journal").arg(guest.path("journal-a")).args(["--leave-paused", "--once"]);
    let receiver = back.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !guest.path("back").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut send = Command::new(env!("CARGO_BIN_EXE_pagewire"));
    send.args(["send", "--live"]).arg(guest.path("b/vm")).args([
        "--to",
        &address,
        "--name",
        "vm",
        "--on-pause",
        "true",
    ]);
    send.arg("--journal").arg(guest.path("journal-b")).stdout(Stdio::null()).stderr(Stdio::piped());
    let (code, said) = ended(send.spawn().unwrap());
    assert_eq!(code, Some(0), "{said}");
    ended(receiver);
    assert_eq!((guest.at("journal-a"), guest.at("journal-b")), (Whereabouts::Here, Whereabouts::There));
}

/// C09, C10: stopped in a round, the guest never stands still.
#[test]
fn a_signal_leaves_the_guest_running() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--leave-paused"]);
    let sender = guest.send(&to, &["--bandwidth-limit", "2MB"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    signal(sender.id(), "-TERM");
    let (code, said) = ended(sender);
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("the guest is at the sender") && guest.runs(), "{said}");
    assert!(!guest.path("b/vm").exists());
    stop(receiver);
}

#[test]
fn a_hook_that_fails_or_hangs_leaves_the_guest_running() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--leave-paused"]);
    let (code, said) = ended(guest.send(&to, &["--on-pause", "echo garbage; exit 3"]).spawn().unwrap());
    assert_eq!(code, Some(2), "an option cannot be given twice: {said}");
    let mut failing = Command::new(env!("CARGO_BIN_EXE_pagewire"));
    failing.args(["send", "--live"]).arg(guest.path("a/vm")).args(["--to", &to, "--name", "vm"]);
    failing
        .args(["--on-pause", "echo garbage; exit 3", "--downtime", "5000", "--journal"])
        .arg(guest.path("journal-a"));
    let (code, said) = ended(failing.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the guest cannot be paused") && said.contains("exit status: 3"), "{said}");
    assert!(guest.runs());
    // A state that no blob can hold.
    File::create(guest.path("huge")).unwrap().set_len((16 << 20) + 1).unwrap();
    let huge = guest.path("huge");
    let mut failing = Command::new(env!("CARGO_BIN_EXE_pagewire"));
    failing.args(["send", "--live"]).arg(guest.path("a/vm")).args(["--to", &to, "--name", "vm", "--on-pause", "true"]);
    failing.args(["--downtime", "5000", "--state"]).arg(huge).arg("--journal").arg(guest.path("journal-a"));
    let (code, said) = ended(failing.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("--state") && guest.runs(), "{said}");
    stop(receiver);
}

#[test]
fn a_receiver_that_was_not_told_to_takes_no_guest() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&[]);
    let (code, said) = ended(guest.send(&to, &[]).spawn().unwrap());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("feature") && guest.runs(), "{said}");
    stop(receiver);
}

/// C25: one journal, two sessions of one guest.
#[test]
fn a_second_session_of_the_same_guest_is_refused() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--leave-paused"]);
    let first = guest.send(&to, &["--bandwidth-limit", "2MB"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let (code, said) = ended(guest.send(&to, &[]).spawn().unwrap());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("vm") && guest.runs(), "{said}");
    stop(first);
    stop(receiver);
}

/// C20, C22: the receiver dies when STARTED is durable and before it can say so; its successor says it.
#[test]
fn a_sender_in_doubt_asks_until_the_receiver_is_back() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--on-start", "kill -9 $PPID"]);
    let sender = guest.send(&to, &["--patience", "30"]).spawn().unwrap();
    assert_eq!(ended(receiver).0, None, "killed");
    let (receiver, _) = guest.receive(&["--leave-paused"]);
    let (code, said) = ended(sender);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the session ended early") && !guest.runs(), "{said}");
    guest.arrived_whole();
    assert_eq!((guest.at("journal-a"), guest.at("journal-b")), (Whereabouts::There, Whereabouts::Here));
    stop(receiver);

    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--on-start", "kill -9 $PPID"]);
    let (code, said) = ended(guest.send(&to, &["--patience", "0.1"]).spawn().unwrap());
    ended(receiver);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("in doubt") && said.contains("pagewire resolve") && !guest.runs(), "{said}");
    assert_eq!(guest.report()["guest_at"], "in doubt");
    let (code, said) = ended(guest.send(&to, &[]).spawn().unwrap());
    assert_eq!(code, Some(3), "nor can it be sent: {said}");
    assert_eq!((guest.at("journal-a"), guest.at("journal-b")), (Whereabouts::InDoubt, Whereabouts::Here));
}

/// C21: long after the session the other host can be asked again, and nothing else is done.
#[test]
fn a_guest_in_doubt_is_found_by_asking_the_other_host() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--on-start", "kill -9 $PPID"]);
    assert_eq!(ended(guest.send(&to, &["--patience", "0.1"]).spawn().unwrap()).0, Some(3));
    ended(receiver);
    let resolve = |name: &str, to: &str| {
        let journal = guest.path("journal-a").display().to_string();
        let output = pagewire(&["resolve", name, "--ask", to, "--patience", "0.1", "--journal", &journal]);
        (output.status.code(), text(&output.stdout) + &text(&output.stderr))
    };
    let (code, said) = resolve("vm", &to);
    assert!(code == Some(3) && said.contains("in doubt still"), "nobody is there: {said}");

    // Another host answers at that address: it has no part in the hand-over.
    fs::create_dir(guest.path("c")).unwrap();
    let journal = guest.path("journal-c").display().to_string();
    let stranger = Receiver::start(&guest.path("c"), &["--leave-paused", "--journal", &journal]);
    let (code, said) = resolve("vm", &stranger.address);
    assert!(code == Some(3) && said.contains("in doubt still"), "it is not believed: {said}");
    assert_eq!(guest.at("journal-a"), Whereabouts::InDoubt);

    let (receiver, _) = guest.receive(&["--leave-paused"]);
    let (code, said) = resolve("vm", &to);
    assert!(code == Some(0) && said.contains("the guest is the other host's"), "{said}");
    assert_eq!((guest.at("journal-a"), guest.at("journal-b")), (Whereabouts::There, Whereabouts::Here));
    let (code, said) = resolve("vm", &to);
    assert!(code == Some(2) && said.contains("nothing to ask"), "{said}");
    stop(receiver);
}

/// C04, C05, C16 to C22: kill -9 of either side at any moment leaves one host that may run the guest, or a doubt that the
/// sender's journal names. `PAGEWIRE_KILLS` says how often; the long run has 1,000.
#[test]
fn a_kill_at_any_moment_leaves_one_runnable_guest_or_a_named_doubt() {
    let kills: u64 = std::env::var("PAGEWIRE_KILLS").map_or(12, |kills| kills.parse().unwrap());
    let (mut moved, mut stayed, mut doubts) = (0, 0, 0);
    for kill in 0..kills {
        let guest = Guest::new();
        let (mut receiver, to) = guest.receive(&["--leave-paused"]);
        let mut sender = guest.send(&to, &["--patience", "0.1"]).spawn().unwrap();
        // Spread over the session and somewhat beyond, by a step that has nothing in common with its length.
        std::thread::sleep(Duration::from_micros(kill * 7_919 % 400_000));
        let victim = if kill % 2 == 0 { &mut sender } else { &mut receiver };
        victim.kill().unwrap();
        let ended_by_itself = kill % 2 == 1;
        if ended_by_itself {
            sender.wait().unwrap();
        }
        stop(receiver);
        stop(sender);
        let (here, there) = (guest.at("journal-a"), guest.at("journal-b"));
        let at_sender = matches!(here, Whereabouts::Unrecorded | Whereabouts::Here);
        let at_receiver = there == Whereabouts::Here;
        assert!(!(at_sender && at_receiver), "kill {kill}: two may run it: {here:?}, {there:?}");
        assert!(at_sender || at_receiver || here == Whereabouts::InDoubt, "kill {kill}: {here:?}, {there:?}");
        if at_sender && ended_by_itself {
            assert!(guest.runs(), "kill {kill}: a sender that lives lets it run on");
        }
        if at_receiver {
            guest.arrived_whole();
        }
        moved += u64::from(at_receiver);
        stayed += u64::from(at_sender);
        doubts += u64::from(!at_receiver && !at_sender);
    }
    println!("{kills} kills: {moved} moved, {stayed} stayed, {doubts} in doubt");
}

#[test]
fn usage_is_checked_before_anything_is_touched() {
    let code = |args: &[&str]| pagewire(args).status.code();
    let send = ["send", "x", "--to", "unix:/nowhere", "--name", "vm"];
    assert_eq!(code(&[&send[..], &["--live"]].concat()), Some(2), "how to pause it is needed");
    assert_eq!(code(&[&send[..], &["--on-pause", "true"]].concat()), Some(2), "only with --live");
    assert_eq!(code(&["receive", "--listen", "unix:/x", "--into", "/", "--on-start", "x", "--leave-paused"]), Some(2));
    let open = tempfile::tempdir().unwrap();
    fs::set_permissions(open.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let journal: &Path = open.path();
    let journal = journal.to_str().unwrap();
    let output = pagewire(&[&send[..], &["--live", "--on-pause", "true", "--journal", journal]].concat());
    let said = text(&output.stderr);
    assert!(said.contains("--journal") && said.contains("the guest is where it was"), "{said}");
    assert_eq!(output.status.code(), Some(2), "{said}");
}
