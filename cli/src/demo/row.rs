//! One row of the table: all guests there at once, a while of work, all guests back at once.

use super::guest::{self, PAGE};
use super::host::Host;
use super::place::Place;
use super::postcopy::{self, PostCopyLeg};
use super::{Plan, peak, say};
use anyhow::{Context, Result, anyhow, ensure};
use pagewire::{CancellationToken, Pages, Report, Round};
use serde::Serialize;
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
    /// From the first connection to the last guest that is started on the other host.
    pub(super) seconds: f64,
    /// Until everything that stays was kept, too.
    pub(super) seconds_until_kept: f64,
    /// What the guests changed a second while they moved, until they were paused.
    pub(super) dirty_pages_a_second: f64,
    /// Of the guest that had the fewest rounds, the last one counted, and of that which had the most.
    pub(super) rounds_min: usize,
    pub(super) rounds_max: usize,
    /// Of the guest that stood still for the longest, from its pause until it was the other host's.
    pub(super) downtime_seconds_max: f64,
    /// Pages that the guests wrote on the host they left.
    pub(super) pages_rewritten: u64,
}

impl Leg {
    fn of(reports: &[Report], seconds_until_kept: f64, pages_rewritten: u64) -> Self {
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
            dirty_pages_a_second: reports.iter().map(|report| dirty_rate(&report.rounds)).sum(),
            rounds_min: reports.iter().map(|report| report.rounds.len()).min().unwrap_or(0),
            rounds_max: reports.iter().map(|report| report.rounds.len()).max().unwrap_or(0),
            downtime_seconds_max: reports.iter().map(|report| report.downtime_seconds).fold(0.0, f64::max),
            pages_rewritten,
        }
    }
}

/// What a guest changed a second over all of its rounds, each for as long as it took: one that was short says little. In
/// the last it stands still.
fn dirty_rate(rounds: &[Round]) -> f64 {
    let ran = rounds.split_last().map_or(&[][..], |(_, ran)| ran);
    let seconds: f64 = ran.iter().map(|round| round.seconds).sum();
    let changed: f64 = ran.iter().map(|round| round.dirty_rate * round.seconds).sum();
    if seconds > 0.0 { changed / seconds } else { 0.0 }
}

/// A row of the table.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) guests: usize,
    pub(super) memory_bytes: u64,
    pub(super) pages_total: u64,
    /// Written on host B, each page counted once.
    pub(super) pages_rewritten: u64,
    pub(super) out: Leg,
    pub(super) back: Leg,
    /// `VmHWM` over both legs; of the whole run until then where the kernel does not forget it.
    pub(super) memory_peak_bytes: Option<u64>,
    pub(super) memory_peak_is_of_this_row: bool,
    /// Of one guest, which moves a third time; of none where the system has no userfaultfd for us.
    pub(super) post_copy: Option<PostCopyLeg>,
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
        at_once(&seeds, |guest, seed| {
            guest::create(&a.image(guest), self.pages, seed, cancel)?;
            a.boot(guest)
        })?;
        let forgotten = peak::forget();
        say(&format!("{title}: all move to B at once, and run meanwhile"));
        let out = self.leg(a, b)?;
        say(&format!("{title}: they run on B and write {} % of their pages anew", plan.rewritten_percent));
        at_once(&seeds, |guest, _| b.guest(guest)?.work(plan.rewritten_percent, cancel))?;
        say(&format!("{title}: all move back to A at once, and run meanwhile"));
        let back = self.leg(b, a)?;
        // What one guest takes a third time, in memory that all of it is copied to, is not of these legs.
        let memory_peak_bytes = peak::bytes();
        let post_copy = self.post_copy()?;
        let pages_total = self.pages.saturating_mul(self.guests.len() as u64);
        Ok(Row {
            guests: plan.guests,
            memory_bytes: pages_total.saturating_mul(PAGE as u64),
            pages_total,
            pages_rewritten: back.pages_rewritten,
            out,
            back,
            memory_peak_bytes,
            memory_peak_is_of_this_row: forgotten,
            post_copy,
        })
    }

    /// Moves the first guest once more, in post-copy.
    fn post_copy(&self) -> Result<Option<PostCopyLeg>> {
        let Self { title, cancel, a, b, .. } = self;
        let Some(guest) = self.guests.first() else { return Ok(None) };
        if let Some(why) = postcopy::missing() {
            say(&format!("{title}: SKIPPED: the leg in post-copy: {why}"));
            return Ok(None);
        }
        say(&format!("{title}: {guest} moves to B in post-copy: it runs there at once, and its memory follows"));
        postcopy::leg(guest, a, b, cancel).with_context(|| guest.clone()).map(Some)
    }

    /// Moves all guests at once, compares, and leaves on the host they left what the store kept and no more.
    fn leg(&self, from: &Host, to: &Host) -> Result<Leg> {
        let guests: Vec<(&str, ())> = self.guests.iter().map(|guest| (guest.as_str(), ())).collect();
        let begin = Instant::now();
        let reports = at_once(&guests, |guest, ()| from.send(guest, to, self.cancel))?;
        to.settle(guests.len())?;
        let kept = begin.elapsed().as_secs_f64();
        let rewritten = at_once(&guests, |guest, ()| {
            // It stands still on the host that it left, and runs on the other: what it wrote there it knows.
            to.guest(guest)?.compare(&from.image(guest), self.cancel)?;
            let rewritten = from.guest(guest)?.rewritten();
            from.forget(guest)?;
            Ok(rewritten)
        })?;
        Ok(Leg::of(&reports, kept, rewritten.iter().sum()))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_count_for_as_long_as_they_took_and_the_last_not_at_all() {
        let round = |seconds, dirty_rate| Round { seconds, dirty_rate, ..Round::default() };
        let rounds = [round(0.9, 1000.0), round(0.1, 500.0), round(0.5, 0.0)];
        assert!((dirty_rate(&rounds) - 950.0).abs() < 1e-9);
        assert_eq!((dirty_rate(&rounds[..1]), dirty_rate(&[])), (0.0, 0.0));
    }
}
