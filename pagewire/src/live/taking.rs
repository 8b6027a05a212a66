//! The receiver's side: its journal, the blobs, and the start of the guest, for one session.

use super::{TakeOptions, name_of};
use crate::entrance::Entrant;
use crate::journal::GuestJournal;
use crate::report::Report;
use crate::reuse::{Reuse, claimed};
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::error::{CloseCode, GuestAt, chain};
use pagewire_protocol::frame::{ImageName, Open};
use pagewire_protocol::handover::{Handover, HostId, Input, Message, Output, ReceiverPhase};
use pagewire_protocol::page::Place;
use pagewire_receiver::ErrorKind as Failure;
use pagewire_receiver::driver::{Action, GuestTaker, Refusal};
use pagewire_receiver::memory::PostcopyMemory;
use std::sync::{Arc, OnceLock};

/// The memory of the guest of a session, once it has a place.
pub(crate) type MemorySlot = Arc<OnceLock<Arc<PostcopyMemory>>>;

/// A guest that is this host's now.
#[derive(Debug)]
pub struct Started<'a> {
    /// What it is called.
    pub name: &'a ImageName,
    /// By which hand-over it came.
    pub handover: &'a Handover,
    /// Its memory, if it came into memory that guests can run in before all of it is there. Pages may be absent: who
    /// touches one waits until it has come.
    pub memory: Option<&'a Arc<PostcopyMemory>>,
}

/// Starts guests that have come.
pub trait GuestStarter: std::fmt::Debug + Send + Sync + 'static {
    /// All of the guest is here, and these are its blobs. It may not be started yet; what starting needs is made to last.
    ///
    /// # Errors
    /// It cannot be; the guest is rejected and stays where it is.
    fn prepare(&self, name: &ImageName, blobs: &Blobs) -> Result<(), String>;

    /// Whether the memory of a guest that was started here is still here: a crash of the host takes what is in memory.
    fn has(&self, _name: &ImageName) -> bool {
        true
    }

    /// The pages that the guest will touch first when it comes into memory that it can run in before all of it is there,
    /// by their places in the image and in that order: what [`keep_first_touches`](Self::keep_first_touches) was given the
    /// last time. They are brought first; what is not lacking or no page of the image is left out. Where there are none,
    /// those that the store has of the guest are taken, if there is a store.
    fn first_touches(&self, _name: &ImageName) -> Vec<Place> {
        Vec::new()
    }

    /// All of a guest that was started without is here. These pages it touched before they had come, behind those that it
    /// was expected to touch; each once, so four bytes a page at most. A page that came before it was touched is not
    /// among them unless it was expected.
    fn keep_first_touches(&self, _name: &ImageName, _touches: &[Place]) {}

    /// Starts the guest: it is this host's, and its record says so.
    ///
    /// # Errors
    /// It did not start. It is this host's all the same.
    fn start(&self, started: &Started<'_>) -> Result<(), String>;
}

/// The guest's side of one session at the receiver.
#[derive(Debug)]
pub(crate) struct Taking<'a> {
    options: &'a TakeOptions,
    entrant: &'a Entrant,
    guest: Option<GuestJournal>,
    name: Option<ImageName>,
    handover: Option<Handover>,
    memory: MemorySlot,
    warnings: Vec<String>,
    /// Where the order of first touches is kept, if the starter has none.
    reuse: Option<&'a Reuse>,
}

impl<'a> Taking<'a> {
    /// `memory` is filled by whoever finds a place for the guest.
    pub(crate) fn new(
        options: &'a TakeOptions,
        memory: MemorySlot,
        entrant: &'a Entrant,
        reuse: Option<&'a Reuse>,
    ) -> Self {
        Self { options, entrant, guest: None, name: None, handover: None, memory, warnings: Vec::new(), reuse }
    }

    /// What the guest of a hand-over is called.
    pub(crate) fn called(&self, handover: &Handover) -> Option<ImageName> {
        name_of(&self.options.journal, handover.lineage)
    }

    /// The session is over: what became of the guest, if there was one.
    pub(crate) fn end(&mut self, failed: bool, report: &mut Report) -> Option<GuestAt> {
        let handover = self.handover;
        if failed && handover.is_some() {
            self.input(Input::Timeout);
        }
        report.warnings.append(&mut self.warnings);
        let handovers = self.guest.as_ref()?.handovers();
        handovers.guest_at(&handover?)
    }

    fn input(&mut self, input: Input) -> Vec<Action> {
        let outputs = self.guest.as_mut().map(|guest| guest.handle(input)).unwrap_or_default();
        self.follow_all(outputs)
    }

