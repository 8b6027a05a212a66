//! Somebody between sender and receiver, who does something once when a frame of one kind comes by.

use pagewire_protocol::frame::{FrameKind, HEADER_BYTES};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What becomes of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It goes on.
    Pass,
    /// It is lost, all connections end, and nobody can connect any more.
    Cut,
}

struct Shared {
    to: String,
    kind: FrameKind,
    act: Mutex<Box<dyn FnMut() -> Then + Send>>,
    seen: AtomicBool,
    cut: AtomicBool,
    open: Mutex<Vec<UnixStream>>,
}

pub struct Proxy {
    pub address: String,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens at `path` for connections to the receiver at `to`; both are Unix sockets.
    pub fn new(path: &Path, to: &str, kind: FrameKind, act: impl FnMut() -> Then + Send + 'static) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let shared = Arc::new(Shared {
            to: to.strip_prefix("unix:").unwrap().to_owned(),
            kind,
            act: Mutex::new(Box::new(act)),
            seen: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            open: Mutex::new(Vec::new()),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok((from, _)) = listener.accept() {
                // One that comes too late is dropped: nobody answers.
                if !accepting.cut.load(Ordering::SeqCst) {
                    accepting.join(from);
                }
            }
        });
        Self { address: format!("unix:{}", path.display()), shared }
    }

    /// Whether the frame has come by.
    pub fn has_seen(&self) -> bool {
        self.shared.seen.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn join(self: &Arc<Self>, from: UnixStream) {
        let Ok(to) = UnixStream::connect(&self.to) else { return };
        let mut open = self.open.lock().unwrap();
        open.extend([from.try_clone().unwrap(), to.try_clone().unwrap()]);
        for (mut read, mut write) in [(from.try_clone().unwrap(), to.try_clone().unwrap()), (to, from)] {
            let shared = Arc::clone(self);
            std::thread::spawn(move || {
                while shared.carry(&mut read, &mut write).is_some() {}
                let _ = (read.shutdown(Shutdown::Read), write.shutdown(Shutdown::Write));
            });
        }
    }

    /// Carries one frame; nothing if the stream is over.
    fn carry(&self, read: &mut UnixStream, write: &mut UnixStream) -> Option<()> {
        let mut frame = vec![0; HEADER_BYTES];
        read.read_exact(&mut frame).ok()?;
        let length = u32::from_le_bytes(*frame.first_chunk()?);
        frame.resize(HEADER_BYTES + usize::try_from(length).ok()?, 0);
        read.read_exact(frame.get_mut(HEADER_BYTES..)?).ok()?;
        if frame.get(4) == Some(&self.kind.0)
            && !self.seen.swap(true, Ordering::SeqCst)
            && (self.act.lock().unwrap())() == Then::Cut
        {
            self.cut.store(true, Ordering::SeqCst);
            for stream in self.open.lock().unwrap().iter() {
                let _ = stream.shutdown(Shutdown::Both);
            }
            return None;
        }
        write.write_all(&frame).ok()
    }
}
