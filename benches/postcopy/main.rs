//! What a guest waits for that runs at the receiver while its memory follows: two hosts of this process, loopback TCP.
//!
//! `cargo run --release -p pagewire-benches --bin postcopy -- [--image FILE] [--runs N] [CASE…]` prints a table for each
//! case: `idle`, `busy`, `total`, `readers`; all without one. Each figure stands beside its alternative from the same run;
//! medians over the runs. FILE is what the pages hold, noise without it. Needs userfaultfd for the kernel's own touches
//! (root, or `vm.unprivileged_userfaultfd`), two cores and 4 GiB. Exit code 1: a bar was missed.
//!
//! A local fault is what `faults` measures: a page whose digest is found here is put in at once when the digest comes, so
//! that whoever waits for it waits for the same steps as there.

mod figures;
mod image;
mod journey;
mod plain;

use rustix::thread::{CpuSet, sched_setaffinity};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

pub(crate) const PAGE: usize = 4096;

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How figures are taken.
pub(crate) struct Setup {
    pub(crate) runs: usize,
    pub(crate) image: Option<PathBuf>,
}

/// Keeps this thread, and those that it starts from now on, on a core.
pub(crate) fn pin(core: Option<usize>) -> Result<(), Failure> {
    let Some(core) = core else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

/// Lets the others of a core run: who serves is asleep again when the next touch comes, as on an idle link.
pub(crate) fn rest(pause: Duration) {
    let began = Instant::now();
    while began.elapsed() < pause {
        std::thread::yield_now();
    }
}

/// What so many thousandths of the times are not above, in microseconds.
pub(crate) fn quantile(times: &[u64], thousandths: usize) -> f64 {
    let mut times = times.to_vec();
    times.sort_unstable();
    times
        .get((times.len() * thousandths / 1000).min(times.len().saturating_sub(1)))
        .map_or(f64::NAN, |nanos| *nanos as f64 / 1e3)
}

pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A row's last column.
pub(crate) fn judge(met: bool) -> &'static str {
    if met { "pass" } else { "**FAIL**" }
}

fn main() -> Result<ExitCode, Failure> {
    let (mut setup, mut cases) = (Setup { runs: 5, image: None }, Vec::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--runs" => setup.runs = args.next().ok_or("--runs N")?.parse()?,
            "--image" => setup.image = Some(args.next().ok_or("--image FILE")?.into()),
            _ => cases.push(arg),
        }
    }
    if cases.is_empty() {
        cases = ["idle", "busy", "total", "readers"].map(str::to_owned).to_vec();
    }
    let mut met = true;
    for case in cases {
        met &= match case.as_str() {
            "idle" => figures::idle(&setup)?,
            "busy" => figures::busy(&setup)?,
            "total" => figures::total(&setup)?,
            "readers" => figures::readers(&setup)?,
            _ => return Err(format!("{case}: no such case").into()),
        };
        println!();
    }
    Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
