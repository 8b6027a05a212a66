//! Memory that is touched before it has arrived: real threads touch it, and several loaders put it in.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "tests choose their numbers")]

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::page::{InstallSize, Layout, Region, RegionId};
use pagewire_protocol::time::{Span, Time};
use pagewire_receiver::GuestSink;
use pagewire_receiver::memory::uffd::{FaultsOf, UffdError};
use pagewire_receiver::memory::{
    Backing, Gathered, HandedRegion, Odd, PostcopyError, PostcopyMemory, PostcopySink, TableError,
};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, scope, sleep, spawn};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const MAIN: RegionId = RegionId(0);

fn now() -> Time {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    Time::from_nanos(START.get_or_init(Instant::now).elapsed().as_nanos() as u64)
}

fn layout(regions: &[(usize, InstallSize)]) -> Layout {
    let region = |&(bytes, install_size): &(usize, InstallSize)| Region { bytes: bytes as u64, install_size };
    Layout::new(regions.iter().map(region).collect()).unwrap()
}

/// What a page holds: never zero, and different in each page.
fn content(region: RegionId, page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    let (words, _) = bytes.as_chunks_mut::<8>();
    for (at, word) in words.iter_mut().enumerate() {
        *word = (((u64::from(region.0) + 1) << 48) | (page << 12) | at as u64 | 1).to_ne_bytes();
    }
    bytes
}

fn contents(region: RegionId, pages: std::ops::Range<u64>) -> Vec<u8> {
    pages.flat_map(|page| content(region, page)).collect()
}

/// For everybody, else for programs alone, which needs no privilege.
fn arm(memory: &PostcopyMemory, absent: &PageBitmap) -> Result<PageBitmap, PostcopyError> {
    match memory.arm(absent, FaultsOf::Everybody) {
        Err(PostcopyError::Uffd(UffdError::NotPermitted(_))) => memory.arm(absent, FaultsOf::Programs),
        other => other,
    }
}

/// New memory of which everything is absent; `None`, said aloud, where that cannot be had.
fn armed(layout: Layout, backing: Backing) -> Option<Arc<PostcopyMemory>> {
    let all = PageBitmap::full(layout.pages());
    let start = || -> Result<Arc<PostcopyMemory>, PostcopyError> {
        let failed = |error| PostcopyError::Call { what: "memory cannot be mapped", error };
        let memory = PostcopyMemory::new(layout, backing).map_err(failed)?;
        arm(&memory, &all)?;
        Ok(Arc::new(memory))
    };
    match start() {
        Ok(memory) => Some(memory),
        Err(PostcopyError::Uffd(error @ UffdError::Call { .. })) => panic!("{error}"),
        Err(error) => {
            io::stderr()
                .write_all(format!("SKIPPED: post-copy into {backing:?} memory: {error}\n").as_bytes())
                .unwrap();
            None
        }
    }
}

fn reader(memory: &Arc<PostcopyMemory>, region: RegionId, page: u64) -> JoinHandle<Vec<u8>> {
    let memory = memory.clone();
    spawn(move || read(&memory, region, page))
}

fn read(memory: &PostcopyMemory, region: RegionId, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    let left = memory.layout().region(region).unwrap().bytes - page * PAGE as u64;
    memory.read(region, page * PAGE as u64, &mut bytes[..PAGE.min(left as usize)]).unwrap();
    bytes
}

