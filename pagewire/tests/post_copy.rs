//! A guest that runs at the receiver while its memory follows, over real sockets, through any number of cuts.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::{
    Backing, Blobs, FaultsOf, GuestAt, GuestHooks, GuestStarter, Into, Journal, KeepWhat, LiveOptions, NoObserver,
    Outcome, Place, PostCopy, PostcopyMemory, ReceiveOptions, RegionId, Report, SendOptions, Server, ServerEvent,
    Started, TakeOptions, send_live,
};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{Host, PAGE, name, noise};

const PAGES: usize = 3000;

/// The guest at the sender: memory that nobody writes to.
struct Still;

impl GuestHooks for Still {
    fn pause(&mut self) -> Result<Blobs, String> {
        Ok(Blobs::new())
    }

    fn resume(&mut self) -> Result<(), String> {
        Ok(())
    }
}

/// The guest at the receiver: its threads read all of its memory, each in an order of its own, and write to each page once
/// they have read it.
#[derive(Debug)]
struct Runs {
    expected: Arc<Vec<u8>>,
    ended: Mutex<Sender<Result<(), String>>>,
    /// What it is expected to touch first, and what it did.
    expected_touches: Vec<Place>,
    touched: Arc<Mutex<Vec<Place>>>,
    started: Arc<AtomicBool>,
}

const THREADS: usize = 3;

fn run(memory: &PostcopyMemory, expected: &[u8], thread: usize) -> Result<(), String> {
    let mut page = [0; PAGE];
    for at in 0..PAGES {
        // 1009 is prime to the number of pages: each is seen once.
        let number = (at * if thread == 0 { 1 } else { 1009 } + thread * 701) % PAGES;
        memory.read(RegionId(0), (number * PAGE) as u64, &mut page).map_err(|error| error.to_string())?;
        // Word `1 + thread` of the page is what this thread writes, none but it.
        let mut meant: [u8; PAGE] = expected[number * PAGE..][..PAGE].try_into().unwrap();
        for word in 1..=THREADS {
            let words = word * 8..word * 8 + 8;
            if page[words.clone()] == [0xAB; 8] {
                meant[words].fill(0xAB);
            }
        }
        if page != meant {
            return Err(format!("page {number} is not what it should be"));
        }
        let offset = (number * PAGE + 8 * (1 + thread)) as u64;
        memory.store(RegionId(0), offset, u64::from_le_bytes([0xAB; 8])).map_err(|error| error.to_string())?;
    }
    Ok(())
}

impl GuestStarter for Runs {
    fn prepare(&self, _: &pagewire::ImageName, _: &Blobs) -> Result<(), String> {
        Ok(())
    }

    fn first_touches(&self, called: &pagewire::ImageName) -> Vec<Place> {
        assert_eq!(*called, name());
        self.expected_touches.clone()
    }

    fn keep_first_touches(&self, called: &pagewire::ImageName, touches: &[Place]) {
        assert_eq!(*called, name());
        *self.touched.lock().unwrap() = touches.to_vec();
    }

    fn start(&self, started: &Started<'_>) -> Result<(), String> {
        let memory = Arc::clone(started.memory.ok_or("it came into memory that can wait")?);
        self.started.store(true, Ordering::SeqCst);
        let (expected, ended) = (Arc::clone(&self.expected), self.ended.lock().unwrap().clone());
        std::thread::spawn(move || {
            let result = std::thread::scope(|scope| {
                let run = |thread| {
                    scope.spawn({
                        let (memory, expected) = (&memory, &expected);
                        move || run(memory, expected, thread)
                    })
                };
                let threads: Vec<_> = (0..THREADS).map(run).collect();
                threads.into_iter().try_for_each(|thread| thread.join().unwrap())
            });
            let _ = ended.send(result);
        });
        Ok(())
    }
}

/// Carries connections to a socket, and can cut all of them.
struct Network {
    path: PathBuf,
    /// Bytes, in both directions.
    carried: Arc<AtomicU64>,
    open: Arc<Mutex<Vec<UnixStream>>>,
}

