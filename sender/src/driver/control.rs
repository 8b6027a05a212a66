//! Whoever holds the guest that is sent while it runs: stops it, lets it run, and knows its hand-overs.

use crate::engine::{Event, SenderEngine};
use crate::error::ErrorKind;
use crate::memory::GuestMemory;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::handover::{Handover, Message};
use pagewire_transport::Pump;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long a receiver that has been told everything may take to be ready, before the guest runs on here.
const READY_SPAN_MAX: Duration = Duration::from_secs(30);

/// What the session has to do for its guest's hand-over.
#[derive(Debug)]
pub enum Action {
    /// Say this to the receiver.
    Say(Message),
    /// End: the guest is the receiver's for good.
    Release,
    /// End: it is, and lacks pages that only the memory here has. What fills them is a session of its own.
    Fill(Handover),
    /// End: it is not, or nobody knows.
    Stop(ErrorKind),
}

/// The guest of a live session. Its methods may block: [`pause`](Self::pause) for as long as a hypervisor takes, the
/// others for as long as a disk does.
pub trait GuestControl: Send + 'static {
    /// Stops the guest; what comes back goes with its memory. Called at most once.
    ///
    /// # Errors
    /// It cannot be stopped; then it is let run.
    fn pause(&mut self) -> Result<Blobs, String>;

    /// Lets the guest run on here at full speed. Called once if it was paused or was to be, and stays here.
    fn resume(&mut self);

    /// Slows the guest down to so many per cent less.
    fn throttle(&mut self, percent: u8);

    /// All of the guest was stated: it may be handed over by this.
    fn offer(&mut self, handover: Handover) -> Vec<Action>;

    /// The receiver says this.
    fn hear(&mut self, message: Message) -> Vec<Action>;

    /// Somebody wants the guest to stay, `Cancelled` or because it has taken too long; what follows. Nothing does if it is too late.
    fn cancel(&mut self, why: ErrorKind) -> Vec<Action>;
}

/// A control, and what came of its pause.
type Paused = (Box<dyn GuestControl>, Result<Blobs, String>);

/// A control, and what it is doing.
#[derive(Default)]
pub(crate) struct Controlled {
    control: Option<Box<dyn GuestControl>>,
    pausing: Option<JoinHandle<Paused>>,
    /// The session has ended while the guest was being paused.
    resumes: bool,
    ready_until: Option<Instant>,
    offered: bool,
}

impl Controlled {
    pub(crate) fn new(control: Option<Box<dyn GuestControl>>) -> Self {
        Self { control, ..Self::default() }
    }

    /// Waits until the guest stands still, or READY is late; for ever if neither is awaited.
    pub(crate) async fn wait(&mut self) -> Waited {
        let (pausing, ready) = (&mut self.pausing, self.ready_until);
        let paused = async {
            match pausing {
                Some(pausing) => pausing.await,
                None => std::future::pending().await,
            }
        };
        let late = async {
            match ready {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            paused = paused => match paused {
                Ok((control, result)) => {
                    (self.control, self.pausing) = (Some(control), None);
                    Waited::Paused(result)
                }
                Err(error) => {
                    self.pausing = None;
                    Waited::Paused(Err(error.to_string()))
                }
            },
            () = late => Waited::Late,
        }
    }

    /// What was waited for has come.
    pub(crate) fn go_on<M: GuestMemory>(&mut self, waited: Waited, pump: &mut Pump<SenderEngine<M>>) {
        match waited {
            Waited::Paused(result) => {
                if std::mem::take(&mut self.resumes) {
                    self.control.iter_mut().for_each(|control| control.resume());
                }
                let now = pump.now();
                pump.machine().paused(result, now);
            }
            Waited::Late => {
                self.ready_until = None;
                self.stop(ErrorKind::Late(READY_SPAN_MAX), pump);
            }
        }
    }

    /// Somebody wants the session to end.
    pub(crate) fn stop<M: GuestMemory>(&mut self, why: ErrorKind, pump: &mut Pump<SenderEngine<M>>) {
        match self.control.as_mut().filter(|_| self.offered) {
            Some(control) => {
                let actions = control.cancel(why);
                self.act(actions, pump);
            }
            None => pump.machine().cancel(why),
        }
    }

    /// Does what the engine asks for.
    pub(crate) fn handle<M: GuestMemory>(&mut self, event: Event, pump: &mut Pump<SenderEngine<M>>) {
        if event == Event::Pause {
            self.pausing = self.control.take().map(|mut control| {
                tokio::task::spawn_blocking(move || {
                    let result = control.pause();
                    (control, result)
                })
            });
            return;
        }
        let Some(control) = self.control.as_mut() else {
            self.resumes |= event == Event::Resume;
            return;
        };
        let actions = match event {
            Event::Resume => {
                control.resume();
                return;
            }
            Event::Throttle(percent) => {
                control.throttle(percent);
                return;
            }
            Event::Offer(handover) => {
                self.offered = true;
                self.ready_until = Some(Instant::now() + READY_SPAN_MAX);
                control.offer(handover)
            }
            Event::Said(message) => {
                let actions = control.hear(message);
                if !actions.is_empty() {
                    // It was about this hand-over: the receiver is ready, or never will be.
                    self.ready_until = None;
                }
                actions
            }
            _ => return,
        };
        self.act(actions, pump);
    }

    fn act<M: GuestMemory>(&mut self, actions: Vec<Action>, pump: &mut Pump<SenderEngine<M>>) {
        for action in actions {
            match action {
                Action::Say(message) => pump.machine().say(message),
                Action::Release => pump.machine().release(),
                Action::Fill(_) => fill(pump),
                Action::Stop(kind) => pump.machine().cancel(kind),
            }
        }
    }

    /// The session is over: a guest that is still being stopped runs on when it has been.
    pub(crate) async fn end(&mut self) {
        while self.pausing.is_some() {
            if let Waited::Paused(_) = self.wait().await
                && std::mem::take(&mut self.resumes)
            {
                self.control.iter_mut().for_each(|control| control.resume());
            }
        }
    }
}

/// The guest runs at the receiver, and pages of it are here alone: this session ends well, and its memory stays.
fn fill<M: GuestMemory>(pump: &mut Pump<SenderEngine<M>>) {
    pump.machine().split();
}

/// What was waited for.
pub(crate) enum Waited {
    Paused(Result<Blobs, String>),
    Late,
}
