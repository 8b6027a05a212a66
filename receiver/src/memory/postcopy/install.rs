//! Pages put in, once each, by any number of loaders.

use super::gather::put_zeros;
use super::{PostcopyError, PostcopyMemory, SMALL, Served, failed, lock, places, size};
use crate::memory::uffd::{Filled, Stop, Uffd, Wake};
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Region, RegionId};
use pagewire_protocol::time::Time;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::PoisonError;

/// Pages put in while messages cannot be read, unless a unit has more: some ten microseconds.
const CHUNK_PAGES: u64 = 32;
/// How often pages are tried again while the address space is being changed, and how often at once.
const TRIES_MAX: u32 = 200;
const TRIES_AT_ONCE: u32 = 4;
/// What is waited between tries: messages end it earlier.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// What became of pages that were to be put in. Together they are all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// Pages put in by this call.
    pub pages: u64,
    /// Pages that were there, or that nobody has to bring: what came for them is dropped.
    pub already: u64,
    /// Pages of units that another loader is putting in just now.
    pub elsewhere: u64,
    /// Pages whose addresses are not the guest's any more.
    pub gone: u64,
    /// Who waited for them.
    pub served: Vec<Served>,
}

/// What is put in.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// The bytes of all pages, from the first on.
    Bytes(&'a [u8]),
    Zeros,
}

/// Whole units of a region.
#[derive(Clone)]
struct Chunk<'a> {
    region: RegionId,
    pages: Range<u64>,
    unit: u64,
    source: Source<'a>,
    /// The page that the source begins with.
    source_first: u64,
}

/// Units that this loader alone puts in, given back when it is done.
struct Claims<'a> {
    memory: &'a PostcopyMemory,
    units: Vec<Range<u64>>,
}

impl Drop for Claims<'_> {
    fn drop(&mut self) {
        self.units.iter().for_each(|unit| self.memory.claimed.remove(unit.start));
    }
}

impl PostcopyMemory {
    /// Puts pages in that nobody has brought yet, and wakes who waits for them. They are whole install units of the region,
    /// whose last may be cut to the region.
    ///
    /// Messages may be read meanwhile; what they say comes with the next [`gather`](Self::gather).
    ///
    /// # Errors
    /// [`Busy`](PostcopyError::Busy) and [`NoMemory`](PostcopyError::NoMemory): some are in, the others can be tried again
    /// by the same call. [`ProcessGone`](PostcopyError::ProcessGone). They are not whole units inside the region, or the
    /// memory is not armed.
    pub fn install(&self, region: RegionId, first: u64, bytes: &[u8], now: Time) -> Result<Installed, PostcopyError> {
        if !bytes.len().is_multiple_of(PAGE_BYTES) {
            return Err(PostcopyError::Misuse("no whole pages"));
        }
        self.put(region, first, (bytes.len() / PAGE_BYTES) as u64, Source::Bytes(bytes), now)
    }

    /// As [`install`](Self::install), of pages that are zero.
    ///
    /// # Errors
    /// As there.
    pub fn install_zeros(
        &self,
        region: RegionId,
        first: u64,
        count: u64,
        now: Time,
    ) -> Result<Installed, PostcopyError> {
        self.put(region, first, count, Source::Zeros, now)
    }

    /// Makes the touch of pages that cannot be brought any more a signal (`SIGBUS`), which KVM passes on as a memory
    /// failure. They count as present.
    ///
    /// # Errors
    /// The kernel cannot do that (Linux 6.6), or as [`install`](Self::install).
    pub fn poison(&self, region: RegionId, first: u64, count: u64, now: Time) -> Result<Installed, PostcopyError> {
        let uffd = self.uffd()?;
        self.judge(region, first, count)?;
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let (mut installed, page_bytes) = (Installed::default(), self.page_bytes(region));
        for run in self.present.runs(self.places_of(region, first..first.saturating_add(count)), false) {
            for piece in self.pieces(region, &run) {
                let filled =
                    uffd.poison(piece.address..piece.address.saturating_add(piece.bytes), page_bytes, Wake::Now);
                if let Some(stop) = filled.stop {
                    return Err(error(stop));
                }
            }
            installed.pages = installed.pages.saturating_add(self.settle(run.clone()));
            self.done(region, &run, now, &mut installed.served);
        }
        installed.already = count.saturating_sub(installed.pages);
        Ok(installed)
    }

