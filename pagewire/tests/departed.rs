//! What a guest wrote until it left is not kept: its visit lacks those pages, and it comes back over what is there.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use pagewire::{
    AtLimit, Blobs, GuestHooks, GuestStarter, Journal, KeepWhat, Limits, LiveOptions, NoObserver, ReceiveOptions,
    SendOptions, Server, ServerEvent, Started, TakeOptions, send_live,
};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use support::{Host, PAGE, name, noise};

const PAGES: usize = 500;
/// Written in turn until the guest is paused.
const HOT: std::ops::Range<usize> = 30..50;
/// Written all the time, with zeros from the pause on.
const CLEARED: usize = 60;
/// Written once.
const COLD: usize = 70;

/// A thread that writes to a file, and stops where it is when it is paused.
struct Guest {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    image: std::path::PathBuf,
}

impl Guest {
    fn start(image: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, file) = (stop.clone(), File::options().write(true).open(image).unwrap());
        let thread = std::thread::spawn(move || {
            let mut turn = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                turn += 1;
                for page in HOT.chain([CLEARED]) {
                    file.write_all_at(&noise(turn << 8 | page as u64, 1), (page * PAGE) as u64).unwrap();
                }
            }
        });
        Self { stop, thread: Some(thread), image: image.to_owned() }
    }
}

impl GuestHooks for Guest {
    fn pause(&mut self) -> Result<Blobs, String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        let file = File::options().write(true).open(&self.image).unwrap();
        file.write_all_at(&[0; PAGE], (CLEARED * PAGE) as u64).unwrap();
        file.write_all_at(&noise(9, 1), (COLD * PAGE) as u64).unwrap();
        Ok(Blobs::new())
    }

    fn resume(&mut self) -> Result<(), String> {
        panic!("it leaves");
    }
}

#[derive(Debug)]
struct Starts;

impl GuestStarter for Starts {
    fn prepare(&self, _: &pagewire::ImageName, _: &Blobs) -> Result<(), String> {
        Ok(())
    }

    fn start(&self, _: &Started<'_>) -> Result<(), String> {
        Ok(())
    }
}

#[test]
fn what_a_guest_wrote_all_the_time_until_it_left_is_not_kept() {
    let (a, b) = (Host::new(), Host::new());
    fs::write(a.image(), noise(1, PAGES)).unwrap();
    let journal = |host: &Host| Arc::new(Journal::open(&host.dir.path().join("journal")).unwrap());
    let starter = Arc::new(Starts);
    let mut into = ReceiveOptions::new(b.folder());
    (into.reuse, into.once) = (Some(b.reuse(KeepWhat::Manifest)), true);
    into.live = Some(TakeOptions { journal: journal(&b), lease: None, starter });
    let address = format!("unix:{}", b.dir.path().join("socket").display());
    let server = Server::bind(&address.parse().unwrap(), into).unwrap();
    let to = server.address().unwrap();
    let (ended, received) = channel();
    std::thread::spawn(move || {
        server.serve(move |event: ServerEvent<'_>| {
            if let ServerEvent::Ended { outcome, .. } = event {
                ended.send(outcome.report.clone()).unwrap();
            }
        })
    });

    // Slow enough for every round to see each hot page written anew, whatever else the machine does.
    let options =
        SendOptions { bandwidth_limit: Some(2 << 20), reuse: Some(a.reuse(KeepWhat::Visit)), ..SendOptions::default() };
    let limits =
        Limits { at_limit: AtLimit::Force, rounds: 6, downtime: pagewire::milliseconds(0), ..Limits::default() };
    let live = LiveOptions { limits, ..LiveOptions::new(journal(&a)) };
    let guest = Box::new(Guest::start(&a.image()));
    let sent = send_live(&a.image(), &name(), &to, &options, (&live, guest), &mut NoObserver).into_result().unwrap();
    received.recv().unwrap();
    let left = fs::read(a.image()).unwrap();
    assert!(left == fs::read(b.image()).unwrap());
    assert_eq!((sent.reuse.hot, sent.reuse.unkept, sent.warnings.len()), (HOT.len() as u64, 0, 0), "{sent:?}");

    let head = a.store.heads().unwrap().remove(0);
    let visit = a.store.open_visit(&head).unwrap().unwrap();
    let gone: Vec<u64> = visit.present().unwrap().gaps(0..PAGES as u64).flatten().collect();
    assert_eq!(gone, HOT.map(|page| page as u64).collect::<Vec<_>>(), "a page that is zero takes no room");
    assert!(a.store.verify().unwrap().findings.is_empty(), "no page is kept under another page's digest");
    drop(visit);

    // It comes back as it left: what is not kept is sent, nothing is taken for zeros, and nothing is damaged.
    let (to, back) = a.serve(a.folder(), a.reuse(KeepWhat::Nothing), |_| ());
    fs::remove_file(a.image()).unwrap();
    let sent = b.send_file(&to, KeepWhat::Nothing).into_result().unwrap();
    let back = back.recv().unwrap();
    assert!(fs::read(a.image()).unwrap() == left);
    assert_eq!(back.reuse.damaged, 0);
    assert_eq!((sent.pages.inline, sent.wants), (HOT.len() as u64, HOT.len() as u64), "{:?}", sent.pages);
}
