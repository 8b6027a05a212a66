//! A process that serves a guest's page faults is killed at random instants, again and again (C30 to C32, A32).
//!
//! This program is the guest, its supervisor and, started anew, each of the handlers. The supervisor keeps a duplicate of
//! the descriptor: while nobody serves, threads of the guest wait, and never see a zero. `PAGEWIRE_KILLS` says how many
//! handlers die; a few are enough to find what is wrong at all, ten thousand belong to `check.sh long`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "tests choose their numbers")]

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::page::{InstallSize, Layout, Region, RegionId};
use pagewire_protocol::time::Time;
use pagewire_receiver::memory::uffd::{FaultsOf, UffdError};
use pagewire_receiver::memory::{Backing, HandedRegion, PostcopyError, PostcopyMemory};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

const PAGE: usize = 4096;
const PAGES: u64 = 4096;
const MAIN: RegionId = RegionId(0);
/// Handlers that die over one memory before it is filled and another one begins.
const KILLS_A_MEMORY: u64 = 16;
const KILLS_DEFAULT: u64 = 48;
/// Says on a handler's standard output that it has taken over.
const SERVES: u8 = 1;
/// Where a handler finds its table.
const TABLE: &str = "PAGEWIRE_TEST_HANDLER";

/// What a page holds: no word is zero, and all differ.
fn content(page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    let (words, _) = bytes.as_chunks_mut::<8>();
    for (at, word) in words.iter_mut().enumerate() {
        *word = ((0xface << 48) | (page << 12) | at as u64).to_ne_bytes();
    }
    bytes
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// The handler's process. It does nothing where it is run as a test.
#[test]
fn serves_until_it_is_killed() {
    let Ok(table) = std::env::var(TABLE) else { return };
    let numbers: Vec<u64> = table.split(' ').map(|number| number.parse().unwrap()).collect();
    let &[owner, address, bytes, page_bytes, seed] = numbers.as_slice() else { panic!("{table}") };
    let uffd = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let memory = PostcopyMemory::handed_over(uffd, &[HandedRegion { address, bytes, page_bytes }]).unwrap();
    memory.recall(&File::open(format!("/proc/{owner}/pagemap")).unwrap(), None).unwrap();
    io::stdout().write_all(&[SERVES]).unwrap();
    io::stdout().flush().unwrap();
    let mut random = Random(seed);
    let install = |first: u64, count: u64| {
        let bytes: Vec<u8> = (first..first + count).flat_map(content).collect();
        match memory.install(MAIN, first, &bytes, Time::ZERO) {
            Ok(_) | Err(PostcopyError::Busy) => {}
            Err(PostcopyError::ProcessGone) => std::process::exit(0),
            Err(error) => panic!("{error}"),
        }
    };
    loop {
        let mut fds = [PollFd::from_borrowed_fd(memory.as_fd(), PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 50_000 })).unwrap();
        let news = memory.gather(Time::ZERO).unwrap();
        assert_eq!(news.odd, 0, "{news:?}");
        while let Some(fault) = memory.next_fault() {
            install(fault.first, u64::from(fault.pages));
        }
        // What nobody has touched comes, too, more slowly than it is touched.
        let first = random.below(PAGES);
        install(first, (1 + random.below(4)).min(PAGES - first));
        if std::os::unix::process::parent_id() as u64 != owner {
            return;
        }
    }
}

/// A handler that dies with its supervisor's value.
struct Handler(Child);