impl Network {
    fn to(server: PathBuf, dir: &Path, slow: bool) -> Self {
        let path = dir.join("network");
        let listener = UnixListener::bind(&path).unwrap();
        let open = Arc::new(Mutex::new(Vec::new()));
        let carried = Arc::new(AtomicU64::new(0));
        let (streams, count) = (Arc::clone(&open), Arc::clone(&carried));
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, far) = (near.unwrap(), UnixStream::connect(&server).unwrap());
                let mut streams = streams.lock().unwrap();
                for (from, to) in [(&near, &far), (&far, &near)] {
                    streams.push(from.try_clone().unwrap());
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let carried = Arc::clone(&count);
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 1 << 14];
                        while let Ok(read @ 1..) = from.read(&mut buffer) {
                            if slow {
                                // 4 MiB a second for each connection.
                                std::thread::sleep(Duration::from_nanos(250 * read as u64));
                            }
                            if to.write_all(&buffer[..read]).is_err() {
                                break;
                            }
                            carried.fetch_add(read as u64, Ordering::SeqCst);
                        }
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        Self { path, carried, open }
    }

    /// Cuts when it has carried so many bytes more, or in the end: then nothing was left to cut.
    fn cut_after(&self, bytes: u64) {
        let (before, begin) = (self.carried.load(Ordering::SeqCst), Instant::now());
        while self.carried.load(Ordering::SeqCst) < before + bytes && begin.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.cut();
    }

    fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

struct Moved {
    sent: Outcome,
    received: Vec<Report>,
    ran: Receiver<Result<(), String>>,
    touched: Vec<Place>,
}

/// How a guest is moved, beside what all moves have in common.
#[derive(Default)]
struct Way {
    background_limit: Option<u64>,
    expected_touches: Vec<Place>,
    /// All of it goes before the guest starts.
    before: bool,
    /// Where it goes, if not into private memory.
    into: Option<Into>,
}

/// Moves an image in post-copy, cutting the network each time it has carried so many bytes since the guest was started.
fn moves(image: Vec<u8>, way: Way, options: &SendOptions, cuts: &[u64]) -> Moved {
    moves_between(&[Host::new(), Host::new()], None, image, way, options, cuts)
}

/// Moves an image from one host to another, whose stores are used if it is said what is kept there. Each cut ends a session
/// that fills the guest.
fn moves_between(
    [a, b]: &[Host; 2],
    keep: Option<KeepWhat>,
    image: Vec<u8>,
    way: Way,
    options: &SendOptions,
    cuts: &[u64],
) -> Moved {
    let Way { background_limit, expected_touches, before, into } = way;
    fs::write(a.image(), &image).unwrap();
    let here = tempfile::tempdir().unwrap();
    let journal = |host: &str| Arc::new(Journal::open(&here.path().join(host)).unwrap());
    let options = &SendOptions { reuse: keep.map(|keep| a.reuse(keep)), ..options.clone() };
    let (ended, ran) = channel();
    let (expected, touched, started) = (Arc::new(image), Arc::new(Mutex::new(Vec::new())), Arc::default());
    let starter = Arc::new(Runs {
        expected,
        ended: Mutex::new(ended),
        expected_touches,
        touched: Arc::clone(&touched),
        started: Arc::clone(&started),
    });
    let private = Into::PostCopy { backing: Backing::Private, faults_of: FaultsOf::Everybody };
    let mut receiving = ReceiveOptions::new(into.unwrap_or(private));
    receiving.live = Some(TakeOptions { journal: journal("b"), lease: None, starter });
    receiving.reuse = keep.map(|keep| b.reuse(keep));
    let cancel = receiving.cancel.clone();
    let socket = here.path().join("socket");
    let server = Server::bind(&format!("unix:{}", socket.display()).parse().unwrap(), receiving).unwrap();
    let reports = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&reports);
    let serving = std::thread::spawn(move || {
        server.serve(move |event: ServerEvent<'_>| {
            if let ServerEvent::Ended { outcome, .. } = event {
                told.lock().unwrap().push(outcome.report.clone());
            }
        })
    });
    let network = Network::to(socket, here.path(), !cuts.is_empty());
    let to = format!("unix:{}", network.path.display()).parse().unwrap();
    let post_copy = if before { PostCopy::Never } else { PostCopy::Now };
    let live = LiveOptions { post_copy, background_limit, ..LiveOptions::new(journal("a")) };
    let sent = std::thread::scope(|scope| {
        let sending =
            scope.spawn(|| send_live(&a.image(), &name(), &to, options, (&live, Box::new(Still)), &mut NoObserver));
        // A network that breaks before the guest is there is another test's.
        let begin = Instant::now();
        while !cuts.is_empty() && !started.load(Ordering::SeqCst) && begin.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        cuts.iter().for_each(|&bytes| network.cut_after(bytes));
        sending.join().unwrap()
    });
    let sessions = usize::try_from(sent.report.faults.sessions).unwrap();
    assert!(cuts.is_empty() || sessions > cuts.len(), "a cut came too late: {:?}", sent.report);
    // The sender is done before the receiver has taken its last word in.
    let is_last = |report: &Report| report.error.is_none() && (before || report.faults.seconds > 0.0);
    let ended = || reports.lock().unwrap().iter().any(is_last);
    let begin = Instant::now();
    while !ended() && begin.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(5));
    }
    cancel.cancel();
    serving.join().unwrap();
    let received = reports.lock().unwrap().clone();
    let touched = touched.lock().unwrap().clone();
    Moved { sent, received, ran, touched }
}

