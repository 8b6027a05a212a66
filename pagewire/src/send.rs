//! Sends an image to a receiver.

use crate::entropy::random;
use crate::error::{Error, ErrorKind};
use crate::live::{GuestHooks, LiveOptions, bring, give};
use crate::observe::{Event, Observer};
use crate::report::{Decision, ImageId, Outcome, Pages, Report, ReuseCounts, Role, Round};
use crate::reuse::{Departed, Departure, Reuse, keep_departed};
use crate::trace::Recording;
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::page::{InstallSize, Layout};
use pagewire_sender::driver::{Cargo, GuestControl, Notice, Route, Stop, Summary};
use pagewire_sender::memory::{BitmapMemory, FileMemory};
use pagewire_sender::{GuestMemory, SenderConfig, Trace};
use pagewire_transport::{Address, CancellationToken, Progress};
use std::io;
use std::path::Path;
use std::time::Duration;

/// How to send.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// Bulk lanes to ask for, 1 to 8.
    pub lanes: u8,
    /// What the receiver installs at once.
    pub install_size: InstallSize,
    /// Ask the receiver to ignore what it has.
    pub fresh: bool,
    /// Send what is there twice once.
    pub dedup: bool,
    /// Compress where it pays.
    pub compress: bool,
    /// Bytes a second at most.
    pub bandwidth_limit: Option<u64>,
    /// Allow an unencrypted transfer over a network.
    pub insecure_plaintext: bool,
    /// Give up after this long.
    pub deadline: Option<Duration>,
    /// Build on what is kept of the guest, and keep it when it has left. Used on local links alone until others are
    /// authenticated.
    pub reuse: Option<Reuse>,
    /// Stops the transfer.
    pub cancel: CancellationToken,
}

impl Default for SendOptions {
    fn default() -> Self {
        Self {
            lanes: 1,
            install_size: InstallSize::KIB_4,
            fresh: false,
            dedup: true,
            compress: true,
            bandwidth_limit: None,
            insecure_plaintext: false,
            deadline: None,
            reuse: None,
            cancel: CancellationToken::new(),
        }
    }
}

impl SendOptions {
    pub(crate) fn config(&self, name: ImageName) -> Result<SenderConfig, ErrorKind> {
        Ok(SenderConfig {
            session: random()?,
            nonce: random()?,
            seed: u64::from_le_bytes(random()?),
            lanes: self.lanes,
            fresh: self.fresh,
            dedup: self.dedup,
            compress: self.compress,
            workers: self.workers(),
            bandwidth_limit: self.bandwidth_limit,
            ..SenderConfig::new(name)
        })
    }

    pub(crate) fn workers(&self) -> usize {
        std::thread::available_parallelism().map_or(1, |cores| cores.get().min(WORKERS_MAX))
    }

    /// What stops a session once the guest has left: no time that passes.
    pub(crate) fn stop_by_hand(&self) -> Stop {
        Stop { cancel: self.cancel.clone(), deadline: None }
    }

    pub(crate) fn stop(&self) -> Stop {
        Stop { cancel: self.cancel.clone(), deadline: self.deadline }
    }
}

/// Threads that compress for one session at most: four fill 10 Gbit/s, and other guests need cores too.
const WORKERS_MAX: usize = 4;

/// Sends the image in the file `source` as `name` to the receiver at `to`. Blocks until it is there, verified and
/// lasting, or failed; the report says what was done either way.
pub fn send(
    source: &Path,
    name: &ImageName,
    to: &Address,
    options: &SendOptions,
    observer: &mut dyn Observer,
) -> Outcome {
    match FileMemory::open(source, options.install_size) {
        Ok(memory) => {
            let source = Some(source);
            send_from(Sent { memory, source, guest: None }, name, to, options, observer)
        }
        Err(error) => unreadable(source, error, name),
    }
}

fn unreadable(source: &Path, error: io::Error, name: &ImageName) -> Outcome {
    let kind = ErrorKind::Source { path: source.to_path_buf(), source: error };
    Report::new(Role::Sender, name.to_string()).close(Some(kind.at_sender()))
}

