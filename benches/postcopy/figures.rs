//! The cases: each prints its table and says whether the bars were met.

use crate::image::{Image, Random, random_pages};
use crate::journey::{Journey, Way, travel};
use crate::{Failure, PAGE, Setup, judge, median, plain, quantile, rest};
use pagewire::{Place, PostCopy, PostcopyMemory, RegionId};
use std::time::{Duration, Instant};

const MAIN: RegionId = RegionId(0);
const GIB_PAGES: usize = (1 << 30) / PAGE;
/// What is waited between touches on an idle link.
const PAUSE: Duration = Duration::from_micros(50);
/// Touches of a run on an idle link.
const TOUCHES: usize = 4096;
/// The link of the readers, in bytes a second: what the background may send.
const LINK: u64 = 100_000_000;
/// First touches that must not block, in per cent: of who reads on from the middle, without a trace; and of the other readers
/// with one.
const SEQUENTIAL_MIN: f64 = 90.0;
const TRACED_MIN: f64 = 80.0;

/// Touches a page; whether it was there, and how long it took, in nanoseconds.
fn touch(memory: &PostcopyMemory, image: &Image, page: usize) -> Result<(bool, u64), Failure> {
    let was_there = memory.is_present(MAIN, page as u64);
    let mut byte = [0];
    let before = Instant::now();
    memory.read(MAIN, (page * PAGE) as u64, &mut byte)?;
    let took = u64::try_from(before.elapsed().as_nanos())?;
    if byte.first() != image.bytes.get(page * PAGE) {
        return Err("a wrong page".into());
    }
    Ok((was_there, took))
}

/// Touches pages one after the other, and gives how long those took that were not there.
fn faults(memory: &PostcopyMemory, image: &Image, pages: &[usize], pause: Duration) -> Result<Vec<u64>, Failure> {
    let mut times = Vec::with_capacity(pages.len());
    for page in pages {
        let (was_there, took) = touch(memory, image, *page)?;
        if !was_there {
            times.push(took);
        }
        rest(pause);
    }
    Ok(times)
}

/// Faults on a link that carries nothing else: the background may send one byte a second.
fn idle_faults(image: &Image, cores: [usize; 2], seed: u64) -> Result<[Vec<u64>; 2], Failure> {
    let pages = random_pages(image.pages(), TOUCHES, seed);
    let plain = plain::faults(&image.bytes, &pages, cores, PAUSE)?;
    let way = Way { background: Some(1), cores: cores.map(Some), cut: true, ..Way::now() };
    let ours = travel(image, &way, |memory| {
        // The first frame of the background is under way.
        rest(Duration::from_millis(50));
        faults(memory, image, &pages, PAUSE)
    })?;
    Ok([plain, ours.guest])
}

pub(crate) fn idle(setup: &Setup) -> Result<bool, Failure> {
    let image = Image::new(setup.image.as_deref(), GIB_PAGES / 4)?;
    println!("Remote faults on an idle link, microseconds: {TOUCHES} touches in random order, one after the other.\n");
    println!("| placement | quantile | plain | pagewire | ratio | bar | result |\n|---|---|---|---|---|---|---|");
    let mut met = true;
    for (placement, cores) in [("all on one core", [0, 0]), ("each host on a core", [0, 1])] {
        let runs: Result<Vec<_>, _> = (1..=setup.runs as u64).map(|run| idle_faults(&image, cores, run)).collect();
        let runs = runs?;
        for (thousandths, bar) in [(500, 1.5), (990, 2.0)] {
            let of =
                |side: fn(&[Vec<u64>; 2]) -> &Vec<u64>| median(runs.iter().map(|run| quantile(side(run), thousandths)));
            let (plain, ours) = (of(|run| &run[0]), of(|run| &run[1]));
            let ratio =
                median(runs.iter().map(|[plain, ours]| quantile(ours, thousandths) / quantile(plain, thousandths)));
            let pass = ratio <= bar;
            met &= pass;
            let p = thousandths / 10;
            println!("| {placement} | p{p} | {plain:.1} | {ours:.1} | {ratio:.2} | ≤ {bar} | {} |", judge(pass));
        }
    }
    Ok(met)
}

