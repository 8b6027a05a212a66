//! Serves senders: each session on a thread of its own, as many at once as allowed, none of which can end the others.

use crate::entrance::{Entrance, Entrant};
use crate::entropy::random;
use crate::error::{Error, ErrorKind};
use crate::ground::{Ground, Search};
use crate::handed::HandedSink;
use crate::live::{MemorySlot, TakeOptions, Taking};
use crate::observe::Event;
use crate::report::{ImageId, Outcome, Pages, Report, ReuseCounts, Role};
use crate::reuse::{Came, Image, KeepWhat, Reuse, keep_arrived};
use crate::send::check_plaintext;
use pagewire_protocol::error::{CloseCode, GuestAt, chain};
use pagewire_protocol::frame::Open;
use pagewire_protocol::framing::Framer;
use pagewire_protocol::limits::{BULK_LANES_MAX, IMAGE_BYTES_DEFAULT};
use pagewire_protocol::time::Time;
use pagewire_receiver::driver::{Beginning, Entropy, GuestTaker, Landed, Parking, Progress, Refusal, Summary};
use pagewire_receiver::memory::uffd::FaultsOf;
use pagewire_receiver::memory::{Backing, Clock, FileSink, GuestRam, PostcopyMemory, PostcopySink, RamSink};
use pagewire_receiver::{GuestSink, Offer};
use pagewire_store::{Landing, LandingError, LandingOptions};
use pagewire_transport::{Address, Arrival, CancellationToken, Listener, Sessions, Socket};
use std::cell::Cell;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

mod waiting;

use waiting::Memory;

/// How often the server looks whether it shall stop.
const PATIENCE: Duration = Duration::from_millis(200);

/// Where images go.
#[derive(Clone, Debug)]
pub enum Into {
    /// Each to `folder/NAME`.
    Folder(PathBuf),
    /// Into this file, where it lies, whatever the sender calls it: somebody may hold it open.
    File(PathBuf),
    /// Into memory of this process: [`ServerEvent::Arrived`] hands it over. A visit that the guest left here is mapped
    /// copy-on-write, so that a guest that comes back costs what it changed.
    Memory,
    /// Into memory of this process that a guest can run in before all of it is there: for guests that run, which
    /// [`GuestStarter`](crate::GuestStarter) is given with it.
    PostCopy {
        /// What the memory is made of.
        backing: Backing,
        /// Who may touch what is absent.
        faults_of: FaultsOf,
    },
    /// As [`PostCopy`](Self::PostCopy), in files of shared memory, each of which is the guest's memory for as long as that is
    /// mapped: that of the guest NAME is `folder/NAME` when all of it has come, and has no such name before.
    PostCopyFolder {
        /// A folder on a tmpfs.
        folder: PathBuf,
        /// Who may touch what is absent.
        faults_of: FaultsOf,
    },
    /// Into memory of a hypervisor that loads the guest when it is started, and hands over its userfaultfd then: for the
    /// guest NAME on the Unix socket `NAME.sock` in this folder, as Firecracker does. The guest comes in post-copy alone,
    /// at once.
    HandedOver(PathBuf),
}

/// How to receive.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// Where images go.
    pub into: Into,
    /// What becomes of files that are there.
    pub landing: LandingOptions,
    /// Bulk lanes granted to a session at most.
    pub lanes: u8,
    /// Sessions at once at most; further ones are refused as busy. One that fills a guest which runs here counts, and is
    /// never refused for it: the guest waits for its pages, and has one such session at a time.
    pub sessions_max: usize,
    /// The largest image accepted, in bytes.
    pub image_bytes_max: u64,
    /// Build on what is kept of guests that come back, and keep what arrives. Not for images that go into a given file; of
    /// what arrives in memory pages are kept before it is handed over, a manifest after, and of a guest that ran before
    /// all of it was there a manifest and the order of its first touches.
    pub reuse: Option<Reuse>,
    /// Take guests over that run; without it they are refused.
    pub live: Option<TakeOptions>,
    /// Allow unencrypted transfers over a network.
    pub insecure_plaintext: bool,
    /// Stop after the first session that got as far as naming an image.
    pub once: bool,
    /// Stops the server and every session.
    pub cancel: CancellationToken,
}