fn layout_of(pages: usize) -> pagewire::Layout {
    let install_size = pagewire::InstallSize::KIB_4;
    pagewire::Layout::new(vec![pagewire::Region { bytes: (pages * PAGE) as u64, install_size }]).unwrap()
}

fn image() -> Vec<u8> {
    let mut image = noise(7, PAGES);
    image[100 * PAGE..180 * PAGE].fill(0);
    image
}

#[test]
fn a_guest_runs_at_the_receiver_before_any_of_its_memory_is_there() {
    let Moved { sent, received, ran, .. } = moves(image(), Way::default(), &SendOptions::default(), &[]);
    assert_eq!(ran.recv_timeout(Duration::from_secs(20)).unwrap(), Ok(()));
    let report = sent.into_result().unwrap();
    assert_eq!((report.guest_at, report.faults.lacking, report.faults.sessions), ("receiver", 0, 1), "{report:?}");
    let filled = received.iter().find(|report| report.faults.count > 0).unwrap();
    assert!(filled.error.is_none() && filled.faults.p50_us > 0.0, "{filled:?}");
}

#[test]
fn it_runs_to_the_right_end_though_the_network_is_cut_five_times() {
    // Half of the image, in all.
    let cuts = [1 << 20; 5];
    let Moved { sent, ran, .. } = moves(image(), Way::default(), &SendOptions::default(), &cuts);
    assert_eq!(ran.recv_timeout(Duration::from_secs(20)).unwrap(), Ok(()));
    let report = sent.into_result().unwrap();
    assert_eq!((report.guest_at, report.faults.lacking), (GuestAt::Receiver.name(), 0));
}

/// What the guest waits for needs no background, and is not sent a second time there.
#[test]
fn a_guest_gets_all_that_it_touches_while_nothing_goes_in_the_background() {
    let way = Way { background_limit: Some(1), ..Way::default() };
    let Moved { sent, received, ran, .. } = moves(image(), way, &SendOptions::default(), &[]);
    assert_eq!(ran.recv_timeout(Duration::from_secs(20)).unwrap(), Ok(()));
    let report = sent.into_result().unwrap();
    let filled = received.iter().find(|report| report.faults.count > 0).unwrap();
    // One frame may go before the limit holds.
    assert!(report.faults.count >= PAGES as u64 - 64 && filled.faults.background <= 64, "{filled:?}");
    assert!(report.wire.sent_bytes < (PAGES * PAGE) as u64 * 21 / 20, "{report:?}");
    let blocked: f64 = filled.faults.threads.iter().map(|thread| thread.seconds).sum();
    let (all, threads) = (filled.faults.blocked_seconds, filled.faults.threads.len());
    // A kernel that tells no thread tells none.
    assert!(threads == 0 || (threads == THREADS && (blocked - all).abs() < 1e-6), "{filled:?}");
}

