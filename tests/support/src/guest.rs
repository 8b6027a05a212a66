//! A guest that runs in virtual time: it writes to its memory in a pattern and at a rate, until it is paused.
//!
//! Its memory outlives every session that sends it, and so do its dirty bits: what an attempt that failed took and did
//! not give back would be missing from the next one.

use crate::image::{Image, Mix};
use crate::rng::Rng;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, Place, RegionId};
use pagewire_protocol::time::Time;
use pagewire_protocol::trace::TraceRecord;
use pagewire_sender::{GuestMemory, Trace, Tracking};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// Where a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere.
    Uniform,
    /// Nine writes of ten into a twentieth of its pages.
    HotSet,
    /// One page after the other, again and again.
    Sweeping,
    /// Anywhere, in the first tenth of each second.
    Bursts,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Uniform, Self::HotSet, Self::Sweeping, Self::Bursts];
}

/// What a guest is and does.
#[derive(Debug)]
pub struct GuestState {
    /// Its memory now.
    pub image: Image,
    /// What it had when it was paused last.
    pub frozen: Option<Image>,
    /// Written, and not harvested.
    pub dirty: PageBitmap,
    /// Writes are watched.
    pub tracked: bool,
    /// How many times it was paused, and let run again.
    pub turns: (u64, u64),
    /// In per cent.
    pub throttled: u8,
    /// Pages whose content does not matter until they are written.
    pub free: Option<PageBitmap>,
    /// Pages that were read.
    pub reads: u64,
    /// Harvests before the first that fails.
    pub fail_harvest_after: Option<u64>,
    /// While it runs, each read of several pages finds one of them half written.
    pub writes_under_reads: bool,
    /// Every content that a page has had, by its place, if that is to be kept.
    pub history: Option<Vec<(u64, Vec<u8>)>>,
    pattern: Pattern,
    tracking: Tracking,
    writes_a_second: u64,
    paused: bool,
    now: Time,
    /// Billionths of a write that are due.
    due: u64,
    cursor: u64,
    harvests: u64,
    rng: Rng,
}

/// What a session showed of a guest's writes.
#[derive(Clone, Debug, Default)]
pub struct TraceLog(Arc<Mutex<Vec<TraceRecord>>>);

impl TraceLog {
    /// The records so far.
    pub fn records(&self) -> Vec<TraceRecord> {
        self.0.lock().unwrap().clone()
    }
}

impl Trace for TraceLog {
    fn seen(&mut self, record: TraceRecord) {
        self.0.lock().unwrap().push(record);
    }
}

/// A guest, shared by the world and the session that sends it.
#[derive(Clone, Debug)]
pub struct Guest {
    layout: Layout,
    state: Arc<Mutex<GuestState>>,
}

impl Guest {
    /// A guest with this memory that writes so many pages a second.
    pub fn new(image: Image, pattern: Pattern, writes_a_second: u64, tracking: Tracking, seed: u64) -> Self {
        let state = GuestState {
            dirty: PageBitmap::new(image.pages()),
            frozen: None,
            tracked: false,
            turns: (0, 0),
            throttled: 0,
            free: None,
            reads: 0,
            fail_harvest_after: None,
            writes_under_reads: false,
            history: None,
            pattern,
            tracking,
            writes_a_second,
            paused: false,
            now: Time::ZERO,
            due: 0,
            cursor: 0,
            harvests: 0,
            rng: Rng::new(seed),
            image,
        };
        Self { layout: state.image.layout(), state: Arc::new(Mutex::new(state)) }
    }

    /// What it is and does.
    pub fn state(&self) -> MutexGuard<'_, GuestState> {
        self.state.lock().unwrap()
    }

    /// Lets it run until `now`.
    pub fn run_until(&self, now: Time) {
        self.state().run_until(now, &self.layout);
    }
}

impl GuestState {
    /// Whether it runs.
    pub fn runs(&self) -> bool {
        !self.paused
    }

    /// Stops it.
    pub fn pause(&mut self) {
        self.paused = true;
        self.turns.0 += 1;
        self.frozen = Some(self.image.clone());
    }

