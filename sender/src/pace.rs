//! The bandwidth cap: a bucket of bytes that fills at the allowed rate.
//!
//! A frame may go when the bucket is not empty and may overdraw it, so large frames keep the average without being cut.

use pagewire_protocol::time::{Span, Time};

/// What a full bucket lasts for.
const BURST: Span = Span::from_millis(20);

/// Limits bytes a second.
#[derive(Debug)]
pub(crate) struct Pace {
    rate: u64,
    /// When the bucket is empty again or was overdrawn until.
    free_at: Time,
}

impl Pace {
    /// A cap of `rate` bytes a second, more than zero.
    pub(crate) fn new(rate: u64) -> Self {
        Self { rate: rate.max(1), free_at: Time::ZERO }
    }

    /// Whether a frame may go now.
    pub(crate) fn is_open(&self, now: Time) -> bool {
        now >= self.free_at
    }

    /// When a frame may go again.
    pub(crate) fn opens_at(&self) -> Time {
        self.free_at
    }

    /// A frame of `bytes` went.
    pub(crate) fn spend(&mut self, bytes: usize, now: Time) {
        let nanos = u128::from(bytes as u64).saturating_mul(1_000_000_000) / u128::from(self.rate);
        let cost = Span::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.free_at = self.free_at.max(now - BURST) + cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_average_and_allows_a_short_burst() {
        let mut pace = Pace::new(1_000_000);
        let (mut now, mut sent) = (Time::ZERO + Span::from_secs(1), 0u64);
        let end = now + Span::from_secs(2);
        while now < end {
            if pace.is_open(now) {
                pace.spend(70_000, now);
                sent += 70_000;
            } else {
                now = pace.opens_at();
            }
        }
        assert!((2_000_000..=2_000_000 + 90_000).contains(&sent), "{sent}");
    }
}
