//! One side of a world: its machine, the jobs it has under way, and the clock of its process.

use super::TICK;
use crate::rng::Rng;
use pagewire_protocol::session::{Job, Machine};
use pagewire_protocol::time::{Span, Time};
use std::collections::VecDeque;

/// What one side's machine has under way.
pub(super) struct Side<M: Machine> {
    pub(super) machine: M,
    jobs: VecDeque<(Time, <M::Job as Job>::Output, Span)>,
    pub(super) over_at: Option<Time>,
    /// Its process stands still until then.
    asleep: Option<Time>,
    /// How far its clock is behind the world's.
    lag: Span,
}

impl<M: Machine> Side<M> {
    pub(super) fn new(machine: M) -> Self {
        Self { machine, jobs: VecDeque::new(), over_at: None, asleep: None, lag: Span::ZERO }
    }

    /// Whether its process runs.
    pub(super) fn is_awake(&self, now: Time) -> bool {
        self.asleep.is_none_or(|until| until <= now)
    }

    /// The time that its process sees.
    pub(super) fn clock(&self, now: Time) -> Time {
        now - self.lag
    }

    /// When its clock will show `clock`.
    pub(super) fn world_time(&self, clock: Time) -> Time {
        clock + self.lag
    }

    /// Its process stands still for `span`, and its clock with it, unless that runs on.
    pub(super) fn sleep(&mut self, span: Span, clock_runs: bool, now: Time) {
        self.asleep = Some(now + span);
        if !clock_runs {
            self.lag = self.lag + span;
        }
    }

    pub(super) fn run_jobs(&mut self, now: Time, span_max: Span, rng: &mut Rng) -> bool {
        if !self.is_awake(now) {
            return false;
        }
        let mut moved = false;
        while let Some(job) = self.machine.poll_job() {
            let spent = Span::from_nanos(rng.below(span_max.as_nanos() + 1));
            let due = self.jobs.back().map_or(now, |(last, ..)| now.max(*last)) + spent;
            self.jobs.push_back((due, job.run(), spent));
            moved = true;
        }
        while self.jobs.front().is_some_and(|(due, ..)| *due <= now) {
            if let Some((_, output, spent)) = self.jobs.pop_front() {
                let clock = self.clock(now);
                self.machine.handle_job(output, spent, clock);
            }
            moved = true;
        }
        moved
    }

    pub(super) fn work(&mut self, now: Time) -> bool {
        let clock = self.clock(now);
        self.is_awake(now) && self.machine.work(clock)
    }

    pub(super) fn handle_timeout(&mut self, now: Time) {
        let clock = self.clock(now);
        if self.is_awake(now) && self.machine.poll_timeout().is_some_and(|due| due <= clock) {
            self.machine.handle_timeout(clock);
        }
    }

    /// When it has to be looked at next.
    pub(super) fn next(&self, now: Time) -> Option<Time> {
        if !self.is_awake(now) {
            return self.asleep;
        }
        let due = self.machine.poll_timeout().map(|due| self.world_time(due));
        let due = due.map(|due| if due > now { due } else { now + TICK });
        let due = due.filter(|_| !self.machine.is_over());
        due.into_iter().chain(self.jobs.front().map(|(due, ..)| *due)).min()
    }

    pub(super) fn note_over(&mut self, now: Time) {
        if self.machine.is_over() {
            self.over_at.get_or_insert(now);
        }
    }
}
