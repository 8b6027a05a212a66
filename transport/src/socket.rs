//! Sockets of all kinds, before and after they belong to a runtime.

use crate::address::Address;
use pagewire_protocol::limits::{HANDSHAKE_SPAN_MAX, SILENCE_MAX};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// Bytes that may wait unsent in the kernel: enough to keep a link busy, few enough that nothing urgent waits long.
const UNSENT_MAX: u32 = 256 * 1024;

/// What decides how fast bytes go to a peer on this host. There is no link to share: BBR, which some systems have for all
/// connections, would set a timer for each piece, and take a quarter more time. Every Linux has this one.
const LOOPBACK_CONGESTION: &[u8] = b"reno";

/// An ordered byte stream in both directions.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connected socket that belongs to no runtime yet, so it can move to the thread of its session.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
}

impl Socket {
    /// Connects to a receiver; each resolved address is tried in turn.
    ///
    /// # Errors
    /// None of them answers, with the last one's reason.
    pub fn connect(address: &Address) -> io::Result<Self> {
        if let Address::Unix(path) = address {
            return UnixStream::connect(path).map(Self::Unix);
        }
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name leads to no address");
        for address in address.resolve().map_err(|error| io::Error::other(error.to_string()))? {
            match connect(address) {
                Ok(stream) => {
                    tune(&stream)?;
                    return Ok(Self::Tcp(stream));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Two sockets that are connected to each other.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        for socket in [&one, &other] {
            let socket = socket2::SockRef::from(socket);
            // As much as the system allows: a local copy is limited by memory, not by waking the other side.
            let _ = socket.set_send_buffer_size(PAIR_BUFFER).and_then(|()| socket.set_recv_buffer_size(PAIR_BUFFER));
        }
        Ok((Self::Unix(one), Self::Unix(other)))
    }

    /// Limits how long a blocking read waits.
    pub(crate) fn set_read_timeout(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(patience),
            Self::Unix(stream) => stream.set_read_timeout(patience),
        }
    }

    /// The socket as a stream of the current runtime.
    ///
    /// # Errors
    /// The runtime cannot take it.
    pub fn into_stream(self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                Box::new(tokio::net::TcpStream::from_std(stream)?)
            }
            Self::Unix(stream) => {
                stream.set_nonblocking(true)?;
                Box::new(tokio::net::UnixStream::from_std(stream)?)
            }
        })
    }
}

impl io::Read for Socket {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(space),
            Self::Unix(stream) => stream.read(space),
        }
    }
}

const PAIR_BUFFER: usize = 512 * 1024;

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    let socket = TcpStream::from(socket);
    do_not_pace(&socket, address.ip());
    let patience = Duration::from_nanos(HANDSHAKE_SPAN_MAX.as_nanos());
    socket2::SockRef::from(&socket).connect_timeout(&address.into(), patience)?;
    Ok(socket)
}

/// Has connections over loopback not be paced. Called before the socket is connected or listens: BBR leaves its pacing
/// on when something else takes its place. A system that does not allow it goes on with what it has.
pub(crate) fn do_not_pace(socket: &impl AsFd, address: IpAddr) {
    if address.to_canonical().is_loopback() {
        let _ = socket2::SockRef::from(socket).set_tcp_congestion(LOOPBACK_CONGESTION);
    }
}

/// What every TCP connection of a session needs: no waiting for more, little unsent, a bounded wait for a dead peer.
pub(crate) fn tune(stream: &TcpStream) -> io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(UNSENT_MAX)?;
    socket.set_tcp_user_timeout(Some(Duration::from_nanos(SILENCE_MAX.as_nanos())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The taken one has it from the listener. That the other had it before it was connected shows nowhere but in its speed.
    #[test]
    fn connections_over_loopback_have_their_own_congestion_control() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = crate::listener::Listener::bind(&Address::Tcp(local.to_owned())) else { continue };
            let Socket::Tcp(stream) = Socket::connect(&listener.address().unwrap()).unwrap() else { panic!("TCP") };
            let taken = listener.accept(Duration::from_secs(1)).unwrap();
            let Some((Socket::Tcp(taken), _)) = taken else { panic!("nothing to take") };
            for stream in [stream, taken] {
                let name = socket2::SockRef::from(&stream).tcp_congestion().unwrap();
                assert!(name.starts_with(LOOPBACK_CONGESTION), "{}", String::from_utf8_lossy(&name));
            }
        }
    }

    /// It is the stranger's end alone, and the listener goes on.
    #[test]
    fn a_connection_that_is_reset_before_it_is_taken_is_no_error() {
        let listener = crate::listener::Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned())).unwrap();
        let Address::Tcp(at) = listener.address().unwrap() else { panic!("TCP") };
        let stream = TcpStream::connect(&at).unwrap();
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        drop(stream);
        std::thread::sleep(Duration::from_millis(50));
        assert!(listener.accept(Duration::from_millis(200)).unwrap().is_some());
    }
}
