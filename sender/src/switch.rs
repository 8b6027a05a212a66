//! Skipping and compressing must pay for themselves: two switches that throw themselves by measured rates.
//!
//! Both compare the time a page costs one way with the time it costs the other, from what this session has measured:
//! goodput of the link, speed and ratio of each compression level, share of announcements that hit. Nothing here knows
//! memory, lanes or frames; every decision is a pure function of figures that the report shows.

use crate::goodput::{GLIMPSE_BYTES, Goodput, average, blend};
use crate::report::Decision;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::time::{Span, Time};

/// A way to make a batch smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// zstd at a level.
    Level(i32),
    /// zstd over what the pages were in the base.
    Delta,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Level(level) => write!(f, "compress at zstd level {level}"),
            Self::Delta => f.write_str("send what differs from the base"),
        }
    }
}

/// What is worth having: level −1 for links of some Gbit/s, 1 for slower ones (3 and more buy little over 1 on memory),
/// and deltas where there is something to differ from.
const WAYS: [Way; 3] = [Way::Level(-1), Way::Level(1), Way::Delta];
/// The last of them, alone measured where it is possible.
const DELTA: usize = 2;
/// A link is looked at again after so many batches that were deltas: 256 MiB of pages.
const GLIMPSE_EVERY: u64 = 1024;
/// Compression must promise at least this share less time than raw before it is switched on.
const GAIN_MIN: f64 = 0.2;
/// Batches at the start that are compressed to measure, at most.
const PROBES_FIRST_MAX: u64 = 64;
/// Bytes that make a sample of a level: small batches alone would make it look slow.
const LEVEL_SAMPLE_BYTES: usize = 256 * 1024;
/// Every so many batches a way that is not in use is measured again.
const PROBE_EVERY: u64 = 64;
/// Weight of a new compression ratio: contents differ from batch to batch, and levels are compared over many.
const FRESH_RATIO: f64 = 0.08;
/// What decompressing takes of the time that compressing took (measured, 0.3 to 0.5 at the levels in use).
const UNPACK: f64 = 0.4;
/// A level in use is left only for one that takes at most this share of its time.
const BETTER: f64 = 0.85;
/// What a page costs that was announced in vain: it is read and digested again (measured, 0.6–1 µs).
const REREAD_NANOS: f64 = 1_000.0;
/// Announcements that make a sample.
const ANNOUNCED_MIN: u64 = 256;

#[derive(Debug, Default, Clone, Copy)]
struct Measured {
    nanos_a_byte: Option<f64>,
    ratio: Option<f64>,
    /// Of the sample under way.
    raw: usize,
    compressed: usize,
    spent: Span,
}

/// Whether batches are compressed, and how hard.
#[derive(Debug)]
pub(crate) struct CompressSwitch {
    allowed: bool,
    workers: f64,
    levels: [Measured; WAYS.len()],
    /// The level in use for batches that cannot be deltas.
    whole: Option<usize>,
    /// Those that can be go as deltas. The one choice never stands in for the other: an answer to a want rests on
    /// nothing that the receiver may lack.
    deltas: Option<usize>,
    batches: u64,
    /// When a raw batch goes out to show what the link can do.
    glimpse_at: u64,
}

impl CompressSwitch {
    /// A switch for `workers` threads that compress; never on unless `allowed`.
    pub(crate) fn new(allowed: bool, workers: usize) -> Self {
        let workers = u16::try_from(workers.max(1)).unwrap_or(u16::MAX);
        Self {
            allowed,
            workers: f64::from(workers),
            levels: Default::default(),
            whole: None,
            deltas: None,
            batches: 0,
            glimpse_at: 0,
        }
    }

    /// Nanoseconds that a byte of a page costs at a level: compression and link work side by side.
    fn cost(&self, level: usize, goodput: &Goodput, link: f64) -> Option<f64> {
        let measured = self.levels.get(level)?;
        let (nanos, rest) = (measured.nanos_a_byte?, measured.ratio? * link);
        // How many may help with deltas is not known before they are the rule: one is counted on.
        if level == DELTA {
            return Some(nanos.max(rest));
        }
        if goodput.shares_host() {
            // What compresses here is taken from whoever decompresses there and whatever carries bytes between them.
            let workers = (self.workers / 2.0).max(1.0);
            return Some((nanos * (1.0 + UNPACK) / workers + rest).max(goodput.floor()));
        }
        Some((nanos / self.workers).max(rest).max(goodput.floor()))
    }

