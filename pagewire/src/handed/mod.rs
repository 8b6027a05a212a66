//! Memory of a hypervisor that loads a guest itself and hands over its userfaultfd, as Firecracker does.
//!
//! For the guest NAME the receiver listens on a Unix socket. The guest's start loads the snapshot with that socket as the
//! backend of its memory; the hypervisor connects and says where the memory is. From then on pages are put in as they
//! come, and what the guest touches is asked for. Nothing can be stored before.

mod message;
mod sink;

pub(crate) use sink::HandedSink;

use message::{HandedError, Part, take};
use pagewire_protocol::error::chain;
use pagewire_protocol::page::Layout;
use pagewire_receiver::memory::PostcopyMemory;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How often it is looked whether the memory is still waited for.
const LOOK_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// What is told of a socket.
pub(crate) enum HandedNews<'a> {
    /// The memory has come.
    Come(&'a Arc<PostcopyMemory>),
    /// Somebody connected who is no such hypervisor.
    Refused(&'a str),
}

/// The memory that a hypervisor has handed over, and how the image lies in it.
#[derive(Clone, Debug)]
pub(crate) struct Handed {
    memory: Arc<PostcopyMemory>,
    parts: Arc<[Part]>,
}

/// Where a hypervisor hands its memory over, once.
#[derive(Debug)]
pub(crate) struct Handing {
    path: PathBuf,
    layout: Layout,
    handed: Mutex<Option<Handed>>,
    come: Condvar,
    /// Readable when somebody touches a page that is absent: it stands for a descriptor that comes later.
    touches: OwnedFd,
}

impl Handing {
    /// Listens at `path`. A socket that nobody listens at any more is replaced. It goes with what this gives.
    pub(crate) fn listen(
        path: &Path,
        layout: Layout,
        tell: impl Fn(HandedNews<'_>) + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let listener = UnixListener::bind(path).or_else(|error| match error.kind() {
            io::ErrorKind::AddrInUse if UnixStream::connect(path).is_err() => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            _ => Err(error),
        })?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let touches = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let (handed, come) = Default::default();
        let handing = Arc::new(Self { path: path.to_path_buf(), layout, handed, come, touches });
        let its = Arc::downgrade(&handing);
        let accept = move || accept(&listener, &its, &tell);
        std::thread::Builder::new().name("pagewire-handed".to_owned()).spawn(accept)?;
        Ok(handing)
    }

    fn handed(&self) -> MutexGuard<'_, Option<Handed>> {
        self.handed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory, if it has come.
    fn now(&self) -> Option<Handed> {
        self.handed().clone()
    }

    /// The memory; waits for it so long.
    fn within(&self, patience: Duration) -> Option<Handed> {
        let lacks = |handed: &mut Option<Handed>| handed.is_none();
        let waited = self.come.wait_timeout_while(self.handed(), patience, lacks);
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    fn welcome(&self, stream: &UnixStream, tell: &impl Fn(HandedNews<'_>)) -> Result<(), HandedError> {
        stream.set_nonblocking(false)?;
        let (memory, parts) = take(stream, &self.layout)?;
        let memory = Arc::new(memory);
        tell(HandedNews::Come(&memory));
        *self.handed() = Some(Handed { memory: Arc::clone(&memory), parts: parts.into() });
        self.come.notify_all();
        // Behind it: whoever is told of a touch has to find the memory.
        let (data, flags) = (epoll::EventData::new_u64(0), epoll::EventFlags::IN);
        Ok(epoll::add(&self.touches, &*memory, data, flags).map_err(io::Error::from)?)
    }
}

impl AsFd for Handing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.touches.as_fd()
    }
}

impl Drop for Handing {
    fn drop(&mut self) {
        if self.handed().is_none() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Takes connections until one has handed the memory over, or nobody waits for it any more.
fn accept(listener: &UnixListener, handing: &Weak<Handing>, tell: &impl Fn(HandedNews<'_>)) {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        let begun = Instant::now();
        if poll(&mut fds, Some(&LOOK_EVERY)).is_err() && begun.elapsed() < Duration::from_millis(1) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let Some(handing) = handing.upgrade() else { return };
        let Ok((stream, _)) = listener.accept() else { continue };
        match handing.welcome(&stream, tell) {
            Ok(()) => {
                // There is one memory: nobody else shall wait here in vain.
                let _ = std::fs::remove_file(&handing.path);
                return;
            }
            Err(error) => tell(HandedNews::Refused(&chain(&error))),
        }
    }
}
