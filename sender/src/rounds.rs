//! The rounds of a guest that runs: which pages each states, which wait for the last, and what was measured of them.
//!
//! What a harvest takes is in `dirty` until a round takes it over; a page that is hot waits in `deferred`. Nothing
//! leaves these sets but by being stated, and all that was ever harvested is remembered: an attempt that fails gives it
//! back.

use crate::converge::{Facts, Limits, Reason, STUCK_SHARE, Verdict, decide};
use crate::history::History;
use crate::lanes::Lanes;
use crate::memory::{GuestMemory, Tracking};
use crate::report::{Decision, RoundReport};
use crate::trace::Trace;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::time::{Span, Time};
use pagewire_protocol::trace::{Seen, TraceRecord};
use std::io;
use std::ops::Range;

/// How often writes are looked at while a round lasts, so that history tells pages that are written all the time from
/// those that were written once.
const SAMPLE_EVERY: Span = Span::from_secs(1);
/// Of the bytes that fit the downtime, hot pages may take this share: the rest is for what else changes.
const HOT_SHARE: f64 = 0.75;
/// Before a round's end is judged, so much of the downtime's bytes may still be under way.
const DRAINED_SHARE: f64 = 0.125;

/// How far a live session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// A round is under way.
    Running,
    /// It is stated, and what is under way has to become less before it can be judged.
    Draining,
    /// It was judged to be the last in which the guest runs, and all of it has to be at the receiver before the guest is
    /// stopped: what waits in queues then would make it wait.
    Settling,
    /// The embedder was asked to pause the guest.
    Pausing,
    /// The guest stands still and the rest is being sent.
    Last,
}

/// Whether the guest leaves before all of its pages do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    No,
    /// Before any does.
    AtOnce,
    /// Its pages are left behind as they are when it stands still.
    Yes,
}

/// What a round began with, and what it has done.
#[derive(Clone, Copy, Debug, Default)]
struct Measure {
    since: Time,
    /// Bytes that the receiver had acknowledged.
    delivered: u64,
    /// Pages that have to be looked at.
    looked: u64,
    /// Of these, those that had changed.
    changed: u64,
}

/// The rounds of one live session.
#[derive(Debug)]
pub(crate) struct Rounds {
    limits: Limits,
    tracking: Tracking,
    pub(crate) stage: Stage,
    pub(crate) number: u32,
    /// The pages of this round, from the second on; those before `next` are stated.
    todo: PageBitmap,
    next: u64,
    /// All that were to be looked at in this round.
    looked: PageBitmap,
    dirty: PageBitmap,
    deferred: PageBitmap,
    /// Everything that was harvested.
    ever: PageBitmap,
    /// Pages that do not matter; a write makes them matter.
    free: Option<PageBitmap>,
    history: History,
    sampled: Time,
    began: Time,
    round: Measure,
    /// The round before: when it began, and how many pages had changed.
    before: Option<Measure>,
    dirty_rate: f64,
    stuck: u32,
    throttled: u8,
    /// A round was made only to shorten a downtime that was short enough.
    shortened: bool,
    leaving: Leave,
    /// No round was begun before the last.
    no_rounds: bool,
    reports: Vec<RoundReport>,
    trace: Option<Box<dyn Trace>>,
    /// Of memory of which nobody knows: what this round found changed.
    compared: PageBitmap,
}

impl Rounds {
    /// Starts to watch `memory`; round 0 begins, which states all of it.
    ///
    /// # Errors
    /// Its writes cannot be watched.
    pub(crate) fn begin(memory: &mut impl GuestMemory, limits: Limits, now: Time) -> io::Result<Self> {
        memory.start_tracking()?;
        let pages = memory.layout().pages();
        let none = || PageBitmap::new(pages);
        Ok(Self {
            limits,
            tracking: memory.tracking(),
            stage: Stage::Running,
            number: 0,
            todo: none(),
            next: 0,
            looked: PageBitmap::full(pages),
            dirty: none(),
            deferred: none(),
            ever: none(),
            free: memory.free_pages().filter(|free| free.len() == pages),
            history: History::new(pages),
            sampled: now,
            began: now,
            round: Measure { since: now, looked: pages, ..Measure::default() },
            before: None,
            dirty_rate: 0.0,
            stuck: 0,
            throttled: 0,
            shortened: false,
            leaving: Leave::No,
            no_rounds: false,
            reports: Vec::new(),
            trace: None,
            compared: none(),
        })
    }