impl ReceiveOptions {
    /// The defaults, into `into`.
    pub fn new(into: Into) -> Self {
        Self {
            into,
            landing: LandingOptions::default(),
            lanes: BULK_LANES_MAX,
            sessions_max: 64,
            image_bytes_max: IMAGE_BYTES_DEFAULT,
            reuse: None,
            live: None,
            insecure_plaintext: false,
            once: false,
            cancel: CancellationToken::new(),
        }
    }
}

/// What a server tells, and hands over. `session` counts from 1.
#[derive(Debug)]
pub enum ServerEvent<'a> {
    /// A peer connected and greeted.
    Connected {
        /// Which session.
        session: u64,
        /// The peer's address.
        peer: &'a str,
    },
    /// A session goes on.
    Progress {
        /// Which session.
        session: u64,
        /// How far it is.
        event: &'a Event,
    },
    /// A guest is in memory, whole. If nobody takes it, it is gone: the sender knows that it arrived.
    Arrived {
        /// Which session.
        session: u64,
        /// What the sender calls it.
        name: &'a str,
        /// The guest's memory.
        memory: GuestRam,
    },
    /// A hypervisor has handed over the memory of a guest that runs in it. Whoever keeps a
    /// [duplicate](PostcopyMemory::duplicate) and the [table](PostcopyMemory::table) can serve it when this process is gone;
    /// until then nobody sees a zero.
    HandedOver {
        /// Which session.
        session: u64,
        /// What the sender calls it.
        name: &'a str,
        /// The guest's memory.
        memory: &'a Arc<PostcopyMemory>,
    },
    /// A session ended.
    Ended {
        /// Which session.
        session: u64,
        /// How.
        outcome: &'a Outcome,
    },
    /// A connection never became a session.
    Stranger {
        /// The peer's address.
        peer: &'a str,
        /// Why not.
        why: &'a str,
    },
}

/// A listener that receives images.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: ReceiveOptions,
    sessions: Sessions,
    entrance: Arc<Entrance>,
    count: AtomicU64,
    /// Guests that run here and lack pages.
    parking: Arc<Parking<PostcopySink>>,
    /// The same, of those that run in the memory of another process.
    handed: Arc<Parking<HandedSink>>,
}

type Tell = Arc<dyn Fn(ServerEvent<'_>) + Send + Sync>;

impl Server {
    /// Listens at an address.
    ///
    /// # Errors
    /// The address is wrong or taken, or not on this host without leave to be.
    pub fn bind(address: &Address, options: ReceiveOptions) -> Result<Self, Error> {
        check_plaintext(address, options.insecure_plaintext).map_err(ErrorKind::at_sender)?;
        let failed = |source| ErrorKind::Listen { address: address.to_string(), source }.at_sender();
        let listener = Listener::bind(address).map_err(failed)?;
        let (sessions, entrance, count, parking, handed) = Default::default();
        let shared = Shared { options, sessions, entrance, count, parking, handed };
        Ok(Self { listener, shared: Arc::new(shared) })
    }

    /// The address that senders connect to.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn address(&self) -> Result<Address, Error> {
        let failed = |source| ErrorKind::Local { what: "own address", source }.at_sender();
        self.listener.address().map_err(failed)
    }

    /// Serves until it is cancelled, or once. Blocks. Sessions that run are brought to their end first.
    pub fn serve(&self, tell: impl Fn(ServerEvent<'_>) + Send + Sync + 'static) {
        let (tell, cancel): (Tell, _) = (Arc::new(tell), &self.shared.options.cancel);
        let mut threads = Vec::new();
        while !cancel.is_cancelled() {
            threads.retain(|thread: &std::thread::JoinHandle<()>| !thread.is_finished());
            if self.shared.entrance.is_crowded() {
                std::thread::sleep(PATIENCE);
                continue;
            }
            match self.listener.accept(PATIENCE) {
                Ok(Some((socket, peer))) => {
                    let (shared, tell, start) = (Arc::clone(&self.shared), Arc::clone(&tell), Instant::now());
                    let entrant = self.shared.entrance.admit();
                    let name = "pagewire-session".to_owned();
                    let welcome = move || shared.welcome(Connection { socket, start, entrant }, &peer, &tell);
                    // If no thread can be had, the closure is gone, and with it the connection.
                    threads.extend(std::thread::Builder::new().name(name).spawn(welcome));
                }
                Ok(None) => {}
                // A signal: what it asks for is in the token.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tell(ServerEvent::Stranger { peer: "?", why: &chain(&error) });
                    std::thread::sleep(PATIENCE);
                }
            }
        }
        threads.into_iter().for_each(|thread| drop(thread.join()));
    }
}

