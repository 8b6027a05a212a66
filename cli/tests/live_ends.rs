//! How live sessions end over real sockets when something else than a host fails: addresses where nobody is, hooks that
//! fail, hang or babble, device states at their limit, processes that stand still.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::handover::Whereabouts;
use pagewire_protocol::frame::FrameKind;
use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use support::guest::{Guest, ended, stop};
use support::proxy::{Proxy, Then};
use support::*;

/// The largest device state.
const STATE_MAX: u64 = 16 << 20;

/// A process that is not started yet when somebody is to signal it.
#[derive(Clone, Default)]
struct Victim(Arc<AtomicU32>);

impl Victim {
    fn is(&self, pid: u32) {
        self.0.store(pid, Ordering::SeqCst);
    }

    /// Its id, as soon as it has one.
    fn pid(&self) -> u32 {
        loop {
            match self.0.load(Ordering::SeqCst) {
                0 => std::thread::sleep(Duration::from_millis(1)),
                pid => return pid,
            }
        }
    }
}

/// C01: the error names the address and why; the guest was never stopped.
#[test]
fn an_address_where_nobody_is_leaves_the_guest_alone() {
    let guest = Guest::new();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let refused = format!("tcp://127.0.0.1:{free}");
    let nowhere = format!("unix:{}", guest.path("nobody").display());
    File::create(guest.path("file")).unwrap();
    let no_socket = format!("unix:{}", guest.path("file").display());
    for (to, reason) in [(refused.as_str(), "refused"), (&nowhere, "No such file"), (&no_socket, "refused")] {
        let (code, said) = ended(guest.send(to, &[]).spawn().unwrap());
        assert_eq!(code, Some(1), "{said}");
        let named = to.split_once("://").or_else(|| to.split_once(':')).unwrap().1;
        assert!(said.contains(named) && said.contains(reason), "{to}: {said}");
        assert!(said.contains("the guest is at the sender") && guest.runs(), "{said}");
        assert!(!guest.path("paused").exists());
        assert_eq!(guest.at("journal-a"), Whereabouts::Unrecorded);
    }
    let (code, said) = ended(guest.send("tcp://host.invalid:1", &[]).spawn().unwrap());
    assert!(code == Some(2) && said.contains("host.invalid") && guest.runs(), "{said}");
}

/// A guest that cannot be let run on is a warning of a session that failed of something else.
#[test]
fn a_resume_that_fails_or_is_missing_is_told() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--leave-paused"]);
    for (resume, told) in [(Some("echo garbage; exit 9"), "exit status: 9"), (None, "no --on-resume was given")] {
        let (code, said) = ended(guest.send_by(&to, "exit 3", resume, &[]).spawn().unwrap());
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("cannot be paused") && said.contains("was not let run") && said.contains(told), "{said}");
        assert!(guest.report()["warnings"].to_string().contains(told), "{}", guest.report());
    }
    assert_eq!(guest.at("journal-a"), Whereabouts::Unrecorded);
    stop(receiver);
}

/// A start that fails is the receiver's to tell: the guest is there all the same, and nobody else may run it.
#[test]
fn a_start_that_fails_leaves_the_guest_where_it_is() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--once", "--on-start", "echo garbage; exit 7"]);
    let (code, said) = ended(guest.send(&to, &[]).spawn().unwrap());
    assert_eq!(code, Some(0), "{said}");
    let (_, said) = ended(receiver);
    assert!(said.contains("the guest is here and was not started") && said.contains("exit status: 7"), "{said}");
    assert!(!guest.runs());
    guest.arrived_whole();
    assert_eq!((guest.at("journal-a"), guest.at("journal-b")), (Whereabouts::There, Whereabouts::Here));
}

