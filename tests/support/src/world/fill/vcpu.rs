//! A vCPU: it touches one page after the other, waits for those that are absent, and knows what it should read.

use crate::image::{Image, Mix};
use crate::memory::ImageSink;
use crate::rng::Rng;
use pagewire_protocol::page::{Place, RegionId};
use pagewire_protocol::time::{Span, Time};

/// In which order a vCPU touches pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// One after the other.
    Sequential,
    /// Anywhere.
    Random,
    /// Nine times of ten in a twentieth of the pages.
    HotSet,
    /// From the last to the first.
    Backwards,
}

impl Habit {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Sequential, Self::Random, Self::HotSet, Self::Backwards];
}

pub(super) struct Vcpu {
    habit: Habit,
    /// Touches that are left.
    touches: u64,
    cursor: u64,
    next: Time,
    /// The place that it waits for.
    waits: Option<u64>,
    /// When it was asked for, if all lanes were there.
    pub(super) asked_at: Option<Time>,
    rng: Rng,
}

impl Vcpu {
    pub(super) fn new(habit: Habit, touches: u64, seed: u64) -> Self {
        Self { habit, touches, cursor: seed, next: Time::ZERO, waits: None, asked_at: None, rng: Rng::new(seed) }
    }

    pub(super) fn is_done(&self) -> bool {
        self.touches == 0 && self.waits.is_none()
    }

    /// When it touches the next page, if it does not wait.
    pub(super) fn next(&self) -> Option<Time> {
        (self.waits.is_none() && self.touches > 0).then_some(self.next)
    }

    pub(super) fn waits_for(&self) -> Option<(RegionId, u64)> {
        let at = self.waits?;
        Some((RegionId((at >> 48) as u16), at & 0xffff_ffff_ffff))
    }

    /// Touches a page if that is due; the page, if it is absent.
    pub(super) fn run(
        &mut self,
        now: Time,
        think: Span,
        sink: &ImageSink,
        truth: &mut Image,
    ) -> Option<(RegionId, u64)> {
        if self.waits.is_some() || self.touches == 0 || self.next > now {
            return None;
        }
        self.touches -= 1;
        self.next = now + Span::from_nanos(self.rng.between(1, 2 * think.as_nanos()));
        let pages = truth.pages();
        let place = match self.habit {
            Habit::Sequential => self.cursor.wrapping_add(1),
            Habit::Backwards => self.cursor.wrapping_sub(1),
            Habit::HotSet if self.rng.chance(90) => self.rng.below((pages / 20).max(1)),
            Habit::Random | Habit::HotSet => self.rng.word(),
        };
        self.cursor = place;
        let place = place % pages;
        let (region, page) = truth.layout().locate(Place(place as u32));
        if sink.state().absent.as_ref().is_some_and(|absent| absent.contains(place)) {
            self.waits = Some(u64::from(region.0) << 48 | page.0);
            return Some((region, page.0));
        }
        self.touch(region, page.0, sink, truth);
        None
    }

    /// Goes on if what it waits for has come; says how long that took, if that is known.
    pub(super) fn wake(&mut self, now: Time, sink: &ImageSink, truth: &mut Image) -> Option<Span> {
        let (region, page) = self.waits_for()?;
        let place = u64::from(truth.layout().place(region, page).0);
        if sink.state().absent.as_ref().is_some_and(|absent| absent.contains(place)) {
            return None;
        }
        self.waits = None;
        self.next = self.next.max(now);
        self.touch(region, page, sink, truth);
        self.asked_at.take().map(|asked| now.since(asked))
    }

    /// Reads a page, and sometimes writes to it.
    fn touch(&mut self, region: RegionId, page: u64, sink: &ImageSink, truth: &mut Image) {
        let at = usize::from(region.0);
        let mut state = sink.state();
        assert!(state.image.page(at, page) == truth.page(at, page), "page {page} of region {at} reads wrong");
        if self.rng.chance(30) {
            truth.rewrite(at, page, Mix::MEMORY, &mut self.rng);
            state.image.page_mut(at, page).copy_from_slice(truth.page(at, page));
        }
    }
}
