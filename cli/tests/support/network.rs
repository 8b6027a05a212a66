//! A slow network between sender and receiver that can be cut, and be gone for good.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Read at once.
const PIECE: usize = 16 << 10;

pub struct Network {
    pub address: String,
    open: Arc<Mutex<Vec<UnixStream>>>,
    gone: Arc<AtomicBool>,
}

impl Network {
    /// Listens at `path` for connections to the socket at `to`, each of which carries so many bytes a second.
    pub fn to(to: &str, path: &Path, bytes_a_second: u64) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let to = PathBuf::from(to.strip_prefix("unix:").unwrap());
        let open: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
        let gone: Arc<AtomicBool> = Arc::default();
        let (streams, over) = (Arc::clone(&open), Arc::clone(&gone));
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let Ok(far) = UnixStream::connect(&to) else { continue };
                let near = near.unwrap();
                let mut streams = streams.lock().unwrap();
                if over.load(Ordering::SeqCst) {
                    continue;
                }
                for (from, to) in [(&near, &far), (&far, &near)] {
                    streams.push(from.try_clone().unwrap());
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    std::thread::spawn(move || carry(from, to, bytes_a_second));
                }
            }
        });
        Self { address: format!("unix:{}", path.display()), open, gone }
    }

    /// Ends all connections.
    pub fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Ends all connections; whoever connects from now on is dropped.
    pub fn end(&self) {
        self.gone.store(true, Ordering::SeqCst);
        self.cut();
    }
}

fn carry(mut from: UnixStream, mut to: UnixStream, bytes_a_second: u64) {
    let mut piece = vec![0; PIECE];
    while let Ok(read @ 1..) = from.read(&mut piece) {
        std::thread::sleep(Duration::from_nanos(read as u64 * 1_000_000_000 / bytes_a_second));
        if to.write_all(&piece[..read]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
