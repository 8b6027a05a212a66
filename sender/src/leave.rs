//! What a live session does to end in post-copy: it states as absent what is still to be sent, and leaves it behind.
//!
//! Nothing of the image is read while the guest stands still, so the time it stands still does not grow with what is
//! left. A page is left behind as a whole install page.

use crate::error::ErrorKind;
use crate::fill::Remainder;
use crate::lanes::Batch;
use crate::memory::GuestMemory;
use crate::sending::{Sending, Step};
use pagewire_protocol::batch::batch_digest;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::frame::{EntryKind, Run};
use pagewire_protocol::handover::Handover;
use pagewire_protocol::limits::{COVER_PAGES_MAX, RUNS_MAX};
use pagewire_protocol::page::{GROUP_PAGES, PageRange, Place};

/// What is left behind, and how much of it was said.
#[derive(Debug)]
pub(crate) struct Leaving {
    pub(crate) absent: PageBitmap,
    next: u64,
}

impl<M: GuestMemory> Sending<M> {
    /// The guest stands still: what `todo` says was written, what was never stated and what is wanted is left behind.
    pub(crate) fn begin_leaving(&mut self, todo: &PageBitmap) {
        let pages = self.layout.pages();
        let mut absent = PageBitmap::new(pages);
        for set in [todo, &self.wants] {
            set.runs(0..pages).for_each(|run| {
                absent.insert_range(run);
            });
        }
        if self.layout.region(self.region).is_some() {
            // Pages are stated in order the first time.
            absent.insert_range(u64::from(self.layout.place(self.region, self.next).0)..pages);
        }
        self.wants = PageBitmap::new(pages);
        self.widen(&mut absent);
        self.region = pagewire_protocol::page::RegionId(u16::try_from(self.layout.regions().len()).unwrap_or(u16::MAX));
        self.next = 0;
        self.flush_cover();
        self.leaving = Some(Leaving { absent, next: 0 });
    }

    /// Install pages are left behind as a whole.
    fn widen(&self, absent: &mut PageBitmap) {
        let mut first = 0u64;
        for region in self.layout.regions() {
            let (start, install) = (first, u64::from(region.install_size.pages()).max(1));
            first = first.saturating_add(region.pages());
            if install == 1 {
                continue;
            }
            for run in absent.runs(start..first).collect::<Vec<_>>() {
                let from = run.start.saturating_sub(start) / install * install;
                let to = run.end.saturating_sub(start).div_ceil(install).saturating_mul(install).min(region.pages());
                absent.insert_range(start.saturating_add(from)..start.saturating_add(to));
            }
        }
    }

    /// States the next pages as absent; `None` when all are.
    // SPEC 13.2
    pub(crate) fn leave_next(&mut self) -> Result<Option<Step>, ErrorKind> {
        let Some(leaving) = self.leaving.as_mut() else { return Ok(None) };
        let pages = self.layout.pages();
        let Some(first) = leaving.absent.runs(leaving.next..pages).next().map(|run| run.start) else {
            return Ok(None);
        };
        let (region, page) = self.layout.locate(Place(u32::try_from(first).unwrap_or(u32::MAX)));
        let Some(known) = self.layout.region(region) else { return Ok(None) };
        // SPEC 6.3
        let step = if self.lanes.ids().count() > 1 { GROUP_PAGES } else { u64::from(COVER_PAGES_MAX) };
        let border = (page.0 / step).saturating_add(1).saturating_mul(step).min(known.pages());
        let end = first.saturating_add(border.saturating_sub(page.0));
        let (mut runs, mut next): (Vec<Run>, u64) = (Vec::new(), first);
        for run in leaving.absent.runs(first..end).take(RUNS_MAX / 2) {
            let count = |places: u64| u16::try_from(places).unwrap_or(u16::MAX);
            if run.start > next {
                runs.push(Run { kind: EntryKind::SKIPPED, count: count(run.start.saturating_sub(next)) });
            }
            runs.push(Run { kind: EntryKind::ABSENT, count: count(run.end.saturating_sub(run.start)) });
            next = run.end;
            let at = |place: u64| page.0.saturating_add(place.saturating_sub(first));
            if let Some(tree) = self.trees.get_mut(usize::from(region.0)) {
                tree.set_absent(at(run.start)..at(run.end));
            }
        }
        leaving.next = next;
        let range = PageRange { region, first: page, count: u32::try_from(next.saturating_sub(first)).unwrap_or(0) };
        self.send_absent(range, runs);
        Ok(Some(Step::Did))
    }

    /// What is left to bring.
    pub(crate) fn into_remainder(self, handover: Handover) -> Option<Remainder<M>> {
        let Self { memory, hasher, trees, leaving, layout, .. } = self;
        let (absent, gone) = (leaving?.absent, Some(PageBitmap::new(layout.pages())));
        Some(Remainder { memory, hasher, trees, absent, gone, handover })
    }

    fn send_absent(&mut self, range: PageRange, runs: Vec<Run>) {
        let head =
            self.head(range, batch_digest((self.hasher.domain(), false), range.first.0, runs.iter().copied(), &[]));
        let lane = self.lanes.lane_of(self.layout.group(range.region, range.first.0));
        self.note(range, &runs);
        let (references, proofs, payload) = Default::default();
        self.lanes.plan(lane, Batch { head, runs, references, proofs, payload, announced: 0, old: None }, None);
    }
}