/// One that hangs ends after ten seconds, with all that it has started.
#[test]
fn a_start_that_hangs_holds_up_nobody_for_ever() {
    let guest = Guest::new();
    let start = guest.hook("sleep 1000 & echo $! > child; wait");
    let (receiver, to) = guest.receive(&["--once", "--on-start", &start]);
    let began = Instant::now();
    let (code, said) = ended(guest.send(&to, &[]).spawn().unwrap());
    assert_eq!(code, Some(0), "{said}");
    let (_, said) = ended(receiver);
    assert!(said.contains("was not started") && said.contains("not done after 10 s"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    let child = fs::read_to_string(guest.path("child")).unwrap();
    let status = Path::new("/proc").join(child.trim()).join("stat");
    // Dead, or a zombie that nobody has waited for.
    let is_gone = || fs::read_to_string(&status).map_or(true, |stat| stat.contains(") Z "));
    wait_until("the hook's child is killed", is_gone);
    assert_eq!((guest.at("journal-a"), guest.at("journal-b")), (Whereabouts::There, Whereabouts::Here));
}

/// What hooks print is for people, and never gets between the lines of `--json`.
#[test]
fn hooks_that_print_garbage_harm_no_output() {
    let guest = Guest::new();
    let babble = "head -c 200000 /dev/urandom; printf '{\"event\":\"done\"}\\n\\033[31m'";
    let (receiver, to) = guest.receive(&["--once", "--on-start", babble]);
    let pause = format!("{babble}; {}", guest.pause_hook());
    let mut send = guest.send_by(&to, &pause, Some(&guest.resume_hook()), &["--json"]);
    let output = send.stdout(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    assert!(lines.lines().count() > 2);
    for line in lines.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    }
    let (code, _) = ended(receiver);
    assert_eq!(code, Some(0));
    guest.arrived_whole();
}

/// C09: a signal while the guest is being stopped: it is let run when it has been.
#[test]
fn a_signal_while_the_guest_is_being_paused_lets_it_run() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--leave-paused"]);
    let pause = format!("touch {}; sleep 1; {}", guest.path("pausing").display(), guest.pause_hook());
    let sender = guest.send_by(&to, &pause, Some(&guest.resume_hook()), &[]).spawn().unwrap();
    wait_until("the hook has begun", || guest.path("pausing").exists());
    signal(sender.id(), "-TERM");
    let (code, said) = ended(sender);
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("the guest is at the sender"), "{said}");
    assert!(!guest.path("pause").exists() && guest.runs(), "on-resume came after on-pause");
    assert!(!guest.path("b/vm").exists());
    stop(receiver);
}

/// SPEC 12.2: as large as may be arrives as it is, and a byte more is refused with the guest running on.
#[test]
fn a_device_state_may_be_as_large_as_its_limit_and_no_larger() {
    let guest = Guest::new();
    let state = guest.path("big");
    let arg = state.to_str().unwrap().to_owned();
    let (receiver, to) = guest.receive(&["--leave-paused"]);
    let pause = |bytes: u64| {
        format!(
            "touch {0}/pause; until [ -e {0}/paused ]; do sleep 0.002; done; truncate -s {bytes} {arg}",
            guest.dir.path().display()
        )
    };
    fs::write(&state, noise(3, 4096)).unwrap();
    for (bytes, ok) in [(STATE_MAX + 1, false), (STATE_MAX, true)] {
        let send = guest.send_by(&to, &pause(bytes), Some(&guest.resume_hook()), &["--state", &arg]).spawn();
        let (code, said) = ended(send.unwrap());
        assert_eq!(code, Some(i32::from(!ok)), "{said}");
        if !ok {
            assert!(said.contains("--state") && said.contains("the guest is at the sender"), "{said}");
            assert!(guest.runs());
        }
    }
    let there = fs::read(guest.path("b/.device-states/vm")).unwrap();
    assert!(there == fs::read(&state).unwrap() && there.len() as u64 == STATE_MAX);
    guest.arrived_whole();
    stop(receiver);
}

/// A state that is not there, or is no file, is known only when the guest stands still; it runs on.
#[test]
fn a_device_state_that_cannot_be_read_leaves_the_guest_running() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--leave-paused"]);
    fs::create_dir(guest.path("folder")).unwrap();
    for name in ["missing", "folder"] {
        let path = guest.path(name);
        let args = ["--state", path.to_str().unwrap()];
        let (code, said) = ended(guest.send(&to, &args).spawn().unwrap());
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("--state") && said.contains(name), "{said}");
        assert!(guest.runs());
    }
    stop(receiver);
}

/// How long a process stands still. More than 15 makes its peer give it up; the long run has 17.
fn stop_span() -> Duration {
    let seconds = std::env::var("PAGEWIRE_STOP_SECONDS").map_or(2, |seconds| seconds.parse().unwrap());
    Duration::from_secs(seconds)
}

/// I1: at most one host's records let it run the guest, and it runs nowhere else; or the sender's name a doubt.
fn judge(guest: &Guest, what: &str) -> (bool, bool) {
    let (here, there) = (guest.at("journal-a"), guest.at("journal-b"));
    let at_sender = matches!(here, Whereabouts::Unrecorded | Whereabouts::Here);
    let at_receiver = there == Whereabouts::Here;
    assert!(!(at_sender && at_receiver), "{what}: two may run it: {here:?}, {there:?}");
    assert!(at_sender || at_receiver || here == Whereabouts::InDoubt, "{what}: {here:?}, {there:?}");
    assert_eq!(guest.runs(), at_sender, "{what}: {here:?}, {there:?}");
    if at_receiver {
        guest.arrived_whole();
    }
    (at_sender, at_receiver)
}

