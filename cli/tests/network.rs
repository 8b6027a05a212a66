//! `pagewire send` and `pagewire receive` over real sockets: many at once, and peers that are none.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};
use support::*;

const MIB: usize = 1 << 20;

fn send(src: &Path, to: &str, name: &str, more: &[&str]) -> serde_json::Value {
    report(&[&["send", src.to_str().unwrap(), "--to", to, "--name", name], more].concat())
}

#[test]
fn moves_an_image_there_and_back_over_tcp_and_unix_sockets() {
    let pair = Pair::new(6 * MIB + 77);
    let there = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", there.path().join("socket").display());
    for (address, lanes) in [("tcp://127.0.0.1:0", "1"), ("tcp://[::1]:0", "4"), (socket.as_str(), "8")] {
        let receiver = Receiver::listen(address, &["--into", there.path().to_str().unwrap(), "--inplace"]);
        let _ = fs::remove_file(there.path().join("vm"));
        let cold = send(&pair.src(), &receiver.address, "vm", &["--lanes", lanes]);
        assert_eq!(cold["pages"]["inline"], cold["pages_total"]);
        let warm = send(&pair.dst(), &receiver.address, "vm", &["--lanes", lanes]);
        assert_eq!(warm["pages"]["inline"], 384, "{address}");
        assert_eq!(fs::read(there.path().join("vm")).unwrap(), pair.old);
    }
}

#[test]
fn serves_many_sessions_at_once_and_outlives_failed_ones() {
    let there = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(there.path(), &[]);
    let pairs: Vec<Pair> = (0..6).map(|_| Pair::new(3 * MIB)).collect();
    let mut stranger = TcpStream::connect(receiver.port()).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\nHost: there\r\n\r\n").unwrap();
    drop(TcpStream::connect(receiver.port()).unwrap());
    std::thread::scope(|scope| {
        for (at, pair) in pairs.iter().enumerate() {
            let address = &receiver.address;
            scope.spawn(move || send(&pair.src(), address, &format!("vm{at}"), &["--lanes", "2"]));
        }
        let killed = Running::start(&[
            "send",
            pairs[0].src().to_str().unwrap(),
            "--to",
            &receiver.address,
            "--name",
            "killed",
            "--bandwidth-limit",
            "1MB",
        ]);
        std::thread::sleep(Duration::from_millis(200));
        drop(killed);
    });
    for (at, pair) in pairs.iter().enumerate() {
        assert_eq!(fs::read(there.path().join(format!("vm{at}"))).unwrap(), pair.new);
    }
    assert!(!there.path().join("killed").exists());
    let mut answer = Vec::new();
    stranger.read_to_end(&mut answer).unwrap();
    assert!(answer.is_empty(), "a stranger learns nothing");
}

#[test]
fn one_image_is_received_by_one_session_at_a_time() {
    let there = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(there.path(), &[]);
    let pair = Pair::new(8 * MIB);
    let (src, partial) = (pair.src(), there.path().join(".pagewire/vm.partial"));
    let first = Running::start(&[
        "send",
        src.to_str().unwrap(),
        "--to",
        &receiver.address,
        "--name",
        "vm",
        "--bandwidth-limit",
        "4MB",
    ]);
    wait_until("the first has begun", || partial.exists());
    let said = fails(1, &["send", src.to_str().unwrap(), "--to", &receiver.address, "--name", "vm"]);
    assert!(said.contains("busy") && said.contains("being received by another session"), "{said}");
    let (status, said) = first.end();
    assert!(status.success(), "{said}");
    assert_eq!(fs::read(there.path().join("vm")).unwrap(), pair.new);
}

#[test]
fn rejects_names_and_addresses_before_anything_is_sent() {
    let pair = Pair::new(PAGE);
    let src = pair.src();
    let src = src.to_str().unwrap();
    for name in ["../x", "/x", "a/../../b", "a\nb", ".", "..", "", "\u{1b}[31m", &"x".repeat(65)] {
        let said = fails(2, &["send", src, "--to", "127.0.0.1:1", "--name", name]);
        assert!(!said.contains('\u{1b}'), "escaped: {said:?}");
    }
    for (address, why) in [("host", "tcp://HOST:PORT"), ("quic://h:1", "QUIC is not there yet")] {
        assert!(fails(2, &["send", src, "--to", address, "--name", "vm"]).contains(why));
    }
    let said = fails(1, &["send", src, "--to", "127.0.0.1:1", "--name", "vm"]);
    assert!(said.contains("cannot connect to tcp://127.0.0.1:1") && said.contains("refused"), "{said}");
    let said = fails(2, &["receive", "--listen", "0.0.0.0:0", "--into", "/tmp"]);
    assert!(said.contains("--insecure-plaintext"), "{said}");
    assert!(fails(2, &["receive", "--listen", "127.0.0.1:0", "--into", "/nonexistent"]).contains("not a folder"));
    assert!(fails(2, &["receive", "--listen", "127.0.0.1:0"]).contains("--into"));
}

#[test]
fn the_reserved_folder_is_no_image() {
    let there = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(there.path(), &[]);
    let pair = Pair::new(PAGE);
    let said = fails(1, &["send", pair.src().to_str().unwrap(), "--to", &receiver.address, "--name", ".pagewire"]);
    assert!(said.contains("a directory"), "{said}");
}

