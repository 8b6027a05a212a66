//! What watching over writes costs: 1 GiB of memory that is mapped into this process, private and shared.
//!
//! `cargo run --release -p pagewire-benches --bin tracking` prints how long it takes to arm the watch, to harvest when
//! nothing and when 2 % of the pages were written, and to copy everything out; then what a writer that touches 2 % of
//! the memory anew each second has left of its throughput when a session harvests once a second, in pairs of watched and
//! unwatched spans. Throughput is in seconds of the writer's own processor time, with its faults in it, so that a busy
//! machine does not decide; what the writer may wait for a harvest besides is no longer than the harvest.

use pagewire::{GuestMemory, InstallSize, MappedMemory, MappedRegion, Mapping, PageBitmap, RegionId};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const BYTES: usize = 1 << 30;
const PAGE: usize = 4096;
const PAGES: usize = BYTES / PAGE;
/// 2 % of the pages.
const DIRTY: usize = PAGES / 50;
const RUNS: usize = 11;
const PAIRS: usize = 7;
const SPAN: Duration = Duration::from_secs(4);
const ROUND: Duration = Duration::from_secs(1);
/// What is copied out at once, as a session does.
const READ_PAGES: usize = 256;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Populated memory and its mapping.
fn memory(mapping: io::Result<Mapping>) -> Result<(MappedMemory, Arc<Mapping>), Failure> {
    let mapping = Arc::new(mapping?);
    (0..PAGES).for_each(|page| write(&mapping, page * PAGE));
    let region = MappedRegion::of(mapping.clone(), InstallSize::KIB_4);
    Ok((MappedMemory::new(vec![region])?, mapping))
}

fn write(mapping: &Mapping, offset: usize) {
    if let Some(byte) = mapping.byte(offset) {
        byte.fetch_add(1, Ordering::Relaxed);
    }
}

fn millis(mut act: impl FnMut() -> io::Result<()>) -> io::Result<f64> {
    let start = Instant::now();
    act()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Milliseconds of arming, of harvests with nothing and with 2 % dirty, and of copying everything out.
fn once(memory: &mut MappedMemory, mapping: &Mapping, seed: usize) -> Result<[f64; 4], Failure> {
    let arm = millis(|| memory.start_tracking())?;
    let mut dirty = PageBitmap::new(PAGES as u64);
    let idle = millis(|| memory.harvest(&mut dirty))?;
    if dirty.count() != 0 {
        return Err("pages are dirty that nobody wrote".into());
    }
    (0..DIRTY).for_each(|at| write(mapping, (at * 50 + seed % 50) * PAGE));
    let some = millis(|| memory.harvest(&mut dirty))?;
    if dirty.count() != DIRTY as u64 {
        return Err(format!("{} dirty pages instead of {DIRTY}", dirty.count()).into());
    }
    let mut bytes = vec![0; READ_PAGES * PAGE];
    let copy =
        millis(|| (0..PAGES as u64).step_by(READ_PAGES).try_for_each(|at| memory.read(RegionId(0), at, &mut bytes)))?;
    memory.stop_tracking();
    Ok([arm, idle, some, copy])
}

/// Pages written in a second of its own by a writer that walks through a window of 2 % of the pages, again and again, and takes the next
/// window each second. Watched: `memory` is armed before and harvested once a second.
fn throughput(memory: &mut MappedMemory, mapping: &Arc<Mapping>, watched: bool) -> Result<f64, Failure> {
    if watched {
        memory.start_tracking()?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, target) = (stop.clone(), mapping.clone());
    let writer = std::thread::spawn(move || {
        let (start, mut written) = (Instant::now(), 0.0);
        while !stopped.load(Ordering::Relaxed) {
            let window = usize::try_from(start.elapsed().as_secs()).unwrap_or(0) * DIRTY;
            // A store to each cache line: what a guest does to pages it works on.
            for page in window..window + DIRTY {
                (0..PAGE).step_by(64).for_each(|at| write(&target, page % PAGES * PAGE + at));
            }
            written += DIRTY as f64;
        }
        let busy = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        written / (busy.tv_sec as f64 + busy.tv_nsec as f64 / 1e9)
    });
    let start = Instant::now();
    let mut dirty = PageBitmap::new(PAGES as u64);
    while start.elapsed() < SPAN {
        std::thread::sleep(ROUND);
        if watched {
            memory.harvest(&mut dirty)?;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let rate = writer.join().map_err(|_| "the writer broke")?;
    memory.stop_tracking();
    Ok(rate)
}

fn spread(mut values: Vec<f64>, write: impl Fn(f64) -> String) -> String {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).map_or_else(String::new, |&value| write(value));
    format!("{} ({} to {})", at(values.len() / 2), at(0), at(values.len() - 1))
}

fn main() -> Result<(), Failure> {
    println!(
        "| 1 GiB | arm ms | harvest ms, idle | harvest ms, 2 % dirty | copy out GB/s | writer watched / unwatched |"
    );
    println!("|---|---|---|---|---|---|");
    for (name, map) in [("private", Mapping::private as fn(usize) -> io::Result<Mapping>), ("shared", Mapping::shared)]
    {
        let (mut memory, mapping) = memory(map(BYTES))?;
        let mut columns = [const { Vec::new() }; 4];
        for run in 0..RUNS {
            let times = once(&mut memory, &mapping, run)?;
            columns.iter_mut().zip(times).for_each(|(column, time)| column.push(time));
        }
        let mut ratios = Vec::new();
        for _ in 0..PAIRS {
            let unwatched = throughput(&mut memory, &mapping, false)?;
            ratios.push(throughput(&mut memory, &mapping, true)? / unwatched);
        }
        let [arm, idle, some, copy] = columns;
        let [arm, idle, some] = [arm, idle, some].map(|times| spread(times, |ms| format!("{ms:.2}")));
        let speeds = copy.into_iter().map(|ms| BYTES as f64 / ms / 1e6).collect();
        let copy = spread(speeds, |speed| format!("{speed:.1}"));
        println!("| {name} | {arm} | {idle} | {some} | {copy} | {} |", spread(ratios, |ratio| format!("{ratio:.3}")));
    }
    println!("\nbar: a writer keeps at least 0.95 of its throughput");
    Ok(())
}