impl Handler {
    fn start(memory: &PostcopyMemory, seed: u64) -> Self {
        let HandedRegion { address, bytes, page_bytes } = memory.table()[0];
        let table = format!("{} {address} {bytes} {page_bytes} {seed}", std::process::id());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "serves_until_it_is_killed", "--nocapture", "--test-threads=1"])
            .env(TABLE, table)
            .stdin(Stdio::from(memory.duplicate().unwrap()))
            .stdout(Stdio::piped())
            .spawn();
        Self(child.unwrap())
    }

    fn wait_until_it_serves(&mut self) {
        let (stdout, mut byte) = (self.0.stdout.as_mut().unwrap(), [0]);
        while byte != [SERVES] {
            stdout.read_exact(&mut byte).unwrap();
        }
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        assert_eq!(self.0.wait().unwrap().signal(), Some(9), "it was served until then");
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A thread of the guest: reads pages, and writes to those that are its own. Gives how many it has read.
fn guest(memory: &PostcopyMemory, number: u64, stop: &AtomicBool, seed: u64) -> u64 {
    let (mut random, mut written, mut reads) = (Random(seed), BTreeMap::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        let page = random.below(PAGES);
        let own = page % 8 == number;
        if own && random.below(2) == 0 {
            let word = (0xbeef << 48) | random.below(1 << 30);
            memory.store(MAIN, page * PAGE as u64 + 64, word).unwrap();
            written.insert(page, word);
        } else if own || page % 8 > 3 {
            let (mut bytes, mut expected) = ([0; PAGE], content(page));
            memory.read(MAIN, page * PAGE as u64, &mut bytes).unwrap();
            if let Some(word) = written.get(&page) {
                expected[64..72].copy_from_slice(&word.to_ne_bytes());
            }
            assert!(bytes == expected, "page {page}: {:?}", &bytes[..80]);
            reads += 1;
        }
    }
    reads
}

/// Fills what is still absent, so that all threads of the guest come to an end.
fn fill(memory: &PostcopyMemory) -> u64 {
    let there = memory.recall(&File::open("/proc/self/pagemap").unwrap(), None).unwrap();
    for page in 0..PAGES {
        memory.install(MAIN, page, &content(page), Time::ZERO).unwrap();
    }
    there
}

/// For everybody, else for programs alone, which needs no privilege.
fn arm(memory: &PostcopyMemory) -> Result<PageBitmap, PostcopyError> {
    let all = PageBitmap::full(PAGES);
    match memory.arm(&all, FaultsOf::Everybody) {
        Err(PostcopyError::Uffd(UffdError::NotPermitted(_))) => memory.arm(&all, FaultsOf::Programs),
        other => other,
    }
}

/// Sixteen handlers over one memory. Gives how many pages they put in, and how many the guest read.
fn kill_handlers(kills: u64, seed: u64) -> Option<(u64, u64)> {
    let region = Region { bytes: PAGES * PAGE as u64, install_size: InstallSize::KIB_4 };
    let memory = PostcopyMemory::new(Layout::new(vec![region]).unwrap(), Backing::Private).unwrap();
    if let Err(error) = arm(&memory) {
        io::stderr().write_all(format!("SKIPPED: the death of handlers: {error}\n").as_bytes()).unwrap();
        return None;
    }
    let (stop, read) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut random = Random(seed);
    let there = scope(|scope| {
        for number in 0..3 {
            let (memory, stop, read, seed) = (&memory, &stop, &read, random.below(1 << 30));
            scope.spawn(move || {
                // A thread that fails must not leave the others waiting for ever.
                let reads = std::panic::catch_unwind(|| guest(memory, number, stop, seed));
                read.fetch_add(reads.unwrap_or_else(|_| std::process::exit(101)), Ordering::Relaxed);
            });
        }
        for _ in 0..kills {
            let mut handler = Handler::start(&memory, random.below(1 << 30));
            // One of eight dies before it has taken over, perhaps while it does.
            if random.below(8) > 0 {
                handler.wait_until_it_serves();
            }
            sleep(Duration::from_micros(random.below(2500)));
            handler.kill();
        }
        stop.store(true, Ordering::Relaxed);
        fill(&memory)
    });
    for page in (0..PAGES).filter(|page| page % 8 > 3) {
        let mut bytes = [0; PAGE];
        memory.read(MAIN, page * PAGE as u64, &mut bytes).unwrap();
        assert!(bytes == content(page), "page {page}");
    }
    Some((there, read.into_inner()))
}

#[test]
fn the_death_of_a_handler_never_shows_a_zero_to_the_guest() {
    let kills = std::env::var("PAGEWIRE_KILLS").map_or(KILLS_DEFAULT, |kills| kills.parse().unwrap());
    let (mut there, mut read, mut left) = (0, 0, kills);
    while left > 0 {
        let some = left.min(KILLS_A_MEMORY);
        let Some((pages, reads)) = kill_handlers(some, 0x5eed ^ left) else { return };
        there += pages;
        read += reads;
        left -= some;
    }
    println!("{kills} handlers killed: they put in {there} pages, the guest read {read} and none was wrong");
    assert!(there > kills && read > kills, "{there} pages put in, {read} read: handlers hardly served");
}
