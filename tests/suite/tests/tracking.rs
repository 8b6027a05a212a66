//! Memory that is written while it is followed: no write is missed, whoever tells of them.
//!
//! A writer increments one byte in each page, in order, without end; `follower` says what must come of it.
#![expect(clippy::cast_possible_truncation, reason = "tests choose their numbers")]
#![expect(clippy::unwrap_used, reason = "memory that cannot be followed has failed its test")]

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{InstallSize, Layout, Region};
use pagewire_sender::GuestMemory;
use pagewire_sender::memory::{BitmapMemory, DirtyBitmap, FileMemory, MappedMemory, MappedRegion, Mapping};
use pagewire_test_support::follower::{Follower, check_one_edge};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::skip;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PAGES: usize = 2048;
const ROUNDS: usize = 25;
/// Writes that a round waits for, so that there is something to miss.
const WRITES_A_ROUND: u64 = 300;
/// Where in a page is written.
const OFFSET: usize = 1001;

/// A thread that writes until it is stopped.
struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Increments a byte of the pages that `next` names, and tells `marks` of it, if that has to be told.
    fn start(
        mapping: Arc<Mapping>,
        marks: Option<DirtyBitmap>,
        mut next: impl FnMut() -> usize + Send + 'static,
    ) -> Self {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), written.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let page = next();
                mapping.byte(page * PAGE_BYTES + OFFSET).unwrap().fetch_add(1, Ordering::Relaxed);
                marks.iter().for_each(|marks| marks.mark(page as u64..page as u64 + 1));
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, written, thread }
    }

    /// Writes to the pages in order, and goes on after `before` writes.
    fn in_order<M>(kind: &Kind<M>, before: u64) -> Self {
        let mut pages = (0..PAGES).cycle().skip(before as usize % PAGES);
        Self::start(kind.mapping.clone(), kind.marks.clone(), move || pages.next().unwrap_or(0))
    }

    fn wait(&self) {
        let until = self.written.load(Ordering::Relaxed) + WRITES_A_ROUND;
        while self.written.load(Ordering::Relaxed) < until {
            std::thread::yield_now();
        }
    }

    /// Stops it; says how often it wrote.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.written.load(Ordering::Relaxed)
    }
}

/// A kind of memory over a mapping, and the marks that its writers have to set.
struct Kind<M> {
    memory: M,
    mapping: Arc<Mapping>,
    marks: Option<DirtyBitmap>,
}

fn mapped(mapping: Mapping) -> Kind<MappedMemory> {
    let mapping = Arc::new(mapping);
    let region = MappedRegion::of(mapping.clone(), InstallSize::KIB_4);
    Kind { memory: MappedMemory::new(vec![region]).unwrap(), mapping, marks: None }
}

fn private() -> Kind<MappedMemory> {
    mapped(Mapping::private(PAGES * PAGE_BYTES).unwrap())
}

fn shared() -> Kind<MappedMemory> {
    mapped(Mapping::shared(PAGES * PAGE_BYTES).unwrap())
}

fn marked() -> Kind<BitmapMemory<MappedMemory>> {
    let Kind { memory, mapping, .. } = private();
    let memory = BitmapMemory::new(memory);
    Kind { marks: Some(memory.dirty()), memory, mapping }
}

/// A memory file that somebody else has mapped.
fn live() -> Kind<FileMemory> {
    let mapping = Arc::new(Mapping::shared(PAGES * PAGE_BYTES).unwrap());
    let path = format!("/proc/self/fd/{}", mapping.file().unwrap().as_raw_fd());
    Kind { memory: FileMemory::open_live(path.as_ref(), InstallSize::KIB_4).unwrap(), mapping, marks: None }
}

/// Whether writes can be watched here; says so if not.
fn can_track<M: GuestMemory>(kind: &mut Kind<M>) -> bool {
    let skip = |error| skip(format!("memory that is watched: {error}"));
    kind.memory.start_tracking().map_err(skip).is_ok()
}

/// The follower's last round, after which it must have everything.
fn finish<M: GuestMemory>(follower: &mut Follower, writer: Writer, kind: &mut Kind<M>) -> u64 {
    let written = writer.stop();
    follower.round(&mut kind.memory).unwrap();
    check_one_edge(&follower.image, OFFSET);
    follower.check(&mut kind.memory);
    written
}

/// Stops the writer soon after each round, before it can make up for a write that was missed by another to that page.
fn follows<M: GuestMemory>(mut kind: Kind<M>) {
    if !can_track(&mut kind) {
        return;
    }
    let (mut writer, mut written) = (Writer::in_order(&kind, 0), 0);
    writer.wait();
    let mut follower = Follower::start(&mut kind.memory).unwrap();
    for _ in 0..ROUNDS {
        writer.wait();
        let dirty = follower.round(&mut kind.memory).unwrap();
        assert_ne!(dirty.count(), 0, "there were writes");
        written += finish(&mut follower, writer, &mut kind);
        writer = Writer::in_order(&kind, written);
    }
    finish(&mut follower, writer, &mut kind);
}

#[test]
fn follows_a_private_mapping_with_one_edge() {
    follows(private());
}

#[test]
fn follows_a_shared_mapping_with_one_edge() {
    follows(shared());
}

#[test]
fn follows_a_bitmap_of_the_embedder_with_one_edge() {
    follows(marked());
}

#[test]
fn follows_a_live_file_by_reading_it_again_with_one_edge() {
    follows(live());
}

