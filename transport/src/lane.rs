//! One connection of a session: bytes in through a framer, frames out piece by piece.
//!
//! Reading goes straight into the framer's buffer and writing straight from page buffers, so a page is copied once by
//! the kernel in each direction and never here.

use crate::socket::Stream;
use pagewire_protocol::framing::Framer;
use pagewire_protocol::limits::{PROGRESS_BYTES_MIN, PROGRESS_SPAN};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::Outgoing;
use pagewire_protocol::time::Time;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Pieces written with one call; the kernel takes up to 1024.
const PIECES_MAX: usize = 64;

/// The buffer of a frame that is written, and the frame's length.
pub(crate) type Written = (PageBuffer, usize);

/// A connection and what is under way on it.
pub(crate) struct Lane {
    stream: Box<dyn Stream>,
    pub(crate) framer: Framer,
    out: Option<(Outgoing, usize)>,
    /// Bytes moved in either direction since that was last told.
    moved: u64,
    /// Since when the frame under way has been watched, and what came of it since.
    watched: (Time, u64),
    pub(crate) ended: bool,
    shut: bool,
}

impl Lane {
    pub(crate) fn new(stream: Box<dyn Stream>, framer: Framer, now: Time) -> Self {
        Self { stream, framer, out: None, moved: 0, watched: (now, 0), ended: false, shut: false }
    }

    /// Reads once; zero bytes are the end of the stream.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut space = ReadBuf::new(self.framer.space());
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut space))?;
        let count = space.filled().len();
        self.framer.filled(count);
        self.watched.1 = self.watched.1.saturating_add(count as u64);
        self.moved = self.moved.saturating_add(count as u64);
        Poll::Ready(Ok(count))
    }

    /// Whether a frame has been under way for too long with too little of it coming.
    pub(crate) fn trickles(&mut self, now: Time) -> bool {
        if !self.framer.is_partial() {
            self.watched = (now, 0);
            return false;
        }
        if now.since(self.watched.0) < PROGRESS_SPAN {
            return false;
        }
        let trickle = self.watched.1 < PROGRESS_BYTES_MIN;
        self.watched = (now, 0);
        trickle
    }

    /// Whether enough has moved since it was last asked to count as a sign of life.
    pub(crate) fn take_progress(&mut self) -> bool {
        let enough = self.moved >= PROGRESS_BYTES_MIN;
        if enough {
            self.moved = 0;
        }
        enough
    }

    /// Whether a frame can be given to [`send`](Self::send).
    pub(crate) fn is_free(&self) -> bool {
        self.is_idle() && !self.shut
    }

    /// Whether nothing is being written.
    pub(crate) fn is_idle(&self) -> bool {
        self.out.is_none()
    }

    /// Starts to write a frame.
    pub(crate) fn send(&mut self, outgoing: Outgoing) {
        self.out = Some((outgoing, 0));
    }

    /// Writes what is under way; the frame's buffer comes back when all of it is written, with its length.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Written>>> {
        while let Some((outgoing, written)) = &mut self.out {
            let total = outgoing.len();
            if *written >= total {
                let buffer = std::mem::take(&mut outgoing.payload.buffer);
                self.out = None;
                return Poll::Ready(Ok(Some((buffer, total))));
            }
            let mut skip = *written;
            let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
            let mut used = 0;
            for piece in outgoing.pieces() {
                let rest = piece.get(skip..).unwrap_or_default();
                skip = skip.saturating_sub(piece.len());
                if let Some(slot) = pieces.get_mut(used).filter(|_| !rest.is_empty()) {
                    *slot = IoSlice::new(rest);
                    used += 1;
                }
            }
            let pieces = pieces.get(..used).unwrap_or_default();
            let count = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, pieces))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *written = written.saturating_add(count);
            self.moved = self.moved.saturating_add(count as u64);
        }
        Poll::Ready(Ok(None))
    }

    /// Writing failed: nothing more goes out, what comes in is still read.
    pub(crate) fn stop_writing(&mut self) {
        (self.out, self.shut) = (None, true);
    }

    /// Says that nothing more will be written.
    pub(crate) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.shut {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            self.shut = true;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads and forgets; true at the end of the stream.
    pub(crate) fn poll_drain(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Poll<bool> {
        loop {
            let mut space = ReadBuf::new(scratch);
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut space)) {
                Ok(()) if !space.filled().is_empty() => {}
                _ => return Poll::Ready(true),
            }
        }
    }
}