/// A connection that was accepted.
struct Connection {
    socket: Socket,
    start: Instant,
    entrant: Entrant,
}

impl Shared {
    /// Finds out what a connection is, and runs its session if it begins one.
    fn welcome(&self, connection: Connection, peer: &str, tell: &Tell) {
        let Connection { socket, start, entrant } = connection;
        match Arrival::greet(socket, start) {
            Ok(Arrival::Lane(joining)) => self.sessions.deliver(joining),
            Ok(Arrival::Session(socket, framer)) => {
                let session = self.count.fetch_add(1, Ordering::Relaxed).saturating_add(1);
                tell(ServerEvent::Connected { session, peer });
                let arriving = Arriving { socket, framer, single_stream: false, lanes: self.options.lanes, start };
                let (named, outcome) = self.receive(session, arriving, entrant, tell);
                tell(ServerEvent::Ended { session, outcome: &outcome });
                // A guest that lacks pages needs this process until it has them.
                if self.options.once && named && self.parking.is_empty() && self.handed.is_empty() {
                    self.options.cancel.cancel();
                }
            }
            Err(error) => tell(ServerEvent::Stranger { peer, why: &chain(&error) }),
        }
    }

    /// Runs one session into wherever images go here; says whether it got as far as naming one.
    fn receive(&self, session: u64, arriving: Arriving, entrant: Entrant, tell: &Tell) -> (bool, Outcome) {
        let options = &self.options;
        let observe = |event: &Event| tell(ServerEvent::Progress { session, event });
        match &options.into {
            Into::Folder(dir) => {
                let place = |offer: &Offer, warnings: &mut Vec<String>| into_folder(dir, offer, options, warnings);
                let keep = |came: &Came<'_>, report: &mut Report| {
                    self.keep(came, Some(Image::File(&dir.join(came.open.name.as_str()))), report);
                };
                self.run(arriving, entrant, place, None, keep, observe)
            }
            Into::File(path) => {
                let place = |offer: &Offer, _: &mut Vec<String>| into_file(path, offer, options);
                self.run(arriving, entrant, place, None, |_, _| (), observe)
            }
            Into::PostCopy { backing, faults_of } => {
                self.receive_post_copy(arriving, entrant, (Memory::Of(*backing), *faults_of), observe)
            }
            Into::PostCopyFolder { folder, faults_of } => {
                self.receive_post_copy(arriving, entrant, (Memory::In(folder), *faults_of), observe)
            }
            Into::HandedOver(dir) => self.receive_handed(arriving, entrant, (dir, session), tell),
            Into::Memory => {
                let shared = Cell::new(None);
                let place = |offer: &Offer, warnings: &mut Vec<String>| {
                    let ground = into_memory(offer, options, warnings)?;
                    Ok(ground.landed(|ram| {
                        let ram = Arc::new(Mutex::new(ram));
                        shared.set(Some(Arc::clone(&ram)));
                        RamSink::new(ram)
                    }))
                };
                let keep = |came: &Came<'_>, report: &mut Report| {
                    let Some(ram) = shared.take() else { return };
                    // Pages have to be kept before the guest writes to them; a manifest it need not wait for.
                    let pages = options.reuse.as_ref().is_some_and(|reuse| reuse.keep == Some(KeepWhat::Visit));
                    if pages {
                        self.keep(came, Some(Image::Memory(&ram)), report);
                    }
                    // The sink went with the session: nobody else has the memory.
                    if let Some(memory) = Arc::into_inner(ram) {
                        let memory = memory.into_inner().unwrap_or_else(PoisonError::into_inner);
                        tell(ServerEvent::Arrived { session, name: came.open.name.as_str(), memory });
                    }
                    if !pages {
                        self.keep(came, None, report);
                    }
                };
                self.run(arriving, entrant, place, None, keep, observe)
            }
        }
    }

    /// Keeps what arrived, if there is a store.
    fn keep(&self, came: &Came<'_>, image: Option<Image<'_>>, report: &mut Report) {
        if let Some(reuse) = &self.options.reuse {
            keep_arrived(reuse, came, image, report);
        }
    }

    /// Runs one session. Until it names an image, or a guest that is here to be filled, its peer is a stranger.
    fn run<S: GuestSink>(
        &self,
        arriving: Arriving,
        entrant: Entrant,
        mut place: impl FnMut(&Offer, &mut Vec<String>) -> Result<Landed<S>, Refusal>,
        waiting: Option<(MemorySlot, &Arc<Parking<S>>)>,
        keep: impl FnOnce(&Came<'_>, &mut Report),
        observe: impl FnMut(&Event),
    ) -> (bool, Outcome) {
        let options = &self.options;
        let mut warnings = Vec::new();
        let decide = |offer: &Offer| {
            if entrant.name() >= options.sessions_max {
                let reason = format!("{} sessions are open, which is the limit here", options.sessions_max);
                return Err(Refusal { code: CloseCode::BUSY, reason });
            }
            let (bytes, most) = (offer.open.layout.bytes(), options.image_bytes_max);
            if bytes > most {
                let reason = format!("the image has {bytes} bytes, the limit here is {most}");
                return Err(Refusal { code: CloseCode::REFUSED, reason });
            }
            place(offer, &mut warnings)
        };
        let (slot, parking) = waiting.unzip();
        let (live, reuse) = (options.live.as_ref(), options.reuse.as_ref());
        let taking = live.map(|live| Taking::new(live, slot.unwrap_or_default(), &entrant, reuse));
        let host = (&self.sessions, &options.cancel);
        let (named, mut outcome) = session(arriving, host, (taking, parking), decide, keep, observe);
        outcome.report.warnings.splice(0..0, warnings);
        (named, outcome)
    }
}

