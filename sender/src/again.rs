//! What a live session does beyond one at rest: rounds over what was written, and the pause before the last.

use crate::classify::Entries;
use crate::converge::Verdict;
use crate::error::ErrorKind;
use crate::memory::GuestMemory;
use crate::rounds::Stage;
use crate::sending::{Sending, Sent, Step};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::frame::EntryKind;
use pagewire_protocol::limits::{COVER_PAGES_MAX, PAGE_BYTES, RUNS_MAX, SUBTREE_PAGES};
use pagewire_protocol::page::{GROUP_PAGES, PageNumber, PageRange, Place, RegionId};
use pagewire_protocol::time::Time;
use std::ops::Range;

/// Lowest nodes of trees that one step hashes: half a millisecond.
const NODES_A_STEP: u64 = 256;

impl<M: GuestMemory> Sending<M> {
    /// The next part of a later round: pages that may have changed, with those between them.
    pub(crate) fn next_again(&mut self) -> Option<PageRange> {
        let (todo, next) = self.rounds.as_ref()?.todo();
        let first = todo.runs(next..todo.len()).next()?.start;
        let (region, page) = self.layout.locate(Place(u32::try_from(first).ok()?));
        let known = *self.layout.region(region)?;
        let step = if self.lanes.ids().count() > 1 { GROUP_PAGES } else { u64::from(COVER_PAGES_MAX) };
        let border = (page.0 / step).saturating_add(1).saturating_mul(step).min(known.pages());
        let end = first.saturating_add(border.saturating_sub(page.0));
        let (mut looked, mut last) = (0u64, first);
        for (count, run) in todo.runs(first..end).enumerate() {
            if looked >= self.step_pages() || count > RUNS_MAX / 4 {
                break;
            }
            let pages = run.end.saturating_sub(run.start).min(self.step_pages().saturating_sub(looked));
            looked = looked.saturating_add(pages);
            last = run.start.saturating_add(pages);
        }
        let install = u64::from(known.install_size.pages()).max(1);
        let start = page.0 / install * install;
        let pages = page.0.saturating_add(last.saturating_sub(first));
        let stop = pages.div_ceil(install).saturating_mul(install).min(known.pages());
        let count = u32::try_from(stop.saturating_sub(start)).ok()?;
        self.rounds.as_mut()?.advance(last);
        Some(PageRange { region, first: PageNumber(start), count })
    }

    /// Reads what may have changed of a range, up to where the round has advanced, and states what has.
    pub(crate) fn state_again(&mut self, range: PageRange, now: Time) -> Result<Step, ErrorKind> {
        let parts = self.parts_to_look_at(range);
        let count = |part: &Range<u64>| usize::try_from(part.end.saturating_sub(part.start)).unwrap_or(0);
        let mut buffer = self.lanes.buffer(parts.iter().map(count).sum::<usize>().saturating_mul(PAGE_BYTES));
        let mut filled = 0usize;
        for part in &parts {
            let end = filled.saturating_add(count(part).saturating_mul(PAGE_BYTES));
            let space = buffer.get_mut(filled..end).unwrap_or_default();
            self.copy_out(range.region, part.start, space)?;
            filled = end;
        }
        self.digests.clear();
        self.hasher.digest_nonzero(buffer.as_chunks().0, &mut self.digests);
        let found = std::mem::take(&mut self.digests);
        self.state_changed(range, &parts, &found, Entries::over(buffer), now);
        Ok(Step::Did)
    }

    /// Takes the pages of a range that this round has to look at: a frame of whole install pages may begin before where
    /// the last one ended, and each page is looked at once.
    fn parts_to_look_at(&mut self, range: PageRange) -> Vec<Range<u64>> {
        let first = u64::from(self.layout.place(range.region, range.first.0).0);
        let places = first..first.saturating_add(u64::from(range.count));
        let page = |place: u64| place.saturating_sub(first).saturating_add(range.first.0);
        let taken = self.rounds.as_mut().map(|rounds| rounds.take(places)).unwrap_or_default();
        taken.into_iter().map(|run| page(run.start)..page(run.end)).collect()
    }