#[test]
fn the_order_of_first_touches_is_kept_and_brought_first_the_next_time() {
    let first = moves(image(), Way::default(), &SendOptions::default(), &[]);
    assert_eq!(first.ran.recv_timeout(Duration::from_secs(20)).unwrap(), Ok(()));
    first.sent.into_result().unwrap();
    let count = first.touched.len();
    assert!(count > 0 && count <= PAGES, "{count}");
    assert_eq!(first.touched.iter().map(|place| place.0).collect::<BTreeSet<u32>>().len(), count, "each once");
    // A trace may be of another image: what is no page of this one is left out.
    let places = [u32::MAX, 2000, 1999, 5, 2000, 7, 3000];
    let expected_touches: Vec<Place> = places.into_iter().map(Place).collect();
    let way = Way { expected_touches, ..Way::default() };
    let again = moves(image(), way, &SendOptions::default(), &[]);
    assert_eq!(again.ran.recv_timeout(Duration::from_secs(20)).unwrap(), Ok(()));
    assert!(again.sent.into_result().unwrap().faults.prepaged > 0);
    assert_eq!(again.touched[..4], [2000, 1999, 5, 7].map(Place));
}

/// A guest that never touches its memory; says when it is filled.
#[derive(Debug)]
struct Idle {
    filled: Mutex<Sender<()>>,
}

impl GuestStarter for Idle {
    fn prepare(&self, _: &pagewire::ImageName, _: &Blobs) -> Result<(), String> {
        Ok(())
    }

    fn first_touches(&self, _: &pagewire::ImageName) -> Vec<Place> {
        let _ = self.filled.lock().unwrap().send(());
        Vec::new()
    }

    fn start(&self, _: &Started<'_>) -> Result<(), String> {
        Ok(())
    }
}

/// Strangers that a server lets in at once.
const STRANGERS_MAX: usize = 64;

/// A session that fills a guest counts as one, and its peer is no stranger for whom another would have to wait.
#[test]
fn a_session_that_fills_a_guest_counts_as_one_and_keeps_nobody_out() {
    let (a, b, c) = (Host::new(), Host::new(), Host::new());
    [&a, &c].into_iter().for_each(|host| fs::write(host.image(), image()).unwrap());
    let journal = |host: &Host| Arc::new(Journal::open(&host.dir.path().join("journal")).unwrap());
    let (filled, fills) = channel();
    let into = Into::PostCopy { backing: Backing::Private, faults_of: FaultsOf::Everybody };
    let mut receiving = ReceiveOptions { sessions_max: 1, ..ReceiveOptions::new(into) };
    let starter = Arc::new(Idle { filled: Mutex::new(filled) });
    receiving.live = Some(TakeOptions { journal: journal(&b), lease: None, starter });
    let (socket, stop) = (b.dir.path().join("socket"), receiving.cancel.clone());
    let to = format!("unix:{}", socket.display()).parse().unwrap();
    let server = Server::bind(&to, receiving).unwrap();
    let (told, ended) = channel();
    let serving = std::thread::spawn(move || {
        server.serve(move |event: ServerEvent<'_>| {
            if let ServerEvent::Ended { session, .. } = event {
                told.send(session).unwrap();
            }
        })
    });
    let options = SendOptions::default();
    let slow = LiveOptions {
        post_copy: PostCopy::Now,
        background_limit: Some(1),
        patience: Duration::from_millis(1),
        ..LiveOptions::new(journal(&a))
    };
    let patience = Duration::from_secs(20);
    std::thread::scope(|scope| {
        let sending =
            scope.spawn(|| send_live(&a.image(), &name(), &to, &options, (&slow, Box::new(Still)), &mut NoObserver));
        fills.recv_timeout(patience).expect("the guest is filled");
        assert_eq!(ended.recv_timeout(patience), Ok(1), "the session that brought it has ended");
        let strangers: Vec<UnixStream> = (1..STRANGERS_MAX).map(|_| UnixStream::connect(&socket).unwrap()).collect();
        let other = LiveOptions { patience: Duration::ZERO, ..LiveOptions::new(journal(&c)) };
        let send_other = || {
            let name = pagewire::ImageName::new("other").unwrap();
            let hooks = Box::new(Still);
            send_live(&c.image(), &name, &to, &SendOptions::default(), (&other, hooks), &mut NoObserver)
        };
        let refused = send_other().into_result().unwrap_err();
        assert!(pagewire::chain(&refused).contains("1 sessions are open"), "{refused:?}");
        drop(strangers);
        options.cancel.cancel();
        let split = sending.join().unwrap();
        assert_eq!(split.report.guest_at, GuestAt::Receiver.name(), "{:?}", split.report);
        while ended.recv_timeout(patience).expect("the session that fills it has ended") != 2 {}
        assert_eq!(send_other().into_result().unwrap().guest_at, GuestAt::Receiver.name(), "there is room again");
    });
    stop.cancel();
    serving.join().unwrap();
}

