//! One row of the table: all guests there at once, a while of work, all guests back at once.

use super::guest::{self, PAGE};
use super::host::Host;
use super::place::Place;
use super::{Plan, peak, say};
use anyhow::{Context, Result, anyhow, ensure};
use pagewire::{CancellationToken, Pages, Report};
use serde::Serialize;
use std::path::Path;
use std::time::Instant;

/// What one leg took, all guests together.
#[derive(Debug, Serialize)]
pub(super) struct Leg {
    /// Both directions, frames and their headers.
    pub(super) wire_bytes: u64,
    /// With their bytes, or as a difference.
    pub(super) pages_travelled: u64,
    /// By the way they were stated.
    pub(super) pages: Pages,
    /// From the first connection to the last image that is whole and synced under its name.
    pub(super) seconds: f64,
    /// Until everything that stays was kept, too.
    pub(super) seconds_until_kept: f64,
}

impl Leg {
    fn of(reports: &[Report], seconds_until_kept: f64) -> Self {
        let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum();
        let pages = Pages {
            zero: sum(|report| report.pages.zero),
            base: sum(|report| report.pages.base),
            reference: sum(|report| report.pages.reference),
            inline: sum(|report| report.pages.inline),
            delta: sum(|report| report.pages.delta),
        };
        Self {
            wire_bytes: sum(|report| report.wire.sent_bytes.saturating_add(report.wire.received_bytes)),
            pages_travelled: pages.inline.saturating_add(pages.delta),
            pages,
            // All begin at once: the slowest is the leg.
            seconds: reports.iter().map(|report| report.seconds).fold(0.0, f64::max),
            seconds_until_kept,
        }
    }
}

/// A row of the table.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) guests: usize,
    pub(super) memory_bytes: u64,
    pub(super) pages_total: u64,
    pub(super) pages_rewritten: u64,
    pub(super) out: Leg,
    pub(super) back: Leg,
    /// `VmHWM` over both legs; of the whole run until then where the kernel does not forget it.
    pub(super) memory_peak_bytes: Option<u64>,
    pub(super) memory_peak_is_of_this_row: bool,
}

/// Two hosts and the guests on A.
pub(super) struct Scene<'a> {
    plan: Plan,
    title: String,
    cancel: &'a CancellationToken,
    guests: Vec<String>,
    /// Of one guest.
    pages: u64,
    a: Host,
    b: Host,
    // Behind the hosts, which are dropped before it.
    _dir: tempfile::TempDir,
}

impl<'a> Scene<'a> {
    pub(super) fn set(plan: Plan, place: &Place, title: String, cancel: &'a CancellationToken) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("row").tempdir_in(place.path())?;
        let host = |name: &str| Host::start(&dir.path().join(name)).with_context(|| format!("host {name}"));
        let (a, b) = (host("a")?, host("b")?);
        let guests: Vec<String> = (1..=plan.guests).map(|guest| format!("guest-{guest}")).collect();
        let one = place.scaled(plan.memory) / guests.len().max(1) as u64;
        let pages = one / PAGE as u64;
        ensure!(pages > 0, "the guests have no memory");
        Ok(Self { plan, title, cancel, guests, pages, a, b, _dir: dir })
    }

    pub(super) fn play(&self) -> Result<Row> {
        let Self { plan, title, cancel, a, b, .. } = self;
        let seeds: Vec<(&str, u64)> =
            self.guests.iter().map(String::as_str).zip((1..).map(|seed| seed << 40)).collect();
        say(&format!("{title}: they start on A"));
        at_once(&seeds, |guest, seed| guest::create(&a.image(guest), self.pages, seed, cancel))?;
        let forgotten = peak::forget();
        say(&format!("{title}: all move to B at once"));
        let out = self.leg(a, b)?;
        say(&format!("{title}: they run on B and write {} % of their pages anew", plan.rewritten_percent));
        let rewrite = |guest: &str, seed: u64| guest::work(&b.image(guest), plan.rewritten_percent, !seed, cancel);
        let rewritten = at_once(&seeds, rewrite)?;
        say(&format!("{title}: all move back to A at once"));
        let back = self.leg(b, a)?;
        let pages_total = self.pages.saturating_mul(self.guests.len() as u64);
        Ok(Row {
            guests: plan.guests,
            memory_bytes: pages_total.saturating_mul(PAGE as u64),
            pages_total,
            pages_rewritten: rewritten.iter().sum(),
            out,
            back,
            memory_peak_bytes: peak::bytes(),
            memory_peak_is_of_this_row: forgotten,
        })
    }

    /// Moves all guests at once, compares, and leaves on the host they left what the store kept and no more.
    fn leg(&self, from: &Host, to: &Host) -> Result<Leg> {
        let guests: Vec<(&str, ())> = self.guests.iter().map(|guest| (guest.as_str(), ())).collect();
        let begin = Instant::now();
        let reports = at_once(&guests, |guest, ()| from.send(guest, to, self.cancel))?;
        to.settle(guests.len())?;
        let leg = Leg::of(&reports, begin.elapsed().as_secs_f64());
        at_once(&guests, |guest, ()| {
            let (left, arrived) = (from.image(guest), to.image(guest));
            guest::compare(&left, &arrived, self.cancel)?;
            remove(&left)
        })?;
        Ok(leg)
    }
}

fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path).with_context(|| path.display().to_string())
}

/// Does `work` for every guest at once, each on a thread of its own.
fn at_once<S: Copy + Send, T: Send>(
    guests: &[(&str, S)],
    work: impl Fn(&str, S) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let work = &work;
        let start = |&(guest, with)| (guest, scope.spawn(move || work(guest, with)));
        let threads: Vec<_> = guests.iter().map(start).collect();
        let end = |(guest, thread): (&str, std::thread::ScopedJoinHandle<'_, Result<T>>)| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("its thread panicked"))).with_context(|| guest.to_owned())
        };
        // All are waited for before one that failed is told.
        let ends: Vec<Result<T>> = threads.into_iter().map(end).collect();
        ends.into_iter().collect()
    })
}