#[test]
fn an_image_over_the_receivers_limit_is_refused_with_both_sizes() {
    let there = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(there.path(), &["--max-image", "1MiB"]);
    let pair = Pair::new(MIB + 1);
    let said = fails(1, &["send", pair.src().to_str().unwrap(), "--to", &receiver.address, "--name", "vm"]);
    assert!(said.contains("1048577") && said.contains("1048576"), "{said}");
    assert_eq!(fs::read_dir(there.path()).unwrap().count(), 0);
}

#[test]
fn fills_a_given_file_that_somebody_holds_open() {
    let pair = Pair::new(2 * MIB);
    let mut held = fs::File::open(pair.dst()).unwrap();
    let receiver = Receiver::listen("127.0.0.1:0", &["--into-file", pair.dst().to_str().unwrap()]);
    send(&pair.src(), &receiver.address, "anything", &[]);
    let mut bytes = Vec::new();
    held.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, pair.new);
    fs::write(pair.src(), [1; 10]).unwrap();
    let said = fails(1, &["send", pair.src().to_str().unwrap(), "--to", &receiver.address, "--name", "x"]);
    assert!(said.contains("make it that size"), "{said}");
}

/// A receiver that is none: accepts one connection and does as told.
fn impostor(behave: impl FnOnce(TcpStream) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || behave(listener.accept().unwrap().0));
    address
}

#[test]
fn a_receiver_that_closes_or_babbles_is_named() {
    let pair = Pair::new(PAGE);
    let src = pair.src();
    let to = |address: String| fails(1, &["send", src.to_str().unwrap(), "--to", &address, "--name", "vm"]);
    let said = to(impostor(drop));
    assert!(said.contains("ended before") || said.contains("broke"), "{said}");
    let said = to(impostor(|mut stream| {
        stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n").unwrap();
        std::thread::sleep(Duration::from_secs(1));
    }));
    assert!(said.contains("malformed"), "{said}");
}

#[test]
fn a_silent_receiver_costs_ten_seconds_and_no_more() {
    let pair = Pair::new(PAGE);
    let begin = Instant::now();
    let address = impostor(|stream| {
        std::thread::sleep(Duration::from_secs(30));
        drop(stream);
    });
    let said = fails(1, &["send", pair.src().to_str().unwrap(), "--to", &address, "--name", "vm"]);
    assert!(said.contains("handshake not complete after 10 s"), "{said}");
    assert!((9..13).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
}

/// A18: idle sockets and trickles hold nobody up, and are gone after ten seconds.
#[test]
fn idle_and_trickling_strangers_hold_nobody_up() {
    let there = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(there.path(), &[]);
    let mut idle: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(receiver.port()).unwrap()).collect();
    let mut trickle = TcpStream::connect(receiver.port()).unwrap();
    let begin = Instant::now();
    let pair = Pair::new(2 * MIB);
    trickle.write_all(&[100]).unwrap();
    send(&pair.src(), &receiver.address, "vm", &[]);
    assert!(begin.elapsed() < Duration::from_secs(8), "a transfer meanwhile takes no longer");
    for byte in [0, 0, 0] {
        std::thread::sleep(Duration::from_secs(2));
        let _ = trickle.write_all(&[byte]);
    }
    for stream in idle.iter_mut().chain([&mut trickle]) {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(stream.read(&mut [0; 64]).unwrap_or(0), 0);
    }
    assert!((9..14).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
}

#[test]
fn once_ends_with_the_sessions_code() {
    let there = tempfile::tempdir().unwrap();
    let pair = Pair::new(PAGE);
    let receiver = Receiver::start(there.path(), &["--once"]);
    send(&pair.src(), &receiver.address, "vm", &[]);
    let Receiver { mut process, .. } = receiver;
    assert_eq!(process.0.wait().unwrap().code(), Some(0));
    fs::create_dir(there.path().join("folder")).unwrap();
    let receiver = Receiver::start(there.path(), &["--once"]);
    fails(1, &["send", pair.src().to_str().unwrap(), "--to", &receiver.address, "--name", "folder"]);
    let Receiver { mut process, .. } = receiver;
    assert_eq!(process.0.wait().unwrap().code(), Some(1));
}

#[test]
fn a_signal_ends_the_receiver_and_tells_the_sender() {
    let there = tempfile::tempdir().unwrap();
    let pair = Pair::new(16 * MIB);
    fs::write(there.path().join("vm"), &pair.old).unwrap();
    let receiver = Receiver::start(there.path(), &[]);
    let sender = Running::start(&[
        "send",
        pair.src().to_str().unwrap(),
        "--to",
        &receiver.address,
        "--name",
        "vm",
        "--bandwidth-limit",
        "2MB",
    ]);
    wait_until("it has begun", || there.path().join(".pagewire/vm.partial").exists());
    receiver.process.signal("-TERM");
    let (status, said) = sender.end();
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("cancelled"), "{said}");
    let Receiver { mut process, .. } = receiver;
    assert!(process.0.wait().unwrap().code().is_some());
    assert_eq!(fs::read(there.path().join("vm")).unwrap(), pair.old);
}