/// Gathers until `enough`.
fn gather_until(memory: &PostcopyMemory, mut enough: impl FnMut(&Gathered) -> bool) -> Gathered {
    let (start, mut all) = (Instant::now(), Gathered::default());
    loop {
        let one = memory.gather(now()).unwrap();
        all.messages += one.messages;
        all.faults += one.faults;
        all.folded += one.folded;
        all.woken += one.woken;
        all.zeroed += one.zeroed;
        all.removed_pages += one.removed_pages;
        all.served.extend(one.served);
        all.odd += one.odd;
        all.odds.extend(one.odds);
        if enough(&all) {
            return all;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{all:?}");
        sleep(Duration::from_micros(200));
    }
}

#[test]
fn faults_of_many_threads_on_one_page_are_one_request() {
    let Some(memory) = armed(layout(&[(64 * PAGE, InstallSize::KIB_4)]), Backing::Private) else { return };
    let readers: Vec<_> = (0..8).map(|_| reader(&memory, MAIN, 17)).collect();
    let news = gather_until(&memory, |news| news.faults + news.folded == 8);
    assert_eq!((news.faults, news.folded), (1, 7));
    let fault = memory.next_fault().unwrap();
    assert_eq!((fault.region, fault.first, fault.pages, fault.page, fault.write), (MAIN, 17, 1, 17, false));
    assert!(memory.next_fault().is_none() && memory.waiting() == 1 && memory.waiting_since() == Some(fault.since));
    memory.renew_faults();
    assert_eq!(memory.next_fault(), Some(fault), "after a new connection");
    sleep(Duration::from_millis(3));
    let installed = memory.install(MAIN, 17, &content(MAIN, 17), now()).unwrap();
    assert_eq!((installed.pages, installed.already, installed.served.len()), (1, 0, 1));
    let waited = &installed.served[0].waited;
    let threads: std::collections::BTreeSet<_> = waited.iter().map(|(thread, _)| thread.unwrap()).collect();
    assert_eq!((waited.len(), threads.len()), (8, 8), "each thread's own time");
    assert!(waited.iter().all(|(_, span)| *span >= Span::from_millis(3)));
    for reader in readers {
        assert_eq!(reader.join().unwrap(), content(MAIN, 17));
    }
    assert!(memory.is_present(MAIN, 17) && memory.waiting() == 0 && memory.absent_pages() == 63);
}

/// Two loaders with all pages in different orders, and readers that touch them at random meanwhile.
fn loads_everything_once(layout: &Layout, backing: Backing) {
    let Some(memory) = armed(layout.clone(), backing) else { return };
    let stop = AtomicBool::new(false);
    let regions = || (0..layout.regions().len() as u16).map(RegionId);
    let new_pages: u64 = scope(|scope| {
        let readers: Vec<_> = (0..3u64)
            .map(|seed| {
                let memory = &memory;
                scope.spawn(move || {
                    let mut state = seed + 1;
                    for _ in 0..400 {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let region = RegionId((state >> 60) as u16 % layout.regions().len() as u16);
                        let pages = layout.region(region).unwrap().pages();
                        let page = (state >> 20) % pages;
                        let bytes = read(memory, region, page);
                        let left =
                            (layout.region(region).unwrap().bytes - page * PAGE as u64).min(PAGE as u64) as usize;
                        assert_eq!(bytes[..left], content(region, page)[..left], "page {page}");
                    }
                })
            })
            .collect();
        let load = |back: bool| {
            let (memory, regions) = (&memory, regions());
            move || {
                let mut new = 0;
                for region in regions {
                    let about = layout.region(region).unwrap();
                    let unit = u64::from(about.install_size.pages());
                    let units = about.pages().div_ceil(unit);
                    for at in 0..units {
                        let first = if back { units - 1 - at } else { at } * unit;
                        let pages = first..(first + unit).min(about.pages());
                        let installed = memory.install(region, first, &contents(region, pages.clone()), now()).unwrap();
                        let counted = installed.pages + installed.already + installed.elsewhere + installed.gone;
                        assert_eq!(counted, pages.end - pages.start);
                        assert_eq!(installed.gone, 0);
                        new += installed.pages;
                    }
                }
                new
            }
        };
        let loaders = [scope.spawn(load(false)), scope.spawn(load(true))];
        let gatherer = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let news = memory.gather(now()).unwrap();
                assert_eq!(news.odd, 0, "{news:?}");
                sleep(Duration::from_micros(50));
            }
        });
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        let new = loaders.map(|loader| loader.join().unwrap()).iter().sum();
        stop.store(true, Ordering::Relaxed);
        gatherer.join().unwrap();
        new
    });
    assert_eq!(new_pages, layout.pages(), "each page once");
    assert_eq!((memory.absent_pages(), memory.waiting()), (0, 0));
    memory.finish().unwrap();
    for region in regions() {
        let about = layout.region(region).unwrap();
        let mut bytes = vec![0; about.bytes as usize];
        memory.read(region, 0, &mut bytes).unwrap();
        assert!(bytes == contents(region, 0..about.pages())[..bytes.len()]);
    }
}