    /// The guest leaves before any of its pages does.
    pub(crate) fn leave_at_once(&mut self) {
        self.leaving = Leave::AtOnce;
    }

    /// Whether it does, and has not been paused yet.
    pub(crate) fn leaves_at_once(&self) -> bool {
        self.leaving == Leave::AtOnce || (self.leaving == Leave::Yes && self.stage == Stage::Pausing)
    }

    /// The guest is to be paused, and leaves what has not been sent behind.
    pub(crate) fn leave(&mut self, stage: Stage) {
        self.no_rounds = self.leaving == Leave::AtOnce;
        self.leaving = Leave::Yes;
        self.stage = stage;
    }

    /// Whether pages are left behind.
    pub(crate) fn leaves(&self) -> bool {
        self.leaving == Leave::Yes
    }

    /// The pages of the last round, which are not sent in it.
    pub(crate) fn take_todo(&mut self) -> PageBitmap {
        let none = PageBitmap::new(self.todo.len());
        std::mem::replace(&mut self.todo, none)
    }

    /// Shows `trace` what is found to be written from here on.
    pub(crate) fn show(&mut self, trace: Option<Box<dyn Trace>>) {
        self.trace = trace;
    }

    fn record(&mut self, seen: Seen, pages: PageBitmap, now: Time) {
        if let Some(trace) = &mut self.trace {
            trace.seen(TraceRecord { at: now.since(self.began), seen, pages });
        }
    }

    /// A round ends: what it found changed by reading. Round 0 has nothing to compare with.
    fn note_compared(&mut self, now: Time) {
        if self.tracking != Tracking::Unknown || self.number == 0 {
            return;
        }
        let found = std::mem::replace(&mut self.compared, PageBitmap::new(self.dirty.len()));
        self.history.note_compared(&found, &self.deferred);
        self.record(Seen::Compare, found, now);
    }

    /// Whether the guest stands still, so that nothing may change any more.
    pub(crate) fn is_last(&self) -> bool {
        self.stage == Stage::Last
    }

    /// The pages of this round that are still to be stated, from the second round on.
    pub(crate) fn todo(&self) -> (&PageBitmap, u64) {
        (&self.todo, self.next)
    }

    /// Takes those of these places that are still to be looked at and lie before where the round has advanced to.
    pub(crate) fn take(&mut self, places: Range<u64>) -> Vec<Range<u64>> {
        let places = places.start..places.end.min(self.next);
        let taken = self.todo.runs(places.clone()).collect();
        self.todo.remove_range(places);
        taken
    }

    /// Those before `place` are stated.
    pub(crate) fn advance(&mut self, place: u64) {
        self.next = place;
    }

    /// A page was found to have changed.
    pub(crate) fn note_changed(&mut self, place: u64) {
        self.round.changed = self.round.changed.saturating_add(1);
        if self.tracking == Tracking::Unknown {
            self.compared.insert(place);
        }
    }

    /// The pages that do not matter, in round 0.
    pub(crate) fn free(&self) -> Option<&PageBitmap> {
        self.free.as_ref().filter(|_| self.number == 0)
    }

    /// Takes what was written since the last harvest.
    pub(crate) fn harvest(&mut self, memory: &mut impl GuestMemory, now: Time) -> io::Result<()> {
        if self.tracking != Tracking::Dirty {
            return Ok(());
        }
        let mut found = PageBitmap::new(self.dirty.len());
        let result = memory.harvest(&mut found);
        if result.is_err() {
            // What it took and could not tell is lost to it: everything counts as written.
            found.insert_range(0..found.len());
        }
        self.history.note(&found);
        let span = now.since(self.sampled).as_secs_f64();
        if span > 0.0 {
            self.dirty_rate = found.count() as f64 / span;
        }
        self.sampled = now;
        self.dirty.insert_all(&found);
        self.ever.insert_all(&found);
        if result.is_ok() {
            self.record(Seen::Harvest, found, now);
        }
        result
    }

