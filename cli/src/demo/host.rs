//! One host: a folder with images and a store, and a receiver on loopback TCP.

use anyhow::{Context, Result, anyhow};
use pagewire::store::{Store, StoreOptions};
use pagewire::{
    Address, CancellationToken, ImageName, Into, LandingOptions, NoObserver, ReceiveOptions, Report, Reuse,
    SendOptions, Server, ServerEvent, send,
};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A session that has not ended so long after its sender did, never will.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Host {
    images: PathBuf,
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
        let reuse = Reuse::new(Store::open(&dir.join("store"), StoreOptions::default())?);
        // In place: what a guest left here becomes its image again, and only what changed is written.
        let landing = LandingOptions { inplace: true, fresh: false };
        let into = Into::Folder(images.clone());
        let options = ReceiveOptions { landing, reuse: Some(reuse.clone()), ..ReceiveOptions::new(into) };
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
        Ok(Self { images, reuse, address, stop, ended: Mutex::new(ended), thread: Some(thread) })
    }

    pub(super) fn image(&self, guest: &str) -> PathBuf {
        self.images.join(guest)
    }

    /// Sends a guest of this host to another one.
    pub(super) fn send(&self, guest: &str, to: &Self, cancel: &CancellationToken) -> Result<Report> {
        let options = SendOptions {
            // On loopback pages are seldom compressed anyway; never, the bytes on the wire are those of the pages.
            compress: false,
            reuse: Some(self.reuse.clone()),
            cancel: cancel.clone(),
            ..SendOptions::default()
        };
        let outcome = send(&self.image(guest), &ImageName::new(guest)?, &to.address, &options, &mut NoObserver);
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
    }
}
