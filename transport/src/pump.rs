//! Moves frames between a machine and its connections, runs its jobs and tells it the time. Knows only `Machine`.
//!
//! It always reads, also while a write is blocked, so two peers never wait for each other. When the session is over it
//! writes what is queued, says that it has finished writing, and reads on for a moment: a socket closed with unread
//! bytes would reset the connection, and the peer would never see why.

use crate::lane::Lane;
use crate::listener::Joining;
use crate::socket::Stream;
use pagewire_protocol::error::{PeerError, Violation};
use pagewire_protocol::frame::LaneId;
use pagewire_protocol::framing::Framer;
use pagewire_protocol::limits::BULK_LANES_MAX;
use pagewire_protocol::session::{Job, Machine, Outgoing};
use pagewire_protocol::time::{Span, Time};
use rustix::process::setpriority_process;
use rustix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Sleep;

/// How long the end of a session may take.
const LINGER: Duration = Duration::from_secs(2);
/// The longest sleep: what is overdue but waits for a lane must not hide what becomes due later.
const TICK: Duration = Duration::from_millis(250);
/// Turns in a row in which something moved, until whoever calls, and the runtime, may look at what else has become
/// ready. Three are what a frame and its answer take: nobody looks in vain where there is nothing else.
const TURNS_MAX: u32 = 4;
/// The nice value of jobs that yield: a third of the processor time that others get.
const JOB_NICE: i32 = 5;

/// Bytes on the wire, frames and their headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wire {
    /// Written.
    pub sent_bytes: u64,
    /// Read.
    pub received_bytes: u64,
}

/// How often a driver tells progress.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// How far a session is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Pages stated, or present at the receiver.
    pub pages: u64,
    /// Pages of the image; zero until it is known.
    pub pages_total: u64,
    /// Bytes on the wire.
    pub wire: Wire,
}

type Done<M> = (<<M as Machine>::Job as Job>::Output, Span);

