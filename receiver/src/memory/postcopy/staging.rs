//! Pages of units that have not come as a whole: kept aside until they have, as the kernel takes nothing less.

use super::install::Installed;
use super::{PostcopyError, PostcopyMemory, SMALL, lock, size};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::is_zero;
use pagewire_protocol::limits::{PAGE_BYTES, WAITING_PAGES_MAX};
use pagewire_protocol::page::{Region, RegionId};
use pagewire_protocol::time::Time;
use std::collections::BTreeMap;
use std::ops::Range;

/// Pages of units that are kept aside: as many as a session may have waiting for anything, 512 MiB. Of a guest with huge
/// pages, whose batches are a huge page each, it takes a few.
const STAGED_PAGES_MAX: u64 = WAITING_PAGES_MAX as u64;

/// A unit in parts.
#[derive(Debug)]
struct Parts {
    region: RegionId,
    first: u64,
    bytes: Vec<u8>,
    here: PageBitmap,
}

/// Units in parts, by the places they begin at.
#[derive(Debug, Default)]
pub(super) struct Staging {
    units: BTreeMap<u64, Parts>,
    pages: u64,
}

impl Staging {
    fn take(&mut self, place: u64) -> Option<Parts> {
        let parts = self.units.remove(&place)?;
        self.pages = self.pages.saturating_sub(parts.here.len());
        Some(parts)
    }

    fn put(&mut self, place: u64, parts: Parts) {
        self.pages = self.pages.saturating_add(parts.here.len());
        if let Some(other) = self.units.insert(place, parts) {
            self.pages = self.pages.saturating_sub(other.here.len());
        }
    }
}

fn add(to: &mut Installed, one: Installed) {
    to.pages = to.pages.saturating_add(one.pages);
    to.already = to.already.saturating_add(one.already);
    to.elsewhere = to.elsewhere.saturating_add(one.elsewhere);
    to.gone = to.gone.saturating_add(one.gone);
    to.served.extend(one.served);
}

impl PostcopyMemory {
    /// As [`install`](Self::install), of any pages inside the region: those of units that are not complete are kept aside
    /// until the rest has come, by this call or a later one. The counts are of what was put in.
    ///
    /// # Errors
    /// As there; and [`NoMemory`](PostcopyError::NoMemory) where too many units have come in part. What was kept aside
    /// stays so.
    pub fn install_pages(
        &self,
        region: RegionId,
        first: u64,
        bytes: &[u8],
        now: Time,
    ) -> Result<Installed, PostcopyError> {
        let (pages, rest) = bytes.as_chunks::<PAGE_BYTES>();
        if !rest.is_empty() {
            return Err(PostcopyError::Misuse("no whole pages"));
        }
        if self.unit_pages(region) == 1 {
            return self.install(region, first, bytes, now);
        }
        let end = first.saturating_add(pages.len() as u64);
        let mut installed = Installed::default();
        for unit in self.units(region, first..end)? {
            let part = unit.start.max(first)..unit.end.min(end);
            let (from, to) = (part.start.saturating_sub(first), part.end.saturating_sub(first));
            let bytes = bytes.get(size(from.saturating_mul(SMALL))..size(to.saturating_mul(SMALL))).unwrap_or_default();
            if part == unit {
                add(&mut installed, self.install(region, unit.start, bytes, now)?);
                self.drop_staged(region, unit.start);
            } else {
                self.stage(region, &unit, part.start, bytes)?;
                self.install_staged(region, unit, now, &mut installed)?;
            }
        }
        Ok(installed)
    }

    /// As [`install_pages`](Self::install_pages), of pages that are zero.
    ///
    /// # Errors
    /// As there.
    pub fn zero_pages(&self, region: RegionId, first: u64, count: u64, now: Time) -> Result<Installed, PostcopyError> {
        let end = first.saturating_add(count);
        let mut installed = Installed::default();
        let units = self.units(region, first..end)?;
        // Whole units in the middle go in one piece.
        let inner: Vec<&Range<u64>> = units.iter().filter(|unit| unit.start >= first && unit.end <= end).collect();
        if let (Some(one), Some(last)) = (inner.first(), inner.last()) {
            let count = last.end.saturating_sub(one.start);
            add(&mut installed, self.install_zeros(region, one.start, count, now)?);
            inner.iter().for_each(|unit| self.drop_staged(region, unit.start));
        }
        for unit in units.iter().filter(|unit| unit.start < first || unit.end > end) {
            let part = unit.start.max(first)..unit.end.min(end);
            let zeros = vec![0; size(part.end.saturating_sub(part.start).saturating_mul(SMALL))];
            self.stage(region, unit, part.start, &zeros)?;
            self.install_staged(region, unit.clone(), now, &mut installed)?;
        }
        Ok(installed)
    }

