//! `pagewire demo`: a guest that keeps changing its memory moves from host A to host B and back.
//!
//! The hosts are two folders of this machine, each with a real receiver on loopback TCP; the guest is a small key-value
//! workload whose memory is a file. It runs, is paused, moves, and runs on where it arrived: what it left behind on A
//! is what the way back builds on.

use crate::args::Demo;
use crate::show::{print_json, size};
use anyhow::{Context, Result, bail, ensure};
use pagewire::{
    Address, CancellationToken, ImageName, Into, LandingOptions, NoObserver, ReceiveOptions, Report, SendOptions,
    Server, send,
};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const PAGE: usize = 4096;
/// Of the guest's pages: this share is in use, the rest was never touched.
const USED_SHARE: u64 = 4;
/// Pages a run of the workload rewrites: one in five of those in use.
const REWRITTEN_SHARE: u64 = 5;

/// A key-value workload in a memory file: records of words with a version, and a read-only part that holds the same
/// library several times, as memory does.
struct Guest {
    memory: File,
    pages: u64,
    random: u64,
}

impl Guest {
    fn create(path: &Path, bytes: u64) -> Result<Self> {
        let pages = bytes / PAGE as u64;
        ensure!(pages >= 1024, "the guest needs at least 4 MiB");
        let memory = File::options().read(true).write(true).create_new(true).open(path)?;
        memory.set_len(pages * PAGE as u64)?;
        let mut guest = Self { memory, pages, random: 1 };
        for page in 0..guest.used() {
            // One page in eight belongs to a library that is mapped more than once.
            let content = if page % 8 == 7 { page % 64 } else { guest.next() };
            guest.write(page, content)?;
        }
        Ok(guest)
    }

    fn resume(path: &Path, random: u64) -> Result<Self> {
        let memory = File::options().read(true).write(true).open(path)?;
        let pages = memory.metadata()?.len() / PAGE as u64;
        Ok(Self { memory, pages, random })
    }

    fn used(&self) -> u64 {
        self.pages - self.pages / USED_SHARE
    }

    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Fills a page with records that a content number decides.
    fn write(&self, page: u64, content: u64) -> Result<()> {
        const WORDS: [&str; 8] = ["page", "wire", "memory", "guest", "round", "digest", "visit", "lane"];
        let mut text = Vec::with_capacity(PAGE);
        let mut state = content | 1;
        while text.len() < PAGE {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let word = WORDS.get((state >> 61) as usize).copied().unwrap_or("page");
            text.extend_from_slice(format!("{{\"{word}\":{}}},", state >> 20).as_bytes());
        }
        text.truncate(PAGE);
        Ok(self.memory.write_all_at(&text, page * PAGE as u64)?)
    }

    /// The guest works for a while: it rewrites pages here and there.
    fn run(&mut self) -> Result<u64> {
        let rewritten = self.used() / REWRITTEN_SHARE;
        for _ in 0..rewritten {
            let (page, content) = (self.next() % self.used(), self.next());
            self.write(page, content)?;
        }
        Ok(rewritten)
    }
}

/// One host: a folder with a receiver.
struct Host {
    dir: PathBuf,
    address: Address,
    cancel: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Host {
    fn start(dir: PathBuf) -> Result<Self> {
        std::fs::create_dir(&dir)?;
        // In place: what comes back only writes what changed to the image that was left here.
        let landing = LandingOptions { inplace: true, fresh: false };
        let options = ReceiveOptions { landing, ..ReceiveOptions::new(Into::Folder(dir.clone())) };
        let cancel = options.cancel.clone();
        let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, options)?;
        let address = server.address()?;
        let thread =
            std::thread::Builder::new().name("pagewire-host".to_owned()).spawn(move || server.serve(|_| ()))?;
        Ok(Self { dir, address, cancel, thread: Some(thread) })
    }

    fn image(&self) -> PathBuf {
        self.dir.join("guest")
    }

    fn receive_from(&self, other: &Self) -> Result<Report> {
        // What the guest wrote before is on the disk already: the time shown is that of the transfer.
        for image in [self.image(), other.image()].into_iter().filter(|image| image.exists()) {
            File::open(image)?.sync_all()?;
        }
        let options = SendOptions::default();
        let report =
            send(&other.image(), &ImageName::new("guest")?, &self.address, &options, &mut NoObserver).into_result()?;
        ensure!(same(&self.image(), &other.image())?, "the images differ");
        Ok(report)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.cancel.cancel();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn same(left: &Path, right: &Path) -> Result<bool> {
    let seen = pagewire::inspect(left, Some(right))?;
    let length = |path: &Path| path.metadata().map(|info| info.len());
    Ok(seen.zero + seen.unchanged == seen.pages_total && length(left)? == length(right)?)
}

/// Runs the demo.
pub(crate) fn run(args: &Demo) -> Result<ExitCode> {
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::Builder::new().prefix("pagewire-demo").tempdir_in(&parent);
    let dir = dir.with_context(|| format!("no folder can be made in {}", parent.display()))?;
    let (a, b) = (Host::start(dir.path().join("a"))?, Host::start(dir.path().join("b"))?);
    let say = |text: String| {
        if !args.json {
            println!("{text}");
        }
    };
    say(format!("a guest with {} of memory runs on host A ({})", size(args.size), a.address));
    let mut guest = Guest::create(&a.image(), args.size)?;
    guest.run()?;
    let there = b.receive_from(&a).context("A to B")?;
    say(format!("it moved to host B ({}) and runs there", b.address));
    let rewritten = Guest::resume(&b.image(), guest.random)?.run()?;
    let back = a.receive_from(&b).context("B to A")?;
    say(format!("it rewrote {rewritten} pages and moved back to A, which still had what it left there\n"));
    if there.pages_total != back.pages_total {
        bail!("the image changed its size");
    }
    if args.json {
        print_json(&serde_json::json!({"a_to_b": there, "b_to_a": back, "rewritten": rewritten}));
    } else {
        print!("{}", table(&there, &back));
    }
    Ok(ExitCode::SUCCESS)
}

/// A row of the table: its name and how it reads from a report.
type Row = (&'static str, fn(&Report) -> String);

fn table(there: &Report, back: &Report) -> String {
    let rows: [Row; 8] = [
        ("image", |report| size(report.bytes_total)),
        ("pages", |report| report.pages_total.to_string()),
        ("  zero", |report| report.pages.zero.to_string()),
        ("  unchanged there", |report| report.pages.base.to_string()),
        ("  found there by digest", |report| report.pages.reference.to_string()),
        ("  sent with their bytes", |report| report.pages.inline.to_string()),
        ("on the wire", |report| size(report.wire.sent_bytes.saturating_add(report.wire.received_bytes))),
        ("time", |report| format!("{:.3} s", report.seconds)),
    ];
    let mut text = format!("{:<26}{:>14}{:>14}\n", "", "A to B", "B to A");
    for (name, cell) in rows {
        text += &format!("{name:<26}{:>14}{:>14}\n", cell(there), cell(back));
    }
    text + "both images were compared page by page after each move: equal\n"
}
