//! One host: a folder with images, a store and a journal, the guests that run there, and a receiver on loopback TCP.

use super::running::Guest;
use anyhow::{Context, Result, anyhow};
use pagewire::store::{Store, StoreOptions};
use pagewire::{
    Address, AtLimit, Blobs, CancellationToken, GuestHooks, GuestStarter, ImageName, Into, Journal, LandingOptions,
    LiveOptions, NoObserver, PostCopy, ReceiveOptions, Report, Reuse, SendOptions, Server, ServerEvent, Started,
    TakeOptions, send_live,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A session that has not ended so long after its sender did, never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guests that run on a host.
#[derive(Debug)]
struct Guests {
    images: PathBuf,
    running: Mutex<BTreeMap<String, Arc<Guest>>>,
}

impl Guests {
    fn running(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Guest>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, name: &str) -> Result<()> {
        let guest = Guest::start(&self.images.join(name))?;
        self.running().insert(name.to_owned(), Arc::new(guest));
        Ok(())
    }
}

impl GuestStarter for Guests {
    fn prepare(&self, _name: &ImageName, _blobs: &Blobs) -> Result<(), String> {
        Ok(())
    }

    fn start(&self, started: &Started<'_>) -> Result<(), String> {
        self.start(started.name.as_str()).map_err(|error| format!("{error:#}"))
    }
}

/// A guest, as its session stops it.
struct Hooks(Arc<Guest>);

impl GuestHooks for Hooks {
    fn pause(&mut self) -> Result<Blobs, String> {
        self.0.pause();
        Ok(Blobs::new())
    }

    fn resume(&mut self) -> Result<(), String> {
        self.0.resume();
        Ok(())
    }
}

pub(super) struct Host {
    guests: Arc<Guests>,
    journal: Arc<Journal>,
    reuse: Reuse,
    address: Address,
    stop: CancellationToken,
    /// Of each session that ended here: what was wrong with it.
    ended: Mutex<Receiver<Option<String>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Host {
    pub(super) fn start(dir: &Path) -> Result<Self> {
        let images = dir.join("images");
        std::fs::create_dir_all(&images)?;
        let guests = Arc::new(Guests { images: images.clone(), running: Mutex::default() });
        let journal = Arc::new(Journal::open(&dir.join("journal"))?);
        let reuse = Reuse::new(Store::open(&dir.join("store"), StoreOptions::default())?);
        // In place: what a guest left here becomes its image again, and only what changed is written.
        let landing = LandingOptions { inplace: true, fresh: false };
        let starter = Arc::clone(&guests) as Arc<dyn GuestStarter>;
        let live = TakeOptions { journal: Arc::clone(&journal), lease: None, starter };
        let into = Into::Folder(images);
        let options =
            ReceiveOptions { landing, live: Some(live), reuse: Some(reuse.clone()), ..ReceiveOptions::new(into) };
        let stop = options.cancel.clone();
        let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, options)?;
        let address = server.address()?;
        let (tell, ended) = mpsc::channel();
        let told = move |event: ServerEvent<'_>| {
            if let ServerEvent::Ended { outcome, .. } = event {
                let error = outcome.error.as_ref().map(|error| pagewire::chain(error));
                let _ = tell.send(error.or_else(|| outcome.report.warnings.first().cloned()));
            }
        };
        let serve = move || server.serve(told);
        let thread = std::thread::Builder::new().name("pagewire-host".to_owned()).spawn(serve)?;
        Ok(Self { guests, journal, reuse, address, stop, ended: Mutex::new(ended), thread: Some(thread) })
    }

    pub(super) fn journal(&self) -> Arc<Journal> {
        Arc::clone(&self.journal)
    }

    pub(super) fn image(&self, guest: &str) -> PathBuf {
        self.guests.images.join(guest)
    }

    /// Starts a guest whose image is here.
    pub(super) fn boot(&self, guest: &str) -> Result<()> {
        self.guests.start(guest)
    }

    /// A guest that runs here.
    pub(super) fn guest(&self, guest: &str) -> Result<Arc<Guest>> {
        self.guests.running().get(guest).cloned().context("it does not run here")
    }

    /// Ends a guest that has left, and gives up its image.
    pub(super) fn forget(&self, guest: &str) -> Result<()> {
        self.guests.running().remove(guest);
        let image = self.image(guest);
        std::fs::remove_file(&image).with_context(|| image.display().to_string())
    }

    /// Sends a guest that runs here to another host.
    pub(super) fn send(&self, guest: &str, to: &Self, cancel: &CancellationToken) -> Result<Report> {
        self.send_by(guest, &to.address, (PostCopy::Never, Some(self.reuse.clone())), cancel)
    }

    /// Sends a guest that runs here to a host where it runs before any of its memory is there.
    pub(super) fn send_in_post_copy(&self, guest: &str, to: &Address, cancel: &CancellationToken) -> Result<Report> {
        self.send_by(guest, to, (PostCopy::Now, None), cancel)
    }

    fn send_by(
        &self,
        guest: &str,
        to: &Address,
        (post_copy, reuse): (PostCopy, Option<Reuse>),
        cancel: &CancellationToken,
    ) -> Result<Report> {
        let options = SendOptions {
            // On loopback pages are seldom compressed anyway; never, the bytes on the wire are those of the pages.
            compress: false,
            reuse,
            cancel: cancel.clone(),
            ..SendOptions::default()
        };
        let runs = self.guest(guest)?;
        let mut live = LiveOptions { post_copy, ..LiveOptions::new(Arc::clone(&self.journal)) };
        // A machine that is too slow for the downtime shows by how much.
        live.limits.at_limit = AtLimit::Force;
        live.writes = Some(runs.writes());
        let (image, name) = (self.image(guest), ImageName::new(guest)?);
        let hooks = Box::new(Hooks(runs));
        let outcome = send_live(&image, &name, to, &options, (&live, hooks), &mut NoObserver);
        let report = outcome.into_result()?;
        report.warnings.first().map_or(Ok(()), |warning| Err(anyhow!("{warning}")))?;
        Ok(report)
    }

    /// Waits until so many sessions have ended here and have kept what they keep.
    pub(super) fn settle(&self, sessions: usize) -> Result<()> {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..sessions {
            let trouble = ended.recv_timeout(PATIENCE).context("a receiver does not end")?;
            trouble.map_or(Ok(()), |trouble| Err(anyhow!("{trouble}")))?;
        }
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
        self.guests.running().clear();
    }
}
