//! What the link carries, and whether it is the link that a session waits for.
//!
//! A session that waits to write may wait for the link or for a receiver that does not read: nothing here can tell one
//! from the other but by trying. Bytes that were compressed should arrive as much sooner as they are fewer; where they do
//! not, something else is the brake, and compression is in vain. That is believed of a receiver on the same processors
//! alone: between two hosts what looks so is a link that was thought faster than it is.

use pagewire_protocol::time::{Span, Time};

/// Raw bytes that show what an unknown link can do: more than what a shaper lets through in one burst.
pub(crate) const GLIMPSE_BYTES: usize = 192 * 1024;
/// A goodput sample lasts at least this long.
const SAMPLE_SPAN: Span = Span::from_millis(4);
/// And brings at least so many bytes of pages, if it does not last long.
const SAMPLE_BYTES: u64 = 256 * 1024;
/// However few bytes come, a sample ends after this.
const SAMPLE_SPAN_MAX: Span = Span::from_millis(500);
/// The link is what limits a session that waits for it for this share of the time.
const LIMITED_SHARE: f64 = 0.7;
/// Enough for a first idea of it.
const LIMITED_SHARE_FIRST: f64 = 0.3;
/// While the link is not the brake it is thought a little faster, once in so long: it may have become so.
const RAISE_SPAN: Span = Span::from_millis(250);
/// By how much.
const RAISE: f64 = 1.1;
/// Of what a prediction rests on: a tenth of a second at 1 Gbit/s evens out acknowledgements that come late, together.
const FRESH_SHOWN: f64 = 0.1;
/// Weight of a new sample in an average.
const FRESH: f64 = 0.3;
/// Bytes on the link for each byte of a page, from which on pages count as sent raw.
const RAW_RATIO: f64 = 0.9;
/// A page that takes so much longer than the link would take for it has waited for something else.
const BESIDES: f64 = 1.5;
/// Compression is in vain where a page takes at least this share of what it took raw. To find that out costs bytes: a
/// slow link, of which compression takes away most, is not asked again.
const IN_VAIN: f64 = 0.7;
/// So many samples in a row show it: some may have met a receiver that was busy for a moment, and to ask costs bytes.
const VAIN_SAMPLES: u32 = 8;
/// What else is the brake is forgotten little by little, once in [`RAISE_SPAN`]: it may have gone.
const FORGET: f64 = 0.9;

pub(crate) fn blend(old: Option<f64>, sample: f64) -> Option<f64> {
    average(old, sample, FRESH)
}

pub(crate) fn average(old: Option<f64>, sample: f64, weight: f64) -> Option<f64> {
    Some(old.map_or(sample, |old| old + weight * (sample - old)))
}

/// Goodput of the link as far as the link is what limits it, in bytes a nanosecond.
#[derive(Debug, Default)]
pub(crate) struct Goodput {
    /// The receiver has no processors of its own: it may be what a session waits for.
    shares_host: bool,
    rate: Option<f64>,
    /// The same, never raised in the hope that the link can do more.
    shown: Option<f64>,
    since: Option<Time>,
    bytes: u64,
    /// Bytes of the pages that these stand for.
    pages: u64,
    blocked: Span,
    blocked_since: Option<Time>,
    raised: Time,
    /// Of frames from going out to being acknowledged: the least that the link can do.
    glimpse: Option<f64>,
    /// Nanoseconds a byte of a page that something else than the link was seen to take, whatever was compressed.
    floor: Option<f64>,
    forgot: Time,
    /// The same, of the last samples in which compression was in vain.
    slow: Option<f64>,
    /// Samples in a row in which it was in vain; from [`VAIN_SAMPLES`] on raw pages have to be measured.
    vain: u32,
}

impl Goodput {
    /// Nothing is known yet.
    pub(crate) fn new(shares_host: bool) -> Self {
        Self { shares_host, ..Self::default() }
    }

    /// Whether the receiver runs on the same processors.
    pub(crate) fn shares_host(&self) -> bool {
        self.shares_host
    }

    /// Frames are ready and the link does not take them.
    pub(crate) fn block(&mut self, now: Time) {
        self.blocked_since.get_or_insert(now);
    }

    /// The link took a frame.
    pub(crate) fn unblock(&mut self, now: Time) {
        if let Some(since) = self.blocked_since.take() {
            self.blocked = self.blocked + now.since(since);
        }
    }

