//! Pages whose bytes the receiver has asked for and not got yet, a bit each.
//!
//! A want leaves with the next ACK of its page's lane, neighbours as one run. All of them together are two bits a page,
//! however many a peer causes; a page wanted more than [`WANTS_A_PAGE_MAX`] times on average ends the session.

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::error::Violation;
use pagewire_protocol::frame::{LaneId, Want};
use pagewire_protocol::limits::{WANTS_A_PAGE_MAX, WANTS_MAX};
use pagewire_protocol::page::{GROUP_PAGES, Layout, PageRange, Place, RegionId};

/// Outstanding wants of a session.
#[derive(Debug)]
pub(crate) struct Wants {
    outstanding: PageBitmap,
    /// Those of them that no ACK has carried yet.
    unsent: PageBitmap,
    asked: u64,
    bulk_lanes: u64,
}

impl Wants {
    pub(crate) fn new(layout: &Layout, bulk_lanes: u8) -> Self {
        let (outstanding, unsent) = (PageBitmap::new(layout.pages()), PageBitmap::new(layout.pages()));
        Self { outstanding, unsent, asked: 0, bulk_lanes: u64::from(bulk_lanes) }
    }

    /// Asks for pages `first..first + count`, widened to whole install pages.
    pub(crate) fn ask(&mut self, layout: &Layout, region: RegionId, first: u64, count: u64) {
        let Some(known) = layout.region(region) else { return };
        let step = u64::from(known.install_size.pages());
        let start = first / step * step;
        let end = (first.saturating_add(count)).div_ceil(step).saturating_mul(step).min(known.pages());
        for page in start..end {
            let place = u64::from(layout.place(region, page).0);
            if self.outstanding.insert(place) {
                self.unsent.insert(place);
                self.asked = self.asked.saturating_add(1);
            }
        }
    }

    /// Pages were stated again.
    pub(crate) fn settle(&mut self, layout: &Layout, range: PageRange) {
        if self.outstanding.count() > 0 {
            let first = u64::from(layout.place(range.region, range.first.0).0);
            let places = first..first.saturating_add(u64::from(range.count));
            self.outstanding.remove_range(places.clone());
            self.unsent.remove_range(places);
        }
    }

    /// The next wants for an ACK of `lane`.
    pub(crate) fn take(&mut self, layout: &Layout, lane: LaneId) -> Vec<Want> {
        let mut wants: Vec<Want> = Vec::new();
        if self.unsent.count() == 0 {
            return wants;
        }
        let mut next = 0;
        while wants.len() < WANTS_MAX {
            let Some(run) = self.unsent.runs(next..layout.pages()).next() else { break };
            let (region, first) = layout.locate(Place(u32::try_from(run.start).unwrap_or(u32::MAX)));
            let pages = layout.region(region).map_or(0, |region| region.pages());
            let border = (first.0 / GROUP_PAGES).saturating_add(1).saturating_mul(GROUP_PAGES).min(pages);
            let count = run.end.saturating_sub(run.start).min(border.saturating_sub(first.0)).max(1);
            next = run.start.saturating_add(count);
            let group = layout.group(region, first.0);
            if group.checked_rem(self.bulk_lanes) == lane.bulk_index().map(u64::from) {
                (run.start..next).for_each(|place| {
                    self.unsent.remove(place);
                });
                wants.push(Want { region: region.0, first: first.0, count: u32::try_from(count).unwrap_or(1) });
            }
        }
        wants
    }

    /// Pages asked for and not there.
    pub(crate) fn outstanding(&self) -> u64 {
        self.outstanding.count()
    }

    /// Pages asked for so far.
    pub(crate) fn asked(&self) -> u64 {
        self.asked
    }

    /// No session asks for everything again and again; so many rounds have begun.
    pub(crate) fn check(&self, layout: &Layout, rounds: u64) -> Result<(), Violation> {
        // SPEC 6.12
        if self.asked > layout.pages().saturating_mul(WANTS_A_PAGE_MAX).saturating_mul(rounds) {
            return Err(Violation::WantFlood { wants: self.asked, pages: layout.pages() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::page::{InstallSize, Region};

    #[test]
    fn a_want_is_widened_asked_once_and_goes_on_its_pages_lane() {
        let region = Region { bytes: 8 << 20, install_size: InstallSize::KIB_64 };
        let layout = Layout::new(vec![region, region]).unwrap();
        let mut wants = Wants::new(&layout, 2);
        wants.ask(&layout, RegionId(0), 505, 10);
        wants.ask(&layout, RegionId(0), 506, 1);
        wants.ask(&layout, RegionId(1), 2047, 1);
        let want = |region, first, count| Want { region, first, count };
        assert_eq!(wants.take(&layout, LaneId::bulk(0)), [want(0, 496, 16)]);
        assert_eq!(wants.take(&layout, LaneId::bulk(1)), [want(0, 512, 16), want(1, 2032, 16)]);
        assert_eq!(wants.take(&layout, LaneId::bulk(1)), []);
        assert_eq!((wants.outstanding(), wants.asked()), (48, 48));
        wants.settle(&layout, layout.range(0, 496, 16).unwrap());
        assert_eq!(wants.outstanding(), 32);
    }
}
