//! The cases: each prints its table and says whether the bars were met.

use crate::guest::{Guest, Noise, Pattern, Shape};
use crate::trip::{Hosts, Trip};
use crate::{Failure, Setup, Spread, judge, millis};
use pagewire::{AtLimit, CancellationToken, Limits, milliseconds};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// 2 % of the pages of 1 GiB.
const TWO_PERCENT: u64 = GIB / 4096 / 50;

fn limits(downtime: u32) -> Limits {
    Limits { downtime: milliseconds(downtime), ..Limits::default() }
}

/// So many moves of a guest that writes at a rate, each between new hosts.
fn trips(
    (runs, folder): (usize, &Path),
    guest: &Guest,
    source: Option<&Path>,
    rate: u64,
    limits: Limits,
) -> Result<Vec<Trip>, Failure> {
    let mut trips = Vec::new();
    for _ in 0..runs {
        guest.run_at(rate);
        trips.push(Hosts::new(folder, limits)?.travel(guest, source)?);
    }
    Ok(trips)
}

fn each(trips: &[Trip], figure: impl Fn(&Trip) -> f64) -> Spread {
    Spread::of(trips.iter().map(figure))
}

/// How long the guest stands still beyond what its last pages take on the link.
pub(crate) fn pause(setup: &Setup) -> Result<bool, Failure> {
    println!("Downtime beyond the link's: uncapped loopback, {TWO_PERCENT} pages a second written uniformly.\n");
    println!(
        "| guest, records and destination | downtime ms | last round | its bytes at the goodput before, ms | beyond that, ms \
         | to stand still, ms | to last, ms | to start, ms | processor, both, ms | bar | result |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    let mut met = true;
    let small = Guest::mapped(Shape::full(GIB), Pattern::Uniform)?;
    for allowed in [20, 300] {
        let what = format!("1 GiB, dirty bitmap, tmpfs, {allowed} ms allowed");
        met &= pause_row(&what, &setup.tmpfs, (&small, None), (setup.runs, allowed, Some(5.0)))?;
    }
    pause_row("1 GiB, dirty bitmap, disk, 300 ms allowed", &setup.disk, (&small, None), (setup.runs, 300, None))?;
    drop(small);
    // One MiB in sixteen is in use, the rest are zeros that nobody has touched: both copies fit this machine.
    let large = Guest::mapped(Shape { bytes: 16 * GIB, stride: 16 }, Pattern::Uniform)?;
    for allowed in [20, 300] {
        let what = format!("16 GiB, 1/16 in use, dirty bitmap, tmpfs, {allowed} ms allowed");
        met &= pause_row(&what, &setup.tmpfs, (&large, None), (setup.runs, allowed, Some(10.0)))?;
    }
    drop(large);
    let source = setup.tmpfs.join(format!("pagewire-live-{}.img", std::process::id()));
    let file = Guest::in_file(&source, Shape::full(GIB), Pattern::Uniform)?;
    // Reading all of a file again takes longer than the default allows.
    let what = "1 GiB, file compared (`--live SRC`), tmpfs, 5 s allowed";
    let row = pause_row(what, &setup.tmpfs, (&file, Some(&source)), (setup.runs, 5000, None));
    std::fs::remove_file(&source)?;
    row?;
    Ok(met)
}

fn pause_row(
    what: &str,
    folder: &Path,
    (guest, source): (&Guest, Option<&Path>),
    (runs, allowed, bar): (usize, u32, Option<f64>),
) -> Result<bool, Failure> {
    let trips = trips((runs, folder), guest, source, TWO_PERCENT, limits(allowed))?;
    let (downtime, link) = (each(&trips, |trip| trip.downtime), each(&trips, Trip::link_span));
    let beyond = each(&trips, |trip| trip.downtime - trip.link_span());
    let [stand, last, start] =
        [0, 1, 2].map(|at: usize| each(&trips, |trip| trip.parts.get(at).copied().unwrap_or(0.0)));
    let busy = each(&trips, |trip| trip.busy);
    let (pages, kib) =
        (each(&trips, |trip| trip.last().pages as f64), each(&trips, |trip| trip.last().bytes as f64 / 1024.0));
    let met = bar.is_none_or(|bar| beyond.median <= bar);
    let (bar, result) = (bar.map_or_else(String::new, |bar| format!("≤ {bar}")), bar.map_or("", |_| judge(met)));
    println!(
        "| {what} | {downtime} | {:.0} pages, {:.0} KiB | {link} | {beyond} | {stand} | {last} | {start} | {busy} | {bar} | {result} |",
        pages.median, kib.median
    );
    Ok(met)
}

/// A guest that writes little, over 1 Gbit/s.
pub(crate) fn uniform(setup: &Setup) -> Result<bool, Failure> {
    println!("1 GiB, {TWO_PERCENT} pages (2 %) a second written uniformly, 1 Gbit/s, 300 ms allowed.\n");
    println!("| rounds, the last counted | seconds | predicted ms | downtime ms | bar | result |");
    println!("|---|---|---|---|---|---|");
    let guest = Guest::mapped(Shape::full(GIB), Pattern::Uniform)?;
    let trips = trips((setup.runs, &setup.tmpfs), &guest, None, TWO_PERCENT, limits(300))?;
    let rounds = each(&trips, |trip| trip.report.rounds.len() as f64);
    let (predicted, downtime) = (each(&trips, Trip::predicted), each(&trips, |trip| trip.downtime));
    let met = rounds.most() <= 4.0 && downtime.median <= 300.0;
    let seconds = each(&trips, |trip| trip.report.seconds);
    println!("| {rounds} | {seconds} | {predicted} | {downtime} | ≤ 4 rounds, ≤ 300 ms | {} |", judge(met));
    Ok(met)
}

/// A guest that writes faster than the link carries.
pub(crate) fn flood(setup: &Setup) -> Result<bool, Failure> {
    println!("256 MiB, 200000 pages a second written uniformly, 1 Gbit/s (30000 pages a second), 300 ms allowed.\n");
    println!(
        "| told to | recognised after round, counted from 1 | what became of the guest | downtime ms | bar | result |"
    );
    println!("|---|---|---|---|---|---|");
    let guest = Guest::mapped(Shape::full(256 * MIB), Pattern::Uniform)?;
    let mut rounds = Vec::new();
    let mut stays = true;
    for _ in 0..setup.runs {
        guest.run_at(200_000);
        let hosts = Hosts::new(&setup.tmpfs, limits(300))?;
        let outcome = hosts.send(&guest, None, CancellationToken::new())?;
        let why = outcome.error.map(|error| pagewire::chain(&error)).unwrap_or_default();
        stays &=
            hosts.clock().paused.at().is_none() && outcome.report.guest_at == "sender" && why.contains("faster than");
        rounds.push(outcome.report.rounds.len() as f64);
    }
    let rounds = Spread::of(rounds);
    let cancelled = stays && rounds.most() <= 3.0;
    let became = if stays { "ran on, never paused" } else { "**something else**" };
    println!("| cancel | {rounds} | {became} | | ≤ 3 | {} |", judge(cancelled));
    let told = Limits { at_limit: AtLimit::Force, ..limits(300) };
    let trips = trips((setup.runs, &setup.tmpfs), &guest, None, 200_000, told)?;
    let rounds = each(&trips, |trip| trip.report.rounds.len() as f64 - 1.0);
    let (downtime, forced) = (each(&trips, |trip| trip.downtime), rounds.most() <= 3.0);
    println!("| force | {rounds} | switched over | {downtime} | ≤ 3 | {} |", judge(forced));
    Ok(cancelled && forced)
}

/// What waiting of hot pages for the last round saves.
pub(crate) fn hot(setup: &Setup) -> Result<bool, Failure> {
    // A twentieth of 256 MiB is 13.4 MB, 115 ms of the link, and fits three quarters of the downtime with the few that seem
    // hot by chance. The cold tenth is written at 0.45 of the link's speed: rounds that send the hot pages every time come
    // to rest at 13.4 / (1 - 0.45) MB, 210 ms.
    println!(
        "256 MiB, 130000 writes a second, nine of ten into 5 % of the pages, 1 Gbit/s, 190 ms allowed, else force.\n"
    );
    println!("| hot pages | rounds | MiB sent | of these in the last round | predicted ms | downtime ms | seconds |");
    println!("|---|---|---|---|---|---|---|");
    let guest = Guest::mapped(Shape::full(256 * MIB), Pattern::HotSet)?;
    let mut results = Vec::new();
    for (what, defer_hot) in [("sent in each round", false), ("wait for the last", true)] {
        let told = Limits { at_limit: AtLimit::Force, defer_hot, ..limits(190) };
        let trips = trips((setup.runs, &setup.tmpfs), &guest, None, 130_000, told)?;
        let (bytes, downtime) = (each(&trips, |trip| trip.bytes() / MIB as f64), each(&trips, |trip| trip.downtime));
        let (rounds, seconds) =
            (each(&trips, |trip| trip.report.rounds.len() as f64), each(&trips, |trip| trip.report.seconds));
        let (last, predicted) =
            (each(&trips, |trip| trip.last().bytes as f64 / MIB as f64), each(&trips, Trip::predicted));
        println!("| {what} | {rounds} | {bytes} | {last} | {predicted} | {downtime} | {seconds} |");
        results.push((bytes.median, downtime.median));
    }
    let [eager, waiting] = results.as_slice() else { return Ok(false) };
    let share = waiting.0 / eager.0;
    let met = share <= 0.85 && waiting.1 <= eager.1;
    println!("\n{share:.3} of the bytes, bar ≤ 0.85 at equal or shorter downtime: {}", judge(met));
    Ok(met)
}

/// How soon a guest whose move is cancelled runs on.
pub(crate) fn cancel(setup: &Setup) -> Result<bool, Failure> {
    // It writes at half the link's speed: the pause has some hundred milliseconds of pages to send.
    println!("256 MiB, 15000 pages a second written uniformly, 1 Gbit/s; cancelled at random moments.\n");
    println!("| cancelled | times | until the guest runs, ms | until the session is over, ms | bar | result |");
    println!("|---|---|---|---|---|---|");
    let guest = Guest::mapped(Shape::full(256 * MIB), Pattern::Uniform)?;
    let (mut noise, mut met) = (Noise(setup.runs as u64 + 5), true);
    for (what, pauses) in [("in rounds", false), ("in the pause", true)] {
        let (mut runs, mut ends) = (Vec::new(), Vec::new());
        while runs.len() < 2 * setup.runs {
            let wait = Duration::from_micros(noise.below(if pauses { 300_000 } else { 2_300_000 }));
            let Some((run, end)) = cancel_once(setup, &guest, pauses, wait)? else { continue };
            runs.push(run);
            ends.push(end);
        }
        let (times, runs, ends) = (runs.len(), Spread::of(runs), Spread::of(ends));
        let is_met = runs.most() <= 20.0;
        met &= is_met;
        println!("| {what} | {times} | {runs} | {ends} | each ≤ 20 | {} |", judge(is_met));
    }
    Ok(met)
}

/// Milliseconds from a cancel until the guest runs, and until the session is over; none if it was too late.
fn cancel_once(setup: &Setup, guest: &Guest, pauses: bool, wait: Duration) -> Result<Option<(f64, f64)>, Failure> {
    guest.run_at(15_000);
    let hosts = Hosts::new(&setup.tmpfs, limits(1000))?;
    let (cancel, clock) = (CancellationToken::new(), Arc::clone(hosts.clock()));
    let canceller = std::thread::spawn({
        let cancel = cancel.clone();
        move || {
            while pauses && clock.stands.at().is_none() {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(wait);
            let at = Instant::now();
            cancel.cancel();
            at
        }
    });
    let outcome = hosts.send(guest, None, cancel)?;
    let (over, cancelled) = (Instant::now(), canceller.join().map_err(|_| "the canceller broke")?);
    if outcome.error.is_none() {
        return Ok(None);
    }
    if outcome.report.outcome != "cancelled" || outcome.report.guest_at != "sender" {
        return Err(format!("not cancelled: {:?}", outcome.report.error).into());
    }
    let clock = hosts.clock();
    // A guest that was not paused has never stopped.
    let runs = match (clock.paused.at(), clock.resumed.at()) {
        (None, _) => 0.0,
        (Some(_), Some(resumed)) => millis(resumed.saturating_duration_since(cancelled)),
        (Some(_), None) => return Err("it was paused, and nobody let it run".into()),
    };
    Ok(Some((runs, millis(over.saturating_duration_since(cancelled)))))
}