    /// Frames with `bytes` of payload were acknowledged `span` after the first of them went out.
    pub(crate) fn glimpse(&mut self, bytes: u64, span: Span) {
        if bytes >= GLIMPSE_BYTES as u64 && span > Span::ZERO {
            let rate = bytes as f64 / span.as_nanos() as f64;
            self.glimpse = Some(self.glimpse.map_or(rate, |known| known.max(rate)));
        }
    }

    /// The receiver has applied frames with `bytes` of payload for `pages` bytes of pages; `more` bytes are under way.
    pub(crate) fn delivered(&mut self, (bytes, pages): (u64, u64), more: u64, now: Time) {
        let Some(since) = self.since else {
            self.since = Some(now);
            return;
        };
        if bytes == 0 && self.bytes == 0 {
            // Statements without page bytes are limited by whoever reads and digests, not by the link.
            (self.since, self.blocked) = (Some(now), Span::ZERO);
            self.blocked_since = self.blocked_since.map(|_| now);
            return;
        }
        self.bytes = self.bytes.saturating_add(bytes);
        self.pages = self.pages.saturating_add(pages);
        let span = now.since(since);
        if span >= SAMPLE_SPAN && (self.bytes >= SAMPLE_BYTES || span >= SAMPLE_SPAN_MAX) {
            self.sample(span, now);
            (self.since, self.bytes, self.pages, self.blocked) = (Some(now), 0, 0, Span::ZERO);
            self.blocked_since = self.blocked_since.map(|_| now);
        }
        if more == 0 {
            // Idle time is nobody's rate.
            (self.since, self.bytes, self.pages, self.blocked, self.blocked_since) = (None, 0, 0, Span::ZERO, None);
        }
    }

    /// A sample is whole.
    fn sample(&mut self, span: Span, now: Time) {
        let rate = self.bytes as f64 / span.as_nanos() as f64;
        let ratio = self.bytes as f64 / self.pages.max(1) as f64;
        let blocked = self.blocked + self.blocked_since.map_or(Span::ZERO, |since| now.since(since));
        let share = blocked.as_nanos() as f64 / span.as_nanos() as f64;
        let patient = now.since(self.raised) >= RAISE_SPAN;
        if now.since(self.forgot) >= RAISE_SPAN {
            (self.forgot, self.floor) = (now, self.floor.map(|floor| floor * FORGET));
        }
        self.rate = if share > if self.rate.is_some() { LIMITED_SHARE } else { LIMITED_SHARE_FIRST } {
            self.raised = now;
            self.shown = average(self.shown, rate, FRESH_SHOWN);
            if self.shares_host { Some(self.limited(rate, ratio)) } else { blend(self.rate, rate) }
        } else {
            // Acknowledgements that come late come together: one sample above what is known is no new truth.
            let more = self.shown.is_some_and(|known| rate > known);
            self.shown = if more { average(self.shown, rate, FRESH_SHOWN) } else { self.shown };
            self.vain = if ratio < RAW_RATIO { self.vain } else { 0 };
            // Something else is the brake: the link can do at least this, and perhaps more than was thought.
            self.raised = if patient { now } else { self.raised };
            self.rate.map(|known| if patient { (known * RAISE).max(rate) } else { known.max(rate) })
        };
    }

    /// The rate of the link after a sample in which the session waited to write, at so many bytes for each of a page.
    fn limited(&mut self, rate: f64, ratio: f64) -> f64 {
        let Some(known) = self.rate else { return rate };
        let (page, fresh) = (ratio / rate, known + FRESH * (rate - known));
        if ratio >= RAW_RATIO {
            // What was known before compression turned out to be in vain was not what the link can do.
            let is_stale = self.is_in_vain();
            self.vain = 0;
            return if is_stale { rate } else { fresh };
        }
        let of_link = ratio / known;
        if page <= IN_VAIN / known || page <= BESIDES * of_link {
            self.vain = 0;
            return if page <= BESIDES * of_link { fresh } else { known };
        }
        self.slow = average(self.slow.filter(|_| self.vain > 0), page, FRESH);
        self.vain = self.vain.saturating_add(1);
        if self.is_in_vain() {
            self.floor = self.slow;
        }
        known
    }

    /// Whether compressing does not help any more as far as is known, and what raw pages cost has to be measured anew.
    pub(crate) fn is_in_vain(&self) -> bool {
        self.vain >= VAIN_SAMPLES
    }

    /// Nanoseconds that a compressed byte of a page takes at least, whatever compressing and the link take.
    pub(crate) fn floor(&self) -> f64 {
        self.floor.unwrap_or(0.0)
    }

