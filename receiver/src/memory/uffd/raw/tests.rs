//! The calls against the kernel itself, with threads that touch what is missing.

use super::super::{FaultKind, Stop};
use super::*;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

const PAGE: usize = PAGE_BYTES;

/// One with these features for `bytes` of memory, all of it watched; the way says which memory.
fn watched(mapping: io::Result<(Mapping, Option<File>)>, features: Features, watch: Watch) -> Option<Watched> {
    let start = || -> Result<Watched, Box<dyn std::error::Error>> {
        let (mapping, file) = mapping?;
        // Programs alone need no privilege.
        let uffd = match Uffd::open(FaultsOf::Everybody, features) {
            Err(UffdError::NotPermitted(_)) => Uffd::open(FaultsOf::Programs, features)?,
            other => other?,
        };
        let ioctls = uffd.register_mapping(&mapping, 0..usize::MAX, watch)?;
        Ok(Watched { uffd, mapping: Arc::new(mapping), file, ioctls })
    };
    let skip = |error: Box<dyn std::error::Error>| {
        io::stderr().write_all(format!("SKIPPED: userfaultfd: {error}\n").as_bytes()).unwrap()
    };
    start().map_err(skip).ok()
}

struct Watched {
    uffd: Uffd,
    mapping: Arc<Mapping>,
    file: Option<File>,
    ioctls: Ioctls,
}

fn private(pages: usize) -> io::Result<(Mapping, Option<File>)> {
    Ok((Mapping::new(pages * PAGE)?, None))
}

fn shared(bytes: usize, huge: bool) -> io::Result<(Mapping, Option<File>)> {
    Mapping::shared(bytes, huge).map(|(mapping, file)| (mapping, Some(file)))
}

impl Watched {
    fn at(&self, page: usize) -> u64 {
        (self.mapping.start().addr().get() + page * PAGE) as u64
    }

    fn pages(&self, pages: Range<usize>) -> Range<u64> {
        self.at(pages.start)..self.at(pages.end)
    }

    fn copy(&self, page: usize, bytes: &[u8]) -> Filled {
        self.uffd.copy(self.at(page), bytes, PAGE as u64, Wake::Now)
    }

    /// A thread that reads a byte of a page.
    fn reader(&self, page: usize) -> JoinHandle<u8> {
        let mapping = self.mapping.clone();
        spawn(move || {
            let mut byte = [0];
            mapping.read(page * PAGE + 5, &mut byte).unwrap();
            byte[0]
        })
    }

    /// The next message, waited for.
    fn message(&self) -> Message {
        let (mut messages, start) = (Vec::new(), Instant::now());
        while self.uffd.read(&mut messages).unwrap() == 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "no message came");
            sleep(Duration::from_millis(1));
        }
        assert_eq!(messages.len(), 1, "{messages:?}");
        messages.remove(0)
    }

    /// Reads a byte the way the kernel does, to which a page that is a signal is an error.
    fn peek(&self, page: usize) -> io::Result<u8> {
        let mut byte = [0];
        File::open("/proc/self/mem")?.read_exact_at(&mut byte, self.at(page))?;
        Ok(byte[0])
    }
}

fn filled(installed: usize, present: usize) -> Filled {
    Filled { installed: (installed * PAGE) as u64, present: (present * PAGE) as u64, stop: None }
}

#[test]
fn a_thread_that_touches_a_page_waits_until_it_is_there() {
    let kinds = [private(8), shared(8 * PAGE, false)];
    for (kind, features) in kinds.into_iter().zip([Features::THREAD_ID, Features::THREAD_ID | Features::MISSING_SHMEM])
    {
        let Some(memory) = watched(kind, features, Watch::MISSING) else { return };
        assert!(memory.ioctls.copies() && memory.ioctls.zeroes());
        let reader = memory.reader(3);
        let Message::Fault { address, kind: FaultKind::Missing, write: false, thread: Some(_) } = memory.message()
        else {
            panic!("no fault");
        };
        assert_eq!(address, memory.at(3));
        sleep(Duration::from_millis(5));
        assert!(!reader.is_finished(), "it waits");
        assert_eq!(memory.copy(3, &[7; PAGE]), filled(1, 0));
        assert_eq!(reader.join().unwrap(), 7);
        assert_eq!(memory.uffd.zero(memory.pages(2..5), Wake::Now), filled(2, 1), "what is there stays");
        assert_eq!((memory.peek(2).unwrap(), memory.peek(3).unwrap()), (0, 7));
    }
}