#[test]
fn two_loaders_never_put_a_page_in_twice() {
    let small = layout(&[(1500 * PAGE, InstallSize::KIB_4), (700 * PAGE - 100, InstallSize::KIB_4)]);
    for backing in [Backing::Private, Backing::Shared] {
        (0..3).for_each(|_| loads_everything_once(&small, backing));
    }
}

#[test]
fn larger_units_come_as_a_whole_and_their_last_is_short() {
    let larger = layout(&[(1000 * PAGE - 7, InstallSize::KIB_64), (1300 * PAGE, InstallSize::MIB_2)]);
    loads_everything_once(&larger, Backing::Private);
    loads_everything_once(&larger, Backing::SharedHuge);
}

/// Pages one by one, in an order that leaves many units open, each of them twice.
#[test]
fn pages_of_larger_units_wait_for_the_rest() {
    let larger = layout(&[(300 * PAGE - 7, InstallSize::KIB_64), (1100 * PAGE, InstallSize::MIB_2)]);
    for backing in [Backing::Private, Backing::Shared, Backing::SharedHuge] {
        let Some(memory) = armed(larger.clone(), backing) else { continue };
        let mut sink = PostcopySink::new(memory.clone(), FaultsOf::Everybody, Box::new(now));
        let all = || {
            (0..2).map(RegionId).flat_map(|region| {
                let pages = larger.region(region).unwrap().pages();
                // 7 and the number of pages have no divisor in common.
                (0..pages).map(move |at| (region, at * 7 % pages))
            })
        };
        let waiting = reader(&memory, MAIN, 299);
        gather_until(&memory, |news| news.faults == 1);
        let mut arrived = 0;
        for (region, page) in all() {
            if page % 5 == 4 && region == MAIN {
                sink.zero(region, page, 1).unwrap();
            } else {
                sink.install(region, page, &content(region, page)).unwrap();
            }
            arrived += 1;
            assert_eq!(memory.arrived().count(), arrived, "{region:?} {page}");
            sink.install(region, page, &[0xee; PAGE]).unwrap();
            let mut bytes = [1; PAGE];
            sink.read(region, page, &mut bytes).unwrap();
            let left = (larger.region(region).unwrap().bytes - page * PAGE as u64).min(PAGE as u64) as usize;
            let expected = if page % 5 == 4 && region == MAIN { [0; PAGE] } else { content(region, page) };
            assert!(bytes[..left] == expected[..left], "{region:?} {page}: the first counts");
        }
        assert_eq!((memory.absent_pages(), memory.waiting()), (0, 0));
        memory.finish().unwrap();
        assert_eq!(waiting.join().unwrap()[..PAGE - 7], [0; PAGE][..PAGE - 7]);
        assert!((0..1100).all(|page| read(&memory, RegionId(1), page) == content(RegionId(1), page)));
    }
}

#[test]
fn a_unit_is_complete_when_the_rest_of_it_was_thrown_away() {
    let Some(memory) = armed(layout(&[(64 * PAGE, InstallSize::KIB_64)]), Backing::Private) else { return };
    memory.install_pages(MAIN, 20, &contents(MAIN, 20..32), now()).unwrap();
    memory.zero_pages(MAIN, 30, 20, now()).unwrap();
    assert_eq!((memory.absent_pages(), memory.arrived().count()), (48, 30), "one unit of zeros, two in part");
    let waiting = reader(&memory, MAIN, 25);
    gather_until(&memory, |news| news.faults == 1);
    let balloon = spawn({
        let memory = memory.clone();
        move || memory.discard(MAIN, 10, 10).unwrap()
    });
    let news = gather_until(&memory, |news| news.removed_pages == 10);
    balloon.join().unwrap();
    assert_eq!(news.served.len(), 1, "the second unit is in");
    assert_eq!(waiting.join().unwrap(), content(MAIN, 25));
    assert_eq!(memory.absent_pages(), 10 + 16);
}