    /// Whether writes are to be looked at although the round goes on.
    pub(crate) fn is_sample_due(&self, now: Time) -> bool {
        self.tracking == Tracking::Dirty && !self.is_last() && now.since(self.sampled) >= SAMPLE_EVERY
    }

    /// Whether a page was written since the session last took notice of it; what is not tracked always may have been.
    pub(crate) fn may_have_changed(&self, place: u64) -> bool {
        self.tracking == Tracking::Unknown || self.dirty.contains(place)
    }

    /// Whether little enough is under way for the round to be judged.
    pub(crate) fn is_drained(&self, lanes: &Lanes, now: Time) -> bool {
        let allowed = self.rate(lanes, now) * self.limits.downtime.as_secs_f64() * DRAINED_SHARE;
        lanes.is_idle() || (lanes.is_sent() && lanes.under_way() as f64 <= allowed)
    }

    /// Bytes a second that reach the receiver, by what limits the link or else by what this round, or all of the
    /// session, has brought there.
    fn rate(&self, lanes: &Lanes, now: Time) -> f64 {
        let over = |bytes: u64, span: Span| {
            let seconds = span.as_secs_f64();
            (seconds > 0.0 && bytes > 0).then(|| bytes as f64 / seconds)
        };
        let round = over(lanes.delivered().saturating_sub(self.round.delivered), now.since(self.round.since));
        lanes.goodput.shown().or(round).or_else(|| over(lanes.delivered(), now.since(self.began))).unwrap_or(0.0)
    }

    /// Judges the round that has ended, after a harvest, and begins the next one if there is one.
    ///
    /// `bytes_a_page` is what a page cost so far whose bytes went: it stands in for what round 0 tells nothing of.
    pub(crate) fn judge(&mut self, lanes: &Lanes, bytes_a_page: f64, now: Time) -> (Verdict, Decision) {
        let left = self.left();
        let rate = self.rate(lanes, now);
        let bytes = lanes.delivered().saturating_add(lanes.under_way()).saturating_sub(self.round.delivered);
        let spent = now.since(self.round.since);
        let under_way = over_rate(lanes.under_way() as f64, rate);
        let scan = (spent.as_secs_f64() - over_rate(bytes as f64, rate)).max(0.0);
        let known = self.number > 0;
        let over_pages = |pages: u64| if known && pages > 0 { bytes as f64 / pages as f64 } else { bytes_a_page };
        let (scan, expected, each) = match self.tracking {
            Tracking::Unknown => {
                let interval = self.before.map_or(0.0, |before| now.since(before.since).as_secs_f64() / 2.0);
                self.dirty_rate = if interval > 0.0 { self.round.changed as f64 / interval } else { f64::INFINITY };
                let changed = self.dirty_rate * spent.as_secs_f64() + self.deferred.count() as f64;
                let each = over_pages(self.round.changed);
                (scan * left as f64 / self.round.looked.max(1) as f64, changed * bytes_a_page, each)
            }
            _ => {
                let share = left as f64 / self.round.looked.max(1) as f64;
                // What was written in this round before it was read has gone already; how much of such is known from what
                // this round found. Every other page has to go.
                let each = over_pages(self.round.changed);
                let new =
                    self.dirty.count_without(&self.looked).saturating_add(self.deferred.count_without(&self.dirty));
                let again = over_pages(self.round.looked) * left.saturating_sub(new) as f64;
                (if self.number == 0 { 0.0 } else { scan * share }, each * new as f64 + again, each)
            }
        };
        let predicted = if left == 0 { 0.0 } else { scan + over_rate(expected, rate) } + under_way;
        self.note_stuck(left);
        self.note_compared(now);
        let facts = Facts {
            round: self.number,
            elapsed: now.since(self.began),
            predicted: span(predicted),
            after_another: span(self.after_another(predicted, (rate, each))),
            shortened: self.shortened,
            dirty_rate: self.dirty_rate,
            rate,
            stuck: self.stuck,
            throttled: self.throttled,
        };
        let mut verdict = decide(&facts, &self.limits);
        self.shortened |= verdict == Verdict::Again && facts.predicted <= self.limits.downtime;
        if scan > self.limits.downtime.as_secs_f64() {
            verdict = verdict.because(Reason::Scan);
        }
        let decision = Decision { at: now, what: explain(&facts, left, verdict, self.limits.downtime) };
        self.reports.push(RoundReport {
            number: self.number,
            pages: self.round.looked,
            stated: if self.number == 0 { self.round.looked } else { self.round.changed },
            bytes,
            spent,
            dirty: left,
            dirty_rate: if self.dirty_rate.is_finite() { self.dirty_rate } else { 0.0 },
            rate,
            predicted: Some(facts.predicted).filter(|_| predicted.is_finite()),
        });
        self.follow(verdict, rate, each);
        (verdict, decision)
    }