    /// The way for the next batch, `None` for raw; `delta` is how many of its bytes could be deltas, if any could: then,
    /// and only then, the way may be [`Way::Delta`].
    pub(crate) fn choose(
        &mut self,
        delta: Option<usize>,
        goodput: &Goodput,
        now: Time,
        decisions: &mut Vec<Decision>,
    ) -> Option<Way> {
        if !self.allowed {
            return None;
        }
        self.batches = self.batches.saturating_add(1);
        // The first batches measure each way, so that the first sample of the link decides.
        let ways = if delta.is_some() { DELTA..WAYS.len() } else { 0..DELTA };
        let unmeasured = ways.clone().find(|&way| self.levels.get(way).is_some_and(|way| way.ratio.is_none()));
        if let Some(level) = unmeasured.filter(|_| self.batches <= PROBES_FIRST_MAX) {
            return WAYS.get(level).copied();
        }
        if delta.is_some_and(|bytes| bytes >= GLIMPSE_BYTES) && self.batches >= self.glimpse_at {
            self.glimpse_at = self.batches.saturating_add(GLIMPSE_EVERY);
            return None;
        }
        let link = match delta {
            None if goodput.is_in_vain() => {
                self.decide(false, None, goodput.nanos_a_byte()?, (now, decisions));
                return None;
            }
            None => goodput.nanos_a_byte()?,
            Some(_) => match goodput.nanos_at_most() {
                Some(link) => link,
                // Bytes that are known to be there once already are not sent while nobody knows what they cost.
                None => return Some(Way::Delta),
            },
        };
        let candidates = ways.filter_map(|level| self.cost(level, goodput, link).map(|cost| (level, cost)));
        let best = candidates.min_by(|a, b| a.1.total_cmp(&b.1)).filter(|&(_, cost)| cost < link * (1.0 - GAIN_MIN));
        let current = if delta.is_some() { self.deltas } else { self.whole };
        let current = current.and_then(|level| self.cost(level, goodput, link).map(|cost| (level, cost)));
        // A way in use is left only for one that is clearly better.
        let stays = current.filter(|&(_, cost)| cost < link && best.is_none_or(|(_, best)| best > cost * BETTER));
        let best = stays.or(best);
        self.decide(delta.is_some(), best, link, (now, decisions));
        if delta.is_none() && self.batches.is_multiple_of(PROBE_EVERY) {
            let other = self.whole.map_or(0, |current| (current + 1) % DELTA);
            // Probing costs: only where the link is slow enough for compression to win if pages were compressible.
            let hopeful = self
                .levels
                .get(other)
                .and_then(|level| level.nanos_a_byte)
                .is_none_or(|nanos| nanos / self.workers < link);
            if hopeful {
                return WAYS.get(other).copied();
            }
        }
        best.and_then(|(level, _)| WAYS.get(level).copied())
    }

    fn decide(
        &mut self,
        deltas: bool,
        best: Option<(usize, f64)>,
        link: f64,
        (now, decisions): (Time, &mut Vec<Decision>),
    ) {
        let level = best.map(|(level, _)| level);
        let current = if deltas { &mut self.deltas } else { &mut self.whole };
        if level == *current {
            return;
        }
        *current = level;
        let what = match best {
            Some((level, cost)) => format!(
                "{}: {cost:.2} ns a byte, {link:.2} raw (ratio {:.2})",
                WAYS.get(level).copied().unwrap_or(Way::Delta),
                self.levels.get(level).and_then(|level| level.ratio).unwrap_or(1.0)
            ),
            None => format!("send raw: nothing beats {link:.2} ns a byte"),
        };
        decisions.push(Decision { at: now, what });
    }