#[test]
fn pages_that_are_there_stay_and_who_waits_for_them_is_woken() {
    let Some(memory) = watched(private(8), Features::NONE, Watch::MISSING) else { return };
    assert_eq!(memory.uffd.copy(memory.at(3), &[1; PAGE], PAGE as u64, Wake::Later), filled(1, 0));
    assert_eq!(memory.copy(0, &[2; 8 * PAGE]), filled(7, 1));
    assert_eq!(memory.copy(0, &[3; 8 * PAGE]), filled(0, 8));
    let bytes: Vec<u8> = (0..8).map(|page| memory.peek(page).unwrap()).collect();
    assert_eq!(bytes, [2, 2, 2, 1, 2, 2, 2, 2]);
}

#[test]
fn who_is_not_woken_waits_until_somebody_does() {
    let Some(memory) = watched(private(2), Features::NONE, Watch::MISSING) else { return };
    let reader = memory.reader(1);
    memory.message();
    assert_eq!(memory.uffd.copy(memory.at(1), &[4; PAGE], PAGE as u64, Wake::Later), filled(1, 0));
    sleep(Duration::from_millis(20));
    assert!(!reader.is_finished());
    // A second loader comes too late, and wakes.
    assert_eq!(memory.copy(1, &[5; PAGE]), filled(0, 1));
    assert_eq!(reader.join().unwrap(), 4);
}

#[test]
fn addresses_that_are_not_watched_are_gone() {
    let Some(memory) = watched(private(4), Features::NONE, Watch::MISSING) else { return };
    memory.uffd.unregister(memory.pages(2..4)).unwrap();
    assert_eq!(memory.copy(2, &[1; PAGE]).stop, Some(Stop::RangeGone));
    assert_eq!(memory.copy(1, &[1; 2 * PAGE]).stop, Some(Stop::RangeGone), "two mappings");
    assert_eq!(memory.copy(1, &[1; PAGE]), filled(1, 0));
    assert_eq!(
        memory.uffd.copy(memory.at(0) + 8, &[1; PAGE], PAGE as u64, Wake::Now).stop,
        Some(Stop::Refused(Errno::INVAL))
    );
    assert_eq!(
        memory.uffd.copy(memory.at(0), &[1; 100], PAGE as u64, Wake::Now).stop,
        Some(Stop::Refused(Errno::INVAL))
    );
    assert_eq!(memory.peek(3).unwrap(), 0);
}

#[test]
fn a_page_that_is_lost_is_an_error_and_no_zero() {
    let Some(memory) = watched(private(4), Features::POISON, Watch::MISSING) else { return };
    assert!(memory.ioctls.poisons());
    assert_eq!(memory.uffd.poison(memory.pages(1..3), PAGE as u64, Wake::Now), filled(2, 0));
    assert!(memory.peek(1).is_err() && memory.peek(2).is_err());
    assert_eq!(memory.uffd.zero(memory.pages(0..1), Wake::Now), filled(1, 0));
    assert_eq!(memory.copy(1, &[1; PAGE]), filled(1, 0), "it may be found after all");
    assert_eq!(memory.peek(1).unwrap(), 1);
}

#[test]
fn minor_faults_are_answered_by_what_the_file_has() {
    let features = Features::MINOR_SHMEM | Features::MISSING_SHMEM;
    let Some(memory) = watched(shared(4 * PAGE, false), features, Watch::MINOR) else { return };
    assert!(memory.ioctls.maps());
    memory.file.as_ref().unwrap().write_all_at(&[9; 2 * PAGE], PAGE as u64).unwrap();
    let reader = memory.reader(1);
    let Message::Fault { kind: FaultKind::Minor, .. } = memory.message() else { panic!("no minor fault") };
    assert_eq!(memory.uffd.map(memory.pages(1..3), PAGE as u64, Wake::Now), filled(2, 0));
    assert_eq!(reader.join().unwrap(), 9);
    assert_eq!(memory.uffd.map(memory.pages(1..3), PAGE as u64, Wake::Now), filled(0, 2));
}