/// All of the guest's way to and fro: what a visit has is not sent again, whether it comes before the guest or behind it,
/// and what it touched first on this host is brought first.
#[test]
fn what_a_host_keeps_of_a_guest_is_put_in_from_there() {
    let hosts = [Host::new(), Host::new()];
    let (first, whole) = (image(), (PAGES * PAGE) as u64);
    let moved = |image: &[u8], way: Way, cuts: &[u64]| {
        let keep = Some(KeepWhat::Visit);
        let moved = moves_between(&hosts, keep, image.to_vec(), way, &SendOptions::default(), cuts);
        let sent = moved.sent.into_result().unwrap();
        assert_eq!(moved.ran.recv_timeout(Duration::from_secs(20)).unwrap(), Ok(()));
        let of_store = |warning: &String| warning.contains("store") || warning.contains("kept");
        assert!(!sent.warnings.iter().any(of_store) && sent.image.is_some(), "{sent:?}");
        let received = moved.received.into_iter().rfind(|report| report.error.is_none()).unwrap();
        assert_eq!(received.image, sent.image);
        (sent, received, moved.touched)
    };
    let back = |changed: &[u8]| {
        let (address, report) = hosts[0].serve(hosts[0].folder(), hosts[0].reuse(KeepWhat::Manifest), |_| ());
        fs::write(hosts[1].image(), changed).unwrap();
        hosts[1].send_file(&address, KeepWhat::Visit).into_result().unwrap();
        report.recv_timeout(Duration::from_secs(20)).unwrap()
    };
    let (_, received, touched) = moved(&first, Way::default(), &[]);
    assert!(!touched.is_empty() && received.faults.local == 0, "{received:?}");
    // It comes back changed, as the host knows that it came from there: what it kept when it left is the base.
    let mut changed = first.clone();
    (0..PAGES).step_by(20).for_each(|page| changed[page * PAGE..][..PAGE].copy_from_slice(&noise(page as u64 + 9, 1)));
    let returned = back(&changed);
    assert!(returned.pages.base > PAGES as u64 / 2, "{returned:?}");
    // Away again in post-copy, over a network that breaks: it is there already.
    let mut again = changed.clone();
    (7..PAGES).step_by(20).for_each(|page| again[page * PAGE..][..PAGE].copy_from_slice(&noise(page as u64 + 5, 1)));
    // The digests of all pages are 96 KiB, and what has changed is 600 KiB.
    let cuts = [128 << 10; 2];
    let (sent, received, touched_again) = moved(&again, Way::default(), &cuts);
    let zeros = (100..180).filter(|page| page % 20 != 0 && page % 20 != 7).count();
    assert!(received.faults.local > (PAGES - zeros) as u64 / 2, "{received:?}");
    assert!(sent.wire.sent_bytes < whole / 2, "{sent:?}");
    assert!(touched_again.starts_with(&touched), "the trace of the first time is asked for first");
    // And once more, all of it before it starts.
    let returned = back(&changed);
    assert!(returned.pages.base > PAGES as u64 / 2, "{returned:?}");
    let (sent, ..) = moved(&again, Way { before: true, ..Way::default() }, &[]);
    assert!(sent.pages.base > PAGES as u64 / 2 && sent.wire.sent_bytes < whole / 4, "{sent:?}");
}

