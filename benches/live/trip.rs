//! One move of a guest between two hosts of this process, over loopback TCP, with real journals and files.

use crate::guest::{Clock, Guest, Starter};
use crate::{Failure, millis};
use pagewire::{
    Address, CancellationToken, ImageName, Into, Journal, Limits, LiveOptions, NoObserver, Outcome, ReceiveOptions,
    Report, Round, SendOptions, Server, TakeOptions, send_live, send_live_memory,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Two hosts in folders that are made for them and removed again.
pub(crate) struct Hosts {
    dir: PathBuf,
    address: Address,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
    clock: Arc<Clock>,
    live: LiveOptions,
}

impl Hosts {
    /// Below `folder`: records and the arriving image.
    pub(crate) fn new(folder: &Path, limits: Limits) -> Result<Self, Failure> {
        let dir = folder.join(format!("pagewire-live-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("into"))?;
        let journal = |name: &str| Journal::open(&dir.join(name)).map(Arc::new);
        let clock = Arc::new(Clock::default());
        let starter = Arc::new(Starter(clock.clone()));
        let mut options = ReceiveOptions::new(Into::Folder(dir.join("into")));
        options.live = Some(TakeOptions { journal: journal("journal-b")?, lease: None, starter });
        let stop = options.cancel.clone();
        let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, options)?;
        let address = server.address()?;
        let thread = Some(std::thread::spawn(move || server.serve(|_| ())));
        let live = LiveOptions { limits, patience: Duration::from_secs(5), ..LiveOptions::new(journal("journal-a")?) };
        Ok(Self { dir, address, stop, thread, clock, live })
    }

    pub(crate) fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    /// Moves the guest: from `source` if it is in that file, else from memory with its dirty bitmap.
    pub(crate) fn send(
        &self,
        guest: &Guest,
        source: Option<&Path>,
        cancel: CancellationToken,
    ) -> Result<Outcome, Failure> {
        let hooks = guest.hooks(&self.clock).ok_or("the guest is gone")?;
        let options = SendOptions { cancel, ..SendOptions::default() };
        let (name, live) = (ImageName::new("vm")?, (&self.live, hooks));
        Ok(match source {
            Some(source) => send_live(source, &name, &self.address, &options, live, &mut NoObserver),
            None => send_live_memory(guest.memory()?, &name, &self.address, &options, live, &mut NoObserver),
        })
    }

    /// As [`send`](Self::send), and what it cost; the guest has arrived, all of it.
    pub(crate) fn travel(&self, guest: &Guest, source: Option<&Path>) -> Result<Trip, Failure> {
        let report = self.send(guest, source, CancellationToken::new())?.into_result()?;
        if !guest.is_at(&self.dir.join("into/vm"))? {
            return Err("what arrived is not what left".into());
        }
        let clock = &self.clock;
        let (paused, started) = (clock.paused.at().ok_or("no pause")?, clock.started.at().ok_or("no start")?);
        let (stands, prepared) = (clock.stands.at().unwrap_or(paused), clock.prepared.at().unwrap_or(started));
        Ok(Trip {
            downtime: millis(started - paused),
            busy: millis(clock.started.busy().saturating_sub(clock.stands.busy())),
            parts: [stands - paused, prepared - stands, started - prepared].map(millis),
            report,
        })
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.stop.cancel();
        self.thread.take().map(std::thread::JoinHandle::join);
        // What stays behind is in a folder that says whose it is.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// What a move cost.
pub(crate) struct Trip {
    pub(crate) report: Report,
    /// Milliseconds from the beginning of the pause until the guest's new host starts it.
    pub(crate) downtime: f64,
    /// Processor time of both hosts from when it stands still until then, in milliseconds: what a busy machine leaves as
    /// it is.
    pub(crate) busy: f64,
    /// Of the downtime until it stands still, until all of it lasts at its new host, and until it may start there.
    pub(crate) parts: [f64; 3],
}

impl Trip {
    fn rounds(&self) -> (&[Round], Round) {
        let (last, before) =
            self.report.rounds.split_last().map_or((Round::default(), &[][..]), |(last, all)| (*last, all));
        (before, last)
    }

    /// What the last round takes at the goodput of those before, in milliseconds.
    pub(crate) fn link_span(&self) -> f64 {
        let (before, last) = self.rounds();
        let (bytes, seconds) = before.iter().fold((0, 0.0), |sum, round| (sum.0 + round.bytes, sum.1 + round.seconds));
        last.bytes as f64 * seconds / (bytes as f64).max(1.0) * 1e3
    }

    pub(crate) fn last(&self) -> Round {
        self.rounds().1
    }

    /// The downtime that was predicted for the switchover, in milliseconds.
    pub(crate) fn predicted(&self) -> f64 {
        let seconds = self.rounds().0.last().and_then(|round| round.predicted_downtime_seconds);
        seconds.unwrap_or(f64::NAN) * 1e3
    }

    /// Bytes of all rounds.
    pub(crate) fn bytes(&self) -> f64 {
        self.report.rounds.iter().map(|round| round.bytes as f64).sum()
    }
}