    /// Bytes a second that the link was seen to carry, if it has ever been the brake. What a guest's downtime is
    /// predicted by hopes for nothing.
    pub(crate) fn shown(&self) -> Option<f64> {
        self.shown.map(|rate| rate * 1e9)
    }

    /// Nanoseconds a byte, if anything at all is known of the link.
    pub(crate) fn nanos_at_most(&self) -> Option<f64> {
        self.nanos_a_byte().or(self.glimpse.filter(|&rate| rate > 0.0).map(f64::recip))
    }

    /// Nanoseconds a byte, if the link has ever been the brake.
    pub(crate) fn nanos_a_byte(&self) -> Option<f64> {
        self.rate.filter(|&rate| rate > 0.0).map(f64::recip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A session that always waits to write.
    struct Session {
        goodput: Goodput,
        millis: u64,
    }

    impl Session {
        fn new(shares_host: bool) -> Self {
            Self { goodput: Goodput::new(shares_host), millis: 0 }
        }

        /// Samples of 10 ms each.
        fn samples(&mut self, count: u64, nanos_a_page_byte: f64, ratio: f64) {
            let pages = 10e6 / nanos_a_page_byte;
            for _ in 0..count {
                self.millis += 10;
                let now = Time::ZERO + Span::from_millis(self.millis);
                self.goodput.block(now);
                self.goodput.delivered(((pages * ratio) as u64, pages as u64), 1, now);
            }
        }

        fn nanos(&self) -> f64 {
            self.goodput.nanos_a_byte().unwrap()
        }
    }

    #[test]
    fn compression_that_speeds_nothing_up_is_in_vain_until_raw_pages_are_measured() {
        let mut session = Session::new(true);
        session.samples(10, 6.0, 1.0);
        assert!(!session.goodput.is_in_vain());
        // A receiver that takes its time, whatever comes: by bytes alone the link would be three times as slow.
        session.samples(u64::from(VAIN_SAMPLES) - 1, 6.0, 0.3);
        assert!(!session.goodput.is_in_vain(), "for a moment");
        session.samples(1, 6.0, 0.3);
        assert!(session.goodput.is_in_vain());
        assert!((session.goodput.floor() - 6.0).abs() < 0.1 && (session.nanos() - 6.0).abs() < 0.1);
        session.samples(1, 4.0, 1.0);
        assert!(!session.goodput.is_in_vain());
        assert!((session.nanos() - 4.0).abs() < 0.1, "what was known before is of no use");
    }

    #[test]
    fn a_moment_in_which_the_receiver_is_busy_changes_nothing() {
        let mut session = Session::new(true);
        session.samples(10, 8.4, 1.0);
        for _ in 0..10 {
            session.samples(u64::from(VAIN_SAMPLES) - 1, 7.0, 0.3);
            session.samples(1, 8.4 * 0.3, 0.3);
            assert!(!session.goodput.is_in_vain());
        }
    }

    #[test]
    fn compression_for_a_slow_link_is_not_in_vain() {
        let mut session = Session::new(true);
        session.samples(10, 8.4, 1.0);
        session.samples(10, 8.4 * 0.3, 0.3);
        assert!(!session.goodput.is_in_vain() && session.goodput.floor() == 0.0);
        assert!((session.nanos() - 8.4).abs() < 0.1);
        // A receiver that is slow, but not so slow that raw pages would do.
        session.samples(10, 5.0, 0.3);
        assert!(!session.goodput.is_in_vain() && session.goodput.floor() == 0.0);
        // Half as fast as before, by what goes raw.
        session.samples(10, 16.8, 1.0);
        assert!(session.nanos() > 14.0);
    }

    /// Samples that came together made the link look three times as fast: what follows shows how fast it is.
    #[test]
    fn between_two_hosts_the_link_is_what_is_waited_for() {
        let mut session = Session::new(false);
        session.samples(3, 2.8, 1.0);
        session.samples(30, 8.4 * 0.4, 0.4);
        assert!(!session.goodput.is_in_vain() && session.goodput.floor() == 0.0);
        assert!((session.nanos() - 8.4).abs() < 0.1, "{}", session.nanos());
    }

    #[test]
    fn what_else_was_the_brake_is_forgotten() {
        let mut session = Session::new(true);
        session.samples(10, 6.0, 1.0);
        session.samples(10, 6.0, 0.3);
        let floor = session.goodput.floor();
        session.samples(500, 6.0, 1.0);
        assert!(session.goodput.floor() < floor / 3.0, "{floor} {}", session.goodput.floor());
    }
}