    /// A batch of `raw` bytes became `compressed` ones in a `way`.
    pub(crate) fn measured(&mut self, way: Way, raw: usize, compressed: usize, spent: Span) {
        let Some(slot) = WAYS.iter().position(|&known| known == way).and_then(|at| self.levels.get_mut(at)) else {
            return;
        };
        slot.raw = slot.raw.saturating_add(raw);
        slot.compressed = slot.compressed.saturating_add(compressed);
        slot.spent = slot.spent + spent;
        if slot.raw < LEVEL_SAMPLE_BYTES {
            return;
        }
        let raw = slot.raw as f64;
        slot.ratio = average(slot.ratio, slot.compressed as f64 / raw, FRESH_RATIO);
        slot.nanos_a_byte = blend(slot.nanos_a_byte, slot.spent.as_nanos() as f64 / raw);
        (slot.raw, slot.compressed, slot.spent) = (0, 0, Span::ZERO);
    }

    /// Whether batches are compressed by what is in them, and so worth making larger. What deltas build on is at hand in
    /// a small batch as well, and fits a core's cache with it.
    pub(crate) fn wants_large(&self) -> bool {
        self.whole.is_some()
    }

    /// Nanoseconds that a page with its bytes costs now.
    fn page_nanos(&self, goodput: &Goodput, link: f64) -> f64 {
        let byte = self.whole.and_then(|level| self.cost(level, goodput, link)).unwrap_or(link);
        byte * PAGE_BYTES as f64
    }
}

/// Whether changed parts of a region are announced before their bytes are sent.
#[derive(Debug)]
pub(crate) struct AnnounceSwitch {
    on: bool,
    announced: u64,
    wanted: u64,
    hits: Option<f64>,
    parts: u64,
}

impl Default for AnnounceSwitch {
    fn default() -> Self {
        Self { on: true, announced: 0, wanted: 0, hits: None, parts: 0 }
    }
}

impl AnnounceSwitch {
    /// Whether the next part of the region is announced.
    pub(crate) fn choose(&mut self) -> bool {
        self.parts = self.parts.saturating_add(1);
        self.on || self.parts.is_multiple_of(PROBE_EVERY)
    }

    /// The receiver has `announced` more pages, or lets them wait; of all of them it lacks `wanted` more.
    pub(crate) fn note(&mut self, announced: u64, wanted: u64) {
        self.announced = self.announced.saturating_add(announced);
        self.wanted = self.wanted.saturating_add(wanted);
    }

