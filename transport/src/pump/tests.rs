use super::*;
use crate::{Socket, block_on};
use pagewire_protocol::frame::{Frame, FrameHeader, FrameKind, Join, Ping};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::NoJob;
use std::io::Read;

/// Has frames for its lanes from the first moment, and is over when all have gone.
struct Talker {
    left: [u64; LaneId::COUNT],
}

impl Machine for Talker {
    type Job = NoJob;
    type Event = ();

    fn handle_frame(&mut self, _lane: LaneId, _kind: FrameKind, _body: &[u8], _now: Time) {}
    fn handle_progress(&mut self, _lane: LaneId, _now: Time) {}
    fn handle_peer_error(&mut self, _error: PeerError, _now: Time) {}
    fn handle_timeout(&mut self, _now: Time) {}
    fn handle_job(&mut self, _output: (), _spent: Span, _now: Time) {}
    fn handle_join(&mut self, _lane: LaneId, _join: &Join, _now: Time) -> Result<(), Violation> {
        Ok(())
    }
    fn handle_lane_open(&mut self, _lane: LaneId, _now: Time) {}
    fn work(&mut self, _now: Time) -> bool {
        false
    }

    fn poll_frame(&mut self, lane: LaneId, _now: Time) -> Option<Outgoing> {
        let left = &mut self.left[lane.index()];
        *left = left.checked_sub(1)?;
        Some(Outgoing::frame(&Frame::Ping(Ping { token: *left, answer: false }), lane))
    }

    fn poll_job(&mut self) -> Option<NoJob> {
        None
    }
    fn poll_event(&mut self) -> Option<()> {
        None
    }
    fn poll_timeout(&self) -> Option<Time> {
        None
    }
    fn recycle(&mut self, _buffer: PageBuffer) {}

    fn is_over(&self) -> bool {
        self.left == [0; LaneId::COUNT]
    }
}

/// The lanes of the frames that a machine with so many for each of its lanes says on one connection.
fn said(left: [u64; LaneId::COUNT]) -> Vec<usize> {
    let (near, mut far) = Socket::pair().unwrap();
    let listening = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let drive = async {
        let mut pump = Pump::new(Talker { left }, near.into_stream().unwrap(), Framer::new(), Instant::now());
        pump.carry_all_lanes();
        pump.next().await
    };
    assert_eq!(block_on(drive).unwrap(), None);
    let bytes = listening.join().unwrap();
    let (mut rest, mut lanes) = (bytes.as_slice(), Vec::new());
    while let Some(header) = rest.first_chunk() {
        let header = FrameHeader::decode(header).unwrap();
        lanes.push(header.lane.index());
        rest = &rest[header.frame_bytes()..];
    }
    lanes
}

#[test]
fn a_connection_that_carries_all_lanes_says_what_is_urgent_before_the_background() {
    let mut left = [0; LaneId::COUNT];
    for lane in [LaneId::bulk(0), LaneId::bulk(7), LaneId::URGENT, LaneId::CONTROL] {
        left[lane.index()] = 3;
    }
    let urgent = LaneId::URGENT.index();
    assert_eq!(said(left), [0, 0, 0, urgent, urgent, urgent, 1, 1, 1, 8, 8, 8]);
}