#[test]
fn no_more_is_kept_aside_than_may_be() {
    const UNITS: u64 = 260;
    let Some(memory) = armed(layout(&[(UNITS as usize * (2 << 20), InstallSize::MIB_2)]), Backing::Private) else {
        return;
    };
    let refused = (0..UNITS).find(|unit| memory.install_pages(MAIN, unit * 512, &[1; PAGE], now()).is_err());
    assert_eq!(refused, Some(256), "512 MiB");
    assert!(matches!(memory.install_pages(MAIN, 256 * 512, &[1; PAGE], now()), Err(PostcopyError::NoMemory)));
    memory.install_pages(MAIN, 1, &[1; 511 * PAGE], now()).unwrap();
    memory.install_pages(MAIN, 256 * 512, &[1; PAGE], now()).unwrap();
    assert!(matches!(memory.install_pages(MAIN, 0, &[1; 100], now()), Err(PostcopyError::Misuse(_))));
    assert!(matches!(memory.zero_pages(MAIN, u64::MAX, 2, now()), Err(PostcopyError::Misuse(_))));
}

#[test]
fn a_page_is_not_overwritten_once_it_is_there() {
    let Some(memory) = armed(layout(&[(64 * PAGE, InstallSize::KIB_4)]), Backing::Private) else { return };
    memory.install(MAIN, 4, &content(MAIN, 4), now()).unwrap();
    let again = memory.install(MAIN, 0, &[9; 8 * PAGE], now()).unwrap();
    assert_eq!((again.pages, again.already), (7, 1));
    assert_eq!(read(&memory, MAIN, 4), content(MAIN, 4));
    assert_eq!(read(&memory, MAIN, 3), [9; PAGE]);
    // A handler that does not know what is there finds out by trying.
    let other = PostcopyMemory::handed_over(memory.duplicate().unwrap(), &memory.table()).unwrap();
    assert!(!other.is_present(MAIN, 4));
    let installed = other.install(MAIN, 0, &[7; 10 * PAGE], now()).unwrap();
    assert_eq!((installed.pages, installed.already), (2, 8));
    assert_eq!(read(&memory, MAIN, 4), content(MAIN, 4));
}

#[test]
fn what_is_thrown_away_is_zero_whether_it_had_come_or_not() {
    for (backing, size) in [
        (Backing::Private, InstallSize::KIB_4),
        (Backing::Shared, InstallSize::KIB_64),
        (Backing::Private, InstallSize::KIB_64),
    ] {
        let Some(memory) = armed(layout(&[(64 * PAGE, size)]), backing) else { return };
        memory.install(MAIN, 0, &contents(MAIN, 0..16), now()).unwrap();
        // Somebody waits for a page that is thrown away, and for one beside it.
        let (waits, beside) = (reader(&memory, MAIN, 20), reader(&memory, MAIN, 33));
        gather_until(&memory, |news| news.faults == 2);
        let balloon = spawn({
            let memory = memory.clone();
            move || memory.discard(MAIN, 10, 20).unwrap()
        });
        let news = gather_until(&memory, |news| news.removed_pages == 14);
        balloon.join().unwrap();
        let gone = spawn({
            let memory = memory.clone();
            move || (10..30).map(|page| read(&memory, MAIN, page)).collect::<Vec<_>>()
        });
        gather_until(&memory, |_| gone.is_finished() && waits.is_finished());
        assert!(gone.join().unwrap().concat().iter().all(|byte| *byte == 0), "{news:?}");
        assert_eq!(waits.join().unwrap(), [0; PAGE]);
        let installed = memory.install(MAIN, 16, &contents(MAIN, 16..64), now()).unwrap();
        assert_eq!((installed.pages, installed.already), (34, 14));
        assert_eq!(beside.join().unwrap(), content(MAIN, 33));
        for page in 0..64 {
            let expected = if (10..30).contains(&page) { [0; PAGE] } else { content(MAIN, page) };
            assert!(read(&memory, MAIN, page) == expected, "page {page}");
        }
        assert_eq!((memory.removed().count(), memory.absent_pages()), (20, 0));
    }
}

