//! Answers to wants: the bytes of pages that the receiver asked for.

use crate::classify::Entries;
use crate::error::ErrorKind;
use crate::memory::GuestMemory;
use crate::rounds::Rounds;
use crate::sending::{Sending, Sent};
use pagewire_protocol::digest::Digest;
use pagewire_protocol::frame::EntryKind;
use pagewire_protocol::page::{GROUP_PAGES, PageRange, Place, RegionId};
use pagewire_protocol::time::Time;
use std::ops::Range;

/// Pages between two wanted ones that are passed over rather than ending the frame.
const GAP_PAGES: u64 = 8;

impl<M: GuestMemory> Sending<M> {
    /// The next pages to answer wants with: whole install pages inside one group, and what lies between near ones.
    pub(crate) fn next_want(&mut self) -> Option<PageRange> {
        if self.wants.count() == 0 {
            return None;
        }
        let mut runs = self.wants.runs(0..self.layout.pages());
        let first = runs.next()?;
        let (region, page) = self.layout.locate(Place(u32::try_from(first.start).ok()?));
        let known = self.layout.region(region)?;
        let step = u64::from(known.install_size.pages()).max(self.step_pages()).min(GROUP_PAGES);
        let border = (page.0 / step).saturating_add(1).saturating_mul(step).min(known.pages());
        let last = first.start.saturating_add(border.saturating_sub(page.0));
        let near = |end: u64, next: &Range<u64>| next.start < last && next.start.saturating_sub(end) <= GAP_PAGES;
        let mut end = first.end;
        while let Some(next) = runs.next().filter(|next| near(end, next)) {
            end = next.end;
        }
        let count = end.min(last).saturating_sub(first.start);
        Some(PageRange { region, first: page, count: u32::try_from(count).ok()? })
    }

    /// Answers a want with the bytes, or with a reference to bytes that went on this lane meanwhile.
    // SPEC 6.11
    pub(crate) fn answer(&mut self, range: PageRange, now: Time) -> Result<(), ErrorKind> {
        let buffer = self.read(range)?;
        let lane = self.lanes.lane_of(self.layout.group(range.region, range.first.0));
        let mut entries = Entries::over(buffer);
        self.flush_cover();
        let found = std::mem::take(&mut self.digests);
        for (at, (page, digest)) in range.numbers().zip(&found).enumerate() {
            let place = self.layout.place(range.region, page);
            if !self.wants.remove(u64::from(place.0)) {
                // Between two wants: passed over, which costs less than a frame for each of them.
                entries.push_many(EntryKind::SKIPPED, 1);
                continue;
            }
            self.check_answer(range.region, page, *digest)?;
            let again = !self.wanted.insert(u64::from(place.0));
            let gone = self.sent.has_gone(digest, place, lane, (&self.layout, &self.trees, &self.lanes));
            let kind = if gone && !again && self.leaving.is_none() { EntryKind::REFERENCE } else { EntryKind::INLINE };
            entries.push(if *digest == self.hasher.zero() { EntryKind::ZERO } else { kind }, at, *digest);
        }
        self.digests = found;
        self.send(range, lane, entries, Sent::default(), now);
        // Nothing else joins an answer of zeros: what rests on the base might have to be wanted, and the answer with it.
        self.flush_cover();
        Ok(())
    }

    /// A page that is looked at again may have changed only while the guest runs; then it is stated as it is now.
    // SPEC 6.21, 6.30
    fn check_answer(&mut self, region: RegionId, page: u64, digest: Digest) -> Result<(), ErrorKind> {
        let is_fixed = self.rounds.as_ref().is_none_or(Rounds::is_last);
        if self.restate(region, page, digest) && is_fixed {
            let message = format!(
                "page {page} changed between two looks at it; memory that is being written needs to be at rest"
            );
            return Err(ErrorKind::Source(std::io::Error::other(message)));
        }
        Ok(())
    }
}