/// Sends a guest that runs, whose memory is the file `source` that something keeps writing to, and hands it over.
///
/// Unless [`LiveOptions::writes`] tells which pages change, each round reads all of the file again. Blocks until the guest is the receiver's, or it failed; the report and the error say
/// where the guest is then.
pub fn send_live(
    source: &Path,
    name: &ImageName,
    to: &Address,
    options: &SendOptions,
    (live, hooks): (&LiveOptions, Box<dyn GuestHooks>),
    observer: &mut dyn Observer,
) -> Outcome {
    let (path, guest) = (Some(source), Some((live, hooks)));
    let memory = FileMemory::open_live(source, options.install_size);
    let Some(writes) = &live.writes else {
        return match memory {
            Ok(memory) => send_from(Sent { memory, source: path, guest }, name, to, options, observer),
            Err(error) => unreadable(source, error, name),
        };
    };
    match memory.and_then(|memory| BitmapMemory::over(memory, writes.clone())) {
        Ok(memory) => send_from(Sent { memory, source: path, guest }, name, to, options, observer),
        Err(error) => unreadable(source, error, name),
    }
}

/// As [`send_live`], for memory of any kind.
pub fn send_live_memory<M: GuestMemory>(
    memory: M,
    name: &ImageName,
    to: &Address,
    options: &SendOptions,
    (live, hooks): (&LiveOptions, Box<dyn GuestHooks>),
    observer: &mut dyn Observer,
) -> Outcome {
    send_from(Sent { memory, source: None, guest: Some((live, hooks)) }, name, to, options, observer)
}

/// What is sent.
pub(crate) struct Sent<'a, M> {
    pub(crate) memory: M,
    /// The file that the memory is in, if it is in one.
    pub(crate) source: Option<&'a Path>,
    /// The guest, if it runs.
    pub(crate) guest: Option<(&'a LiveOptions, Box<dyn GuestHooks>)>,
}

/// As [`send`], for memory of any kind. Of what leaves only the manifest is kept: the pages are the caller's.
pub fn send_memory<M: GuestMemory>(
    memory: M,
    name: &ImageName,
    to: &Address,
    options: &SendOptions,
    observer: &mut dyn Observer,
) -> Outcome {
    send_from(Sent { memory, source: None, guest: None }, name, to, options, observer)
}

fn send_from<M: GuestMemory>(
    sent: Sent<'_, M>,
    name: &ImageName,
    to: &Address,
    options: &SendOptions,
    observer: &mut dyn Observer,
) -> Outcome {
    match check_plaintext(to, options.insecure_plaintext) {
        Ok(()) => run(sent, name, Route::Connect(to.clone()), options, observer),
        Err(kind) => Report::new(Role::Sender, name.to_string()).close(Some(kind.at_sender())),
    }
}

/// Memory leaves this host unencrypted only if somebody said so.
pub(crate) fn check_plaintext(address: &Address, allowed: bool) -> Result<(), ErrorKind> {
    if allowed || address.is_local()? { Ok(()) } else { Err(ErrorKind::Plaintext(address.to_string())) }
}

