//! A byte stream cut into whole frames; partial input is the normal case.
//!
//! Every frame begins with an eight-byte header. The framer owns one buffer, asks for exactly the bytes that complete
//! the frame under way plus the next header, so page bytes are never moved once read, and it never holds more than one
//! frame of the largest legal size.

use crate::error::DecodeError;
use crate::frame::{FrameHeader, FrameKind, HEADER_BYTES};
use crate::page_buffer::PageBuffer;

/// Room a framer keeps ready when no frame is under way: many small frames come with one read.
const READ_BYTES: usize = 16 * 1024;

/// A header that no frame of this version has: the kind it names, and what is wrong.
pub type BadHeader = (FrameKind, DecodeError);

/// Cuts the bytes of one stream into frames.
#[derive(Debug, Default)]
pub struct Framer {
    buffer: PageBuffer,
    /// Bytes of the buffer that came from the stream: `start..end` are not consumed.
    start: usize,
    end: usize,
}

impl Framer {
    /// A framer at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where the next bytes of the stream belong: never empty.
    pub fn space(&mut self) -> &mut [u8] {
        let under_way = self.peek().ok().flatten();
        let want = under_way.map_or(READ_BYTES, |header| header.frame_bytes().saturating_add(HEADER_BYTES));
        if self.start > 0 && (self.start == self.end || self.start.saturating_add(want) > self.buffer.len()) {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        let limit = self.start.saturating_add(want).max(self.end.saturating_add(1));
        if self.buffer.len() < limit {
            self.buffer.resize(limit);
        }
        let (end, limit) = (self.end, if under_way.is_some() { limit } else { self.buffer.len() });
        self.buffer.get_mut(end..limit).unwrap_or_default()
    }

    /// `count` bytes were written to the front of [`space`](Self::space).
    pub fn filled(&mut self, count: usize) {
        self.end = self.end.saturating_add(count).min(self.buffer.len());
    }

    /// The next whole frame, if it is there. It is consumed by the call.
    ///
    /// # Errors
    /// A header that no frame of this version has, with the kind that it names.
    pub fn next_frame(&mut self) -> Result<Option<(FrameHeader, &[u8])>, BadHeader> {
        let Some(header) = self.peek()? else { return Ok(None) };
        let body = self.start.saturating_add(HEADER_BYTES);
        let end = self.start.saturating_add(header.frame_bytes());
        if end > self.end {
            return Ok(None);
        }
        self.start = end;
        Ok(Some((header, self.buffer.get(body..end).unwrap_or_default())))
    }

    /// Whether a frame has begun and is not whole.
    pub fn is_partial(&self) -> bool {
        self.end > self.start
    }

    /// The header of the frame under way, as soon as all of it is there. Nothing is consumed.
    ///
    /// # Errors
    /// No frame of this version has it.
    pub fn peek(&self) -> Result<Option<FrameHeader>, BadHeader> {
        let bytes = self.buffer.get(self.start..self.end).unwrap_or_default();
        bytes.first_chunk().map(FrameHeader::decode).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Frame, LaneId, Ping};
    use alloc::vec::Vec;
    use proptest::prelude::*;

    proptest! {
        /// However the stream is cut, the same frames come out.
        #[test]
        fn finds_the_same_frames_however_the_stream_is_cut(tokens in proptest::collection::vec(any::<u64>(), 0..50), cuts in proptest::collection::vec(1usize..40, 1..50)) {
            let mut stream = Vec::new();
            for token in &tokens {
                Frame::Ping(Ping { token: *token, answer: false }).encode(LaneId::CONTROL, &mut stream);
            }
            let mut framer = Framer::new();
            let mut seen = Vec::new();
            let mut cuts = cuts.iter().cycle();
            let mut rest = stream.as_slice();
            while !rest.is_empty() {
                let space = framer.space();
                let count = (*cuts.next().unwrap()).min(rest.len()).min(space.len());
                space[..count].copy_from_slice(&rest[..count]);
                framer.filled(count);
                rest = &rest[count..];
                while let Some((header, body)) = framer.next_frame().unwrap() {
                    let Ok(Frame::Ping(ping)) = Frame::decode(header.kind, body) else { panic!("not a ping") };
                    seen.push(ping.token);
                }
            }
            prop_assert_eq!(seen, tokens);
            prop_assert!(!framer.is_partial());
        }
    }
}