/// A guest that throws pages away all the time, while two loaders bring them: none may come back with old bytes.
#[test]
fn no_page_comes_back_from_a_flood_of_removals() {
    const PAGES: u64 = 2048;
    let Some(memory) = armed(layout(&[(PAGES as usize * PAGE, InstallSize::KIB_4)]), Backing::Private) else { return };
    let (done, removals) = (AtomicBool::new(false), AtomicU64::new(0));
    scope(|scope| {
        let balloons: Vec<_> = (0..2u64)
            .map(|part| {
                let (memory, removals) = (&memory, &removals);
                scope.spawn(move || {
                    for page in (0..PAGES).filter(|page| page % 4 == part * 2) {
                        memory.discard(MAIN, page, 1).unwrap();
                        assert!(read(memory, MAIN, page) == [0; PAGE], "page {page} after it was thrown away");
                        removals.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let loaders: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for first in (0..PAGES).step_by(64) {
                        let bytes = contents(MAIN, first..first + 64);
                        while let Err(error) = memory.install(MAIN, first, &bytes, now()) {
                            assert!(matches!(error, PostcopyError::Busy), "{error}");
                        }
                    }
                })
            })
            .collect();
        let gatherer = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let news = memory.gather(now()).unwrap();
                assert!(news.messages <= 1024 && news.odd == 0, "{news:?}");
                std::thread::yield_now();
            }
        });
        loaders.into_iter().chain(balloons).for_each(|thread| thread.join().unwrap());
        done.store(true, Ordering::Relaxed);
        gatherer.join().unwrap();
        // Loaders that are late find nothing to put in.
        assert_eq!(memory.install(MAIN, 0, &contents(MAIN, 0..PAGES), now()).unwrap().pages, 0);
    });
    assert_eq!(removals.into_inner(), PAGES / 2);
    for page in 0..PAGES {
        let expected = if page % 2 == 0 { [0; PAGE] } else { content(MAIN, page) };
        assert!(read(&memory, MAIN, page) == expected, "page {page}");
    }
}