    /// States those of the looked-at pages that are not what they were stated as before.
    fn state_changed(
        &mut self,
        range: PageRange,
        parts: &[Range<u64>],
        found: &[Digest],
        mut entries: Entries,
        now: Time,
    ) {
        let lane = self.lanes.lane_of(self.layout.group(range.region, range.first.0));
        self.flush_cover();
        let mut next = range.first.0;
        self.sent.fetch(found);
        for (slot, (page, &digest)) in parts.iter().cloned().flatten().zip(found).enumerate() {
            if !self.restate(range.region, page, digest) {
                continue;
            }
            let skipped = page.saturating_sub(next);
            entries.push_many(EntryKind::SKIPPED, skipped);
            let place = self.layout.place(range.region, page);
            if let Some(rounds) = &mut self.rounds {
                rounds.note_changed(u64::from(place.0));
            }
            let kind = if digest == self.hasher.zero() {
                EntryKind::ZERO
            } else if self.sent.has_gone(&digest, place, lane, (&self.layout, &self.trees, &self.lanes)) {
                EntryKind::REFERENCE
            } else {
                EntryKind::INLINE
            };
            entries.push(kind, slot, digest);
            next = page.saturating_add(1);
        }
        if entries.runs.is_empty() {
            self.lanes.recycle(entries.payload.buffer);
            return;
        }
        let skipped = range.numbers().end.saturating_sub(next);
        entries.push_many(EntryKind::SKIPPED, skipped);
        self.send(range, lane, entries, Sent::default(), now);
        // While the receiver works on it, not when both wait for the root.
        if let Some(tree) = self.trees.get_mut(usize::from(range.region.0)) {
            let pages = range.numbers();
            tree.hash_subtrees(pages.start / SUBTREE_PAGES as u64..pages.end / SUBTREE_PAGES as u64);
        }
    }

    /// A page has `digest` now: whether that is news. What it was before is not believed to be at the receiver any more.
    pub(crate) fn restate(&mut self, region: RegionId, page: u64, digest: Digest) -> bool {
        let place = self.layout.place(region, page);
        let Some(tree) = self.trees.get_mut(usize::from(region.0)) else { return false };
        let old = tree.leaf(page);
        if old == digest && self.tally.is_stated(u64::from(place.0)) {
            return false;
        }
        tree.set(page, digest);
        self.sent.retire(&old, place);
        true
    }

    /// Copies pages out of memory; those that do not matter come as zeros and are not read.
    pub(crate) fn copy_out(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> Result<(), ErrorKind> {
        let Some(free) = self.rounds.as_ref().and_then(|rounds| rounds.free()) else {
            return self.memory.read(region, first, bytes).map_err(ErrorKind::Source);
        };
        let start = u64::from(self.layout.place(region, first).0);
        let end = start.saturating_add((bytes.len() / PAGE_BYTES) as u64);
        bytes.fill(0);
        for run in free.gaps(start..end.min(free.len())) {
            let offset = |place: u64| {
                usize::try_from(place.saturating_sub(start)).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES)
            };
            let part = bytes.get_mut(offset(run.start)..offset(run.end)).unwrap_or_default();
            let page = first.saturating_add(run.start.saturating_sub(start));
            self.memory.read(region, page, part).map_err(ErrorKind::Source)?;
        }
        Ok(())
    }

    /// Whether a page that was said to be unchanged may have been written since it was said.
    pub(crate) fn was_written(&mut self, region: RegionId, page: u64, now: Time) -> Result<bool, ErrorKind> {
        let place = u64::from(self.layout.place(region, page).0);
        let Some(rounds) = self.rounds.as_mut() else { return Ok(false) };
        if !rounds.may_have_changed(place) {
            rounds.harvest(&mut self.memory, now).map_err(ErrorKind::Source)?;
        }
        Ok(rounds.may_have_changed(place))
    }

    /// Looks at what was written, so that history knows, while a round lasts.
    pub(crate) fn sample(&mut self, now: Time) -> Result<(), ErrorKind> {
        let Some(rounds) = self.rounds.as_mut().filter(|rounds| rounds.is_sample_due(now)) else { return Ok(()) };
        rounds.harvest(&mut self.memory, now).map_err(ErrorKind::Source)
    }