/// C40: SIGSTOP of either side at any moment, and SIGCONT.
#[test]
fn a_process_that_stands_still_at_any_moment_leaves_one_runner_or_a_named_doubt() {
    let stops: u64 = std::env::var("PAGEWIRE_STOPS").map_or(8, |stops| stops.parse().unwrap());
    let attempt = |at: u64| {
        let guest = Guest::new();
        let (receiver, to) = guest.receive(&["--leave-paused"]);
        let sender = guest.send(&to, &["--patience", "5", "--bandwidth-limit", "40MB"]).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(at * 37_919 % 500_000));
        let victim = if at.is_multiple_of(2) { sender.id() } else { receiver.id() };
        signal(victim, "-STOP");
        std::thread::sleep(stop_span());
        // While one of them stands still, too.
        let (here, there) = (guest.at("journal-a"), guest.at("journal-b"));
        assert!(!(here != Whereabouts::There && here != Whereabouts::InDoubt && there == Whereabouts::Here), "{at}");
        signal(victim, "-CONT");
        let (code, said) = ended(sender);
        let (at_sender, at_receiver) = judge(&guest, &format!("stop {at}: {said}"));
        assert_eq!(
            code,
            Some(if at_sender {
                1
            } else if at_receiver {
                0
            } else {
                3
            }),
            "stop {at}: {said}"
        );
        stop(receiver);
    };
    // Waiting takes no processor: four at once.
    for first in (0..stops).step_by(4) {
        std::thread::scope(|scope| {
            (first..stops.min(first + 4)).for_each(|at| {
                scope.spawn(move || attempt(at));
            });
        });
    }
}

/// C40: either side stands still when READY, COMMIT or STARTED is on its way, and one of them runs the guest in the end.
#[test]
fn a_process_that_stands_still_over_a_word_of_the_hand_over_leaves_one_runner() {
    let attempt = |kind: FrameKind, stops_sender: bool| {
        let guest = Guest::new();
        let (receiver, to) = guest.receive(&["--leave-paused"]);
        let victim = Victim::default();
        let of_proxy = victim.clone();
        let proxy = Proxy::new(&guest.path("between"), &to, kind, move || {
            let victim = of_proxy.pid();
            signal(victim, "-STOP");
            std::thread::spawn(move || {
                std::thread::sleep(stop_span());
                signal(victim, "-CONT");
            });
            Then::Pass
        });
        let sender = guest.send(&proxy.address, &["--patience", "20"]).spawn().unwrap();
        victim.is(if stops_sender { sender.id() } else { receiver.id() });
        let (code, said) = ended(sender);
        let what = format!("{kind:?} {stops_sender}: {said}");
        assert!(proxy.has_seen(), "{what}");
        let (at_sender, at_receiver) = judge(&guest, &what);
        assert!(at_sender != at_receiver, "{what}");
        assert_eq!(code, Some(i32::from(at_sender)), "{what}");
        stop(receiver);
    };
    std::thread::scope(|scope| {
        for kind in [FrameKind::READY, FrameKind::COMMIT, FrameKind::STARTED] {
            for stops_sender in [true, false] {
                scope.spawn(move || attempt(kind, stops_sender));
            }
        }
    });
}

/// C17: a sender that dies before it has handed the guest over, when its receiver was ready, can send it again.
#[test]
fn a_sender_that_dies_before_handed_can_send_the_guest_again() {
    let guest = Guest::new();
    let (receiver, to) = guest.receive(&["--leave-paused"]);
    let victim = Victim::default();
    let of_proxy = victim.clone();
    let proxy = Proxy::new(&guest.path("between"), &to, FrameKind::READY, move || {
        signal(of_proxy.pid(), "-KILL");
        Then::Cut
    });
    let sender = guest.send(&proxy.address, &[]).spawn().unwrap();
    victim.is(sender.id());
    assert_eq!(ended(sender).0, None, "killed");
    assert_eq!((guest.at("journal-a"), guest.at("journal-b")), (Whereabouts::Unrecorded, Whereabouts::Unrecorded));
    // Whoever holds the guest finds it without a record, and lets it run.
    fs::remove_file(guest.path("pause")).unwrap();
    fs::remove_file(guest.path("paused")).unwrap();
    // The receiver has given that epoch up, which the sender does not know of: REJECT tells it, once.
    wait_until("the receiver has noticed", || receiver_is_free(&guest));
    let codes: Vec<_> = (0..2).map(|_| ended(guest.send(&to, &[]).spawn().unwrap())).collect();
    assert!(codes[0].0 == Some(1) && codes[0].1.contains("rejected"), "{codes:?}");
    assert_eq!(codes[1].0, Some(0), "{codes:?}");
    guest.arrived_whole();
    stop(receiver);
}

/// Whether the receiver's session is over: it has let go of its records.
fn receiver_is_free(guest: &Guest) -> bool {
    let folder = guest.path("journal-b").join(guest.lineage());
    let records = fs::read_dir(folder).into_iter().flatten().flatten();
    records.into_iter().any(|entry| entry.path().extension().is_some_and(|suffix| suffix == "record"))
}