/// The guest's memory is a file that others can map, and that has its name when all of it is there.
#[test]
fn the_memory_of_a_guest_can_be_a_file_of_a_tmpfs() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return println!("SKIPPED: there is no /dev/shm") };
    let into = || Some(Into::PostCopyFolder { folder: dir.path().to_path_buf(), faults_of: FaultsOf::Everybody });
    for (cuts, before) in [(&[][..], false), (&[1 << 20], false), (&[], true)] {
        fs::write(dir.path().join("vm"), "of an earlier guest").unwrap();
        let way = Way { into: into(), before, ..Way::default() };
        let Moved { sent, ran, .. } = moves(image(), way, &SendOptions::default(), cuts);
        assert_eq!(ran.recv_timeout(Duration::from_secs(20)).unwrap(), Ok(()));
        sent.into_result().unwrap();
        let (mut file, expected) = (fs::read(dir.path().join("vm")).unwrap(), image());
        assert!(file.len() == expected.len() && !dir.path().join(".pagewire").exists());
        for (page, expected) in file.chunks_mut(PAGE).zip(expected.chunks(PAGE)) {
            assert!(page[8..8 * (1 + THREADS)].iter().all(|byte| *byte == 0xAB), "what the guest wrote is in it");
            page[8..8 * (1 + THREADS)].copy_from_slice(&expected[8..8 * (1 + THREADS)]);
        }
        assert!(file == expected, "before: {before}");
    }
}

#[test]
fn a_file_that_nobody_can_be_made_to_wait_for_is_refused_by_name() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let into = Some(Into::PostCopyFolder { folder: dir.path().to_path_buf(), faults_of: FaultsOf::Everybody });
    if PostcopyMemory::in_file(layout_of(256), &tempfile::tempfile_in(dir.path()).unwrap()).is_ok() {
        return println!("SKIPPED: the target folder is on a tmpfs");
    }
    let Moved { sent, .. } = moves(image(), Way { into, ..Way::default() }, &SendOptions::default(), &[]);
    let error = sent.into_result().unwrap_err();
    let why = pagewire::chain(&error);
    assert!(error.guest_at == GuestAt::Sender && why.contains("userfaultfd") && why.contains("tmpfs"), "{why}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn a_guest_can_run_in_huge_pages_before_they_are_there() {
    let install_size = pagewire::InstallSize::MIB_2;
    let layout = pagewire::Layout::new(vec![pagewire::Region { bytes: (PAGES * PAGE) as u64, install_size }]).unwrap();
    if let Err(error) = PostcopyMemory::new(layout, Backing::SharedHuge) {
        // As root: echo 64 > /proc/sys/vm/nr_hugepages
        return println!("SKIPPED: no huge pages: {error}");
    }
    let into = || Some(Into::PostCopy { backing: Backing::SharedHuge, faults_of: FaultsOf::Everybody });
    let options = SendOptions { install_size, ..SendOptions::default() };
    for cuts in [&[][..], &[3 << 20; 3]] {
        let Moved { sent, ran, .. } = moves(image(), Way { into: into(), ..Way::default() }, &options, cuts);
        assert_eq!(ran.recv_timeout(Duration::from_secs(20)).unwrap(), Ok(()));
        assert_eq!(sent.into_result().unwrap().faults.lacking, 0);
    }
}