    /// Seconds of downtime after a round that takes `predicted` seconds: what the guest writes meanwhile, and what it
    /// writes all the time.
    fn after_another(&self, predicted: f64, (rate, bytes_a_page): (f64, f64)) -> f64 {
        if self.tracking == Tracking::Unknown || predicted > self.limits.downtime.as_secs_f64() {
            return predicted;
        }
        let mut left = self.deferred.clone();
        left.insert_all(&self.dirty);
        let pages = self.history.hot(&left).count() as f64 + self.dirty_rate * predicted;
        over_rate(pages * bytes_a_page, rate)
    }

    /// Pages that the last round would have to look at.
    fn left(&self) -> u64 {
        if self.tracking == Tracking::Unknown {
            return self.dirty.len();
        }
        self.dirty.count().saturating_add(self.deferred.count_without(&self.dirty))
    }

    fn note_stuck(&mut self, left: u64) {
        let (this, next) = match (self.tracking, self.before) {
            (Tracking::Unknown, Some(before)) if self.number > 1 => (before.changed, self.round.changed),
            (Tracking::Dirty, _) if self.number > 0 => (self.round.looked, left),
            _ => return,
        };
        let stuck = next > 0 && next as f64 >= this as f64 * STUCK_SHARE;
        self.stuck = if stuck { self.stuck.saturating_add(1) } else { 0 };
    }

    fn follow(&mut self, verdict: Verdict, rate: f64, bytes_a_page: f64) {
        match verdict {
            Verdict::Again => self.begin_round(Some((rate, bytes_a_page))),
            Verdict::Throttle(percent) => {
                self.throttled = percent;
                self.stuck = 0;
                self.begin_round(Some((rate, bytes_a_page)));
            }
            Verdict::SwitchOver | Verdict::Force(_) => self.stage = Stage::Settling,
            Verdict::PostCopy(_) | Verdict::GiveUp(_) => {}
        }
    }

    /// The next round takes over what is dirty; with a rate given, hot pages wait if they will fit the downtime.
    fn begin_round(&mut self, hot: Option<(f64, f64)>) {
        let pages = self.dirty.len();
        let mut todo = std::mem::replace(&mut self.dirty, PageBitmap::new(pages));
        if self.tracking == Tracking::Unknown {
            todo.insert_range(0..pages);
        }
        todo.insert_all(&std::mem::replace(&mut self.deferred, PageBitmap::new(pages)));
        if let Some((rate, bytes_a_page)) = hot.filter(|_| self.limits.defer_hot) {
            let hot = self.history.hot(&todo);
            let fits = rate * self.limits.downtime.as_secs_f64() * HOT_SHARE;
            if hot.count() as f64 * bytes_a_page <= fits {
                hot.runs(0..pages).for_each(|run| {
                    todo.remove_range(run);
                });
                self.deferred = hot;
            }
        }
        self.round.looked = todo.count();
        self.looked.clone_from(&todo);
        (self.todo, self.next) = (todo, 0);
        self.number = self.number.saturating_add(1);
        self.stage = Stage::Running;
    }

