//! One direction of one connection: a byte stream with delay, rate, a bounded buffer, and an end that may come early.
//!
//! Bytes leave the writer's buffer at the link's rate and arrive a delay later, cut into pieces of any size, in order.

use crate::rng::Rng;
use pagewire_protocol::time::{Span, Time};
use std::collections::VecDeque;

/// What a link is like.
#[derive(Clone, Copy, Debug)]
pub struct LinkConfig {
    /// From the moment a byte leaves to the moment it arrives.
    pub delay: Span,
    /// Bytes a second; `None` is as many as there are.
    pub rate: Option<u64>,
    /// Bytes that wait to leave before the writer is told to wait.
    pub buffer: usize,
    /// Bytes of the largest piece that arrives at once.
    pub piece_max: usize,
    /// From then on it carries one byte a second.
    pub trickles_from: Option<Time>,
}

impl LinkConfig {
    /// A link that only delays.
    pub const fn delaying(delay: Span) -> Self {
        Self { delay, rate: None, buffer: usize::MAX, piece_max: usize::MAX, trickles_from: None }
    }
}

/// How a link breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// After so many bytes both sides are told.
    Bytes(u64),
    /// After so many bytes nothing arrives any more and nobody is told.
    Silence(u64),
}

/// One direction.
#[derive(Debug)]
pub struct Pipe {
    config: LinkConfig,
    free_at: Time,
    /// When the bytes of each piece have left, how many they are.
    leaving: VecDeque<(Time, usize)>,
    arriving: VecDeque<(Time, Vec<u8>)>,
    cut: Option<Cut>,
    stall: Option<(Time, Time)>,
    /// Bytes taken from the writer.
    pub bytes: u64,
    /// The writer has ended the stream.
    ended: Option<Time>,
    broken: Option<Time>,
}

impl Pipe {
    /// A pipe that breaks as `cut` says and carries nothing during `stall`.
    pub fn new(config: LinkConfig, cut: Option<Cut>, stall: Option<(Time, Time)>) -> Self {
        Self {
            config,
            free_at: Time::ZERO,
            leaving: VecDeque::new(),
            arriving: VecDeque::new(),
            cut,
            stall,
            bytes: 0,
            ended: None,
            broken: None,
        }
    }

    /// Whether the writer may hand over a frame.
    pub fn has_room(&mut self, now: Time) -> bool {
        while self.leaving.front().is_some_and(|(left, _)| *left <= now) {
            self.leaving.pop_front();
        }
        let waiting: usize = self.leaving.iter().map(|(_, bytes)| bytes).sum();
        waiting < self.config.buffer
    }

    /// Takes bytes from the writer.
    pub fn write(&mut self, bytes: &[u8], now: Time, rng: &mut Rng) {
        let mut rest = bytes;
        while !rest.is_empty() && self.broken.is_none() {
            let most = if self.trickles(now) { 1 } else { rest.len().min(self.config.piece_max) };
            let (piece, after) = rest.split_at(rng.between(1, most as u64) as usize);
            rest = after;
            self.write_piece(piece, now);
        }
    }

    fn trickles(&self, now: Time) -> bool {
        self.config.trickles_from.is_some_and(|from| self.free_at.max(now) >= from)
    }

    fn write_piece(&mut self, piece: &[u8], now: Time) {
        let rate = if self.trickles(now) { Some(1) } else { self.config.rate };
        let nanos = rate.map_or(0, |rate| (piece.len() as u64).saturating_mul(1_000_000_000) / rate);
        self.free_at = self.free_at.max(now) + Span::from_nanos(nanos);
        let mut arrives = self.free_at + self.config.delay;
        if let Some((_, end)) = self.stall.filter(|(begin, end)| arrives >= *begin && arrives < *end) {
            arrives = end;
        }
        arrives = self.arriving.back().map_or(arrives, |(last, _)| arrives.max(*last));
        let (kept, breaks) = match self.cut {
            Some(Cut::Bytes(at)) => (at.saturating_sub(self.bytes), true),
            Some(Cut::Silence(at)) => (at.saturating_sub(self.bytes), false),
            None => (u64::MAX, false),
        };
        let kept = piece.len().min(usize::try_from(kept).unwrap_or(usize::MAX));
        self.bytes += piece.len() as u64;
        self.leaving.push_back((self.free_at, piece.len()));
        if kept > 0 {
            self.arriving.push_back((arrives, piece[..kept].to_vec()));
        }
        if kept < piece.len() && breaks {
            self.broken = Some(arrives);
        }
    }

    /// Breaks now; both sides are told.
    pub fn reset(&mut self, now: Time) {
        self.broken.get_or_insert(now);
    }

    /// No more bytes will come.
    pub fn end(&mut self, now: Time) {
        let last = self.arriving.back().map_or(now, |(last, _)| *last);
        let silent = matches!(self.cut, Some(Cut::Silence(at)) if self.bytes > at);
        if self.ended.is_none() && !silent {
            self.ended = Some(last.max(self.free_at + self.config.delay).max(now));
        }
    }

    /// The next bytes that have arrived.
    pub fn read(&mut self, now: Time) -> Option<Vec<u8>> {
        let (arrives, _) = self.arriving.front()?;
        if *arrives > now {
            return None;
        }
        self.arriving.pop_front().map(|(_, bytes)| bytes)
    }

    /// Whether the connection is seen to be broken.
    pub fn is_broken(&self, now: Time) -> bool {
        self.broken.is_some_and(|at| at <= now)
    }

    /// Whether the reader has seen the writer's end of the stream.
    pub fn is_at_end(&self, now: Time) -> bool {
        self.arriving.is_empty() && self.ended.is_some_and(|at| at <= now)
    }

    /// When something happens here next, after `now`.
    pub fn next(&self, now: Time) -> Option<Time> {
        let arrives = self.arriving.front().map(|(at, _)| *at);
        let leaves = self.leaving.front().map(|(at, _)| *at);
        let ends = [self.ended, self.broken].into_iter().flatten().filter(|&at| at > now);
        arrives.into_iter().chain(leaves).filter(|&at| at > now).chain(ends).min()
    }
}
