//! Post-copy at the sender: what a guest lacks that runs at the receiver is brought, in as many sessions as it takes.

use crate::entropy::random;
use crate::error::{Error, ErrorKind};
use crate::journal::GuestJournal;
use crate::observe::{Event, Observer, Phase};
use crate::report::{Decision, Report};
use crate::send::SendOptions;
use pagewire_protocol::error::{GuestAt, PeerError, chain};
use pagewire_protocol::handover::{Message, Word};
use pagewire_protocol::tree::Manifest;
use pagewire_sender::driver::{FillSummary, Route, fill};
use pagewire_sender::fill::{FillConfig, Remainder};
use pagewire_sender::{ErrorKind as Failure, GuestMemory};
use pagewire_transport::Address;
use std::time::{Duration, Instant};

/// How long it is waited before the receiver is tried again: what broke is often back at once.
const TRY_FIRST: Duration = Duration::from_millis(20);
const TRY_LAST: Duration = Duration::from_secs(2);

/// When a guest may start at the receiver before all of its pages are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PostCopy {
    /// Never: it stands still until all of it is there.
    #[default]
    Never,
    /// When the rounds come to their limits and the downtime cannot be kept: then what is left follows.
    Auto,
    /// At once, before any of its pages goes.
    Now,
}

/// Brings all that the guest lacks, and gives what the image was; or says why not: the guest runs at the receiver then, and
/// the memory must be kept.
/// `filled` makes it durable that the memory is given up, and gives the word that says so.
pub(crate) fn bring<M: GuestMemory>(
    remainder: Remainder<M>,
    to: &Address,
    (options, background_limit, patience): (&SendOptions, Option<u64>, Duration),
    mut filled: impl FnMut() -> Result<Message, String>,
    (report, observer): (&mut Report, &mut dyn Observer),
) -> Result<Manifest, Error> {
    let (began, pages) = (Instant::now(), remainder.pages());
    let (mut left, mut until, mut pause) = (Some(remainder), began + patience, TRY_FIRST);
    let ended = report.seconds;
    report.faults.lacking = pages;
    observer.event(&Event::Phase { seconds: ended, phase: Phase::Filling { pages } });
    let why = loop {
        let Some(remainder) = left.take() else { break "its memory is gone".to_owned() };
        let config = match config(options, background_limit) {
            Ok(config) => config,
            Err(error) => break chain(&error),
        };
        let route = Route::Connect(to.clone());
        let observe = |progress: pagewire_transport::Progress| observer.event(&progress.into());
        let (summary, result, rest) = fill(remainder, config, route, &options.stop_by_hand(), &mut filled, observe);
        note(report, &summary);
        report.faults.seconds = began.elapsed().as_secs_f64();
        let error = match result {
            Ok(()) => {
                report.faults.lacking = 0;
                let seconds = ended + began.elapsed().as_secs_f64();
                observer.event(&Event::Phase { seconds, phase: Phase::Filled });
                return rest.map(Remainder::into_manifest).ok_or_else(|| split(pages, "its memory is gone".to_owned()));
            }
            Err(error) => error,
        };
        left = rest;
        // What the receiver itself ends is as if nothing had gone: it cannot put pages in, or its guest is lost.
        let refused = matches!(error, Failure::Peer(PeerError::Closed { .. }));
        if !refused && summary.counts != Default::default() {
            (until, pause) = (Instant::now() + patience, TRY_FIRST);
        }
        let last = matches!(error, Failure::Cancelled | Failure::Source(_)) || Instant::now() >= until;
        let what = format!("a session that fills the guest broke: {}", chain(&error));
        let decision = Decision { seconds: ended + began.elapsed().as_secs_f64(), what };
        observer.event(&Event::Decision(decision.clone()));
        report.decisions.push(decision);
        if let Failure::Handover(why) = error {
            // It has all: nothing but the record is missing, which was tried several times.
            report.faults.lacking = 0;
            return Err(Error { kind: ErrorKind::Unrecorded(why), guest_at: GuestAt::Receiver });
        }
        if last {
            break chain(&error);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(TRY_LAST);
    };
    Err(split(pages, why))
}

fn split(pages: u64, why: String) -> Error {
    Error { kind: ErrorKind::Sender(Failure::Split { pages, why }), guest_at: GuestAt::Receiver }
}

/// The word that the memory is given up, of all that follows for a guest that has all of its pages; or why it is not among
/// them.
pub(super) fn gone(said: impl IntoIterator<Item = Message>, guest: &GuestJournal) -> Result<Message, String> {
    let refused = || guest.owed().map_or_else(|| "the memory cannot be given up".to_owned(), |error| chain(error));
    said.into_iter().find(|message| message.word == Word::Gone).ok_or_else(refused)
}

fn config(options: &SendOptions, background_limit: Option<u64>) -> Result<FillConfig, ErrorKind> {
    Ok(FillConfig {
        session: random()?,
        nonce: random()?,
        lanes: options.lanes,
        compress: options.compress,
        // A core is left to whoever waits for a page.
        workers: options.workers().saturating_sub(1).max(1),
        bandwidth_limit: background_limit.or(options.bandwidth_limit),
        ..FillConfig::default()
    })
}

fn note(report: &mut Report, summary: &FillSummary) {
    let counts = summary.counts;
    report.faults.sessions += 1;
    report.faults.count += counts.faults;
    report.faults.remote += counts.faults;
    report.faults.prepaged += counts.prepaged;
    report.wire.sent_bytes += summary.wire.sent_bytes;
    report.wire.received_bytes += summary.wire.received_bytes;
    let seconds = report.seconds;
    let decisions = summary.decisions.iter().map(Decision::from);
    report.decisions.extend(decisions.map(|decision| Decision { seconds: seconds + decision.seconds, ..decision }));
}