    /// All of a round is stated: what comes next.
    pub(crate) fn end_live_round(&mut self, now: Time) -> Result<Step, ErrorKind> {
        let drains = self.rounds.as_ref().is_some_and(|rounds| rounds.stage == Stage::Draining);
        if drains && self.hash_some_nodes() {
            return Ok(Step::Did);
        }
        let Some(rounds) = self.rounds.as_mut() else { return Ok(Step::Waits) };
        match rounds.stage {
            Stage::Running => {
                rounds.stage = Stage::Draining;
                self.flush_cover();
                self.push_round_ends();
                Ok(Step::Did)
            }
            Stage::Draining if rounds.is_drained(&self.lanes, now) => self.judge_round(now),
            Stage::Settling if self.lanes.is_idle() => {
                rounds.stage = Stage::Pausing;
                Ok(Step::Pause)
            }
            Stage::Draining | Stage::Settling | Stage::Pausing => Ok(Step::Waits),
            Stage::Last => {
                self.ended = true;
                rounds.end_last(&self.lanes, now);
                self.end_round().map(Step::Stated)
            }
        }
    }

    /// Nothing is sent before the guest leaves.
    pub(crate) fn pause_at_once(&mut self) -> Step {
        if let Some(rounds) = self.rounds.as_mut().filter(|rounds| rounds.stage == Stage::Running) {
            rounds.leave(Stage::Pausing);
            return Step::Pause;
        }
        Step::Waits
    }

    /// Hashes some of the nodes whose pages this round has stated, so that the root over all of them costs nothing of the
    /// downtime but for those that the last round changes. Says whether there were any.
    fn hash_some_nodes(&mut self) -> bool {
        self.trees.iter_mut().any(|tree| tree.hash_some(NODES_A_STEP) > 0)
    }

    fn judge_round(&mut self, now: Time) -> Result<Step, ErrorKind> {
        let counts = self.counts;
        let ratio = counts.payload_bytes as f64 / counts.inline_bytes.max(1) as f64;
        let bytes_a_page = if counts.inline_bytes == 0 { 1.0 } else { ratio } * PAGE_BYTES as f64;
        let Some(rounds) = self.rounds.as_mut() else { return Ok(Step::Waits) };
        rounds.harvest(&mut self.memory, now).map_err(ErrorKind::Source)?;
        let (verdict, decision) = rounds.judge(&self.lanes, bytes_a_page, now);
        self.decisions.push(decision);
        match verdict {
            Verdict::Again => {
                rounds.start_clock(&self.lanes, now);
                Ok(Step::Judged)
            }
            Verdict::Throttle(percent) => {
                rounds.start_clock(&self.lanes, now);
                Ok(Step::Throttle(percent))
            }
            Verdict::SwitchOver | Verdict::Force(_) => Ok(Step::Judged),
            Verdict::PostCopy(_) if self.post_copy => {
                rounds.leave(Stage::Settling);
                Ok(Step::Judged)
            }
            Verdict::GiveUp(reason) | Verdict::PostCopy(reason) => {
                let dirty_rate = rounds.reports().last().map_or(0.0, |round| round.dirty_rate);
                Err(ErrorKind::NotConverging { reason, dirty_rate })
            }
        }
    }

    /// The guest stands still: what was written last, and what waited, is sent now, and `blobs` with it.
    pub(crate) fn begin_last_round(&mut self, blobs: Blobs, now: Time) -> Result<(), ErrorKind> {
        self.blobs = blobs;
        let Some(rounds) = self.rounds.as_mut() else { return Ok(()) };
        rounds.harvest(&mut self.memory, now).map_err(ErrorKind::Source)?;
        rounds.begin_last(&self.lanes, now);
        if rounds.leaves() {
            let todo = rounds.take_todo();
            self.begin_leaving(&todo);
            return Ok(());
        }
        if self.lanes.ids().count() > 1 {
            // A lane may overtake another, and a miss costs a round trip while nobody runs: nothing refers to a page
            // that is about to change.
            let (todo, _) = rounds.todo();
            for place in todo.runs(0..todo.len()).flatten() {
                let place = Place(u32::try_from(place).unwrap_or(u32::MAX));
                let (region, page) = self.layout.locate(place);
                let leaf = self.trees.get(usize::from(region.0)).map(|tree| tree.leaf(page.0)).unwrap_or_default();
                self.sent.retire(&leaf, place);
            }
        }
        Ok(())
    }

    /// The guest is another host's: nobody needs to know any more what is written here. Says which pages it wrote all
    /// the time.
    pub(crate) fn release(&mut self) -> Option<PageBitmap> {
        let rounds = self.rounds.take()?;
        self.memory.stop_tracking();
        Some(rounds.hot())
    }

    /// The session failed: memory is as dirty as if it had never been.
    pub(crate) fn abandon(&mut self) {
        if let Some(rounds) = self.rounds.take() {
            rounds.put_back(&mut self.memory);
            self.memory.stop_tracking();
        }
    }
}