#[test]
fn writes_to_protected_pages_wait_and_reads_do_not() {
    let watch = Watch::MISSING | Watch::WRITES;
    let Some(memory) = watched(private(4), Features::WRITE_PROTECT, watch) else { return };
    assert!(memory.ioctls.protects());
    let copied = memory.uffd.copy_protected(memory.at(0), &[1; 2 * PAGE], PAGE as u64, Wake::Now);
    assert_eq!(copied, filled(2, 0));
    assert_eq!(memory.peek(1).unwrap(), 1);
    let (at, mapping) = (memory.at(1), memory.mapping.clone());
    let writer = spawn(move || {
        // SAFETY: inside the mapping, and nobody else in this language looks at it but by copying out.
        let byte = unsafe { AtomicU8::from_ptr(mapping.start().as_ptr().add(PAGE)) };
        byte.store(2, Ordering::Relaxed);
    });
    let Message::Fault { kind: FaultKind::WriteProtected, write: true, address, .. } = memory.message() else {
        panic!("no fault of a write");
    };
    assert_eq!((address, memory.peek(1).unwrap()), (at, 1));
    memory.uffd.protect(memory.pages(1..2), false).unwrap();
    writer.join().unwrap();
    assert_eq!(memory.peek(1).unwrap(), 2);
    memory.uffd.protect(memory.pages(1..2), true).unwrap();
}

#[test]
fn nothing_is_put_in_while_memory_is_thrown_away_and_nobody_knows() {
    let Some(memory) = watched(private(8), Features::EVENT_REMOVE, Watch::MISSING) else { return };
    memory.copy(0, &[1; 4 * PAGE]);
    let mapping = memory.mapping.clone();
    let balloon = spawn(move || mapping.discard(2 * PAGE, 4 * PAGE, false));
    let start = Instant::now();
    // A page that is there changes nothing until the removal is under way.
    while memory.copy(0, &[2; PAGE]).stop != Some(Stop::Changing) {
        assert!(start.elapsed() < Duration::from_secs(10));
        sleep(Duration::from_millis(1));
    }
    assert!(!balloon.is_finished(), "it waits for its message to be read");
    let Message::Removed(addresses) = memory.message() else { panic!("no removal") };
    assert_eq!(addresses, memory.pages(2..6));
    balloon.join().unwrap().unwrap();
    assert_eq!(memory.copy(1, &[5; 5 * PAGE]), filled(4, 1));
}

#[test]
fn unmapping_and_moving_are_told() {
    let features = Features::EVENT_UNMAP | Features::EVENT_REMAP;
    let Some(memory) = watched(private(8), features, Watch::MISSING) else { return };
    let (start, room) = (memory.at(0), Mapping::new(8 * PAGE).unwrap());
    let target = room.start().addr().get();
    let mover = spawn(move || {
        let old = std::ptr::without_provenance_mut((start as usize) + 4 * PAGE);
        let new = std::ptr::without_provenance_mut(target);
        // SAFETY: both are mappings of this test, which nobody uses but through the kernel.
        unsafe { rustix::mm::mremap_fixed(old, 2 * PAGE, 2 * PAGE, MremapFlags::MAYMOVE, new) }.map(drop)
    });
    let Message::Remapped { from, to, bytes } = memory.message() else { panic!("no move") };
    assert_eq!((from, to, bytes), (memory.at(4), target as u64, 2 * PAGE as u64));
    let Message::Unmapped(addresses) = memory.message() else { panic!("the old place is not unmapped") };
    assert_eq!(addresses, memory.pages(4..6));
    mover.join().unwrap().unwrap();
    assert_eq!(memory.uffd.copy(to, &[6; 2 * PAGE], PAGE as u64, Wake::Now), filled(2, 0));
    let mut byte = [0];
    room.read(PAGE, &mut byte).unwrap();
    assert_eq!(byte, [6]);
    let unmapper = spawn(move || {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        let at = std::ptr::without_provenance_mut(start as usize + PAGE);
        // SAFETY: over pages of a mapping of this test, which nobody uses.
        unsafe { rustix::mm::mmap_anonymous(at, PAGE, ProtFlags::READ, flags) }.map(drop)
    });
    let Message::Unmapped(addresses) = memory.message() else { panic!("not unmapped") };
    assert_eq!(addresses, memory.pages(1..2));
    unmapper.join().unwrap().unwrap();
    assert_eq!(memory.copy(1, &[1; PAGE]).stop, Some(Stop::RangeGone));
    // The mappings that go with this test would wait for somebody to read of it.
    memory.uffd.unregister(memory.pages(0..1)).unwrap();
    memory.uffd.unregister(memory.pages(2..4)).unwrap();
    memory.uffd.unregister(memory.pages(6..8)).unwrap();
    memory.uffd.unregister(to..to + 2 * PAGE as u64).unwrap();
}

