//! The program as a user runs it: processes, files and sockets of this machine.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]
#![allow(clippy::cast_possible_truncation, reason = "tests choose their numbers")]

pub mod guest;
pub mod network;
pub mod proxy;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

pub const PAGE: usize = 4096;

pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagewire"));
    command.args(args).stdin(Stdio::null());
    command
}

pub fn pagewire(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// Runs to success; returns what `--report` wrote.
pub fn report(args: &[&str]) -> serde_json::Value {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let output = pagewire(&[args, &["--report", path]].concat());
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    json(Path::new(path))
}

/// What is in a file of one JSON value.
pub fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Runs to failure with `code`; returns what it said.
pub fn fails(code: i32, args: &[&str]) -> String {
    let output = pagewire(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output.stderr));
    text(&output.stderr)
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Bytes that neither compress nor repeat.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(&mut next).take(len.div_ceil(8)).flatten().collect();
    bytes.truncate(len);
    bytes
}

/// A folder with an image `src` and an older version of it, `dst`: every fourth page differs.
pub struct Pair {
    pub dir: tempfile::TempDir,
    pub new: Vec<u8>,
    pub old: Vec<u8>,
}

impl Pair {
    pub fn new(len: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let old = noise(1, len);
        let mut new = old.clone();
        for (at, page) in new.chunks_mut(PAGE).enumerate().filter(|(at, _)| at % 4 == 1) {
            page.copy_from_slice(&noise(at as u64 + 7, page.len()));
        }
        let pair = Self { dir, new, old };
        fs::write(pair.src(), &pair.new).unwrap();
        fs::write(pair.dst(), &pair.old).unwrap();
        pair
    }

    pub fn src(&self) -> PathBuf {
        self.dir.path().join("src")
    }

    pub fn dst(&self) -> PathBuf {
        self.dir.path().join("dst")
    }

    pub fn partial(&self) -> PathBuf {
        self.dir.path().join(".pagewire/dst.partial")
    }

    /// `copy src dst` with further arguments.
    pub fn copy<'a>(&'a self, src: &'a str, dst: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        [&["copy", src, dst], more].concat()
    }
}

/// Sends a signal; false if there is no such process any more.
pub fn signal(pid: u32, name: &str) -> bool {
    // Zero would be everybody.
    assert_ne!(pid, 0);
    let status = Command::new("kill").args([name, &pid.to_string()]).stderr(Stdio::null()).status();
    status.unwrap().success()
}

/// A process that is killed when it is not needed any more.
pub struct Running(pub Child);

impl Running {
    pub fn start(args: &[&str]) -> Self {
        Self(command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Waits for the first line on standard output.
    pub fn first_line(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        line
    }

    pub fn signal(&self, name: &str) {
        assert!(signal(self.0.id(), name), "it runs no more");
    }

    /// Waits for the end, and for what it said on standard error.
    pub fn end(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        let status = {
            let mut stderr = self.0.stderr.take().unwrap();
            stderr.read_to_string(&mut said).unwrap();
            self.0.wait().unwrap()
        };
        (status, said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `pagewire receive` into a folder, ready.
pub struct Receiver {
    pub process: Running,
    pub address: String,
}

impl Receiver {
    pub fn start(dir: &Path, more: &[&str]) -> Self {
        Self::listen("tcp://127.0.0.1:0", &[&["--into", dir.to_str().unwrap()], more].concat())
    }

    pub fn listen(address: &str, more: &[&str]) -> Self {
        let mut process = Running::start(&[&["receive", "--listen", address], more].concat());
        let mut lines = BufReader::new(process.0.stderr.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        let address = first.strip_prefix("listening on ").unwrap_or_else(|| panic!("{first}")).to_owned();
        // The rest is read so that the receiver never waits for somebody to read it.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| println!("receiver: {line}")));
        Self { process, address }
    }

    pub fn port(&self) -> String {
        self.address.strip_prefix("tcp://").unwrap().to_owned()
    }
}

/// Waits until `done`, for ten seconds at most.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(10), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A small file system of its own, for root; elsewhere the test is skipped, and says so.
pub struct Mounted(PathBuf);

impl Mounted {
    pub fn tmpfs(dir: &Path, options: &str) -> Option<Self> {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(dir.to_path_buf()));
        }
        println!("SKIPPED: mounting a tmpfs needs root");
        None
    }

    pub fn remount(&self, options: &str) {
        let status = Command::new("mount").args(["-o", options]).arg(&self.0).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
