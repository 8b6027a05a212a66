//! What a fault costs that is answered on this host: a thread touches pages that are not there, and another puts them in
//! from a mapped file, as plainly as it can be written, and with `PostcopyMemory`.
//!
//! `cargo run --release -p pagewire-benches --bin faults` prints the time of a touch for both, in pairs, with both threads
//! on one core and with each on a core of its own. The bar: the median at most 1.5 times that of the plain handler.
#![allow(unsafe_code, reason = "the plain handler maps memory and reads a file's mapping")]

use pagewire::{InstallSize, Layout, PageBitmap, Region, RegionId};
use pagewire_protocol::time::Time;
use pagewire_receiver::memory::uffd::{FaultsOf, Features, Message, Uffd, Wake, Watch};
use pagewire_receiver::memory::{Backing, PostcopyMemory};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const PAGES: usize = 4096;
const PAIRS: usize = 9;
const MAIN: RegionId = RegionId(0);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Memory of this program, for good: it ends with it.
fn map(file: Option<&File>) -> Result<*mut u8, Failure> {
    let (bytes, flags) = (PAGES * PAGE, MapFlags::PRIVATE);
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: no address is asked for, so nothing that is there is touched.
    let start = unsafe {
        match file {
            Some(file) => rustix::mm::mmap(std::ptr::null_mut(), bytes, access, flags | MapFlags::POPULATE, file, 0)?,
            None => rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, flags)?,
        }
    };
    Ok(start.cast())
}

fn pin(core: usize) -> Result<(), Failure> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

fn wait(fd: impl AsFd) -> Result<(), Failure> {
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], None)?;
    Ok(())
}

/// Touches all pages in an order that looks random; gives how long each touch took, in nanoseconds.
fn touch(start: usize, image: &[u8], core: usize) -> Result<Vec<u64>, Failure> {
    pin(core)?;
    let mut times = Vec::with_capacity(PAGES);
    for at in 0..PAGES {
        // An odd number and a power of two have no divisor in common.
        let page = at * 2_654_435_761 % PAGES;
        let address = std::ptr::with_exposed_provenance::<u8>(start + page * PAGE);
        let before = Instant::now();
        // SAFETY: inside memory that stays mapped, where nobody writes but the kernel.
        let byte = unsafe { address.read_volatile() };
        times.push(u64::try_from(before.elapsed().as_nanos())?);
        if Some(&byte) != image.get(page * PAGE) {
            return Err("a wrong page".into());
        }
        // The handler is asleep again when the next fault comes, as it is on an idle link.
        let pause = Instant::now();
        while pause.elapsed() < Duration::from_micros(20) {
            std::thread::yield_now();
        }
    }
    times.sort_unstable();
    Ok(times)
}

/// Runs a handler until everything was touched.
fn race(
    start: usize,
    image: &[u8],
    cores: [usize; 2],
    handle: impl Fn(&AtomicBool) -> Result<(), Failure> + Sync,
) -> Result<Vec<u64>, Failure> {
    let done = AtomicBool::new(false);
    scope(|scope| {
        let handler = scope.spawn(|| pin(cores[1]).and_then(|()| handle(&done)).inspect_err(|_| std::process::exit(1)));
        let times = scope.spawn(|| touch(start, image, cores[0])).join().map_err(|_| "the reader panicked")?;
        done.store(true, Ordering::Relaxed);
        handler.join().map_err(|_| "the handler panicked")??;
        times
    })
}

fn plain(image: &[u8], cores: [usize; 2]) -> Result<Vec<u64>, Failure> {
    let start = map(None)?.expose_provenance();
    let uffd = Uffd::open(FaultsOf::Everybody, Features::NONE)?;
    // SAFETY: memory of our own in which no object is.
    unsafe { uffd.register(start as u64..(start + PAGES * PAGE) as u64, Watch::MISSING) }?;
    race(start, image, cores, |done| {
        let (mut messages, mut left) = (Vec::new(), PAGES);
        while left > 0 && !done.load(Ordering::Relaxed) {
            wait(&uffd)?;
            uffd.read(&mut messages)?;
            for message in messages.drain(..) {
                let Message::Fault { address, .. } = message else { return Err("no fault".into()) };
                let offset = usize::try_from(address)? - start;
                let page = image.get(offset..offset + PAGE).ok_or("outside")?;
                uffd.copy(address, page, PAGE as u64, Wake::Now);
                left -= 1;
            }
        }
        Ok(())
    })
}

fn ours(image: &[u8], cores: [usize; 2]) -> Result<Vec<u64>, Failure> {
    let region = Region { bytes: (PAGES * PAGE) as u64, install_size: InstallSize::KIB_4 };
    let memory = PostcopyMemory::new(Layout::new(vec![region])?, Backing::Private)?;
    memory.arm(&PageBitmap::full(PAGES as u64), FaultsOf::Everybody)?;
    let start = memory.regions().first().ok_or("no region")?.start.as_ptr().expose_provenance();
    let clock = Instant::now();
    let now = || u64::try_from(clock.elapsed().as_nanos()).map(Time::from_nanos);
    race(start, image, cores, |done| {
        while memory.absent_pages() > 0 && !done.load(Ordering::Relaxed) {
            wait(&memory)?;
            memory.gather(now()?)?;
            while let Some(fault) = memory.next_fault() {
                let offset = usize::try_from(fault.first)? * PAGE;
                let page = image.get(offset..offset + PAGE).ok_or("outside")?;
                memory.install(MAIN, fault.first, page, now()?)?;
            }
        }
        Ok(())
    })
}

fn quantile(times: &[u64], thousandths: usize) -> f64 {
    times.get(times.len() * thousandths / 1000).map_or(f64::NAN, |nanos| *nanos as f64 / 1e3)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<(), Failure> {
    let mut file = File::options().read(true).write(true).create_new(true).open("/dev/shm/pagewire-bench-faults")?;
    std::fs::remove_file("/dev/shm/pagewire-bench-faults")?;
    let bytes: Vec<u8> = (1..=u8::MAX).cycle().take(PAGES).flat_map(|byte| [byte; PAGE]).collect();
    file.write_all(&bytes)?;
    // SAFETY: the file is this program's alone, as long as it runs.
    let image = unsafe { std::slice::from_raw_parts(map(Some(&file))?, PAGES * PAGE) };
    println!("{PAGES} touches a run, {PAIRS} pairs of runs, medians over the runs, microseconds");
    println!(
        "{:<10} {:>10} {:>10} {:>7} {:>10} {:>10} {:>7}",
        "", "plain p50", "ours p50", "x", "plain p99", "ours p99", "x"
    );
    for (placement, cores) in [("one core", [0, 0]), ("two cores", [0, 1])] {
        let (mut plains, mut mine) = (Vec::new(), Vec::new());
        for _ in 0..PAIRS {
            plains.push(plain(image, cores)?);
            mine.push(ours(image, cores)?);
        }
        print!("{placement:<10}");
        for thousandths in [500, 990] {
            let of = |runs: &[Vec<u64>]| median(runs.iter().map(|times| quantile(times, thousandths)).collect());
            let ratios = plains
                .iter()
                .zip(&mine)
                .map(|(plain, ours)| quantile(ours, thousandths) / quantile(plain, thousandths));
            print!(" {:>10.1} {:>10.1} {:>7.2}", of(&plains), of(&mine), median(ratios.collect()));
        }
        println!();
    }
    Ok(())
}