/// A connection that begins a session.
pub(crate) struct Arriving {
    pub(crate) socket: Socket,
    pub(crate) framer: Framer,
    pub(crate) single_stream: bool,
    pub(crate) lanes: u8,
    /// When it was accepted.
    pub(crate) start: Instant,
}

/// Runs one session and makes the report.
pub(crate) fn session<S: GuestSink>(
    arriving: Arriving,
    (sessions, cancel): (&Sessions, &CancellationToken),
    (mut taking, parking): (Option<Taking<'_>>, Option<&Arc<Parking<S>>>),
    decide: impl FnMut(&Offer) -> Result<Landed<S>, Refusal>,
    keep: impl FnOnce(&Came<'_>, &mut Report),
    mut observe: impl FnMut(&Event),
) -> (bool, Outcome) {
    let Arriving { socket, framer, single_stream, lanes, start } = arriving;
    let entropy = || {
        let (nonce, secret, challenge) = (random()?, random()?, random()?);
        Ok(Entropy { nonce, secret, challenge, seed: u64::from_le_bytes(random()?) })
    };
    let entropy: Entropy = match entropy() {
        Ok(entropy) => entropy,
        Err(kind) => {
            return (false, Report::new(Role::Receiver, String::new()).close(Some(ErrorKind::at_sender(kind))));
        }
    };
    let begin = Beginning { socket, framer, single_stream, lanes, start, entropy };
    let observe = |progress: Progress| observe(&progress.into());
    let taker = taking.as_mut().map(|taking| taking as &mut dyn GuestTaker);
    let to = (taker, parking);
    let (summary, result) = pagewire_receiver::driver::receive(begin, sessions, cancel, decide, to, observe);
    let mut report = report(&summary);
    let filled = summary.filled.as_ref().and_then(|filled| filled.handover);
    if let (Some(taking), Some(handover)) = (&taking, filled) {
        report.name = taking.called(&handover).map(|name| name.to_string()).unwrap_or_default();
    }
    let whole = summary.filled.as_ref().and_then(|filled| filled.whole.as_deref());
    let whole = whole.map(|(open, manifest, touches)| Came { open, manifest, touches });
    let at_once = summary.offer.as_ref().zip(summary.manifest.as_ref());
    let at_once = at_once.map(|(offer, manifest)| Came { open: &offer.open, manifest, touches: &[] });
    if let Some(came) = whole.or(at_once) {
        report.image = Some(ImageId { root: came.manifest.root.0, session: came.open.session });
        keep(&came, &mut report);
    }
    let guest_at = taking.as_mut().and_then(|taking| taking.end(result.is_err(), &mut report));
    let error = match (result.err(), guest_at) {
        (Some(error), Some(GuestAt::Receiver)) => {
            report
                .warnings
                .push(format!("the guest is here; its sender did not say that it let go: {}", chain(&error)));
            None
        }
        (Some(error), guest_at) => {
            // Whoever is filled runs here.
            let guest_at = guest_at.or(filled.map(|_| GuestAt::Receiver));
            let error = Error::from(error);
            Some(Error { guest_at: guest_at.unwrap_or(error.guest_at), ..error })
        }
        (None, _) => None,
    };
    (summary.offer.is_some() || summary.filled.is_some(), report.close(error))
}

fn report(summary: &Summary) -> Report {
    let open = summary.offer.as_ref().map(|offer| &offer.open);
    let mut report = Report::new(Role::Receiver, open.map(|open| open.name.to_string()).unwrap_or_default());
    let counts = summary.counts;
    report.seconds = summary.spent.as_secs_f64();
    (report.bytes_total, report.pages_total) = open.map_or((0, 0), |open| (open.layout.bytes(), open.layout.pages()));
    report.pages = Pages::new([counts.zero, counts.base, counts.reference, counts.inline, counts.delta]);
    report.wants = counts.wants;
    report.reuse = ReuseCounts {
        scanned: counts.scanned,
        unverified: counts.unverified,
        damaged: counts.damaged,
        others: counts.others,
        ..ReuseCounts::default()
    };
    report.wire = summary.wire.into();
    report.faults.lacking = summary.lacking;
    if let Some(filled) = &summary.filled {
        report.note_filled(filled);
    }
    report
}

/// Whether an offered image is to be built on nothing.
fn is_fresh(offer: &Offer, options: &ReceiveOptions) -> bool {
    options.landing.fresh || offer.open.fresh
}

/// Finds the place of an offered image in a folder.
// SPEC 3.9: what is announced is the image of that name; whoever may connect may read all of the folder.
fn into_folder(
    dir: &Path,
    offer: &Offer,
    options: &ReceiveOptions,
    warnings: &mut Vec<String>,
) -> Result<Landed<FileSink>, Refusal> {
    let Open { layout, name, .. } = &offer.open;
    let landing = LandingOptions { fresh: is_fresh(offer, options), ..options.landing };
    let ground = match options.reuse.as_ref().filter(|_| !landing.fresh) {
        Some(reuse) => Search { reuse, open: &offer.open, seed: seed()?, warnings }.in_folder(dir, landing),
        None => Landing::start(dir, OsStr::new(name.as_str()), layout.bytes(), landing).map(Ground::plain),
    };
    let ground = ground.map_err(|error| refusal(&error))?;
    Ok(ground.landed(|landing| FileSink::new(landing, layout.clone())))
}

/// The given file for an offered image.
fn into_file(path: &Path, offer: &Offer, options: &ReceiveOptions) -> Result<Landed<FileSink>, Refusal> {
    let layout = &offer.open.layout;
    let landing =
        Landing::into_file(path, layout.bytes(), is_fresh(offer, options)).map_err(|error| refusal(&error))?;
    Ok(Ground::plain(landing).landed(|landing| FileSink::new(landing, layout.clone())))
}

/// Memory for an offered image.
fn into_memory(
    offer: &Offer,
    options: &ReceiveOptions,
    warnings: &mut Vec<String>,
) -> Result<Ground<GuestRam>, Refusal> {
    let ram = match options.reuse.as_ref().filter(|_| !is_fresh(offer, options)) {
        Some(reuse) => Search { reuse, open: &offer.open, seed: seed()?, warnings }.in_memory(),
        None => GuestRam::new(offer.open.layout.clone()).map(Ground::plain),
    };
    ram.map_err(|error| no_memory(&error))
}

/// A clock from now on.
fn clock() -> Clock {
    let began = Instant::now();
    Box::new(move || Time::from_nanos(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)))
}

fn no_memory(error: &dyn std::error::Error) -> Refusal {
    Refusal { code: CloseCode::DESTINATION, reason: format!("no memory for the guest: {}", chain(error)) }
}

/// A seed for the index of other guests' pages.
fn seed() -> Result<u64, Refusal> {
    let failed = |kind: ErrorKind| Refusal { code: CloseCode::DESTINATION, reason: chain(&kind) };
    random().map(u64::from_le_bytes).map_err(failed)
}

fn refused(reason: &str) -> Refusal {
    Refusal { code: CloseCode::REFUSED, reason: reason.to_owned() }
}

/// What the peer is told of a place that cannot be used.
pub(crate) fn refusal(error: &LandingError) -> Refusal {
    let code = match error {
        LandingError::Busy { .. } => CloseCode::BUSY,
        LandingError::Io { .. } => CloseCode::DESTINATION,
        _ => CloseCode::REFUSED,
    };
    Refusal { code, reason: chain(error) }
}
