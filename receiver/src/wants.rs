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
        let mut page = start;
        while page < end {
            // SPEC 6.10: of an install page that was asked for and stated in part since, all of it is asked for again.
            let place = u64::from(layout.place(region, page).0);
            let whole = place..place.saturating_add(step.min(end.saturating_sub(page)));
            if self.outstanding.insert_range(whole.clone()) > 0 {
                self.asked = self.asked.saturating_add(self.unsent.insert_range(whole));
            }
            page = page.saturating_add(step);
        }
    }

    /// Pages were stated again. An install page of which one is outstanding is still asked for as a whole.
    pub(crate) fn settle(&mut self, layout: &Layout, range: PageRange) {
        if self.outstanding.count() == 0 {
            return;
        }
        let first = u64::from(layout.place(range.region, range.first.0).0);
        self.outstanding.remove_range(first..first.saturating_add(u64::from(range.count)));
        let Some(region) = layout.region(range.region).filter(|_| self.unsent.count() > 0) else { return };
        let step = u64::from(region.install_size.pages());
        let pages = range.numbers();
        for start in (pages.start / step..pages.end.div_ceil(step)).map(|at| at.saturating_mul(step)) {
            let place = u64::from(layout.place(range.region, start).0);
            let whole = place..place.saturating_add(step.min(region.pages().saturating_sub(start)));
            if self.outstanding.runs(whole.clone()).next().is_none() {
                self.unsent.remove_range(whole);
            }
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
    use pagewire_protocol::page::{InstallSize, PageNumber, Region};

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

    /// SPEC 6.10: a later round may state pages in the middle of an install page that is asked for.
    #[test]
    fn a_want_of_which_a_part_was_stated_again_is_whole() {
        let region = Region { bytes: 141 << 12, install_size: InstallSize::KIB_64 };
        let layout = Layout::new(vec![region, region]).unwrap();
        let mut wants = Wants::new(&layout, 1);
        wants.ask(&layout, RegionId(0), 0, 40);
        wants.ask(&layout, RegionId(1), 140, 1);
        for (region, first, count) in [(0, 3, 29), (1, 128, 12)] {
            let range = PageRange { region: RegionId(region), first: PageNumber(first), count };
            wants.settle(&layout, range);
        }
        let want = |region, first, count| Want { region, first, count };
        assert_eq!(wants.outstanding(), 3 + 16 + 1);
        assert_eq!(wants.take(&layout, LaneId::bulk(0)), [want(0, 0, 16), want(0, 32, 16), want(1, 128, 13)]);
        wants.ask(&layout, RegionId(0), 20, 1);
        wants.settle(&layout, PageRange { region: RegionId(0), first: PageNumber(16), count: 16 });
        assert_eq!(wants.take(&layout, LaneId::bulk(0)), []);
        // Asked for, stated in part, and missed again.
        wants.settle(&layout, PageRange { region: RegionId(1), first: PageNumber(130), count: 2 });
        wants.ask(&layout, RegionId(1), 131, 1);
        assert_eq!(wants.take(&layout, LaneId::bulk(0)), [want(1, 128, 13)]);
    }
}
