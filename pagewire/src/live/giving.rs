//! The sender's side: the guest's hooks and its journal behind one control, which outlives the session.

use super::bringing::gone;
use super::{ASK_EVERY, Arbiter, GuestHooks, LiveOptions, Operator, PostCopy, lineage_of};
use crate::entropy::random;
use crate::error::{Error, ErrorKind};
use crate::journal::{GuestJournal, Journal};
use crate::observe::{Event, Observer, Phase};
use crate::report::{Decision, Report};
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::error::{GuestAt, chain};
use pagewire_protocol::frame::{ImageName, LiveOpen};
use pagewire_protocol::handover::{Handover, HostId, Input, Message, Output, Whereabouts, Word};
use pagewire_sender::converge::AtLimit;
use pagewire_sender::driver::{Action, GuestControl, ask};
use pagewire_sender::{ErrorKind as Failure, Live};
use pagewire_store::Lineage;
use pagewire_transport::Address;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The guest's side of a live session.
struct Holding {
    hooks: Box<dyn GuestHooks>,
    journal: GuestJournal,
    host: HostId,
    lease: Option<Arc<dyn Arbiter>>,
    operator: Option<Arc<dyn Operator>>,
    /// Since when he is asked.
    asked: Option<Instant>,
    /// When he said what.
    word: Option<(Instant, String)>,
    /// By how many per cent the guest is slowed down.
    throttled: u8,
    handover: Option<Handover>,
    paused: Option<Instant>,
    downtime: Option<Duration>,
    released: bool,
    /// Why it ends, for what follows from a word or a time.
    why: Option<Failure>,
    warnings: Vec<String>,
}

/// What is shared by the session and by who waits for its end.
#[derive(Clone)]
pub(crate) struct Giving(Arc<Mutex<Holding>>);

/// Opens a live session: the hand-over that it will end with.
pub(crate) fn give(
    name: &ImageName,
    lineage: &Lineage,
    session: [u8; 16],
    options: &LiveOptions,
    hooks: Box<dyn GuestHooks>,
) -> Result<(Giving, Live), Error> {
    let (guest, mut journal) = restore(name, lineage.id, &options.journal).map_err(ErrorKind::at_sender)?;
    let epoch = journal.open(session).map_err(|refusal| {
        let guest_at = match journal.handovers().whereabouts() {
            Whereabouts::There | Whereabouts::Serving => GuestAt::Receiver,
            Whereabouts::InDoubt => GuestAt::InDoubt,
            Whereabouts::Here | Whereabouts::Filling | Whereabouts::Lost | Whereabouts::Unrecorded => GuestAt::Sender,
        };
        Error { kind: ErrorKind::Sender(Failure::Handover(format!("guest {name}: {refusal}"))), guest_at }
    })?;
    if options.post_copy != PostCopy::Never && lineage.key != [0; 32] {
        // Before anything can depend on it: what is left behind may be brought by a process that knows the records alone.
        journal.keep_key(session, lineage).map_err(|error| ErrorKind::Journal(error).at_sender())?;
    }
    let host = options.journal.host();
    let handover = LiveOpen {
        guest,
        epoch,
        host,
        arbiter: options.lease.is_some(),
        post_copy: options.post_copy != PostCopy::Never,
    };
    let mut limits = options.limits;
    limits.throttles = hooks.throttles();
    if options.post_copy == PostCopy::Auto {
        limits.at_limit = AtLimit::PostCopy;
    }
    let holding = Holding {
        hooks,
        journal,
        host,
        lease: options.lease.clone(),
        operator: options.pause_before_switchover.clone(),
        asked: None,
        word: None,
        throttled: 0,
        handover: None,
        paused: None,
        downtime: None,
        released: false,
        why: None,
        warnings: Vec::new(),
    };
    Ok((Giving(Arc::new(Mutex::new(holding))), Live { limits, handover, at_once: options.post_copy == PostCopy::Now }))
}

/// The guest that is called `name` here, and what is recorded of it.
fn restore(name: &ImageName, lineage: LineageId, journal: &Journal) -> Result<(LineageId, GuestJournal), ErrorKind> {
    let guest = match lineage_of(journal, name)? {
        Some(known) => known,
        None if lineage.0 != [0; 16] => lineage,
        None => LineageId(random()?),
    };
    Ok((guest, journal.guest(guest, Some(name), true)?))
}

