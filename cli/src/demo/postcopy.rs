//! A leg in post-copy: one guest runs on the other host at once, and its memory follows.
//!
//! There it is in memory of this process. It reads and writes here and there, and waits where a page has not come; in the
//! end all of it is compared.

use super::guest::{self, PAGE, Written, mixed, records, used};
use super::host::Host;
use super::say;
use anyhow::{Context, Result, anyhow, ensure};
use pagewire::{
    Backing, Blobs, CancellationToken, Faults, FaultsOf, GuestStarter, ImageName, InstallSize, Into, Layout,
    PageBitmap, PostcopyMemory, ReceiveOptions, Region, RegionId, Server, ServerEvent, Started, TakeOptions,
};
use serde::Serialize;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const MAIN: RegionId = RegionId(0);
/// Of the pages that it touches, one in so many it writes.
const WRITTEN_SHARE: u64 = 4;
/// What the guest does between two pages.
const THINKS: Duration = Duration::from_micros(20);
/// A receiver that has not told so long after the sender ended, never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// How one guest moved in post-copy.
#[derive(Debug, Serialize)]
pub(super) struct PostCopyLeg {
    pub(super) memory_bytes: u64,
    /// From its pause until it was the other host's, where it ran on.
    pub(super) downtime_seconds: f64,
    /// From then on until all of its memory was there.
    pub(super) seconds: f64,
    /// Pages that it touched meanwhile, each time counted.
    pub(super) touches: u64,
    /// What it waited for, how long, and by which way pages came.
    pub(super) faults: Faults,
}

/// Why there is no such leg on this system, if there is none.
pub(super) fn missing() -> Option<String> {
    let layout = Layout::new(vec![Region { bytes: PAGE as u64, install_size: InstallSize::KIB_4 }]).ok()?;
    let memory = PostcopyMemory::new(layout, Backing::Private).ok()?;
    memory.arm(&PageBitmap::full(1), FaultsOf::Programs).err().map(|error| pagewire::chain(&error))
}

/// The guest on the other host.
#[derive(Debug)]
struct Runs {
    memory: Arc<PostcopyMemory>,
    thread: JoinHandle<io::Result<(u64, Written)>>,
}

/// Starts it, and ends it when it has all of its memory.
#[derive(Debug, Default)]
struct Starts {
    runs: Mutex<Option<Runs>>,
    ends: Arc<AtomicBool>,
}

impl GuestStarter for Starts {
    fn prepare(&self, _name: &ImageName, _blobs: &Blobs) -> Result<(), String> {
        Ok(())
    }

    fn start(&self, started: &Started<'_>) -> Result<(), String> {
        let memory = Arc::clone(started.memory.ok_or("its memory cannot wait for pages")?);
        let (its, ends) = (Arc::clone(&memory), Arc::clone(&self.ends));
        let run = move || run(&its, &ends);
        let thread = std::thread::Builder::new().name("pagewire-guest".to_owned()).spawn(run);
        let thread = thread.map_err(|error| error.to_string())?;
        *self.runs.lock().unwrap_or_else(PoisonError::into_inner) = Some(Runs { memory, thread });
        Ok(())
    }
}

/// Touches pages in no order until it is told to end: how often, and what it wrote.
fn run(memory: &PostcopyMemory, ends: &AtomicBool) -> io::Result<(u64, Written)> {
    let pages = used(memory.layout().pages()).max(1);
    let (mut written, mut text, mut touches) = (Written::new(), Vec::with_capacity(PAGE), 0);
    while !ends.load(Ordering::Relaxed) {
        let page = mixed(0x9057, touches) % pages;
        let start = page.saturating_mul(PAGE as u64);
        memory.read(MAIN, start, &mut [0; 8])?;
        if touches % WRITTEN_SHARE == 0 {
            let content = mixed(touches, page);
            text.clear();
            records(content, &mut text);
            for (word, offset) in text.as_chunks::<8>().0.iter().zip((start..).step_by(8)) {
                memory.store(MAIN, offset, u64::from_ne_bytes(*word))?;
            }
            written.insert(page, content);
        }
        touches += 1;
        std::thread::sleep(THINKS);
    }
    Ok((touches, written))
}

