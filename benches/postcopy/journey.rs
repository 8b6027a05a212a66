//! One move of a guest between two hosts of this process, over loopback TCP, into memory that it can run in before all of
//! it is there.

use crate::image::Image;
use crate::{Failure, pin};
use pagewire::{
    Backing, BitmapMemory, Blobs, CancellationToken, FaultsOf, GuestHooks, GuestStarter, ImageName, InstallSize, Into,
    Journal, LiveOptions, MappedMemory, MappedRegion, NoObserver, Place, PostCopy, PostcopyMemory, ReceiveOptions,
    Report, SendOptions, Server, ServerEvent, Started, TakeOptions, send_live_memory,
};
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How a guest is moved.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) post_copy: PostCopy,
    /// Bytes a second in the background.
    pub(crate) background: Option<u64>,
    /// Of the receiver's host, on which the guest runs, and of the sender's.
    pub(crate) cores: [Option<usize>; 2],
    /// What the guest touched first another time.
    pub(crate) trace: Vec<Place>,
    /// Whether what goes in the background is compressed where that pays.
    pub(crate) compress: bool,
    /// Whether the move is cut off when the guest has done its part.
    pub(crate) cut: bool,
}

impl Way {
    pub(crate) fn now() -> Self {
        Self {
            post_copy: PostCopy::Now,
            background: None,
            cores: [None; 2],
            trace: Vec::new(),
            compress: true,
            cut: false,
        }
    }
}

/// What came of it.
pub(crate) struct Journey<T> {
    /// What the guest gave.
    pub(crate) guest: T,
    /// From the call to its end.
    pub(crate) seconds: f64,
    /// The sender's.
    pub(crate) sent: Report,
    /// What the guest touched first.
    pub(crate) trace: Vec<Place>,
}

/// The guest at the sender: memory that nobody writes to.
struct Still;

impl GuestHooks for Still {
    fn pause(&mut self) -> Result<Blobs, String> {
        Ok(Blobs::new())
    }

    fn resume(&mut self) -> Result<(), String> {
        Ok(())
    }
}

#[derive(Debug)]
struct Host {
    started: Mutex<Sender<Arc<PostcopyMemory>>>,
    expected: Vec<Place>,
    kept: Mutex<Vec<Place>>,
}

impl GuestStarter for Host {
    fn prepare(&self, _: &ImageName, _: &Blobs) -> Result<(), String> {
        Ok(())
    }

    fn start(&self, started: &Started<'_>) -> Result<(), String> {
        let memory = Arc::clone(started.memory.ok_or("it came into memory that cannot wait")?);
        let sender = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        sender.send(memory).map_err(|error| error.to_string())
    }

    fn first_touches(&self, _: &ImageName) -> Vec<Place> {
        self.expected.clone()
    }

    fn keep_first_touches(&self, _: &ImageName, touches: &[Place]) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = touches.to_vec();
    }
}

/// A folder for records that goes when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, Failure> {
        let folder = PathBuf::from(format!("/dev/shm/pagewire-postcopy-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    fn journal(&self, name: &str) -> Result<Arc<Journal>, Failure> {
        Ok(Arc::new(Journal::open(&self.0.join(name))?))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What stays behind is in a folder that says whose it is.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Moves the image; `guest` runs at the receiver, in a thread of its own, as soon as it is started there.
pub(crate) fn travel<T: Send>(
    image: &Image,
    way: &Way,
    guest: impl FnOnce(&PostcopyMemory) -> Result<T, Failure> + Send,
) -> Result<Journey<T>, Failure> {
    let folder = Folder::new()?;
    let (started, start) = channel();
    let host = Arc::new(Host { started: Mutex::new(started), expected: way.trace.clone(), kept: Mutex::default() });
    let into = Into::PostCopy { backing: Backing::Private, faults_of: FaultsOf::Everybody };
    let mut receiving = ReceiveOptions::new(into);
    receiving.live = Some(TakeOptions { journal: folder.journal("b")?, lease: None, starter: Arc::clone(&host) as _ });
    let (stop, cancel) = (receiving.cancel.clone(), CancellationToken::new());
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, receiving)?;
    let to = server.address()?;
    let region = MappedRegion::of(Arc::clone(&image.mapping), InstallSize::KIB_4);
    let memory = BitmapMemory::new(MappedMemory::new(vec![region])?);
    memory.dirty().take(&mut pagewire::PageBitmap::new(image.pages() as u64));
    let live = LiveOptions {
        post_copy: way.post_copy,
        background_limit: way.background,
        ..LiveOptions::new(folder.journal("a")?)
    };
    let options = SendOptions { cancel: cancel.clone(), compress: way.compress, ..SendOptions::default() };
    let name = ImageName::new("vm")?;
    let [here, there] = way.cores;
    std::thread::scope(|scope| {
        let serving = scope.spawn(move || pin(here).map(|()| server.serve(|_: ServerEvent<'_>| ())));
        let (live, to, name, options) = (&live, &to, &name, &options);
        let sending = scope.spawn(move || {
            pin(there)?;
            let began = Instant::now();
            let outcome = send_live_memory(memory, name, to, options, (live, Box::new(Still)), &mut NoObserver);
            Ok::<_, Failure>((outcome, began.elapsed().as_secs_f64()))
        });
        let running = scope.spawn(move || {
            pin(here)?;
            guest(&*start.recv_timeout(Duration::from_secs(60))?)
        });
        let ran = running.join().map_err(|_| "the guest panicked")?;
        if way.cut || ran.is_err() {
            cancel.cancel();
        }
        let sent = sending.join().map_err(|_| "the sender panicked")?;
        stop.cancel();
        serving.join().map_err(|_| "the receiver panicked")??;
        let (outcome, seconds) = sent?;
        let sent = if way.cut { outcome.report } else { outcome.into_result()? };
        let trace = host.kept.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Journey { guest: ran?, seconds, sent, trace })
    })
}