    /// Decides anew, when no page waits that may be wanted yet.
    pub(crate) fn judge(
        &mut self,
        region: u16,
        costs: (&CompressSwitch, &Goodput),
        now: Time,
        decisions: &mut Vec<Decision>,
    ) {
        if self.announced < ANNOUNCED_MIN {
            return;
        }
        let hits = 1.0 - (self.wanted.min(self.announced) as f64 / self.announced as f64);
        self.hits = blend(self.hits, hits);
        (self.announced, self.wanted) = (0, 0);
        let (compress, goodput) = costs;
        // Until the link has been the brake nobody knows what a page costs; announcing is the careful way.
        let Some(link) = goodput.nanos_a_byte() else { return };
        let share = self.hits.unwrap_or(hits);
        let gain = share * compress.page_nanos(goodput, link);
        let price = 32.0 * link + (1.0 - share) * REREAD_NANOS;
        let on = gain > price;
        if on != self.on {
            self.on = on;
            let verb = if on { "announce" } else { "stop announcing" };
            let what =
                format!("{verb} region {region}: {:.0} % hit, saves {gain:.0} ns a page for {price:.0}", share * 100.0);
            decisions.push(Decision { at: now, what });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Time {
        Time::ZERO + Span::from_millis(millis)
    }

    /// A link that always makes the sender wait, at `mb` megabytes a second.
    fn link(mb: u64) -> Goodput {
        waiting(Goodput::default(), mb)
    }

    fn waiting(mut goodput: Goodput, mb: u64) -> Goodput {
        goodput.block(at(0));
        for step in 0..50 {
            goodput.delivered((mb * 10_000, mb * 10_000), 1, at(step * 10));
        }
        goodput
    }

    fn switch(ratio: f64) -> CompressSwitch {
        let mut switch = CompressSwitch::new(true, 1);
        for (way, nanos) in WAYS.into_iter().zip([1.3, 2.6, 1.6]) {
            switch.measured(way, 1_000_000, (ratio * 1e6) as usize, Span::from_nanos((nanos * 1e6) as u64));
        }
        switch.batches = PROBES_FIRST_MAX;
        switch
    }

    #[test]
    fn compresses_on_slow_links_only_and_only_what_shrinks() {
        let mut decisions = Vec::new();
        assert!(switch(0.25).choose(None, &link(50), at(1), &mut decisions).is_some());
        assert!(switch(0.25).choose(None, &link(3000), at(1), &mut decisions).is_none());
        assert!(switch(1.0).choose(None, &link(10), at(1), &mut decisions).is_none());
        assert!(switch(0.25).choose(None, &Goodput::default(), at(1), &mut decisions).is_none());
        assert!(decisions.iter().any(|decision| decision.what.contains("zstd level")));
    }

    #[test]
    fn what_compresses_beside_the_receiver_has_to_pay_for_both() {
        let (fast, mut decisions) = (link(870), Vec::new());
        assert!(switch(0.07).choose(None, &fast, at(1), &mut decisions).is_none(), "1.3 ns beside 1.15");
        let mut many = CompressSwitch { workers: 2.0, ..switch(0.07) };
        assert!(many.choose(None, &fast, at(1), &mut decisions).is_some(), "two others do it");
        let (fast, slow) = (waiting(Goodput::new(true), 870), waiting(Goodput::new(true), 120));
        let mut many = CompressSwitch { workers: 2.0, ..switch(0.07) };
        assert!(many.choose(None, &fast, at(1), &mut decisions).is_none());
        assert!(many.choose(None, &slow, at(1), &mut decisions).is_some(), "1 Gbit/s");
    }

    /// A receiver that is slower than the link looks like a slow link, as long as nothing is tried.
    #[test]
    fn what_was_compressed_in_vain_goes_raw() {
        let (mut switch, mut goodput) = (switch(0.25), waiting(Goodput::new(true), 100));
        let mut decisions = Vec::new();
        assert!(switch.choose(None, &goodput, at(1), &mut decisions).is_some());
        for step in 0..20 {
            goodput.delivered((250_000, 1_000_000), 1, at(500 + step * 10));
        }
        assert!(switch.choose(None, &goodput, at(700), &mut decisions).is_none());
        for step in 0..20 {
            goodput.delivered((1_000_000, 1_000_000), 1, at(700 + step * 10));
        }
        assert!(switch.choose(None, &goodput, at(900), &mut decisions).is_none(), "raw is as fast");
        assert!(decisions.last().is_some_and(|decision| decision.what.starts_with("send raw")));
    }

    /// A guest's downtime is predicted by it: a link that was not the brake for long has not become faster.
    #[test]
    fn what_the_link_has_shown_is_never_raised_by_hope() {
        let mut goodput = link(10);
        let shown = goodput.shown().unwrap();
        goodput.unblock(at(500));
        for step in 0..2000 {
            goodput.delivered((10_000, 10_000), 1, at(500 + step * 10));
        }
        assert!(goodput.nanos_a_byte().unwrap() < 1e9 / shown / 1.2, "compression may hope");
        assert_eq!(goodput.shown(), Some(shown));
        for step in 0..100 {
            goodput.delivered((1_000_000, 1_000_000), 1, at(20_500 + step * 10));
        }
        assert!(goodput.shown().unwrap() > 5.0 * shown, "it was seen to carry more, again and again");
        let shown = goodput.shown().unwrap();
        goodput.delivered((100_000_000, 100_000_000), 1, at(21_600));
        assert!(goodput.shown().unwrap() < 5.0 * shown, "once is chance");
    }

    #[test]
    fn deltas_go_until_a_raw_batch_has_shown_that_the_link_is_faster() {
        let bytes = Some(GLIMPSE_BYTES);
        let (mut switch, mut goodput, mut decisions) = (switch(0.1), Goodput::default(), Vec::new());
        assert_eq!(switch.choose(bytes, &goodput, at(1), &mut decisions), None, "one raw batch looks at the link");
        assert_eq!(switch.choose(bytes, &goodput, at(1), &mut decisions), Some(Way::Delta));
        goodput.glimpse(1 << 20, Span::from_millis(9));
        assert_eq!(switch.choose(bytes, &goodput, at(1), &mut decisions), Some(Way::Delta), "1 Gbit/s");
        goodput.glimpse(1000, Span::from_nanos(1_000));
        assert_eq!(switch.choose(bytes, &goodput, at(1), &mut decisions), Some(Way::Delta), "too little to go by");
        goodput.glimpse(1 << 20, Span::from_nanos(500_000));
        assert_eq!(switch.choose(bytes, &goodput, at(1), &mut decisions), None, "2 GB/s");
    }

    /// SPEC 6.11: a way that is in use for deltas is none for a batch that must not be one, and the other way round.
    #[test]
    fn a_batch_that_cannot_be_a_delta_never_is_one() {
        let (mut switch, goodput, mut decisions) = (switch(0.1), link(50), Vec::new());
        switch.glimpse_at = u64::MAX;
        for _ in 0..2 * PROBE_EVERY {
            assert_eq!(switch.choose(Some(1), &goodput, at(1), &mut decisions), Some(Way::Delta));
            let whole = switch.choose(None, &goodput, at(1), &mut decisions);
            assert!(matches!(whole, Some(Way::Level(_))), "{whole:?}");
        }
        assert_eq!(decisions.len(), 2, "each is decided once: {decisions:?}");
    }

    #[test]
    fn a_link_that_never_brakes_is_thought_faster_little_by_little() {
        let mut goodput = link(50);
        let before = goodput.nanos_a_byte().unwrap();
        goodput.unblock(at(500));
        for step in 51..400 {
            goodput.delivered((500_000, 500_000), 1, at(step * 10));
        }
        assert!(goodput.nanos_a_byte().unwrap() < before / 2.0);
    }

    #[test]
    fn announcing_stops_where_nothing_hits_and_comes_back_where_it_does() {
        let (compress, goodput) = (switch(0.25), link(1000));
        let mut announce = AnnounceSwitch::default();
        let mut decisions = Vec::new();
        let mut feed = |announce: &mut AnnounceSwitch, wanted| {
            for _ in 0..20 {
                announce.note(300, wanted);
                announce.judge(0, (&compress, &goodput), at(1), &mut decisions);
            }
        };
        feed(&mut announce, 300);
        assert!(!announce.on);
        assert!((0..PROBE_EVERY).any(|_| announce.choose()), "it is tried again now and then");
        feed(&mut announce, 0);
        assert!(announce.on);
    }

    #[test]
    fn small_batches_are_no_sample_of_a_level_until_they_are_many() {
        let mut switch = CompressSwitch::new(true, 1);
        let feed = |switch: &mut CompressSwitch, batches: usize| {
            (0..batches).for_each(|_| switch.measured(Way::Level(1), 4096, 1000, Span::from_nanos(50_000)));
        };
        feed(&mut switch, LEVEL_SAMPLE_BYTES / 4096 - 1);
        assert!(switch.levels[1].ratio.is_none());
        feed(&mut switch, 1);
        assert!(switch.levels[1].ratio.is_some());
    }

    #[test]
    fn statements_without_page_bytes_say_nothing_of_the_link() {
        let mut goodput = Goodput::default();
        goodput.block(at(0));
        (0..100).for_each(|step| goodput.delivered((0, 0), 1, at(step * 10)));
        assert!(goodput.nanos_a_byte().is_none());
        let mut announce = AnnounceSwitch::default();
        announce.note(1000, 1000);
        announce.judge(0, (&switch(0.25), &goodput), at(1), &mut Vec::new());
        assert!(announce.on, "until the link is known");
    }
}