#[test]
fn a_child_has_a_descriptor_of_its_own_until_it_is_gone() {
    let Some(memory) = watched(private(4), Features::EVENT_FORK, Watch::MISSING) else { return };
    // A user is asked for, so that the child is forked and not just spawned.
    let child = spawn(|| Command::new("/bin/true").uid(rustix::process::getuid().as_raw()).status());
    let start = Instant::now();
    let mut messages = Vec::new();
    while !child.is_finished() {
        assert!(start.elapsed() < Duration::from_secs(10));
        memory.uffd.read(&mut messages).unwrap();
        sleep(Duration::from_millis(1));
    }
    assert!(child.join().unwrap().unwrap().success());
    // Other tests of this program may fork too.
    let Some(Message::Forked(fd)) = messages.into_iter().next() else { panic!("no child") };
    let child = Uffd::handed_over(fd).unwrap();
    let stop = child.copy(memory.at(0), &[1; PAGE], PAGE as u64, Wake::Now).stop;
    assert_eq!(stop, Some(Stop::ProcessGone));
    assert_eq!(memory.copy(0, &[1; PAGE]), filled(1, 0));
}

#[test]
fn huge_pages_are_put_in_as_a_whole() {
    const HUGE: usize = 2 << 20;
    let Some(memory) = watched(shared(3 * HUGE, true), Features::MISSING_HUGETLBFS, Watch::MISSING) else { return };
    assert!(memory.ioctls.copies() && !memory.ioctls.zeroes());
    let copy = |bytes: &[u8]| memory.uffd.copy(memory.at(0), bytes, HUGE as u64, Wake::Now);
    let reader = memory.reader(700);
    let Message::Fault { address, .. } = memory.message() else { panic!("no fault") };
    assert_eq!(address, memory.at(512), "the beginning of the huge page");
    let second = memory.uffd.copy(memory.at(512), &vec![2; HUGE], HUGE as u64, Wake::Now);
    assert_eq!(second, filled(512, 0));
    assert_eq!(reader.join().unwrap(), 2);
    assert_eq!(copy(&vec![1; 3 * HUGE]), filled(1024, 512));
    assert_eq!((memory.peek(0).unwrap(), memory.peek(600).unwrap(), memory.peek(1500).unwrap()), (1, 2, 1));
}

#[test]
fn what_is_handed_over_must_be_a_userfaultfd() {
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    assert!(matches!(Uffd::handed_over(null), Err(UffdError::Foreign)));
    let Some(memory) = watched(private(4), Features::NONE, Watch::MISSING) else { return };
    let other = Uffd::handed_over(memory.uffd.duplicate().unwrap()).unwrap();
    let reader = memory.reader(2);
    drop(memory.uffd);
    sleep(Duration::from_millis(20));
    assert!(!reader.is_finished(), "while a duplicate is open, nobody sees a zero");
    let at = (memory.mapping.start().addr().get() + 2 * PAGE) as u64;
    assert_eq!(other.copy(at, &[8; PAGE], PAGE as u64, Wake::Now), filled(1, 0));
    assert_eq!(reader.join().unwrap(), 8);
    let mapping = memory.mapping.clone();
    let waits = spawn(move || {
        let mut byte = [1];
        mapping.read(0, &mut byte).unwrap();
        byte[0]
    });
    let mut messages = Vec::new();
    while other.read(&mut messages).unwrap() == 0 {
        sleep(Duration::from_millis(1));
    }
    drop(other);
    assert_eq!(waits.join().unwrap(), 0, "why a duplicate is kept");
}

#[test]
fn a_feature_that_the_kernel_lacks_is_named() {
    let Some(_) = watched(private(1), Features::NONE, Watch::MISSING) else { return };
    let odd = Features::from_bits(1 << 50);
    let error = Uffd::open(FaultsOf::Programs, odd | Features::THREAD_ID).unwrap_err();
    assert!(matches!(error, UffdError::Lacks(Missing(lacks)) if lacks == odd), "{error}");
}
