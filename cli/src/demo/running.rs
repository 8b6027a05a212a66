//! A guest that runs: it writes to its memory, here and there, until it is paused.
//!
//! It knows what it wrote. So its memory can be compared while it runs on, and it tells which pages were written as a
//! hypervisor with a dirty log does.

use super::guest::{self, PAGE, Written, mixed, records, used};
use anyhow::{Result, anyhow, ensure};
use pagewire::{CancellationToken, DirtyBitmap, InstallSize, Layout, PageBitmap, Region};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// In a second it writes one page in so many of those in use,
const BUSY_SHARE: u64 = 50;
/// and so many at least.
const BUSY_MIN: u64 = 20;
/// All of these are of its working set: so many per cent of the pages in use. [`Guest::work`] writes them all.
const WORKING_PERCENT: u64 = 20;
/// It does not wake up more often, however many pages that makes.
const TURN: Duration = Duration::from_millis(10);
/// Guests that were started: none writes what another one wrote.
static STARTS: AtomicU64 = AtomicU64::new(1);

/// A guest that was started and has not ended.
#[derive(Debug)]
pub(super) struct Guest {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    file: File,
    pages: u64,
    seed: u64,
    dirty: DirtyBitmap,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    paused: bool,
    ends: bool,
    writes: u64,
    written: Written,
    failed: Option<std::io::Error>,
}

