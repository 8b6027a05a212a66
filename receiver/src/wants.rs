//! Pages whose bytes the receiver has asked for and not got yet.
//!
//! Wants are collected lane by lane and leave with that lane's next ACK, neighbours as one run. A page wanted more
//! than [`WANTS_A_PAGE_MAX`] times on average ends the session: the peer answers with what cannot be kept.

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::error::Violation;
use pagewire_protocol::frame::{LaneId, Want};
use pagewire_protocol::limits::{WANTS_A_PAGE_MAX, WANTS_MAX};
use pagewire_protocol::page::{Layout, RegionId};
use std::collections::VecDeque;

/// Outstanding wants of a session.
#[derive(Debug)]
pub(crate) struct Wants {
    outstanding: PageBitmap,
    asked: u64,
    queues: [VecDeque<Want>; LaneId::COUNT],
}

impl Wants {
    pub(crate) fn new(layout: &Layout) -> Self {
        Self { outstanding: PageBitmap::new(layout.pages()), asked: 0, queues: Default::default() }
    }

    /// Asks for pages `first..first + count`, widened to whole install pages, on `lane`.
    pub(crate) fn ask(&mut self, layout: &Layout, lane: LaneId, region: RegionId, first: u64, count: u64) {
        let Some(known) = layout.region(region) else { return };
        let step = u64::from(known.install_size.pages());
        let start = first / step * step;
        let end = (first.saturating_add(count)).div_ceil(step).saturating_mul(step).min(known.pages());
        let Some(queue) = self.queues.get_mut(lane.index()) else { return };
        for page in start..end {
            if !self.outstanding.insert(u64::from(layout.place(region, page).0)) {
                continue;
            }
            self.asked = self.asked.saturating_add(1);
            match queue.back_mut() {
                Some(last) if last.region == region.0 && last.first.saturating_add(u64::from(last.count)) == page => {
                    last.count = last.count.saturating_add(1);
                }
                _ => queue.push_back(Want { region: region.0, first: page, count: 1 }),
            }
        }
    }

    /// A page came.
    pub(crate) fn settle(&mut self, layout: &Layout, region: RegionId, page: u64) {
        if self.outstanding.count() > 0 {
            self.outstanding.remove(u64::from(layout.place(region, page).0));
        }
    }

    /// Whether `lane` has wants to send.
    pub(crate) fn is_waiting(&self, lane: LaneId) -> bool {
        self.queues.get(lane.index()).is_some_and(|queue| !queue.is_empty())
    }

    /// The next wants for an ACK of `lane`.
    pub(crate) fn take(&mut self, lane: LaneId) -> Vec<Want> {
        let Some(queue) = self.queues.get_mut(lane.index()) else { return Vec::new() };
        queue.drain(..queue.len().min(WANTS_MAX)).collect()
    }

    /// Pages asked for and not there.
    pub(crate) fn outstanding(&self) -> u64 {
        self.outstanding.count()
    }

    /// Pages asked for so far.
    pub(crate) fn asked(&self) -> u64 {
        self.asked
    }

    /// No session asks for everything again and again.
    pub(crate) fn check(&self, layout: &Layout) -> Result<(), Violation> {
        if self.asked > layout.pages().saturating_mul(WANTS_A_PAGE_MAX) {
            return Err(Violation::WantFlood { wants: self.asked, pages: layout.pages() });
        }
        Ok(())
    }
}
