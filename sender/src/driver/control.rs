//! Whoever holds the guest that is sent while it runs: stops it, lets it run, and knows its hand-overs.

use super::notice::{LivePhase, Told};
use crate::engine::{Event, SenderEngine};
use crate::error::ErrorKind;
use crate::memory::GuestMemory;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::handover::{Handover, Message, Word};
use pagewire_transport::{CancellationToken, Pump};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long a receiver that has been told everything may take to be ready, before the guest runs on here.
const READY_SPAN_MAX: Duration = Duration::from_secs(30);
/// How long the guest may wait for somebody's word between READY and its hand-over. The receiver waits for
/// `STALL_SPAN_MAX`, and needs the rest of it to be told, to start the guest and to say so.
const APPROVAL_SPAN_MAX: Duration = Duration::from_secs(90);

/// Says whether a guest that is ready at the receiver may be handed over. It may block, and ends soon when its token is
/// cancelled: what it says does not matter any more then.
pub type Approval = Box<dyn FnOnce(&CancellationToken) -> Result<(), String> + Send>;

/// What the session has to do for its guest's hand-over.
pub enum Action {
    /// Say this to the receiver.
    Say(Message),
    /// Ask somebody, and tell [`GuestControl::approved`] what he says.
    Wait(Approval),
    /// End: the guest is the receiver's for good.
    Release,
    /// End: it is, and lacks pages that only the memory here has. What fills them is a session of its own.
    Fill(Handover),
    /// End: it stays here, and was told to run on.
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

    /// Whoever [`Action::Wait`] asked says that the guest may be handed over, or why not.
    fn approved(&mut self, _result: Result<(), String>) -> Vec<Action> {
        Vec::new()
    }

    /// Somebody wants the guest to stay, `Cancelled` or because it has taken too long; what follows. Nothing does if it is too late.
    fn cancel(&mut self, why: ErrorKind) -> Vec<Action>;
}

/// A control, and what came of its pause.
type Paused = (Box<dyn GuestControl>, Result<Blobs, String>);

/// Somebody is being asked.
struct Asked {
    answer: JoinHandle<Result<(), String>>,
    over: CancellationToken,
    until: Instant,
}

impl Asked {
    fn new(approval: Approval) -> Self {
        let over = CancellationToken::new();
        let token = over.clone();
        let answer = tokio::task::spawn_blocking(move || approval(&token));
        Self { answer, over, until: Instant::now() + APPROVAL_SPAN_MAX }
    }

    async fn wait(&mut self) -> Result<(), String> {
        tokio::select! {
            answer = &mut self.answer => answer.unwrap_or_else(|error| Err(error.to_string())),
            () = tokio::time::sleep_until(self.until) => {
                Err(format!("nobody has said that it may be handed over for {} s", APPROVAL_SPAN_MAX.as_secs()))
            }
        }
    }
}

/// A control, and what it is doing.
#[derive(Default)]
pub(crate) struct Controlled {
    control: Option<Box<dyn GuestControl>>,
    pausing: Option<JoinHandle<Paused>>,
    /// The session has ended while the guest was being paused.
    resumes: bool,
    ready_until: Option<Instant>,
    offered: bool,
    asked: Option<Asked>,
    /// Its answer does not matter any more.
    unheard: Option<Asked>,
    pub(super) told: Told,
}

impl Controlled {
    pub(crate) fn new(control: Option<Box<dyn GuestControl>>) -> Self {
        Self { control, ..Self::default() }
    }