impl Guest {
    /// Starts the guest whose memory is the file at `path`.
    pub(super) fn start(path: &Path) -> Result<Self> {
        let file = File::options().write(true).open(path)?;
        let bytes = file.metadata()?.len();
        let layout = Layout::new(vec![Region { bytes, install_size: InstallSize::KIB_4 }])?;
        let shared = Arc::new(Shared {
            path: path.to_path_buf(),
            file,
            pages: layout.pages(),
            seed: !(STARTS.fetch_add(1, Ordering::Relaxed) << 40),
            dirty: DirtyBitmap::new(&layout),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        // A guest that is moved at once has written something, however busy the machine is.
        shared.working_page(0).map_or(Ok(()), |page| shared.write(page))?;
        let its = Arc::clone(&shared);
        let run = move || its.run().unwrap_or_else(|error| its.lock().failed = Some(error));
        let thread = std::thread::Builder::new().name("pagewire-guest".to_owned()).spawn(run)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Which pages it writes from here on.
    pub(super) fn writes(&self) -> DirtyBitmap {
        self.shared.dirty.take(&mut PageBitmap::new(self.shared.pages));
        self.shared.dirty.clone()
    }

    /// It is busy for a while: beside what it does anyway it writes `percent` of its pages in use anew, its working set
    /// among them.
    pub(super) fn work(&self, percent: u64, cancel: &CancellationToken) -> Result<()> {
        for page in (0..used(self.shared.pages)).filter(|page| self.shared.is_among(*page, percent)) {
            ensure!(!cancel.is_cancelled(), "stopped");
            self.shared.write(page)?;
        }
        Ok(())
    }

    /// It stands still when this returns.
    pub(super) fn pause(&self) {
        self.shared.lock().paused = true;
    }

    pub(super) fn resume(&self) {
        self.shared.lock().paused = false;
        self.shared.changed.notify_all();
    }

    /// Pages that it has written since it was started.
    pub(super) fn rewritten(&self) -> u64 {
        self.shared.lock().written.len() as u64
    }

    /// Its memory is that of the image `left` at the host that it came from, but for what it has written since: it is
    /// stopped to see that.
    ///
    /// # Errors
    /// It is not, or the guest could not write.
    pub(super) fn compare(&self, left: &Path, cancel: &CancellationToken) -> Result<()> {
        let state = self.shared.lock();
        if let Some(error) = &state.failed {
            return Err(anyhow!("the guest cannot write to {}: {error}", self.shared.path.display()));
        }
        guest::compare(left, &self.shared.path, &state.written, cancel)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) -> std::io::Result<()> {
        let rate = (used(self.pages) / BUSY_SHARE).max(BUSY_MIN);
        let turn = TURN.max(Duration::from_secs(1) / u32::try_from(rate).unwrap_or(u32::MAX));
        let (begin, mut done) = (Instant::now(), 1);
        loop {
            let state = self.lock();
            let ends = |state: &mut State| !state.ends;
            let (state, _) = self.changed.wait_timeout_while(state, turn, ends).unwrap_or_else(PoisonError::into_inner);
            if state.ends {
                return Ok(());
            }
            drop(state);
            // What it missed while it stood still it does not make up for.
            let due = (begin.elapsed().as_secs_f64() * rate as f64).min(u64::MAX as f64);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
            let due = due as u64;
            let writes = done..due.min(done + rate);
            writes.filter_map(|write| self.working_page(write)).try_for_each(|page| self.write(page))?;
            done = due.max(done);
        }
    }

    /// Whether a page is of those `percent` that are in the way of this guest.
    fn is_among(&self, page: u64, percent: u64) -> bool {
        mixed(self.seed, page) % 100 < percent
    }

    /// Some page of the working set.
    fn working_page(&self, write: u64) -> Option<u64> {
        let any = |attempt: u64| mixed(!self.seed, write << 8 | attempt) % used(self.pages).max(1);
        (0..256).map(any).find(|page| self.is_among(*page, WORKING_PERCENT))
    }

    /// Writes a page, which nothing else does while it is being written, and marks it; waits while the guest is paused.
    fn write(&self, page: u64) -> std::io::Result<()> {
        let stands = |state: &mut State| state.paused && !state.ends;
        let mut state = self.changed.wait_while(self.lock(), stands).unwrap_or_else(PoisonError::into_inner);
        if state.paused {
            return Ok(());
        }
        state.writes += 1;
        let content = mixed(self.seed, state.writes << 32 | page);
        let mut text = Vec::with_capacity(PAGE);
        records(content, &mut text);
        self.file.write_all_at(&text, page.saturating_mul(PAGE as u64))?;
        self.dirty.mark(page..page + 1);
        state.written.insert(page, content);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 1000;

    #[test]
    fn writes_until_it_is_paused_and_knows_what() {
        let dir = tempfile::tempdir().unwrap();
        let (left, right, cancel) = (dir.path().join("left"), dir.path().join("right"), CancellationToken::new());
        for path in [&left, &right] {
            guest::create(path, PAGES, 7, &cancel).unwrap();
        }
        let guest = Guest::start(&right).unwrap();
        let writes = guest.writes();
        let begin = Instant::now();
        while guest.rewritten() < 20 {
            assert!(begin.elapsed() < Duration::from_secs(20), "it writes by itself");
            std::thread::sleep(TURN);
        }
        guest.work(20, &cancel).unwrap();
        assert!((150..230).contains(&guest.rewritten()), "what it writes by itself is among that");
        guest.compare(&left, &cancel).unwrap();
        guest.pause();
        let (before, bytes) = (guest.rewritten(), std::fs::read(&right).unwrap());
        std::thread::sleep(10 * TURN);
        assert!(guest.rewritten() == before && std::fs::read(&right).unwrap() == bytes, "it stands still");
        let mut marked = PageBitmap::new(PAGES);
        writes.take(&mut marked);
        assert_eq!(marked.count(), before, "each page that it wrote is marked");
        // Somebody else wrote.
        let page = (0..PAGES).find(|page| !marked.contains(*page)).unwrap();
        File::options().write(true).open(&right).unwrap().write_all_at(b"?", page * PAGE as u64).unwrap();
        assert!(guest.compare(&left, &cancel).unwrap_err().to_string().starts_with(&format!("page {page} of")));
        let bytes = std::fs::read(&right).unwrap();
        guest.resume();
        let begin = Instant::now();
        while std::fs::read(&right).unwrap() == bytes {
            assert!(begin.elapsed() < Duration::from_secs(20), "it runs on");
            std::thread::sleep(TURN);
        }
        guest.pause();
        drop(guest);
    }
}
