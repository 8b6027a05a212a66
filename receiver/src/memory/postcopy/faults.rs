//! Who waits for which page, and since when: many faults of one page are one request.

use super::Fault;
use pagewire_protocol::time::{Span, Time};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Threads of one page whose times are kept: more than a guest has vCPUs, whatever it is made of.
const WAITERS_MAX: usize = 256;

/// A page that came for somebody who waited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// The first fault on it.
    pub fault: Fault,
    /// The threads, where they are known, and how long each waited.
    pub waited: Vec<(Option<u32>, Span)>,
}

#[derive(Debug)]
struct Waiting {
    fault: Fault,
    waiters: Vec<(Option<u32>, Time)>,
}

/// Faults by the place of the install unit that was touched, of which there are no more than units.
#[derive(Debug, Default)]
pub(super) struct Faults {
    waiting: BTreeMap<u64, Waiting>,
    fresh: VecDeque<u64>,
}

impl Faults {
    /// A fault on the unit at `place`; whether it is the first.
    pub(super) fn add(&mut self, place: u64, fault: Fault) -> bool {
        let (thread, since) = (fault.thread, fault.since);
        if let Some(waiting) = self.waiting.get_mut(&place) {
            // A thread that was woken and found nothing waits since it first came.
            let knows = thread.is_some() && waiting.waiters.iter().any(|(waiter, _)| *waiter == thread);
            if !knows && waiting.waiters.len() < WAITERS_MAX {
                waiting.waiters.push((thread, since));
            }
            waiting.fault.write |= fault.write;
            return false;
        }
        self.waiting.insert(place, Waiting { fault, waiters: vec![(thread, since)] });
        self.fresh.push_back(place);
        true
    }

    /// The next that nobody has been given, in the order of arrival.
    pub(super) fn next(&mut self) -> Option<Fault> {
        loop {
            let place = self.fresh.pop_front()?;
            if let Some(waiting) = self.waiting.get(&place) {
                return Some(waiting.fault);
            }
        }
    }

    /// Gives all that wait again, the oldest first: whoever was to bring them is gone.
    pub(super) fn renew(&mut self) {
        let mut places: Vec<(Time, u64)> =
            self.waiting.iter().map(|(place, waiting)| (waiting.fault.since, *place)).collect();
        places.sort_unstable();
        self.fresh = places.into_iter().map(|(_, place)| place).collect();
    }

    /// Units at `places` are there.
    pub(super) fn done(&mut self, places: Range<u64>, now: Time, served: &mut Vec<Served>) {
        while let Some((&place, _)) = self.waiting.range(places.clone()).next() {
            if let Some(Waiting { fault, waiters }) = self.waiting.remove(&place) {
                let waited = waiters.into_iter().map(|(thread, since)| (thread, now.since(since))).collect();
                served.push(Served { fault, waited });
            }
        }
    }

    /// The units among `places` that are waited for.
    pub(super) fn waiting_in(&self, places: Range<u64>) -> Vec<u64> {
        self.waiting.range(places).map(|(place, _)| *place).collect()
    }

    /// Nobody waits for the unit at `place` any more, and nothing was brought for it.
    pub(super) fn forget(&mut self, place: u64) {
        self.waiting.remove(&place);
    }

    /// Units that are waited for.
    pub(super) fn count(&self) -> usize {
        self.waiting.len()
    }

    /// Since when the longest of them has been waited for.
    pub(super) fn oldest(&self) -> Option<Time> {
        self.waiting.values().map(|waiting| waiting.fault.since).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::page::RegionId;

    fn fault(page: u64, thread: u32, since: u64) -> Fault {
        let (thread, since) = ((thread != 0).then_some(thread), Time::from_nanos(since));
        Fault { region: RegionId(0), first: page, pages: 1, page, write: false, thread, since }
    }

    #[test]
    fn many_faults_of_a_page_are_one_request() {
        let mut faults = Faults::default();
        assert!(faults.add(5, fault(5, 1, 10)));
        assert!(!faults.add(5, Fault { write: true, ..fault(5, 2, 20) }));
        assert!(!faults.add(5, fault(5, 1, 25)), "woken in vain");
        assert!(faults.add(3, fault(3, 3, 30)));
        assert_eq!((faults.count(), faults.oldest()), (2, Some(Time::from_nanos(10))));
        assert_eq!(faults.next(), Some(Fault { write: true, ..fault(5, 1, 10) }));
        assert_eq!(faults.next(), Some(fault(3, 3, 30)));
        assert_eq!(faults.next(), None);
        let mut served = Vec::new();
        faults.done(4..9, Time::from_nanos(110), &mut served);
        assert_eq!(served.len(), 1);
        assert_eq!(served[0].waited, [(Some(1), Span::from_nanos(100)), (Some(2), Span::from_nanos(90))]);
        assert_eq!(faults.count(), 1);
    }

    #[test]
    fn what_is_waited_for_is_given_again_after_a_new_connection() {
        let mut faults = Faults::default();
        [(9, 1), (2, 5), (4, 3)].into_iter().for_each(|(page, since)| _ = faults.add(page, fault(page, 0, since)));
        faults.next();
        faults.done(4..5, Time::ZERO, &mut Vec::new());
        faults.renew();
        let pages: Vec<u64> = std::iter::from_fn(|| faults.next()).map(|fault| fault.page).collect();
        assert_eq!(pages, [9, 2], "the oldest first, and not what has come");
    }

    #[test]
    fn a_page_that_came_before_anybody_asked_for_it_is_not_asked_for() {
        let mut faults = Faults::default();
        faults.add(1, fault(1, 0, 0));
        faults.done(0..2, Time::ZERO, &mut Vec::new());
        assert_eq!(faults.next(), None);
    }

    #[test]
    fn threads_of_one_page_are_counted_up_to_a_bound() {
        let mut faults = Faults::default();
        (1..2000).for_each(|thread| _ = faults.add(1, fault(1, thread, 0)));
        let mut served = Vec::new();
        faults.done(1..2, Time::ZERO, &mut served);
        assert_eq!(served[0].waited.len(), WAITERS_MAX);
    }
}