#[test]
fn plain_memory_is_written_as_often_as_one_likes_and_armed_once() {
    let layout = layout(&[(40 * PAGE, InstallSize::KIB_4), (8 * PAGE + 9, InstallSize::KIB_4)]);
    for backing in [Backing::Private, Backing::Shared] {
        let memory = Arc::new(PostcopyMemory::new(layout.clone(), backing).unwrap());
        assert!(matches!(memory.install(MAIN, 0, &[1; PAGE], now()), Err(PostcopyError::Misuse(_))));
        assert!(memory.gather(now()).is_err() && memory.duplicate().is_err() && memory.finish().is_err());
        let mut sink = PostcopySink::new(memory.clone(), FaultsOf::Everybody, Box::new(now));
        assert!(sink.starts_zero());
        for first in [0, 3] {
            sink.install(MAIN, first, &contents(MAIN, first..first + 30)).unwrap();
        }
        sink.install(RegionId(1), 2, &[5; PAGE]).unwrap();
        sink.install(MAIN, 5, &[1; PAGE]).unwrap();
        sink.zero(MAIN, 6, 2).unwrap();
        // Pages 5 to 9 changed after they were sent.
        let mut absent = PageBitmap::new(layout.pages());
        absent.insert_range(5..10);
        absent.insert(40 + 8);
        match arm(&memory, &absent) {
            Ok(said) => assert_eq!(said.bytes(), absent.bytes()),
            Err(error) => return io::stderr().write_all(format!("SKIPPED: hybrid: {error}\n").as_bytes()).unwrap(),
        }
        assert!(matches!(memory.arm(&absent, FaultsOf::Everybody), Err(PostcopyError::Misuse(_))));
        assert!(!sink.starts_zero() && memory.absent_pages() == 6);
        let reader = reader(&memory, MAIN, 7);
        gather_until(&memory, |news| news.faults == 1);
        assert_eq!(sink.read(MAIN, 7, &mut [0; PAGE]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        sink.install(MAIN, 5, &[6; 5 * PAGE]).unwrap();
        assert_eq!(reader.join().unwrap(), [6; PAGE]);
        assert!(memory.finish().is_err(), "a page is absent");
        sink.install(RegionId(1), 8, &[7; PAGE]).unwrap();
        memory.finish().unwrap();
        let expected = |page: u64| if (5..10).contains(&page) { [6; PAGE] } else { content(MAIN, page) };
        assert!((0..33).all(|page| read(&memory, MAIN, page) == expected(page)));
        assert!((33..40).all(|page| read(&memory, MAIN, page) == [0; PAGE]));
        assert_eq!(read(&memory, RegionId(1), 2), [5; PAGE]);
        assert_eq!(read(&memory, RegionId(1), 8)[..9], [7; 9]);
    }
}

#[test]
fn another_handler_finds_out_what_is_there_and_who_waits() {
    let Some(memory) = armed(layout(&[(64 * PAGE, InstallSize::KIB_4), (PAGE, InstallSize::KIB_4)]), Backing::Private)
    else {
        return;
    };
    memory.install(MAIN, 8, &contents(MAIN, 8..24), now()).unwrap();
    memory.install_zeros(MAIN, 30, 4, now()).unwrap();
    let waiting = reader(&memory, MAIN, 50);
    gather_until(&memory, |news| news.faults == 1);
    // The first handler has read the fault, and is gone.
    let next = PostcopyMemory::handed_over(memory.duplicate().unwrap(), &memory.table()).unwrap();
    let mut removed = PageBitmap::new(65);
    removed.insert(60);
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    assert_eq!(next.recall(&pagemap, Some(&removed)).unwrap(), 21);
    assert_eq!(next.present().runs(0..65).collect::<Vec<_>>(), [8..24, 30..34, 60..61]);
    gather_until(&next, |news| news.faults == 1);
    assert_eq!(next.next_fault().unwrap().page, 50);
    next.install(MAIN, 40, &contents(MAIN, 40..64), now()).unwrap();
    assert_eq!(waiting.join().unwrap(), content(MAIN, 50));
    let zero = reader(&memory, MAIN, 60);
    gather_until(&next, |news| news.zeroed == 1);
    assert_eq!(zero.join().unwrap(), [0; PAGE]);
}

#[test]
fn a_page_that_vanishes_though_nobody_threw_it_away_is_no_zero() {
    let Some(memory) = armed(layout(&[(16 * PAGE, InstallSize::KIB_4)]), Backing::Private) else { return };
    // A handler that believes what is not so, as one whose records were damaged would.
    let wrong = PostcopyMemory::handed_over(memory.duplicate().unwrap(), &memory.table()).unwrap();
    let claims = tempfile::tempfile().unwrap();
    let entry = memory.table()[0].address / PAGE as u64 * 8;
    std::os::unix::fs::FileExt::write_all_at(&claims, &[0xff; 16 * 8], entry).unwrap();
    wrong.recall(&claims, None).unwrap();
    let waiting = reader(&memory, MAIN, 3);
    let news = gather_until(&wrong, |news| news.odd > 0);
    assert_eq!(news.odds, [Odd::Lost { region: MAIN, page: 3 }]);
    assert!(!waiting.is_finished());
    memory.install(MAIN, 3, &content(MAIN, 3), now()).unwrap();
    assert_eq!(waiting.join().unwrap(), content(MAIN, 3));
}

#[test]
fn a_lost_page_is_a_signal_and_no_zero() {
    let Some(memory) = armed(layout(&[(16 * PAGE, InstallSize::KIB_4)]), Backing::Private) else { return };
    memory.install(MAIN, 2, &content(MAIN, 2), now()).unwrap();
    match memory.poison(MAIN, 0, 4, now()) {
        Ok(poisoned) => assert_eq!((poisoned.pages, poisoned.already), (3, 1)),
        Err(error) => return io::stderr().write_all(format!("SKIPPED: lost pages: {error}\n").as_bytes()).unwrap(),
    }
    // The kernel's own read of it fails where a thread would get the signal.
    let peek = |page: u64| {
        let mem = std::fs::File::open("/proc/self/mem").unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&mem, &mut [0], memory.table()[0].address + page * PAGE as u64)
    };
    assert!(peek(1).is_err() && peek(2).is_ok() && memory.absent_pages() == 12);
    assert_eq!(memory.install(MAIN, 1, &content(MAIN, 1), now()).unwrap().already, 1, "lost is lost");
}

#[test]
fn rejects_what_is_outside_or_no_whole_unit() {
    let sizes = [(64 * PAGE, InstallSize::KIB_64), (20 * PAGE, InstallSize::KIB_64)];
    let Some(memory) = armed(layout(&sizes), Backing::Private) else { return };
    let refused = |region: u16, first: u64, bytes: usize| {
        let error = memory.install(RegionId(region), first, &vec![1; bytes], now()).unwrap_err();
        assert!(matches!(error, PostcopyError::Misuse(_)), "{error}");
    };
    refused(0, 1, 16 * PAGE);
    refused(0, 0, 15 * PAGE);
    refused(0, 0, 16 * PAGE - 1);
    refused(0, 64, 16 * PAGE);
    refused(0, 48, 32 * PAGE);
    refused(0, u64::MAX - 15, 16 * PAGE);
    refused(1, 16, 16 * PAGE);
    refused(2, 0, 16 * PAGE);
    refused(u16::MAX, 0, PAGE);
    assert_eq!(memory.install(RegionId(1), 16, &vec![1; 4 * PAGE], now()).unwrap().pages, 4);
    assert_eq!(memory.install(RegionId(0), 0, &[], now()).unwrap(), pagewire_receiver::memory::Installed::default());
    assert_eq!(memory.absent_pages(), 80);
}

#[test]
fn rejects_a_hostile_hand_over() {
    let Some(memory) = armed(layout(&[(16 * PAGE, InstallSize::KIB_4)]), Backing::Private) else { return };
    let error = |table: &[HandedRegion]| PostcopyMemory::handed_over(memory.duplicate().unwrap(), table).unwrap_err();
    let good = memory.table()[0];
    assert!(matches!(error(&[good, good]), PostcopyError::Table(TableError::Overlap { .. })));
    assert!(matches!(error(&[]), PostcopyError::Table(TableError::Size(_))));
    let null = std::fs::File::open("/dev/null").unwrap().into();
    let foreign = PostcopyMemory::handed_over(null, &[good]).unwrap_err();
    assert!(matches!(foreign, PostcopyError::Uffd(UffdError::Foreign)));
    // A table that leaves memory out, and one that names memory that is not the guest's.
    let half =
        PostcopyMemory::handed_over(memory.duplicate().unwrap(), &[HandedRegion { bytes: good.bytes / 2, ..good }]);
    let half = half.unwrap();
    let waiting = reader(&memory, MAIN, 12);
    let news = gather_until(&half, |news| news.odd == 1);
    assert!(matches!(news.odds[0], Odd::Outside { thread: Some(_), .. }), "{news:?}");
    memory.install(MAIN, 12, &content(MAIN, 12), now()).unwrap();
    assert_eq!(waiting.join().unwrap(), content(MAIN, 12));
    let elsewhere = HandedRegion { address: 1 << 40, ..good };
    let elsewhere = PostcopyMemory::handed_over(memory.duplicate().unwrap(), &[elsewhere]).unwrap();
    let installed = elsewhere.install(MAIN, 0, &[1; 2 * PAGE], now()).unwrap();
    assert_eq!((installed.pages, installed.gone), (0, 2));
}

/// The table says huge pages, and they are small ones: who touches one that was thrown away waits, and its neighbours
/// are not made zero with it.
#[test]
fn a_table_that_lies_about_huge_pages_makes_no_zeros() {
    const HUGE: u64 = 2 << 20;
    let Some(memory) = armed(layout(&[(6 << 20, InstallSize::KIB_4)]), Backing::Private) else { return };
    let start = memory.table()[0].address;
    let address = start.next_multiple_of(HUGE);
    let first = (address - start) / PAGE as u64;
    let table = [HandedRegion { address, bytes: HUGE, page_bytes: HUGE }];
    let liar = PostcopyMemory::handed_over(memory.duplicate().unwrap(), &table).unwrap();
    let balloon = spawn({
        let memory = memory.clone();
        move || memory.discard(MAIN, first + 7, 1).unwrap()
    });
    gather_until(&liar, |news| news.removed_pages == 1);
    balloon.join().unwrap();
    let waiting = [reader(&memory, MAIN, first + 7), reader(&memory, MAIN, first + 8)];
    let news = gather_until(&liar, |news| news.odd > 0 && news.faults > 0);
    assert_eq!((news.zeroed, news.odds[0]), (0, Odd::Lost { region: MAIN, page: 7 }));
    memory.install(MAIN, first, &contents(MAIN, first..first + 16), now()).unwrap();
    for (page, waiting) in (first + 7..).zip(waiting) {
        assert_eq!(waiting.join().unwrap(), content(MAIN, page));
    }
}