    /// Lets it run again, at full speed; nothing happens if it does.
    pub fn resume(&mut self) {
        self.throttled = 0;
        self.turns.1 += u64::from(self.paused);
        self.paused = false;
    }

    fn run_until(&mut self, now: Time, layout: &Layout) {
        let span = now.since(self.now).as_nanos();
        let busy = self.pattern != Pattern::Bursts || now.as_nanos() % 1_000_000_000 < 100_000_000;
        self.now = now;
        if self.paused || !busy {
            return;
        }
        let factor = if self.pattern == Pattern::Bursts { 10 } else { 1 };
        let rate = self.writes_a_second * factor * u64::from(100 - self.throttled.min(100)) / 100;
        self.due += rate.saturating_mul(span.min(10_000_000_000));
        let pages = self.image.pages();
        // More often than every page once is as good as every page once.
        let writes = (self.due / 1_000_000_000).min(pages);
        self.due %= 1_000_000_000;
        for _ in 0..writes {
            let hot = (pages / 20).max(1);
            let place = match self.pattern {
                Pattern::Uniform | Pattern::Bursts => self.rng.below(pages),
                Pattern::HotSet if self.rng.chance(90) => self.rng.below(hot),
                Pattern::HotSet => self.rng.below(pages),
                Pattern::Sweeping => {
                    self.cursor = (self.cursor + 1) % pages;
                    self.cursor
                }
            };
            let (region, page) = layout.locate(Place(place as u32));
            self.write(place, usize::from(region.0), page.0);
        }
    }

    fn write(&mut self, place: u64, region: usize, page: u64) {
        self.image.rewrite(region, page, Mix::MEMORY, &mut self.rng);
        if let Some(history) = &mut self.history {
            history.push((place, self.image.page(region, page).to_vec()));
        }
        if self.tracked {
            self.dirty.insert(place);
        }
        if let Some(free) = &mut self.free {
            free.remove(place);
        }
    }

    /// From now on every content of a page is kept.
    pub fn keep_history(&mut self) {
        let pages = self.image.bytes.iter().flat_map(|bytes| bytes.chunks(PAGE_BYTES));
        self.history = Some(pages.enumerate().map(|(place, page)| (place as u64, page.to_vec())).collect());
    }
}

impl GuestMemory for Guest {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (start, count) = (first as usize * PAGE_BYTES, (bytes.len() / PAGE_BYTES) as u64);
        let mut state = self.state();
        state.reads += count;
        bytes.copy_from_slice(&state.image.bytes[usize::from(region.0)][start..start + bytes.len()]);
        if state.writes_under_reads && state.runs() && count > 1 {
            let at = state.rng.below(count);
            let place = u64::from(self.layout.place(region, first + at).0);
            state.write(place, usize::from(region.0), first + at);
            let half = PAGE_BYTES / 2;
            let written = &state.image.page(usize::from(region.0), first + at)[half..];
            bytes[at as usize * PAGE_BYTES + half..][..half].copy_from_slice(written);
        }
        Ok(())
    }

    fn tracking(&self) -> Tracking {
        self.state().tracking
    }

    fn start_tracking(&mut self) -> io::Result<()> {
        self.state().tracked = true;
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        let mut state = self.state();
        state.harvests += 1;
        let pages = state.dirty.len();
        let taken = std::mem::replace(&mut state.dirty, PageBitmap::new(pages));
        if state.fail_harvest_after.is_some_and(|after| state.harvests > after) {
            return Err(io::Error::other("the dirty log is gone"));
        }
        dirty.insert_all(&taken);
        Ok(())
    }

    fn put_back(&mut self, dirty: &PageBitmap) {
        self.state().dirty.insert_all(dirty);
    }

    fn stop_tracking(&mut self) {
        self.state().tracked = false;
    }

    fn free_pages(&mut self) -> Option<PageBitmap> {
        self.state().free.clone()
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        panic!("a guest that runs is not asked whether it stood still")
    }
}