/// An attempt takes harvests and fails; the next one goes on from what an older one had copied.
fn survives_failed_attempts<M: GuestMemory>(mut kind: Kind<M>) {
    if !can_track(&mut kind) {
        return;
    }
    let writer = Writer::in_order(&kind, 0);
    let mut follower = Follower::start(&mut kind.memory).unwrap();
    for _ in 0..ROUNDS {
        let mut harvested = PageBitmap::new(PAGES as u64);
        for _ in 0..3 {
            writer.wait();
            kind.memory.harvest(&mut harvested).unwrap();
        }
        assert_ne!(harvested.count(), 0, "there were writes");
        kind.memory.put_back(&harvested);
    }
    follower.round(&mut kind.memory).unwrap();
    finish(&mut follower, writer, &mut kind);
}

#[test]
fn a_mapping_loses_nothing_to_attempts_that_failed() {
    survives_failed_attempts(private());
    survives_failed_attempts(shared());
}

#[test]
fn a_bitmap_loses_nothing_to_attempts_that_failed() {
    survives_failed_attempts(marked());
}

/// The guest is paused, the attempt ends for good, and another begins with what is dirty.
fn survives_a_new_start<M: GuestMemory>(mut kind: Kind<M>) {
    if !can_track(&mut kind) {
        return;
    }
    let mut follower = Follower::start(&mut kind.memory).unwrap();
    let writer = Writer::in_order(&kind, 0);
    writer.wait();
    let mut harvested = PageBitmap::new(PAGES as u64);
    kind.memory.harvest(&mut harvested).unwrap();
    writer.wait();
    kind.memory.put_back(&harvested);
    writer.stop();
    kind.memory.stop_tracking();
    kind.memory.start_tracking().unwrap();
    let writer = Writer::in_order(&kind, 0);
    writer.wait();
    writer.stop();
    follower.round(&mut kind.memory).unwrap();
    follower.check(&mut kind.memory);
}

#[test]
fn what_was_dirty_when_tracking_stopped_is_dirty_for_the_next_attempt() {
    survives_a_new_start(private());
    survives_a_new_start(shared());
    survives_a_new_start(marked());
}

/// Several writers all over the place, and harvests without a pause.
fn follows_many_writers<M: GuestMemory>(mut kind: Kind<M>) {
    if !can_track(&mut kind) {
        return;
    }
    let start = |seed| {
        let mut rng = Rng::new(seed);
        Writer::start(kind.mapping.clone(), kind.marks.clone(), move || rng.below(PAGES as u64) as usize)
    };
    let writers: Vec<Writer> = (0..4).map(start).collect();
    let mut follower = Follower::start(&mut kind.memory).unwrap();
    for _ in 0..10 * ROUNDS {
        follower.round(&mut kind.memory).unwrap();
    }
    writers.into_iter().for_each(|writer| _ = writer.stop());
    follower.round(&mut kind.memory).unwrap();
    follower.check(&mut kind.memory);
}

#[test]
fn writes_during_a_harvest_are_in_it_or_in_the_next() {
    follows_many_writers(private());
    follows_many_writers(shared());
    follows_many_writers(marked());
}

/// A page is marked again only after its last mark came out, so that none makes up for one that was lost.
#[test]
fn every_mark_comes_out_once() {
    const PLACES: usize = 128;
    const WRITERS: usize = 2;
    let region = Region { bytes: (PLACES * PAGE_BYTES) as u64, install_size: InstallSize::KIB_4 };
    let marks = DirtyBitmap::new(&Layout::new(vec![region]).unwrap());
    let counts = || -> Arc<Vec<AtomicU64>> { Arc::new((0..PLACES).map(|_| AtomicU64::new(0)).collect()) };
    let (marked, came, stop) = (counts(), counts(), Arc::new(AtomicBool::new(false)));
    let writer = |first: usize| {
        let (marks, marked, came, stop) = (marks.clone(), marked.clone(), came.clone(), stop.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                for place in (first..PLACES).step_by(WRITERS) {
                    if marked[place].load(Ordering::Relaxed) == came[place].load(Ordering::Relaxed) {
                        marked[place].fetch_add(1, Ordering::Relaxed);
                        marks.mark(place as u64..place as u64 + 1);
                    }
                }
            }
        })
    };
    let writers: Vec<_> = (0..WRITERS).map(writer).collect();
    let take = || {
        let mut taken = PageBitmap::new(PLACES as u64);
        marks.take(&mut taken);
        taken.runs(0..u64::MAX).flatten().for_each(|place| _ = came[place as usize].fetch_add(1, Ordering::Relaxed));
    };
    // Until all places had their turns; where a mark was lost, its place waits for ever.
    let given_up = Instant::now() + Duration::from_secs(20);
    while marked.iter().any(|count| count.load(Ordering::Relaxed) < 500) && Instant::now() < given_up {
        take();
    }
    stop.store(true, Ordering::Relaxed);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    take();
    let numbers = |counts: &[AtomicU64]| counts.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
    assert_eq!(numbers(&marked), numbers(&came));
}

/// The checks above would be worth nothing if they held of a follower that misses a write.
#[test]
fn a_harvest_that_is_thrown_away_is_noticed() {
    let mut kind = marked();
    let writer = Writer::in_order(&kind, 0);
    let mut follower = Follower::start(&mut kind.memory).unwrap();
    writer.wait();
    writer.stop();
    kind.memory.harvest(&mut PageBitmap::new(PAGES as u64)).unwrap();
    follower.round(&mut kind.memory).unwrap();
    let missed = std::panic::AssertUnwindSafe(|| follower.check(&mut kind.memory));
    assert!(std::panic::catch_unwind(missed).is_err());
}
