//! What a return visit costs whose embedder knows which pages did not change: 4 GiB of which 1 % changed, beside
//! 64 MiB with as many changed pages.
//!
//! `cargo run --release -p pagewire-benches --bin hint -- FOLDER` moves a guest from A to B and back, both real receivers
//! on loopback TCP with stores below FOLDER, and prints the way back: the bitmap of unchanged pages is handed over, the
//! store on A is trusted, and its visit becomes the image where it lies. FOLDER should be on the file system to be
//! measured and have room for 9 GiB. A number behind it is how many pairs are counted.

use pagewire::store::{Store, StoreOptions};
use pagewire::{
    Address, Digest, FileMemory, GuestMemory, ImageId, ImageName, InstallSize, Into, KeepWhat, LandingOptions, Layout,
    NoObserver, PageBitmap, ReceiveOptions, RegionId, Report, Reuse, SendOptions, Server, send, send_memory,
};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const PAGE_BYTES: usize = 4096;
const PAGE: u64 = PAGE_BYTES as u64;
const RUNS: usize = 5;
const SMALL: u64 = 64 << 20;
const LARGE: u64 = 4 << 30;
/// 1 % of the large image's pages.
const CHANGED: u64 = LARGE / PAGE / 100;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// An image file whose pages were watched since it arrived.
struct Watched {
    file: FileMemory,
    arrived: ImageId,
    unchanged: PageBitmap,
}

impl GuestMemory for Watched {
    fn layout(&self) -> &Layout {
        self.file.layout()
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read(region, first, bytes)
    }

    fn unchanged_since(&mut self, root: &Digest, session: &[u8; 16]) -> Option<PageBitmap> {
        (root.0 == self.arrived.root && *session == self.arrived.session).then(|| self.unchanged.clone())
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        self.file.check_unchanged()
    }
}

/// A host: a folder with images, a store, and a receiver.
struct Host {
    dir: PathBuf,
    reuse: Reuse,
    address: Address,
    cancel: pagewire::CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Host {
    fn start(dir: PathBuf) -> Result<Self, Failure> {
        std::fs::create_dir_all(dir.join("into"))?;
        let store = Store::open(&dir.join("store"), StoreOptions::default())?;
        let reuse = Reuse { trust: true, ..Reuse::new(store) };
        let landing = LandingOptions { inplace: true, fresh: false };
        let mut options = ReceiveOptions::new(Into::Folder(dir.join("into")));
        (options.landing, options.reuse) = (landing, Some(reuse.clone()));
        let cancel = options.cancel.clone();
        let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, options)?;
        let address = server.address()?;
        let thread = Some(std::thread::spawn(move || server.serve(|_| ())));
        Ok(Self { dir, reuse, address, cancel, thread })
    }

    fn image(&self) -> PathBuf {
        self.dir.join("into/guest")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

fn fill(file: &File, pages: impl Iterator<Item = u64>, seed: u64) -> io::Result<()> {
    let mut state = seed | 1;
    let mut bytes = vec![0; PAGE_BYTES];
    for page in pages {
        for word in bytes.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        file.write_all_at(&bytes, page * PAGE)?;
    }
    Ok(())
}

/// There and back once; the report of the way back.
fn trip(folder: &Path, bytes: u64, run: usize) -> Result<Report, Failure> {
    let dir = folder.join(format!("hint-{bytes}-{run}"));
    let (a, b) = (Host::start(dir.join("a"))?, Host::start(dir.join("b"))?);
    let name = ImageName::new("guest")?;
    let file = File::options().read(true).write(true).create(true).truncate(true).open(a.image())?;
    file.set_len(bytes)?;
    fill(&file, 0..bytes / PAGE, 1)?;
    let options =
        |host: &Host, keep| SendOptions { reuse: Some(Reuse { keep, ..host.reuse.clone() }), ..SendOptions::default() };
    let there = send(&a.image(), &name, &b.address, &options(&a, None), &mut NoObserver).into_result()?;
    std::fs::remove_file(a.image())?;
    let arrived = there.image.ok_or("nothing arrived")?;
    let pages = bytes / PAGE;
    let mut unchanged = PageBitmap::full(pages);
    let changed: Vec<u64> = (0..CHANGED).map(|at| at * pages / CHANGED).collect();
    changed.iter().for_each(|&page| {
        unchanged.remove(page);
    });
    fill(&File::options().write(true).open(b.image())?, changed.into_iter(), 99)?;
    // The keeping of what arrived goes on after the sender knows: let it end, so that it is not measured.
    while b.reuse.store.heads()?.is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let memory = Watched { file: FileMemory::open(&b.image(), InstallSize::KIB_4)?, arrived, unchanged };
    let back = send_memory(memory, &name, &a.address, &options(&b, Some(KeepWhat::Nothing)), &mut NoObserver);
    let back = back.into_result()?;
    let same = |(one, other): (&Path, &Path)| -> io::Result<bool> {
        let (one, other) = (File::open(one)?, File::open(other)?);
        let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for at in (0..bytes).step_by(1 << 20) {
            one.read_exact_at(&mut left, at)?;
            other.read_exact_at(&mut right, at)?;
            if left != right {
                return Ok(false);
            }
        }
        Ok(true)
    };
    if !same((&a.image(), &b.image()))? {
        return Err("the images differ".into());
    }
    drop((a, b));
    std::fs::remove_dir_all(&dir)?;
    Ok(back)
}

/// The middle, the least and the most of some figures.
fn range(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
    (at(values.len() / 2), at(0), at(values.len().saturating_sub(1)))
}

fn main() -> Result<(), Failure> {
    let folder = std::env::args().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let runs = std::env::args().nth(2).map_or(Ok(RUNS), |runs| runs.parse())?;
    let (mut small, mut large) = (Vec::new(), Vec::new());
    // The first pair warms the machine up. Which of the two comes first changes, so that what drifts hits both.
    for run in 0..=runs {
        let first = trip(&folder, if run % 2 == 0 { SMALL } else { LARGE }, run)?;
        let second = trip(&folder, if run % 2 == 0 { LARGE } else { SMALL }, run)?;
        let (of_small, of_large) = if run % 2 == 0 { (first, second) } else { (second, first) };
        eprintln!("run {run}: {:.3} s, {:.3} s", of_small.seconds, of_large.seconds);
        if run > 0 {
            small.push(of_small);
            large.push(of_large);
        }
    }
    println!("| image | changed pages | unread | sampled | with bytes | wire | seconds, median (min to max) |");
    println!("|---|---|---|---|---|---|---|");
    for (bytes, reports) in [(SMALL, &small), (LARGE, &large)] {
        let Some(last) = reports.last() else { continue };
        let (median, min, max) = range(reports.iter().map(|report| report.seconds).collect());
        println!(
            "| {} MiB | {CHANGED} | {} | {} | {} | {} bytes | {median:.3} ({min:.3} to {max:.3}) |",
            bytes >> 20,
            last.reuse.unread,
            last.reuse.sampled,
            last.pages.inline + last.pages.delta,
            last.wire.sent_bytes + last.wire.received_bytes,
        );
    }
    let (median, min, max) =
        range(large.iter().zip(&small).map(|(large, small)| large.seconds / small.seconds).collect());
    println!("\nratio of pairs {median:.2} ({min:.2} to {max:.2}), bar: at most 3");
    Ok(())
}
