//! How long threads waited for pages: a histogram of fixed size.

use super::Served;
use pagewire_protocol::time::Span;
use std::collections::BTreeMap;

/// Steps of each doubling: a quantile is at most an eighth too large.
const STEPS: u32 = 8;
const STEPS_BITS: u32 = STEPS.ilog2();
/// Doublings beyond the first eight nanoseconds: up to 2^40 ns, 18 minutes; what took longer counts there.
const DOUBLINGS: u32 = 37;
const BUCKETS: usize = ((DOUBLINGS + 1) * STEPS) as usize;

/// Threads that are told apart: more than a guest has vCPUs, whatever it is made of.
const THREADS_MAX: usize = 256;

/// Spans that were waited, counted by length, and by thread where that is known. 2.4 KiB, and 6 KiB for threads at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultTimes {
    buckets: Vec<u64>,
    count: u64,
    total: u64,
    longest: u64,
    /// How often each thread waited, and for how long together.
    threads: BTreeMap<u32, (u64, u64)>,
}

impl Default for FaultTimes {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], count: 0, total: 0, longest: 0, threads: BTreeMap::new() }
    }
}

impl FaultTimes {
    /// Counts one.
    pub fn add(&mut self, waited: Span) {
        let nanos = waited.as_nanos();
        if let Some(bucket) = self.buckets.get_mut(bucket(nanos)) {
            *bucket = bucket.saturating_add(1);
        }
        self.count = self.count.saturating_add(1);
        self.total = self.total.saturating_add(nanos);
        self.longest = self.longest.max(nanos);
    }

    /// Counts one of a thread, if it is known.
    pub fn add_of(&mut self, thread: Option<u32>, waited: Span) {
        self.add(waited);
        self.add_thread(thread, (1, waited.as_nanos()));
    }

    /// Counts all who waited for these pages.
    pub fn add_served(&mut self, served: &[Served]) {
        let waited = served.iter().flat_map(|served| &served.waited);
        waited.for_each(|(thread, waited)| self.add_of(*thread, *waited));
    }

    fn add_thread(&mut self, thread: Option<u32>, (count, nanos): (u64, u64)) {
        let has_room = self.threads.len() < THREADS_MAX;
        let Some(thread) = thread.filter(|thread| has_room || self.threads.contains_key(thread)) else { return };
        let of_thread = self.threads.entry(thread).or_default();
        *of_thread = (of_thread.0.saturating_add(count), of_thread.1.saturating_add(nanos));
    }

    /// How often each thread waited, and for how long together: of the first threads that did.
    pub fn threads(&self) -> impl Iterator<Item = (u32, u64, Span)> {
        self.threads.iter().map(|(thread, (count, nanos))| (*thread, *count, Span::from_nanos(*nanos)))
    }

    /// Counts all of another histogram's.
    pub fn add_all(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(to, from)| *to = to.saturating_add(*from));
        self.count = self.count.saturating_add(other.count);
        self.total = self.total.saturating_add(other.total);
        self.longest = self.longest.max(other.longest);
        other.threads.iter().for_each(|(thread, counted)| self.add_thread(Some(*thread), *counted));
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// All of them together.
    pub fn total(&self) -> Span {
        Span::from_nanos(self.total)
    }

    /// The longest.
    pub fn longest(&self) -> Span {
        Span::from_nanos(self.longest)
    }

    /// What `thousandths` of 1000 were not longer than, at most an eighth too large; zero if there are none.
    pub fn quantile(&self, thousandths: u32) -> Span {
        let rank = u128::from(self.count).saturating_mul(u128::from(thousandths.min(1000))).div_ceil(1000).max(1);
        let mut seen: u128 = 0;
        for (at, count) in self.buckets.iter().enumerate() {
            seen = seen.saturating_add(u128::from(*count));
            if seen >= rank {
                return Span::from_nanos(last_of(at).min(self.longest));
            }
        }
        Span::ZERO
    }
}

/// Below eight, each number has its own; from there on, eight share each doubling.
fn bucket(nanos: u64) -> usize {
    let doubling = nanos.max(1).ilog2().saturating_sub(STEPS_BITS);
    let step = nanos >> doubling;
    let at = u64::from(doubling).saturating_mul(u64::from(STEPS)).saturating_add(step);
    usize::try_from(at).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The largest number of a bucket.
fn last_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < u64::from(STEPS) {
        return bucket;
    }
    let doubling = bucket / u64::from(STEPS) - 1;
    let step = bucket - doubling * u64::from(STEPS);
    ((step + 1) << doubling).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_number_is_in_the_bucket_that_ends_behind_it() {
        for nanos in (0..5000).chain((10..40).flat_map(|bits| [(1 << bits) - 1, 1 << bits, (1 << bits) + 12345])) {
            let at = bucket(nanos);
            assert!(last_of(at) >= nanos && (at == 0 || last_of(at - 1) < nanos), "{nanos}");
            assert!(last_of(at) <= nanos + nanos / 8, "{nanos}: {}", last_of(at));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn threads_are_told_apart_and_not_without_bound() {
        let mut times = FaultTimes::default();
        for thread in 0..THREADS_MAX as u32 + 10 {
            times.add_of(Some(thread), Span::from_nanos(5));
        }
        times.add_of(Some(3), Span::from_nanos(7));
        times.add_of(None, Span::from_nanos(100));
        let mut twice = times.clone();
        twice.add_all(&times);
        assert_eq!((times.threads().count(), times.count()), (THREADS_MAX, THREADS_MAX as u64 + 12));
        assert_eq!(times.threads().nth(3), Some((3, 2, Span::from_nanos(12))));
        assert_eq!(twice.threads().nth(3), Some((3, 4, Span::from_nanos(24))));
    }

    proptest! {
        #[test]
        fn quantiles_are_at_most_an_eighth_too_large(mut spans in prop::collection::vec(0u64..1 << 38, 1..200), thousandths in 1u32..=1000) {
            let mut times = FaultTimes::default();
            spans.iter().for_each(|span| times.add(Span::from_nanos(*span)));
            spans.sort_unstable();
            let exact = spans[(spans.len() * thousandths as usize).div_ceil(1000) - 1];
            let said = times.quantile(thousandths).as_nanos();
            prop_assert!(said >= exact && said <= exact + exact / 8, "{} for {}", said, exact);
            let mut twice = times.clone();
            twice.add_all(&times);
            prop_assert_eq!(twice.quantile(thousandths), times.quantile(thousandths));
            prop_assert_eq!((twice.count(), twice.longest()), (2 * times.count(), times.longest()));
        }
    }
}
