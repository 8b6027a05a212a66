//! What moving a guest that runs costs it: real hosts of this process on loopback TCP, with journals and files.
//!
//! `cargo run --release -p pagewire-benches --bin live -- [--runs N] [--disk FOLDER] [CASE…]` prints a table for each case:
//! `pause`, `uniform`, `flood`, `hot`, `cancel`; all of them if none is named. Figures are medians, with the least and the most.
//! Records and arriving images are on tmpfs (`/dev/shm`) but where a row says disk: then below FOLDER. All but `pause` run
//! in a network namespace whose loopback is capped to 1 Gbit/s by tbf, which needs root. After every move the image that
//! arrived is compared with the guest. Exit code 1: a bar was missed.

mod figures;
mod guest;
mod namespace;
mod trip;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How figures are taken.
pub(crate) struct Setup {
    pub(crate) runs: usize,
    pub(crate) tmpfs: PathBuf,
    pub(crate) disk: PathBuf,
}

pub(crate) fn millis(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

/// The median of some values, with the least and the most of them.
pub(crate) struct Spread {
    pub(crate) median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Self { median: at(values.len() / 2), least: at(0), most: at(values.len().saturating_sub(1)) }
    }

    pub(crate) fn most(&self) -> f64 {
        self.most
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { median, least, most } = self;
        let digits = if median.abs() >= 100.0 { 0 } else { 1 };
        write!(f, "{median:.digits$} ({least:.digits$} to {most:.digits$})")
    }
}

/// A row's last column; says whether the bar was met.
pub(crate) fn judge(met: bool) -> &'static str {
    if met { "pass" } else { "**FAIL**" }
}

fn main() -> Result<ExitCode, Failure> {
    let mut setup = Setup { runs: 5, tmpfs: "/dev/shm".into(), disk: std::env::temp_dir() };
    let mut cases = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--runs" => setup.runs = args.next().ok_or("--runs N")?.parse()?,
            "--disk" => setup.disk = args.next().ok_or("--disk FOLDER")?.into(),
            _ => cases.push(arg),
        }
    }
    if cases.is_empty() {
        cases = ["pause", "uniform", "flood", "hot", "cancel"].map(str::to_owned).to_vec();
    }
    let mut met = true;
    for case in cases {
        met &= match case.as_str() {
            "pause" => figures::pause(&setup)?,
            "uniform" | "flood" | "hot" | "cancel" if !namespace::is_capped() => namespace::run_inside(&case, &setup)?,
            "uniform" => figures::uniform(&setup)?,
            "flood" => figures::flood(&setup)?,
            "hot" => figures::hot(&setup)?,
            "cancel" => figures::cancel(&setup)?,
            _ => return Err(format!("{case}: no such case").into()),
        };
        println!();
    }
    Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