    fn follow_all(&mut self, outputs: Vec<Output>) -> Vec<Action> {
        let mut actions = Vec::new();
        outputs.into_iter().for_each(|output| self.follow(output, &mut actions));
        let settled = self.guest.as_ref().and_then(|guest| guest.handovers().incoming());
        if self.handover.is_some() && settled.is_some_and(|incoming| incoming.phase() == ReceiverPhase::Settled) {
            actions.push(Action::Release);
        }
        actions
    }

    fn follow(&mut self, output: Output, actions: &mut Vec<Action>) {
        match output {
            Output::Send(message) => actions.push(Action::Say(message)),
            Output::Run(handover) => {
                let Some(name) = &self.name else { return };
                let started =
                    self.options.starter.start(&Started { name, handover: &handover, memory: self.memory.get() });
                self.warnings
                    .extend(started.err().map(|error| format!("the guest is here and was not started: {error}")));
                if handover.post_copy {
                    actions.push(Action::Split);
                }
            }
            Output::AskArbiter(handover) => {
                let lease = self.options.lease.as_ref();
                match lease.map(|lease| lease.ask(&handover, self.options.journal.host())) {
                    Some(Ok(grant)) => actions.extend(self.input(Input::Granted(grant))),
                    Some(Err(error)) => {
                        self.warnings.push(format!("lease: {}", chain(&error)));
                        actions.extend(self.input(Input::Cancel));
                    }
                    None => actions.extend(self.input(Input::Cancel)),
                }
            }
            Output::Refuse(refusal) => self.warnings.push(format!("hand-over: {refusal}")),
            Output::Verified(_)
            | Output::Resume(_)
            | Output::Release(_)
            | Output::Fill(_)
            | Output::InDoubt(_)
            | Output::Persist(_)
            | Output::Forget(_) => {}
        }
    }
}

impl GuestTaker for Taking<'_> {
    fn fills(&mut self, _handover: &Handover) {
        self.entrant.name();
    }

    fn expects(&mut self, handover: &Handover, open: &Open) -> Vec<Place> {
        let known = self.called(handover).map(|name| self.options.starter.first_touches(&name)).unwrap_or_default();
        match (self.reuse, claimed(open)) {
            (Some(reuse), Some(lineage)) if known.is_empty() => reuse.first_touches(&lineage, &open.layout),
            _ => known,
        }
    }

    fn touched(&mut self, handover: &Handover, first_touches: &[Place]) {
        if let Some(name) = self.called(handover) {
            self.options.starter.keep_first_touches(&name, first_touches);
        }
    }

    fn open(&mut self, open: &Open) -> Result<HostId, Refusal> {
        let refuse = |code, reason: String| Refusal { code, reason };
        let (journal, host) = (&self.options.journal, self.options.journal.host());
        let Some(live) = open.live else { return Ok(host) };
        if live.host == host {
            let reason = "sender and receiver use one journal: give one of them another".to_owned();
            return Err(refuse(CloseCode::REFUSED, reason));
        }
        if live.arbiter && self.options.lease.is_none() {
            let reason = "the sender wants a lease to be asked, and none is named here".to_owned();
            return Err(refuse(CloseCode::REFUSED, reason));
        }
        let guest = journal.guest(live.guest, Some(&open.name), true);
        let guest = guest.map_err(|error| refuse(CloseCode::BUSY, chain(&error)))?;
        guest.may_begin(live.epoch).map_err(|why| refuse(CloseCode::REFUSED, format!("guest {}: {why}", open.name)))?;
        (self.guest, self.name) = (Some(guest), Some(open.name.clone()));
        Ok(host)
    }

    fn ready(&mut self, handover: Handover, blobs: Blobs) -> Vec<Action> {
        let (Some(guest), Some(name)) = (self.guest.as_mut(), self.name.as_ref()) else { return Vec::new() };
        if let Err(error) = self.options.starter.prepare(name, &blobs) {
            return vec![Action::Stop(Failure::Refused(error))];
        }
        self.handover = Some(handover);
        let outputs = guest.receive(handover.sender, handover);
        self.follow_all(outputs)
    }

    fn hear(&mut self, message: Message) -> Vec<Action> {
        let Message { handover, .. } = message;
        if self.guest.is_none() {
            // SPEC 11.16
            let kept = self.called(&handover).is_none_or(|name| self.options.starter.has(&name));
            match self.options.journal.guest(handover.lineage, None, kept) {
                Ok(guest) => self.guest = Some(guest),
                Err(error) => {
                    self.warnings.push(chain(&error));
                    return Vec::new();
                }
            }
        }
        // SPEC 11.3: no link proves who speaks yet; who knows the binding is taken for its sender.
        self.input(Input::Message { from: handover.sender, message })
    }
}