    /// The round under way is measured from here.
    pub(crate) fn start_clock(&mut self, lanes: &Lanes, now: Time) {
        self.before = Some(self.round);
        let delivered = lanes.delivered().saturating_add(lanes.under_way());
        self.round = Measure { since: now, delivered, looked: self.round.looked, changed: 0 };
    }

    /// The guest stands still and was harvested: the last round begins.
    pub(crate) fn begin_last(&mut self, lanes: &Lanes, now: Time) {
        self.begin_round(None);
        if self.no_rounds {
            self.number = 0;
        }
        self.stage = Stage::Last;
        self.start_clock(lanes, now);
    }

    /// All of the last round is stated. What of it has gone out is not known yet.
    pub(crate) fn end_last(&mut self, lanes: &Lanes, now: Time) {
        self.note_compared(now);
        self.reports.push(RoundReport {
            number: self.number,
            pages: self.round.looked,
            stated: self.round.changed,
            bytes: 0,
            spent: Span::ZERO,
            dirty: 0,
            dirty_rate: 0.0,
            rate: self.rate(lanes, now),
            predicted: None,
        });
        self.note_last(lanes, now);
    }

    /// Something of the last round has gone out or arrived since it was stated.
    pub(crate) fn note_last(&mut self, lanes: &Lanes, now: Time) {
        let bytes = lanes.delivered().saturating_add(lanes.under_way()).saturating_sub(self.round.delivered);
        let (number, spent) = (self.number, now.since(self.round.since));
        let report = self.reports.last_mut().filter(|report| self.stage == Stage::Last && report.number == number);
        if let Some(report) = report {
            (report.bytes, report.spent) = (bytes, spent);
        }
    }

    /// The rounds so far.
    pub(crate) fn reports(&self) -> &[RoundReport] {
        &self.reports
    }

    /// The pages that history says are written all the time.
    pub(crate) fn hot(&self) -> PageBitmap {
        self.history.hot(&PageBitmap::full(self.ever.len()))
    }

    /// The session failed: what it took is dirty again.
    pub(crate) fn put_back(&self, memory: &mut impl GuestMemory) {
        memory.put_back(&self.ever);
    }
}

/// Seconds that bytes take; at no rate at all, for ever.
fn over_rate(bytes: f64, rate: f64) -> f64 {
    if bytes <= 0.0 {
        0.0
    } else if rate > 0.0 {
        bytes / rate
    } else {
        f64::INFINITY
    }
}

fn span(seconds: f64) -> Span {
    let nanos = seconds.max(0.0) * 1e9;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
    Span::from_nanos(nanos as u64)
}

fn explain(facts: &Facts, left: u64, verdict: Verdict, downtime: Span) -> String {
    let Facts { round, predicted, dirty_rate, rate, .. } = facts;
    let next = match verdict {
        Verdict::Again if facts.predicted <= downtime => {
            format!("another round, after which it will be {:.1} ms", facts.after_another.as_secs_f64() * 1e3)
        }
        Verdict::Again => "another round".to_owned(),
        Verdict::Throttle(percent) => format!("another round, with the guest slowed down by {percent} %"),
        Verdict::SwitchOver => "switch over".to_owned(),
        Verdict::Force(reason) => format!("switch over all the same: {reason}"),
        Verdict::PostCopy(reason) => format!("post-copy: {reason}"),
        Verdict::GiveUp(reason) => format!("give up: {reason}"),
    };
    if dirty_rate.is_infinite() {
        return format!("after round {round}: nobody tells what the guest writes, so all of it is read again: {next}");
    }
    let (predicted, downtime) = (predicted.as_secs_f64() * 1e3, downtime.as_secs_f64() * 1e3);
    format!(
        "after round {round}: {left} pages are left, the guest changes {dirty_rate:.0} a second, the link carries \
         {:.1} MB a second: a downtime of {predicted:.1} ms, allowed are {downtime:.1}: {next}",
        rate / 1e6,
    )
}