impl Giving {
    fn holding(&self) -> MutexGuard<'_, Holding> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest is the receiver's and lacks pages: that is known, and nothing more is said of it yet.
    pub(crate) fn is_serving(&self) -> bool {
        self.holding().journal.serving().is_some()
    }

    /// The receiver has all of the guest: that is made durable, and this word says so.
    pub(crate) fn filled(&self) -> Result<Message, String> {
        let mut holding = self.holding();
        let Some(handover) = holding.handover else { return Err("there is no hand-over".to_owned()) };
        let said = holding.follow_up(Input::Filled(handover));
        gone(said, &holding.journal)
    }

    /// The session is over: what became of the guest. A receiver that owes an answer is asked for it.
    pub(crate) fn end(
        &self,
        result: Result<(), Failure>,
        (to, options): (Option<&Address>, &LiveOptions),
        session: [u8; 16],
        (report, observer): (&mut Report, &mut dyn Observer),
    ) -> Option<Error> {
        let mut holding = self.holding();
        let (began, ended) = (Instant::now(), report.seconds);
        let mut tell = |phase| {
            let seconds = ended + began.elapsed().as_secs_f64();
            observer.event(&Event::Phase { seconds, phase });
        };
        if let Some((at, what)) = holding.word.take() {
            let seconds = (ended - began.saturating_duration_since(at).as_secs_f64()).max(0.0);
            report.decisions.push(Decision { seconds, what });
        }
        holding.journal.close(session);
        let mut kind = result.err();
        if kind.is_some() && holding.handover.is_some() && !holding.released {
            holding.settle(to, began + options.patience, &mut tell);
        }
        if holding.throttled > 0 {
            holding.throttle(0);
            tell(Phase::Throttled { percent: 0 });
        }
        report.downtime_seconds = holding.downtime.map_or(0.0, |downtime| downtime.as_secs_f64());
        report.warnings.append(&mut holding.warnings);
        if let Some(error) = holding.journal.owed().filter(|_| holding.guest_at() == GuestAt::Receiver) {
            return Some(Error { kind: ErrorKind::Unrecorded(chain(error)), guest_at: GuestAt::Receiver });
        }
        let guest_at = if holding.handover.is_some() { holding.guest_at() } else { GuestAt::Sender };
        match (guest_at, kind.take()) {
            (GuestAt::Receiver, Some(lost)) => {
                report
                    .warnings
                    .push(format!("the guest is at the receiver; the session ended early: {}", chain(&lost)));
                None
            }
            (_, None) => None,
            (GuestAt::InDoubt, Some(_)) => {
                Some(Error { kind: ErrorKind::Sender(Failure::InDoubt), guest_at: GuestAt::InDoubt })
            }
            (guest_at, Some(kind)) => Some(Error { kind: ErrorKind::Sender(kind), guest_at }),
        }
    }
}

impl Holding {
    fn guest_at(&self) -> GuestAt {
        let known = self.handover.and_then(|handover| self.journal.handovers().guest_at(&handover));
        known.unwrap_or(GuestAt::Sender)
    }

    /// The session ended too early: what that means for the guest, and what its receiver says, until `until`.
    fn settle(&mut self, to: Option<&Address>, until: Instant, tell: &mut impl FnMut(Phase)) {
        let stood = self.paused.is_some();
        self.follow_up(Input::Timeout);
        if self.guest_at() == GuestAt::InDoubt {
            tell(Phase::InDoubt);
            while self.guest_at() == GuestAt::InDoubt && !self.ask_again(to, until) {}
        }
        if self.guest_at() == GuestAt::Receiver {
            tell(Phase::Started);
        } else if stood && self.paused.is_none() {
            tell(Phase::Stays);
        }
    }

    /// Does what follows from an input when there is no session that could say anything.
    fn follow_up(&mut self, input: Input) -> Vec<Message> {
        let actions = self.input(input);
        let said = actions.into_iter().filter_map(|action| match action {
            Action::Say(message) => Some(message),
            // READY comes in a session alone.
            Action::Release | Action::Fill(_) | Action::Stop(_) | Action::Wait(_) => None,
        });
        said.collect()
    }

