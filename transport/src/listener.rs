//! Accepts connections and tells beginnings of sessions from lanes that join one.
//!
//! The first frame decides: HELLO begins a session, JOIN brings a lane to one. Until then a connection is a stranger,
//! with little time and a buffer of a few KiB; whoever runs the listener limits how many there are.

use crate::address::{Address, AddressError};
use crate::socket::{Socket, do_not_pace, tune};
use pagewire_protocol::frame::{Frame, FrameKind, Join, LaneId};
use pagewire_protocol::framing::Framer;
use pagewire_protocol::limits::{HANDSHAKE_SPAN_MAX, JOIN_SPAN_MAX};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::collections::HashMap;
use std::io::{self, Read};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Lanes that may wait to be taken by their session.
const JOINS_WAITING_MAX: usize = 16;

/// Device and inode of a file.
type FileId = (u64, u64);

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    /// The socket, where it is, and which file that was.
    Unix(UnixListener, PathBuf, FileId),
}

/// Waits for connections.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
}

/// What a connection turned out to be.
#[derive(Debug)]
pub enum Arrival {
    /// The control connection of a new session; its HELLO is still in the framer.
    Session(Socket, Framer),
    /// A lane for a session.
    Lane(Joining),
}

/// A connection that wants to carry a lane of a session.
#[derive(Debug)]
pub struct Joining {
    /// Which lane.
    pub lane: LaneId,
    /// What it showed.
    pub join: Join,
    /// The connection.
    pub socket: Socket,
    /// What came behind the JOIN.
    pub framer: Framer,
}

impl Listener {
    /// Listens at an address. A Unix socket is made for its owner alone and removed when the listener goes, unless another
    /// file has taken its place.
    ///
    /// # Errors
    /// The address cannot be resolved or is taken.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let kind = match address {
            Address::Unix(path) => {
                let (listener, id) = bind_private(path)?;
                listener.set_nonblocking(true)?;
                Kind::Unix(listener, path.clone(), id)
            }
            Address::Tcp(_) => {
                let addresses = address.resolve().map_err(|error: AddressError| io::Error::other(error.to_string()))?;
                let listener = TcpListener::bind(addresses.as_slice())?;
                // Whoever is taken from it has it, too.
                do_not_pace(&listener, listener.local_addr()?.ip());
                listener.set_nonblocking(true)?;
                Kind::Tcp(listener)
            }
        };
        Ok(Self { kind })
    }

    /// The address that others connect to, with the port that was found for port 0.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match &self.kind {
            Kind::Tcp(listener) => Address::Tcp(listener.local_addr()?.to_string()),
            Kind::Unix(_, path, _) => Address::Unix(path.clone()),
        })
    }

    /// The next connection and who it is, or nothing after `patience`.
    ///
    /// # Errors
    /// The process has no descriptors left, for instance; trying again later may help.
    pub fn accept(&self, patience: Duration) -> io::Result<Option<(Socket, String)>> {
        let accepted = match &self.kind {
            Kind::Tcp(listener) => listener.accept().and_then(|(stream, peer)| {
                stream.set_nonblocking(false)?;
                tune(&stream)?;
                Ok((Socket::Tcp(stream), peer.to_string()))
            }),
            Kind::Unix(listener, path, _) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                Ok((Socket::Unix(stream), format!("unix:{}", path.display())))
            }),
        };
        match accepted {
            Ok(accepted) => return Ok(Some(accepted)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let fd = match &self.kind {
            Kind::Tcp(listener) => listener.as_fd(),
            Kind::Unix(listener, ..) => listener.as_fd(),
        };
        let patience = Timespec { tv_sec: 0, tv_nsec: i64::from(patience.subsec_nanos()) };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&patience))?;
        Ok(None)
    }
}