    /// Waits until the guest stands still, READY is late, or there is an answer; for ever if none of it is awaited.
    pub(crate) async fn wait(&mut self) -> Waited {
        let (pausing, ready, asked) = (&mut self.pausing, self.ready_until, &mut self.asked);
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
        let answer = async {
            match asked {
                Some(asked) => asked.wait().await,
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
            answer = answer => Waited::Answer(answer),
        }
    }

    /// What was waited for has come.
    pub(crate) fn go_on<M: GuestMemory>(&mut self, waited: Waited, pump: &mut Pump<SenderEngine<M>>) {
        match waited {
            Waited::Paused(result) => {
                if std::mem::take(&mut self.resumes) {
                    self.control.iter_mut().for_each(|control| control.resume());
                }
                if result.is_ok() {
                    self.told.note(LivePhase::Paused);
                }
                let now = pump.now();
                pump.machine().paused(result, now);
            }
            Waited::Answer(answer) => {
                self.stop_asking();
                let actions = self.control.as_mut().map(|control| control.approved(answer)).unwrap_or_default();
                self.act(actions, pump);
            }
            Waited::Late => {
                self.ready_until = None;
                self.stop(ErrorKind::Late(READY_SPAN_MAX), pump);
            }
        }
    }

    /// What is being asked does not matter any more.
    fn stop_asking(&mut self) {
        if let Some(asked) = self.asked.take() {
            asked.over.cancel();
            self.unheard = Some(asked);
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
        match &event {
            Event::Accepted { .. } => self.told.note(LivePhase::Sending),
            Event::Throttle(percent) => self.told.note(LivePhase::Throttled(*percent)),
            Event::Pause => self.told.note(LivePhase::Pausing),
            Event::Offer(_) => self.told.note(LivePhase::Offered),
            Event::Resume => self.told.note(LivePhase::Stays),
            _ => {}
        }
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
                    if message.word == Word::Ready {
                        self.told.note(LivePhase::Ready);
                    }
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
                Action::Say(message) => {
                    if message.word == Word::Commit {
                        self.told.note(LivePhase::Handed);
                    }
                    pump.machine().say(message);
                }
                Action::Wait(approval) => {
                    self.told.note(LivePhase::Waiting);
                    self.asked = Some(Asked::new(approval));
                }
                Action::Release => {
                    self.told.note(LivePhase::Started);
                    pump.machine().release();
                }
                Action::Fill(_) => {
                    self.told.note(LivePhase::Started);
                    pump.machine().release();
                }
                Action::Stop(kind) => {
                    self.stop_asking();
                    self.told.note(LivePhase::Stays);
                    pump.machine().cancel(kind);
                }
            }
        }
    }

    /// The session is over: a guest that is still being stopped runs on when it has been, and nobody is asked any more.
    pub(crate) async fn end(&mut self) {
        self.stop_asking();
        if let Some(asked) = self.unheard.take().filter(|asked| !asked.answer.is_finished()) {
            // He may have something of his own to end.
            drop(asked.answer.await);
        }
        while self.pausing.is_some() {
            if let Waited::Paused(_) = self.wait().await
                && std::mem::take(&mut self.resumes)
            {
                self.control.iter_mut().for_each(|control| control.resume());
            }
        }
    }
}

/// What was waited for.
pub(crate) enum Waited {
    Paused(Result<Blobs, String>),
    Late,
    Answer(Result<(), String>),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a test waits for at most.
    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn an_operator_who_says_nothing_has_said_no_in_time_and_is_told_that_it_is_over() {
        let answer = pagewire_transport::block_on(async {
            let mut guest = Controlled::new(None);
            let (told, ended) = std::sync::mpsc::channel();
            let mut asked = Asked::new(Box::new(move |over| {
                while !over.is_cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                told.send(()).map_err(|error| error.to_string())
            }));
            let left = asked.until.saturating_duration_since(Instant::now());
            assert!(left <= APPROVAL_SPAN_MAX && left > APPROVAL_SPAN_MAX / 2);
            asked.until = Instant::now();
            guest.asked = Some(asked);
            let Waited::Answer(answer) = guest.wait().await else { return Ok(()) };
            // The operator goes on waiting until somebody tells him.
            assert!(ended.try_recv().is_err());
            guest.end().await;
            ended.recv_timeout(SOON).map_err(|error| error.to_string())?;
            answer
        });
        let why = answer.unwrap().unwrap_err();
        assert!(why.contains("for 90 s"), "{why}");
    }

    #[test]
    fn an_operator_is_asked_for_less_than_the_receiver_waits() {
        let receiver = Duration::from_nanos(pagewire_protocol::limits::STALL_SPAN_MAX.as_nanos());
        assert!(APPROVAL_SPAN_MAX + Duration::from_secs(20) <= receiver);
    }
}