    /// Asks the receiver once; says whether to give up.
    fn ask_again(&mut self, to: Option<&Address>, until: Instant) -> bool {
        let (Some(to), Some(handover)) = (to, self.handover) else { return true };
        let Ok(nonce) = random() else { return true };
        let commit = Message { word: Word::Commit, handover };
        let asked =
            ask(to, commit, nonce, |message| self.follow_up(Input::Message { from: handover.receiver, message }));
        if asked.is_err() {
            std::thread::sleep(ASK_EVERY);
        }
        Instant::now() >= until
    }

    fn input(&mut self, input: Input) -> Vec<Action> {
        let outputs = self.journal.handle(input);
        let mut actions = Vec::new();
        outputs.into_iter().for_each(|output| self.follow(output, &mut actions));
        actions
    }

    fn follow(&mut self, output: Output, actions: &mut Vec<Action>) {
        match output {
            Output::Send(message) => actions.push(Action::Say(message)),
            Output::Verified(_) => match self.operator.clone() {
                Some(operator) => {
                    self.asked = Some(Instant::now());
                    actions.push(Action::Wait(Box::new(move |over| operator.approve(over))));
                }
                None => actions.extend(self.input(Input::Commit)),
            },
            Output::Resume(_) => {
                self.resume();
                actions.push(Action::Stop(self.why.take().unwrap_or(Failure::Rejected)));
            }
            Output::Fill(handover) => {
                self.started();
                actions.push(Action::Fill(handover));
            }
            Output::Release(_) => {
                self.started();
                self.released = true;
                actions.push(Action::Release);
            }
            Output::AskArbiter(handover) => match self.lease.as_ref().map(|lease| lease.ask(&handover, self.host)) {
                Some(Ok(grant)) => actions.extend(self.input(Input::Granted(grant))),
                Some(Err(error)) => self.warnings.push(format!("lease: {}", chain(&error))),
                None => {}
            },
            Output::Refuse(refusal) => self.warnings.push(format!("hand-over: {refusal}")),
            Output::InDoubt(_) | Output::Run(_) | Output::Persist(_) | Output::Forget(_) => {}
        }
    }

    /// The guest runs at the receiver; what it has stood still is known when that is heard first.
    fn started(&mut self) {
        self.downtime = self.downtime.or_else(|| self.paused.map(|since| since.elapsed()));
    }

    fn throttle(&mut self, percent: u8) {
        self.throttled = percent;
        if let Err(error) = self.hooks.throttle(percent) {
            self.warnings.push(format!("throttle: {error}"));
        }
    }

    fn resume(&mut self) {
        if let Err(error) = self.hooks.resume() {
            self.warnings.push(format!("the guest was not let run: {error}"));
        }
        self.downtime = self.paused.take().map(|since| since.elapsed());
    }
}

impl GuestControl for Giving {
    fn pause(&mut self) -> Result<Blobs, String> {
        let mut holding = self.holding();
        holding.paused = Some(Instant::now());
        holding.hooks.pause()
    }

    fn resume(&mut self) {
        self.holding().resume();
    }

    fn throttle(&mut self, percent: u8) {
        self.holding().throttle(percent);
    }

    fn offer(&mut self, handover: Handover) -> Vec<Action> {
        let mut holding = self.holding();
        match holding.journal.send(handover) {
            Ok(()) => {
                holding.handover = Some(handover);
                Vec::new()
            }
            Err(refusal) => {
                holding.resume();
                vec![Action::Stop(Failure::Handover(refusal.to_string()))]
            }
        }
    }

    fn hear(&mut self, message: Message) -> Vec<Action> {
        // SPEC 11.3: no link proves who speaks yet; the session's own receiver is meant.
        let mut holding = self.holding();
        let Some(from) = holding.handover.map(|handover| handover.receiver) else { return Vec::new() };
        holding.input(Input::Message { from, message })
    }

    fn approved(&mut self, result: Result<(), String>) -> Vec<Action> {
        let mut holding = self.holding();
        let waited = holding.asked.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let said = if result.is_ok() { "hand over" } else { "let it run on here" };
        holding.word = Some((Instant::now(), format!("the operator, asked for {waited:.3} s: {said}")));
        match result {
            Ok(()) => holding.input(Input::Commit),
            Err(why) => {
                holding.why = Some(Failure::NotApproved(why));
                holding.input(Input::Cancel)
            }
        }
    }

    fn cancel(&mut self, why: Failure) -> Vec<Action> {
        let mut holding = self.holding();
        let input = if matches!(why, Failure::Cancelled) { Input::Cancel } else { Input::Timeout };
        holding.why = Some(why);
        holding.input(input)
    }
}