/// Runs the sender over a route and makes the report.
pub(crate) fn run<M: GuestMemory>(
    Sent { memory, source, guest }: Sent<'_, M>,
    name: &ImageName,
    route: Route,
    options: &SendOptions,
    observer: &mut dyn Observer,
) -> Outcome {
    let mut report = Report::new(Role::Sender, name.to_string());
    (report.bytes_total, report.pages_total) = (memory.layout().bytes(), memory.layout().pages());
    let (bytes_total, pages_total) = (report.bytes_total, report.pages_total);
    observer.event(&Event::Started { bytes_total, pages_total });
    let single_stream = matches!(route, Route::Over(_));
    let reuse = reuse_for(options, &route, &mut report);
    let departure = match reuse {
        Some(reuse) => Departure::of(reuse, name, memory.layout(), &mut report),
        None => Departure::unknown(),
    };
    let Departure { lineage, bases } = departure;
    let config = match options.config(name.clone()) {
        Ok(config) => SenderConfig { single_stream, domain_key: lineage.key, lineage: lineage.id, ..config },
        Err(kind) => return report.close(Some(kind.at_sender())),
    };
    let (session, stop) = (config.session, options.stop());
    let to = if let Route::Connect(to) = &route { Some(to.clone()) } else { None };
    let shares_host = to.as_ref().is_none_or(|to| to.is_local().unwrap_or(false));
    let config = SenderConfig { shares_host, ..config };
    let live = guest.as_ref().map(|(live, _)| *live);
    let giving = match guest.map(|(live, hooks)| give(name, &lineage, session, live, hooks)).transpose() {
        Ok(giving) => giving,
        Err(error) => return report.close(Some(error)),
    };
    let (giving, config) = match giving {
        Some((giving, live)) => (Some(giving), SenderConfig { live: Some(live), ..config }),
        None => (None, config),
    };
    let (recording, trace) = record(live, memory.layout(), &mut report).unzip();
    let control = giving.clone().map(|giving| Box::new(giving) as Box<dyn GuestControl>);
    let (summary, result, remainder) =
        pagewire_sender::driver::send(Cargo { memory, bases, control, trace }, config, route, &stop, |notice| {
            observer.event(&match notice {
                Notice::Progress(progress) => Progress { pages_total, ..progress }.into(),
                notice => notice.into(),
            });
        });
    fill(&mut report, &summary, live.is_some());
    let mut manifest = summary.manifest.clone();
    let error = match (giving, live) {
        (Some(giving), Some(live)) => {
            let result = result.map_err(|error| error.kind);
            let ended = giving.end(result, (to.as_ref(), live), session, (&mut report, observer));
            match (remainder.filter(|_| giving.is_serving()), &to) {
                (Some(remainder), Some(to)) => {
                    let with = (options, live.background_limit, live.patience);
                    let brought = bring(remainder, to, with, || giving.filled(), (&mut report, observer));
                    manifest = brought.as_ref().ok().cloned();
                    brought.err()
                }
                _ => ended,
            }
        }
        _ => result.err().map(Error::from),
    };
    report.warnings.extend(recording.and_then(Recording::end));
    report.image = manifest.as_ref().map(|manifest| ImageId { root: manifest.root.0, session });
    if let (Some(reuse), Some(manifest)) = (reuse.filter(|_| lineage.key != [0; 32]), &manifest) {
        let departed = Departed { name, session, manifest, source, hot: summary.hot.as_ref() };
        keep_departed(reuse, lineage, &departed, &mut report);
    }
    report.close(error)
}

/// The store, if the session may use it.
fn reuse_for<'a>(options: &'a SendOptions, route: &Route, report: &mut Report) -> Option<&'a Reuse> {
    let reuse = options.reuse.as_ref()?;
    // SPEC 4.10: no link is authenticated yet, so on others than local ones the domain stays the public one.
    let local = matches!(route, Route::Connect(to) if to.is_local().unwrap_or(false));
    if !local {
        report.warnings.push("the store is not used: the link is neither local nor authenticated".to_owned());
    }
    Some(reuse).filter(|_| local)
}

/// The trace that a live session was asked for; without one it goes on all the same.
fn record(live: Option<&LiveOptions>, layout: &Layout, report: &mut Report) -> Option<(Recording, Box<dyn Trace>)> {
    let begun = Recording::begin(live?.trace.as_deref()?, layout);
    begun.map_err(|why| report.warnings.push(why)).ok()
}

/// A guest that runs has the rounds that were finished, memory at rest has one.
fn fill(report: &mut Report, summary: &Summary, runs: bool) {
    let counts = summary.counts;
    report.seconds = summary.spent.as_secs_f64();
    report.pages = Pages::new([counts.zero, counts.base, counts.reference, counts.inline, counts.delta]);
    report.wants = counts.wants;
    report.reuse = ReuseCounts { unread: counts.unread, sampled: counts.sampled, ..ReuseCounts::default() };
    report.wire = summary.wire.into();
    report.rounds = if summary.rounds.is_empty() && !runs {
        let (pages, seconds) = (report.pages.total(), report.seconds);
        vec![Round { pages, bytes: summary.wire.sent_bytes, seconds, ..Round::default() }]
    } else {
        summary.rounds.iter().map(Round::from).collect()
    };
    report.decisions = summary.decisions.iter().map(Decision::from).collect();
}