    /// All pages that nobody has to bring, and those that are kept aside: what a sender need not send again.
    pub fn arrived(&self) -> PageBitmap {
        let mut arrived = self.present();
        for (place, parts) in &lock(&self.staging).units {
            for run in parts.here.runs(0..parts.here.len()) {
                arrived.insert_range(place.saturating_add(run.start)..place.saturating_add(run.end));
            }
        }
        arrived
    }

    /// Copies pages out that are kept aside; whether it is one of those.
    pub(super) fn read_staged(&self, region: RegionId, page: u64, bytes: &mut [u8]) -> bool {
        let staging = lock(&self.staging);
        let first = page.saturating_sub(page % self.unit_pages(region));
        let Some(parts) = staging.units.get(&self.places_of(region, first..first).start) else { return false };
        let at = page.saturating_sub(first);
        let from = parts.bytes.get(size(at.saturating_mul(SMALL))..).and_then(|rest| rest.get(..bytes.len()));
        let Some(from) = from.filter(|_| parts.here.contains(at)) else { return false };
        bytes.copy_from_slice(from);
        true
    }

    /// Puts in what is complete since pages of it were thrown away.
    pub(super) fn install_all_staged(&self, now: Time, installed: &mut Installed) -> Result<(), PostcopyError> {
        let of = |parts: &Parts| (parts.region, parts.first..parts.first.saturating_add(parts.here.len()));
        let units: Vec<(RegionId, Range<u64>)> = lock(&self.staging).units.values().map(of).collect();
        units.into_iter().try_for_each(|(region, unit)| self.install_staged(region, unit, now, installed))
    }

    /// The units that pages touch, cut to the region.
    fn units(&self, region: RegionId, pages: Range<u64>) -> Result<Vec<Range<u64>>, PostcopyError> {
        let all = self.layout.region(region).map_or(0, Region::pages);
        if pages.start > pages.end || pages.end > all {
            return Err(PostcopyError::Misuse("pages outside of their region"));
        }
        let unit = self.unit_pages(region);
        let start = pages.start.saturating_sub(pages.start % unit);
        let step = usize::try_from(unit).unwrap_or(usize::MAX);
        Ok((start..pages.end).step_by(step).map(|first| first..first.saturating_add(unit).min(all)).collect())
    }

    fn drop_staged(&self, region: RegionId, first: u64) {
        if self.unit_pages(region) > 1 {
            lock(&self.staging).take(self.places_of(region, first..first).start);
        }
    }

    fn stage(&self, region: RegionId, unit: &Range<u64>, first: u64, bytes: &[u8]) -> Result<(), PostcopyError> {
        self.uffd()?;
        let places = self.places_of(region, unit.clone());
        if self.present.runs(places.clone(), false).is_empty() {
            return Ok(());
        }
        let mut staging = lock(&self.staging);
        let count = unit.end.saturating_sub(unit.start);
        if !staging.units.contains_key(&places.start) {
            if staging.pages.saturating_add(count) > STAGED_PAGES_MAX {
                return Err(PostcopyError::NoMemory);
            }
            let bytes = vec![0; size(count.saturating_mul(SMALL))];
            let here = PageBitmap::new(count);
            staging.put(places.start, Parts { region, first: unit.start, bytes, here });
        }
        let Some(parts) = staging.units.get_mut(&places.start) else { return Ok(()) };
        let at = first.saturating_sub(unit.start);
        for (page, from) in (at..).zip(bytes.chunks(PAGE_BYTES)) {
            let to =
                parts.bytes.get_mut(size(page.saturating_mul(SMALL))..).and_then(|rest| rest.get_mut(..from.len()));
            // The first one counts: a page that is here is not replaced.
            if let Some(to) = to.filter(|_| parts.here.insert(page)) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }

    /// Puts a unit in if it is complete: each of its pages kept aside, or nobody's to bring.
    fn install_staged(
        &self,
        region: RegionId,
        unit: Range<u64>,
        now: Time,
        installed: &mut Installed,
    ) -> Result<(), PostcopyError> {
        let places = self.places_of(region, unit.clone());
        let parts = {
            let mut staging = lock(&self.staging);
            let Some(parts) = staging.units.get(&places.start) else { return Ok(()) };
            let mut missing = parts.here.gaps(0..parts.here.len());
            let is_here = |run: Range<u64>| {
                let run = places.start.saturating_add(run.start)..places.start.saturating_add(run.end);
                self.present.runs(run, false).is_empty()
            };
            if !missing.all(is_here) {
                return Ok(());
            }
            staging.take(places.start)
        };
        let Some(parts) = parts else { return Ok(()) };
        let count = unit.end.saturating_sub(unit.start);
        let done = if is_zero(&parts.bytes) {
            self.install_zeros(region, unit.start, count, now)
        } else {
            self.install(region, unit.start, &parts.bytes, now)
        };
        match done {
            Ok(one) => add(installed, one),
            Err(error) => {
                lock(&self.staging).put(places.start, parts);
                return Err(error);
            }
        }
        Ok(())
    }
}
