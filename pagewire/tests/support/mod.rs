//! Hosts as an embedder builds them: a folder, a store, and a server on a socket of the folder.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use pagewire::store::{Store, StoreOptions};
use pagewire::{
    Address, GuestMemory, ImageName, Into, KeepWhat, NoObserver, Outcome, ReceiveOptions, Report, Reuse, SendOptions,
    Server, ServerEvent, send_memory,
};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};

pub const PAGE: usize = 4096;

/// Pages that no two seeds share.
pub fn noise(seed: u64, pages: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..pages * PAGE / 8).flat_map(|_| word()).collect()
}

/// A folder with images and a store.
pub struct Host {
    pub dir: tempfile::TempDir,
    pub store: Store,
}

impl Host {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("images")).unwrap();
        let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
        Self { dir, store }
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("images/vm")
    }

    pub fn folder(&self) -> Into {
        Into::Folder(self.dir.path().join("images"))
    }

    pub fn reuse(&self, keep: KeepWhat) -> Reuse {
        Reuse { keep: Some(keep), ..Reuse::new(self.store.clone()) }
    }

    /// Serves one session; `tell` is told of all that happens, and the channel gets how it ended.
    pub fn serve(
        &self,
        into: Into,
        reuse: Reuse,
        tell: impl Fn(ServerEvent<'_>) + Send + Sync + 'static,
    ) -> (Address, Receiver<Report>) {
        let options = ReceiveOptions { reuse: Some(reuse), once: true, ..ReceiveOptions::new(into) };
        // A server that ends takes its socket with it: none is another's.
        static SERVERS: AtomicUsize = AtomicUsize::new(0);
        let name = format!("socket-{}", SERVERS.fetch_add(1, Ordering::Relaxed));
        let socket = format!("unix:{}", self.dir.path().join(name).display());
        let server = Server::bind(&socket.parse().unwrap(), options).unwrap();
        let address = server.address().unwrap();
        let (ended, report) = channel();
        let watch = move |event: ServerEvent<'_>| {
            if let ServerEvent::Ended { outcome, .. } = &event {
                ended.send(outcome.report.clone()).unwrap();
            }
            tell(event);
        };
        std::thread::spawn(move || server.serve(watch));
        (address, report)
    }

    pub fn send(&self, memory: impl GuestMemory, to: &Address, keep: KeepWhat) -> Outcome {
        let options = SendOptions { reuse: Some(self.reuse(keep)), ..SendOptions::default() };
        send_memory(memory, &name(), to, &options, &mut NoObserver)
    }

    pub fn send_file(&self, to: &Address, keep: KeepWhat) -> Outcome {
        let options = SendOptions { reuse: Some(self.reuse(keep)), ..SendOptions::default() };
        pagewire::send(&self.image(), &name(), to, &options, &mut NoObserver)
    }
}

pub fn name() -> ImageName {
    ImageName::new("vm").unwrap()
}