/// All of a guest's memory, from the first page on.
struct Reading<'a>(&'a PostcopyMemory, u64);

impl Read for Reading<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.0.layout().bytes().saturating_sub(self.1);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let bytes = bytes.get_mut(..count).unwrap_or_default();
        self.0.read(MAIN, self.1, bytes)?;
        self.1 = self.1.saturating_add(count as u64);
        Ok(count)
    }
}

/// Moves `guest` from one host to the other in post-copy, and compares.
pub(super) fn leg(guest: &str, from: &Host, to: &Host, cancel: &CancellationToken) -> Result<PostCopyLeg> {
    let starts = Arc::new(Starts::default());
    let into = Into::PostCopy { backing: Backing::Private, faults_of: FaultsOf::Programs };
    let starter = Arc::clone(&starts) as Arc<dyn GuestStarter>;
    let live = TakeOptions { journal: to.journal(), lease: None, starter };
    let options = ReceiveOptions { live: Some(live), ..ReceiveOptions::new(into) };
    let stop = options.cancel.clone();
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, options)?;
    let address = server.address()?;
    let (tell, told) = mpsc::channel();
    let serving = std::thread::Builder::new()
        .name("pagewire-host".to_owned())
        .spawn(move || server.serve(move |event| pass(&event, &tell)))?;
    let sent = from.send_in_post_copy(guest, &address, cancel);
    starts.ends.store(true, Ordering::Relaxed);
    let faults = told.recv_timeout(if sent.is_ok() { PATIENCE } else { Duration::ZERO });
    stop.cancel();
    let served = serving.join().map_err(|_| anyhow!("the receiver panicked"));
    let report = sent?;
    served?;
    let runs = starts.runs.lock().unwrap_or_else(PoisonError::into_inner).take().context("it was not started")?;
    let (touches, written) = runs.thread.join().map_err(|_| anyhow!("the guest panicked"))??;
    ensure!(runs.memory.absent_pages() == 0, "pages are lacking");
    let image = from.image(guest);
    let left = std::fs::File::open(&image).with_context(|| image.display().to_string())?;
    let names = (image.display().to_string(), format!("{guest} on B"));
    guest::compare_readers((left, Reading(&runs.memory, 0)), (&names.0, &names.1), &written, cancel)?;
    let faults = faults.context("the receiver does not tell")?;
    let (memory_bytes, downtime_seconds, seconds) =
        (report.bytes_total, report.downtime_seconds, report.faults.seconds);
    Ok(PostCopyLeg { memory_bytes, downtime_seconds, seconds, touches, faults })
}

/// Passes on what sessions that fill the guest counted.
fn pass(event: &ServerEvent<'_>, tell: &Sender<Faults>) {
    if let ServerEvent::Ended { outcome, .. } = event {
        let faults = &outcome.report.faults;
        if let Some(error) = &outcome.error {
            say(&format!("post-copy: {}", pagewire::chain(error)));
        } else if faults.lacking == 0 {
            let _ = tell.send(faults.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put in while it runs is what it reads: a page of other bytes is found.
    #[test]
    fn memory_is_read_to_its_end_and_compared() {
        let bytes = 3 * PAGE as u64 - 100;
        let layout = Layout::new(vec![Region { bytes, install_size: InstallSize::KIB_4 }]).unwrap();
        let memory = PostcopyMemory::new(layout, Backing::Private).unwrap();
        let mut all = Vec::new();
        Reading(&memory, 0).read_to_end(&mut all).unwrap();
        assert_eq!(all, vec![0; 3 * PAGE - 100]);
        let cancel = CancellationToken::new();
        let compare = || guest::compare_readers((&*all, Reading(&memory, 0)), ("a", "b"), &Written::new(), &cancel);
        compare().unwrap();
        memory.store(MAIN, 2 * PAGE as u64, 7).unwrap();
        assert!(compare().unwrap_err().to_string().starts_with("page 2 of b"));
    }
}