    fn judge(&self, region: RegionId, first: u64, count: u64) -> Result<u64, PostcopyError> {
        let unit = self.unit_pages(region);
        let pages = self.layout.region(region).map_or(0, Region::pages);
        let end = first.checked_add(count).filter(|end| *end <= pages);
        let end = end.ok_or(PostcopyError::Misuse("pages outside of their region"))?;
        if !first.is_multiple_of(unit) || !(end.is_multiple_of(unit) || end == pages) {
            return Err(PostcopyError::Misuse("no whole install units"));
        }
        Ok(unit)
    }

    fn put(
        &self,
        region: RegionId,
        first: u64,
        count: u64,
        source: Source<'_>,
        now: Time,
    ) -> Result<Installed, PostcopyError> {
        let uffd = self.uffd()?;
        let unit = self.judge(region, first, count)?;
        let mut installed = Installed::default();
        let (mut at, end) = (first, first.saturating_add(count));
        while at < end {
            let to = at.saturating_add(CHUNK_PAGES.max(unit)).min(end);
            let chunk = Chunk { region, pages: at..to, unit, source, source_first: first };
            self.put_chunk(uffd, &chunk, now, &mut installed)?;
            at = to;
        }
        let others = installed.pages.saturating_add(installed.elsewhere).saturating_add(installed.gone);
        installed.already = count.saturating_sub(others);
        Ok(installed)
    }