/// A machine and the connections of its session.
pub struct Pump<M: Machine> {
    machine: M,
    lanes: [Option<Lane>; LaneId::COUNT],
    single_stream: bool,
    start: Instant,
    yields: bool,
    jobs: VecDeque<JoinHandle<Done<M>>>,
    joins: Option<mpsc::Receiver<Joining>>,
    wire: Wire,
    parting_until: Option<tokio::time::Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl<M: Machine> Pump<M> {
    /// Drives `machine` over its control connection, of which `framer` may hold the first bytes already.
    /// `start` is the origin of the times that the machine was and will be told.
    pub fn new(machine: M, control: Box<dyn Stream>, framer: Framer, start: Instant) -> Self {
        let mut pump = Self {
            machine,
            lanes: Default::default(),
            single_stream: false,
            start,
            yields: false,
            jobs: VecDeque::new(),
            joins: None,
            wire: Wire::default(),
            parting_until: None,
            sleep: None,
        };
        let lane = Lane::new(control, framer, pump.now());
        pump.lanes[LaneId::CONTROL.index()] = Some(lane);
        pump
    }

    /// Goes on with another machine on the same connections. What the first has handed out is not waited for.
    #[must_use]
    pub fn turn_into<N: Machine>(self, next: impl FnOnce(M) -> N) -> Pump<N> {
        let Self { machine, lanes, single_stream, start, yields, joins, wire, parting_until, sleep, .. } = self;
        let (machine, jobs) = (next(machine), VecDeque::new());
        Pump { machine, lanes, single_stream, start, yields, jobs, joins, wire, parting_until, sleep }
    }

    /// The machine, when its session is over.
    pub fn into_machine(self) -> M {
        self.machine
    }

    /// The machine.
    pub fn machine(&mut self) -> &mut M {
        &mut self.machine
    }

    /// The time as the machine knows it.
    pub fn now(&self) -> Time {
        since(self.start)
    }

    /// Bytes on the wire so far.
    pub fn wire(&self) -> Wire {
        self.wire
    }

    /// All lanes travel on the control connection.
    pub fn carry_all_lanes(&mut self) {
        self.single_stream = true;
    }

    /// Jobs leave the processors to whoever waits for a page, as far as the system lets them.
    pub fn yield_jobs(&mut self) {
        self.yields = true;
    }

    /// Connections that ask to join come from here.
    pub fn take_joins(&mut self, joins: mpsc::Receiver<Joining>) {
        self.joins = Some(joins);
    }

    /// A connection that this side opened carries `lane` and begins with `join`.
    pub fn attach(&mut self, lane: LaneId, stream: Box<dyn Stream>, join: Outgoing) {
        let now = self.now();
        let mut connection = Lane::new(stream, Framer::new(), now);
        connection.send(join);
        self.put(lane, connection);
        self.machine.handle_lane_open(lane, now);
    }

    fn put(&mut self, lane: LaneId, connection: Lane) {
        if let Some(slot) = self.lanes.get_mut(lane.index()) {
            *slot = Some(connection);
        }
    }

    /// Drives the session until the machine has something to tell; `None` when it is over and the peer knows.
    ///
    /// May be dropped and called again at any await.
    pub async fn next(&mut self) -> Option<M::Event> {
        let mut turns = 0u32;
        loop {
            if let Some(event) = self.machine.poll_event() {
                return Some(event);
            }
            if self.machine.is_over() {
                self.part().await;
                return self.machine.poll_event();
            }
            let now = self.now();
            if self.machine.poll_timeout().is_some_and(|due| due <= now) {
                self.machine.handle_timeout(now);
            }
            let moved = poll_fn(|cx| Poll::Ready(self.turn(now, cx))).await;
            if moved {
                turns += 1;
                if turns.is_multiple_of(TURNS_MAX) {
                    tokio::task::yield_now().await;
                }
                continue;
            }
            if self.machine.work(now) {
                // The runtime learns what has become ready only where it gets its turn: without this, work that goes on
                // would keep what has arrived waiting.
                tokio::task::yield_now().await;
                continue;
            }
            self.wait().await;
            turns = 0;
        }
    }

    /// Sleeps until something can move or is due.
    async fn wait(&mut self) {
        let now = self.now();
        let due = self.machine.poll_timeout().map(|due| due.since(now)).filter(|&span| span > Span::ZERO);
        let sleep = due.map_or(TICK, |span| Duration::from_nanos(span.as_nanos()).min(TICK));
        let until = tokio::time::Instant::now() + sleep;
        // A timer that is set costs less than one set anew for each frame; one that ends early is a turn in vain.
        match &mut self.sleep {
            Some(timer) if !timer.is_elapsed() && timer.deadline() <= until => {}
            Some(timer) => timer.as_mut().reset(until),
            None => self.sleep = Some(Box::pin(tokio::time::sleep_until(until))),
        }
        // Nothing moved in the last turn and no work came after it: all lanes wake this task already.
        let mut is_fresh = true;
        poll_fn(|cx| {
            let moved = !std::mem::take(&mut is_fresh) && self.turn(self.now(), cx);
            if moved {
                Poll::Ready(())
            } else {
                self.sleep.as_mut().map_or(Poll::Pending, |timer| timer.as_mut().poll(cx))
            }
        })
        .await;
    }

    // SPEC 2.8
    /// One turn over everything that can move; says whether anything did. A write that blocks keeps no read waiting.
    fn turn(&mut self, now: Time, cx: &mut Context<'_>) -> bool {
        let mut moved = self.poll_joins(now, cx) | self.poll_jobs(now, cx);
        // Whoever waits for a page waits for no other lane's turn.
        let urgent = std::iter::once(LaneId::URGENT.index());
        for index in urgent.chain(0..LaneId::URGENT.index()) {
            moved |= self.read_lane(index, now, cx);
            moved |= self.write_lane(index, now, cx);
            self.note_progress(index, now);
        }
        moved
    }

    fn poll_joins(&mut self, now: Time, cx: &mut Context<'_>) -> bool {
        let Some(Poll::Ready(Some(joining))) = self.joins.as_mut().map(|joins| joins.poll_recv(cx)) else {
            return false;
        };
        let Joining { lane, join, socket, framer } = joining;
        // A connection that may not join is dropped; the session goes on.
        if self.machine.handle_join(lane, &join, now).is_ok()
            && let Ok(stream) = socket.into_stream()
        {
            self.put(lane, Lane::new(stream, framer, now));
            self.handle_frames(lane.index(), now);
        }
        true
    }

    fn poll_jobs(&mut self, now: Time, cx: &mut Context<'_>) -> bool {
        while let Some(job) = self.machine.poll_job() {
            let yields = self.yields;
            self.jobs.push_back(tokio::task::spawn_blocking(move || {
                if yields {
                    // Of this thread alone, which runs nothing but jobs; one that stays as it is harms nobody.
                    let _ = setpriority_process(None, JOB_NICE);
                }
                let begin = processor_time();
                let output = job.run();
                (output, processor_time().since(begin))
            }));
        }
        let mut moved = false;
        while let Some(Poll::Ready(done)) = self.jobs.front_mut().map(|job| Pin::new(job).poll(cx)) {
            self.jobs.pop_front();
            if let Ok((output, spent)) = done {
                self.machine.handle_job(output, spent, now);
            }
            moved = true;
        }
        moved
    }

    fn read_lane(&mut self, index: usize, now: Time, cx: &mut Context<'_>) -> bool {
        let Some(lane) = self.lanes.get_mut(index).and_then(Option::as_mut).filter(|lane| !lane.ended) else {
            return false;
        };
        let number = u8::try_from(index).unwrap_or(u8::MAX);
        match lane.poll_read(cx) {
            Poll::Pending => {
                if lane.trickles(now) {
                    self.machine
                        .handle_peer_error(PeerError::Timeout("a frame comes at less than 1 KiB a second"), now);
                    return true;
                }
                false
            }
            Poll::Ready(Ok(0)) => {
                lane.ended = true;
                self.machine.handle_peer_error(PeerError::EndOfStream { lane: number }, now);
                true
            }
            Poll::Ready(Ok(count)) => {
                self.wire.received_bytes = self.wire.received_bytes.saturating_add(count as u64);
                self.handle_frames(index, now);
                true
            }
            Poll::Ready(Err(error)) => {
                lane.ended = true;
                self.machine.handle_peer_error(PeerError::Broken { lane: number, reason: error.to_string() }, now);
                true
            }
        }
    }

    fn note_progress(&mut self, index: usize, now: Time) {
        let lane = self.lanes.get_mut(index).and_then(Option::as_mut);
        let id = u8::try_from(index).ok().and_then(|number| LaneId::from_wire(number).ok());
        if let (true, Some(id)) = (lane.is_some_and(Lane::take_progress), id) {
            let carried = (1..LaneId::COUNT)
                .filter(|_| self.single_stream)
                .filter_map(|n| LaneId::from_wire(u8::try_from(n).ok()?).ok());
            std::iter::once(id).chain(carried).for_each(|lane| self.machine.handle_progress(lane, now));
        }
    }

    /// Hands every whole frame of a connection to the machine.
    fn handle_frames(&mut self, index: usize, now: Time) {
        let Some(lane) = self.lanes.get_mut(index).and_then(Option::as_mut) else { return };
        loop {
            match lane.framer.next_frame() {
                Ok(None) => return,
                Ok(Some((header, _))) if !self.single_stream && header.lane.index() != index => {
                    let wrong = Violation::WrongLane { lane: header.lane.number() };
                    return self.machine.handle_peer_error(wrong.into(), now);
                }
                Ok(Some((header, body))) => self.machine.handle_frame(header.lane, header.kind, body, now),
                Err((kind, source)) => {
                    lane.ended = true;
                    return self.machine.handle_peer_error(PeerError::Decode { kind, source }, now);
                }
            }
        }
    }

    /// Writes at most one frame: what arrives meanwhile decides what goes next.
    fn write_lane(&mut self, index: usize, now: Time, cx: &mut Context<'_>) -> bool {
        let Some(lane) = self.lanes.get_mut(index).and_then(Option::as_mut) else { return false };
        let mut moved = false;
        if lane.is_free() {
            let Some(outgoing) = next_frame(&mut self.machine, index, self.single_stream, now) else { return false };
            lane.send(outgoing);
            moved = true;
        }
        match lane.poll_write(cx) {
            Poll::Pending | Poll::Ready(Ok(None)) => moved,
            Poll::Ready(Ok(Some((buffer, bytes)))) => {
                self.wire.sent_bytes = self.wire.sent_bytes.saturating_add(bytes as u64);
                self.machine.recycle(buffer);
                true
            }
            Poll::Ready(Err(error)) => {
                lane.stop_writing();
                // What the peer said before it went is worth more than that it went.
                while self.read_lane(index, now, cx) && !self.machine.is_over() {}
                let lane = u8::try_from(index).unwrap_or(u8::MAX);
                self.machine.handle_peer_error(PeerError::Broken { lane, reason: error.to_string() }, now);
                true
            }
        }
    }

    /// Ends the session: the last frames go out, and the peer gets a moment to read them.
    async fn part(&mut self) {
        let until = *self.parting_until.get_or_insert_with(|| tokio::time::Instant::now() + LINGER);
        let mut scratch = vec![0; 64 * 1024];
        let flush = poll_fn(|cx| if self.poll_part(cx, &mut scratch) { Poll::Ready(()) } else { Poll::Pending });
        // A peer that does not listen any more is not waited for.
        let _ = tokio::time::timeout_at(until, flush).await;
    }

    /// Whether the control connection has written everything and the peer has said that it has, too.
    fn poll_part(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> bool {
        let mut parted = true;
        let now = self.now();
        for index in 0..self.lanes.len() {
            if index == 0 {
                while self.write_lane(index, now, cx) {}
            }
            let Some(lane) = self.lanes.get_mut(index).and_then(Option::as_mut) else { continue };
            if index != 0 {
                lane.stop_writing();
            }
            let shut = lane.is_idle() && lane.poll_shutdown(cx).is_ready();
            lane.ended = lane.ended || lane.poll_drain(cx, scratch).is_ready();
            parted &= index != 0 || (shut && lane.ended);
        }
        parted
    }
}

/// Processor time of the current thread: what a job costs, however busy the machine is.
fn processor_time() -> Time {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let nanos = time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec);
    Time::from_nanos(u64::try_from(nanos).unwrap_or(0))
}

/// The time since a session's start, as its machine knows it.
fn since(start: Instant) -> Time {
    Time::from_nanos(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

/// The machine's next frame for a connection: the control connection may carry every lane. What a guest waits for goes
/// before the background then, of which there may be more at any time.
fn next_frame<M: Machine>(machine: &mut M, index: usize, single_stream: bool, now: Time) -> Option<Outgoing> {
    if !single_stream || index != 0 {
        let lane = u8::try_from(index).ok().and_then(|number| LaneId::from_wire(number).ok())?;
        return machine.poll_frame(lane, now);
    }
    let bulk = (0..BULK_LANES_MAX).map(LaneId::bulk);
    let mut lanes = [LaneId::CONTROL, LaneId::URGENT].into_iter().chain(bulk);
    lanes.find_map(|lane| machine.poll_frame(lane, now))
}

#[cfg(test)]
mod tests;