/// Touches at random as long as pages are absent; so many faults at most.
fn busy_faults(image: &Image, background: Option<u64>, seed: u64) -> Result<Journey<Vec<u64>>, Failure> {
    let pages = random_pages(image.pages(), image.pages(), seed);
    let way = Way { background, ..Way::now() };
    travel(image, &way, |memory| {
        let mut times = Vec::new();
        for page in pages {
            if memory.absent_pages() == 0 {
                break;
            }
            if !memory.is_present(MAIN, page as u64) {
                times.extend(faults(memory, image, &[page], Duration::ZERO)?);
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(times)
    })
}

pub(crate) fn busy(setup: &Setup) -> Result<bool, Failure> {
    let image = Image::new(setup.image.as_deref(), GIB_PAGES)?;
    println!(
        "Remote faults while the background runs: 1 GiB, touches in random order, 200 µs of sleep behind each, nothing pinned.\n"
    );
    println!("| background | faults | p50 µs | p99 µs | bar for p99 | result |\n|---|---|---|---|---|---|");
    let (mut idles, mut free, mut capped, mut rates) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for run in 1..=setup.runs as u64 {
        idles.push(quantile(&idle_faults(&image, [0, 1], run)?[1], 500));
        let unasked = travel(&image, &Way::now(), |_| Ok(()))?;
        let millis = Duration::from_secs_f64(unasked.sent.faults.seconds).as_millis().max(1);
        let rate = u64::try_from(u128::from(unasked.sent.wire.sent_bytes) * 1000 / millis)?;
        rates.push(rate as f64 / 1e6);
        free.push(busy_faults(&image, None, run)?.guest);
        capped.push(busy_faults(&image, Some(rate / 2), run)?.guest);
    }
    let (idle, mut met) = (median(idles), true);
    let what = format!("half of its own {:.0} MB/s on the wire", median(rates));
    for (what, runs, bar) in [(what.as_str(), capped, 10.0 * idle), ("uncapped", free, 3000.0)] {
        let [p50, p99] = [500, 990].map(|thousandths| median(runs.iter().map(|run| quantile(run, thousandths))));
        let count = median(runs.iter().map(|run| run.len() as f64));
        met &= p99 <= bar;
        println!("| {what} | {count:.0} | {p50:.1} | {p99:.1} | ≤ {bar:.0} | {} |", judge(p99 <= bar));
    }
    println!("\nThe p50 on an idle link, each host on a core, was {idle:.1} µs; ten times it is the first bar.");
    Ok(met)
}

pub(crate) fn total(setup: &Setup) -> Result<bool, Failure> {
    let image = Image::new(setup.image.as_deref(), GIB_PAGES)?;
    println!("All of 1 GiB into memory that a guest can run in, seconds; the guest touches nothing.\n");
    println!("| cold in pre-copy | post-copy | ratio | bar | result |\n|---|---|---|---|---|");
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for _ in 0..setup.runs {
        before.push(travel(&image, &Way { post_copy: PostCopy::Never, ..Way::now() }, |_| Ok(()))?.seconds);
        after.push(travel(&image, &Way::now(), |_| Ok(()))?.seconds);
    }
    let ratio = median(before.iter().zip(&after).map(|(before, after)| after / before));
    let (before, after) = (median(before), median(after));
    println!("| {before:.3} | {after:.3} | {ratio:.2} | ≤ 1.15 | {} |", judge(ratio <= 1.15));
    Ok(ratio <= 1.15)
}

/// Touches pages in this order at half the link's rate; gives the share of them that were there.
fn read_at_half_rate(memory: &PostcopyMemory, image: &Image, pages: &[usize]) -> Result<f64, Failure> {
    let interval = Duration::from_secs_f64(2.0 * PAGE as f64 / LINK as f64);
    let (mut there, mut due) = (0usize, Instant::now());
    for page in pages {
        there += usize::from(touch(memory, image, *page)?.0);
        due = (due + interval).max(Instant::now());
        while Instant::now() < due {
            std::thread::yield_now();
        }
    }
    Ok(there as f64 / pages.len() as f64)
}

/// The share of a reader's first touches that block nobody, and the trace that it leaves.
fn read(image: &Image, pages: &[usize], trace: Vec<Place>) -> Result<(f64, Vec<Place>), Failure> {
    let way = Way { background: Some(LINK), trace, compress: false, ..Way::now() };
    let journey = travel(image, &way, |memory| read_at_half_rate(memory, image, pages))?;
    Ok((journey.guest, journey.trace))
}

/// How a reader goes through its pages when it comes again.
#[derive(Clone, Copy)]
enum Order {
    Same,
    /// Another one in each 256 pages.
    Near,
    /// Its second half first.
    Halves,
}

impl Order {
    fn of_next_time(self, pages: &mut [usize], seed: u64) {
        match self {
            Self::Same => {}
            Self::Near => pages.chunks_mut(256).for_each(|chunk| Random(seed | 1).shuffle(chunk)),
            Self::Halves => pages.rotate_left(pages.len() / 2),
        }
    }
}

pub(crate) fn readers(setup: &Setup) -> Result<bool, Failure> {
    let image = Image::new(setup.image.as_deref(), GIB_PAGES / 4)?;
    println!(
        "First touches that do not block: 256 MiB, a link of {} MB/s, uncompressed, pages touched at half its rate.\n",
        LINK / 1_000_000
    );
    println!("| reader | without a trace | with one | with what both times left | bar of the second | result |");
    println!("|---|---|---|---|---|---|");
    let (mut met, start) = (true, image.pages() / 3);
    let sequence: Vec<usize> = (start..image.pages()).chain(0..start).collect();
    let shares: Result<Vec<f64>, Failure> =
        (0..setup.runs).map(|_| Ok(read(&image, &sequence, Vec::new())?.0)).collect();
    let share = median(shares?) * 100.0;
    met &= share >= SEQUENTIAL_MIN;
    println!(
        "| sequential, from the middle on | {share:.1} % | | | ≥ {SEQUENTIAL_MIN} %, of the first | {} |",
        judge(share >= SEQUENTIAL_MIN)
    );
    for (what, order) in [
        ("a random tenth, in the same order", Order::Same),
        ("the same, in another order each 256 pages", Order::Near),
        ("the same, its second half first", Order::Halves),
    ] {
        let (mut without, mut with, mut again) = (Vec::new(), Vec::new(), Vec::new());
        for run in 1..=setup.runs as u64 {
            let mut hot = random_pages(image.pages(), image.pages() / 10, run);
            let (share, trace) = read(&image, &hot, Vec::new())?;
            without.push(share);
            order.of_next_time(&mut hot, run);
            let (share, trace) = read(&image, &hot, trace)?;
            with.push(share);
            order.of_next_time(&mut hot, run + 100);
            again.push(read(&image, &hot, trace)?.0);
        }
        let [without, with, again] = [without, with, again].map(|shares| median(shares) * 100.0);
        met &= with >= TRACED_MIN;
        println!(
            "| {what} | {without:.1} % | {with:.1} % | {again:.1} % | ≥ {TRACED_MIN} % | {} |",
            judge(with >= TRACED_MIN)
        );
    }
    Ok(met)
}