    fn put_chunk(
        &self,
        uffd: &Uffd,
        chunk: &Chunk<'_>,
        now: Time,
        installed: &mut Installed,
    ) -> Result<(), PostcopyError> {
        for attempt in 0..TRIES_MAX {
            match self.try_chunk(uffd, chunk, now, installed) {
                Ok(elsewhere) => {
                    installed.elsewhere = installed.elsewhere.saturating_add(elsewhere);
                    return Ok(());
                }
                Err(Stop::Changing) => self.read_messages(now)?,
                Err(stop) => return Err(error(stop)),
            }
            if attempt >= TRIES_AT_ONCE {
                // Who changes it waits for its message to be read, or to run again.
                let mut fds = [PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN)];
                match poll(&mut fds, Some(&PAUSE)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(failed("userfaultfd cannot be waited for")(error.into())),
                }
            }
        }
        Err(PostcopyError::Busy)
    }

    /// Gives how many of its pages another loader has.
    fn try_chunk(&self, uffd: &Uffd, chunk: &Chunk<'_>, now: Time, installed: &mut Installed) -> Result<u64, Stop> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let (claims, elsewhere) = self.claim(chunk);
        for units in neighbours(&claims.units) {
            for run in self.present.runs(units, false) {
                self.put_run(uffd, chunk, &run, now, installed)?;
            }
        }
        Ok(elsewhere)
    }

    /// Claims the units of a chunk that lack pages and are no other loader's.
    fn claim(&self, chunk: &Chunk<'_>) -> (Claims<'_>, u64) {
        let places = self.places_of(chunk.region, chunk.pages.clone());
        let mut claims = Claims { memory: self, units: Vec::new() };
        let mut elsewhere: u64 = 0;
        let mut start = places.start;
        while start < places.end {
            let unit = start..start.saturating_add(chunk.unit).min(places.end);
            start = unit.end;
            let lacking = self.present.runs(unit.clone(), false);
            if lacking.is_empty() {
                continue;
            }
            if self.claimed.insert(unit.start) {
                claims.units.push(unit);
            } else {
                let pages = lacking.iter().map(|run| run.end.saturating_sub(run.start));
                elsewhere = pages.fold(elsewhere, u64::saturating_add);
            }
        }
        (claims, elsewhere)
    }

    /// Puts in pages that are absent, by their places.
    fn put_run(
        &self,
        uffd: &Uffd,
        chunk: &Chunk<'_>,
        run: &Range<u64>,
        now: Time,
        installed: &mut Installed,
    ) -> Result<(), Stop> {
        let mut reached: u64 = 0;
        let mut stopped = None;
        for piece in self.pieces(chunk.region, run) {
            let filled = self.put_piece(uffd, chunk, &piece);
            let first = self.places_of(chunk.region, places::pages(&(piece.offset..piece.offset))).start;
            let end = first.saturating_add(filled.bytes().div_ceil(SMALL)).min(run.end);
            let settled = self.settle(first..end);
            reached = reached.saturating_add(settled);
            installed.pages = installed.pages.saturating_add(settled.min(filled.installed.div_ceil(SMALL)));
            self.done(chunk.region, &(first..end), now, &mut installed.served);
            match filled.stop {
                None => {}
                // Where the kernel sees no single mapping of the guest's, each page is tried alone.
                Some(Stop::RangeGone) => {
                    let rest = end..first.saturating_add(piece.bytes.div_ceil(SMALL)).min(run.end);
                    stopped = self.put_singly(uffd, chunk, &rest, now, installed).err();
                }
                Some(stop) => stopped = Some(stop),
            }
            if let Some(stop) = stopped {
                return Err(stop);
            }
        }
        // What is in no piece is unmapped, and settled by the message that said so, or will be.
        Ok(())
    }

    fn put_singly(
        &self,
        uffd: &Uffd,
        chunk: &Chunk<'_>,
        rest: &Range<u64>,
        now: Time,
        installed: &mut Installed,
    ) -> Result<(), Stop> {
        let step = self.page_bytes(chunk.region) / SMALL;
        let mut at = rest.start;
        while at < rest.end {
            let page = at..at.saturating_add(step).min(rest.end);
            at = page.end;
            for piece in self.pieces(chunk.region, &page) {
                let filled = self.put_piece(uffd, chunk, &piece);
                match filled.stop {
                    None => {
                        let settled = self.settle(page.clone());
                        installed.pages = installed.pages.saturating_add(settled.min(filled.installed / SMALL));
                    }
                    Some(Stop::RangeGone) => {
                        installed.gone = installed.gone.saturating_add(self.settle(page.clone()));
                    }
                    Some(stop) => return Err(stop),
                }
                self.done(chunk.region, &page, now, &mut installed.served);
            }
        }
        Ok(())
    }

    /// The pieces of absent pages, in whole pages of the kernel.
    fn pieces(&self, region: RegionId, run: &Range<u64>) -> Vec<places::Piece> {
        let start = self.all_places(region).start;
        let page = |place: u64| place.saturating_sub(start).saturating_mul(SMALL);
        let end = page(run.end).next_multiple_of(self.page_bytes(region));
        self.places().pieces(region, page(run.start)..end).collect()
    }

    fn put_piece(&self, uffd: &Uffd, chunk: &Chunk<'_>, piece: &places::Piece) -> Filled {
        let page_bytes = self.page_bytes(chunk.region);
        let Source::Bytes(bytes) = chunk.source else {
            return put_zeros(uffd, piece.address..piece.address.saturating_add(piece.bytes), page_bytes);
        };
        let from = size(piece.offset.saturating_sub(chunk.source_first.saturating_mul(SMALL)));
        let rest = bytes.get(from..).unwrap_or_default();
        match rest.get(..size(piece.bytes)) {
            Some(bytes) => uffd.copy(piece.address, bytes, page_bytes, Wake::Now),
            // The region ends inside a huge page, the rest of which is nobody's.
            None => {
                let mut padded = rest.to_vec();
                padded.resize(size(piece.bytes), 0);
                uffd.copy(piece.address, &padded, page_bytes, Wake::Now)
            }
        }
    }

    /// Nobody waits any more for units that are complete.
    fn done(&self, region: RegionId, places: &Range<u64>, now: Time, served: &mut Vec<Served>) {
        let (all, unit) = (self.all_places(region), self.unit_pages(region));
        let start = places.start.saturating_sub(places.start.saturating_sub(all.start) % unit);
        let mut faults = lock(&self.faults);
        for place in faults.waiting_in(start..places.end) {
            let end = place.saturating_add(unit).min(all.end);
            if self.present.runs(place..end, false).is_empty() {
                faults.done(place..end, now, served);
            }
        }
    }
}

/// Units as runs of places.
fn neighbours(units: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for unit in units {
        match runs.last_mut() {
            Some(last) if last.end == unit.start => last.end = unit.end,
            _ => runs.push(unit.clone()),
        }
    }
    runs
}

fn error(stop: Stop) -> PostcopyError {
    match stop {
        Stop::Changing => PostcopyError::Busy,
        Stop::ProcessGone => PostcopyError::ProcessGone,
        Stop::NoMemory => PostcopyError::NoMemory,
        Stop::RangeGone => failed("a page cannot be put in")(Errno::NOENT.into()),
        Stop::Refused(error) => failed("a page cannot be put in")(error.into()),
    }
}