/// Binds a Unix socket that nobody else could ever open: it is made in a folder of its own and moved into place.
fn bind_private(path: &Path) -> io::Result<(UnixListener, FileId)> {
    let stale = path.symlink_metadata().is_ok_and(|info| info.file_type().is_socket());
    if stale && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
        // Left by a receiver that was killed.
        std::fs::remove_file(path)?;
    }
    if path.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut folder = path.as_os_str().to_owned();
    folder.push(format!(".{}", std::process::id()));
    let folder = PathBuf::from(folder);
    std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
    let made = folder.join(name);
    let bound = UnixListener::bind(&made).and_then(|listener| {
        std::fs::set_permissions(&made, PermissionsExt::from_mode(0o600))?;
        let id = file_id(&made)?;
        // Somebody else's socket that appeared meanwhile is not replaced.
        renameat_with(CWD, &made, CWD, path, RenameFlags::NOREPLACE)?;
        Ok((listener, id))
    });
    // What is left of it is of no use to anybody.
    let _ = std::fs::remove_file(&made);
    let _ = std::fs::remove_dir(&folder);
    bound
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Kind::Unix(_, path, id) = &self.kind else { return };
        // Somebody may have removed it and listen there himself. No other file has its number while it is open.
        if file_id(path).is_ok_and(|there| there == *id) {
            // Nobody can be told if it is gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Which file a path leads to; a link stands for itself.
fn file_id(path: &Path) -> io::Result<FileId> {
    let info = path.symlink_metadata()?;
    Ok((info.dev(), info.ino()))
}

impl Arrival {
    /// Reads a connection's first header, and for a JOIN its whole frame. `begin` is when it was accepted.
    ///
    /// # Errors
    /// Too slow, gone, or not a pagewire peer.
    // SPEC 9.3
    pub fn greet(mut socket: Socket, begin: Instant) -> io::Result<Self> {
        let mut framer = Framer::new();
        let refuse = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        loop {
            let first = framer.peek().map_err(|(kind, error)| refuse(&format!("{kind}: {error}")))?;
            let limit = match first.map(|header| header.kind) {
                None => HANDSHAKE_SPAN_MAX,
                Some(FrameKind::HELLO) => {
                    // The session's own handshake limit counts from `begin` too.
                    socket.set_read_timeout(None)?;
                    return Ok(Self::Session(socket, framer));
                }
                Some(FrameKind::JOIN) => JOIN_SPAN_MAX,
                Some(kind) => return Err(refuse(&format!("{kind} is not how a connection begins"))),
            };
            let left = Duration::from_nanos(limit.as_nanos()).checked_sub(begin.elapsed());
            let left = left.filter(|left| !left.is_zero()).ok_or_else(|| refuse("no first frame in time"))?;
            let frame = framer.next_frame().map_err(|(kind, error)| refuse(&format!("{kind}: {error}")))?;
            if let Some((header, body)) = frame {
                let Ok(Frame::Join(join)) = Frame::decode(header.kind, body) else {
                    return Err(refuse("malformed JOIN"));
                };
                socket.set_read_timeout(None)?;
                return Ok(Self::Lane(Joining { lane: header.lane, join, socket, framer }));
            }
            socket.set_read_timeout(Some(left))?;
            let count = socket.read(framer.space())?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            framer.filled(count);
        }
    }
}

/// The sessions of a process that lanes may join.
#[derive(Clone, Debug, Default)]
pub struct Sessions {
    open: Arc<Mutex<HashMap<[u8; 16], mpsc::Sender<Joining>>>>,
}

/// A session that can be joined for as long as this lives.
#[derive(Debug)]
pub struct Registration {
    sessions: Sessions,
    session: [u8; 16],
}

impl Sessions {
    /// Lets lanes join `session`; `None` if one of that id is open.
    pub fn register(&self, session: [u8; 16]) -> Option<(Registration, mpsc::Receiver<Joining>)> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.contains_key(&session) {
            return None;
        }
        let (sender, receiver) = mpsc::channel(JOINS_WAITING_MAX);
        open.insert(session, sender);
        Some((Registration { sessions: self.clone(), session }, receiver))
    }

    /// Brings a lane to its session; a lane that belongs to none, or to one that is busy with others, is dropped.
    pub fn deliver(&self, joining: Joining) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = open.get(&joining.join.session) {
            let _ = session.try_send(joining);
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.sessions.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.session);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_ends_removes_its_own_socket_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let bind = || Listener::bind(&Address::Unix(path.clone())).unwrap();
        let first = bind();
        assert!(Listener::bind(&Address::Unix(path.clone())).is_err(), "somebody listens there");
        // Somebody tidies up, and another server takes the name.
        std::fs::remove_file(&path).unwrap();
        let second = bind();
        drop(first);
        assert!(UnixStream::connect(&path).is_ok(), "the second one still listens");
        drop(second);
        assert!(path.symlink_metadata().is_err(), "nothing stays");
        let third = bind();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "another's").unwrap();
        drop(third);
        assert_eq!(std::fs::read(&path).unwrap(), b"another's");
    }
}
