//! A connection of a world: two pipes, and how what has arrived on them gets to the machine that reads it.

use crate::link::Pipe;
use pagewire_protocol::error::{PeerError, Violation};
use pagewire_protocol::frame::{Frame, FrameKind, LaneId};
use pagewire_protocol::framing::Framer;
use pagewire_protocol::session::Machine;
use pagewire_protocol::time::Time;

pub(super) struct Connection {
    pub(super) lane: LaneId,
    /// To the receiver, to the sender.
    pub(super) pipes: [Pipe; 2],
    pub(super) framers: [Framer; 2],
    /// Whether each side takes frames of the lane from it: receiver, sender.
    pub(super) carries: [bool; 2],
    /// Whether each side has been told that it ended.
    pub(super) told: [bool; 2],
}

/// Hands what has arrived on a connection to the machine that reads it. The clocks are the world's and that machine's.
pub(super) fn read<M: Machine>(
    connection: &mut Connection,
    way: usize,
    machine: &mut M,
    single_stream: bool,
    clocks: (Time, Time),
    on_frame: &mut impl FnMut(FrameKind),
) -> bool {
    let (now, clock) = clocks;
    if connection.told[way] || machine.is_over() {
        return false;
    }
    let lane = connection.lane.number();
    let Some(bytes) = connection.pipes[way].read(now) else {
        let broken = connection.pipes.iter().any(|pipe| pipe.is_broken(now));
        let end = if broken {
            PeerError::Broken { lane, reason: "connection reset".to_owned() }
        } else if connection.pipes[way].is_at_end(now) {
            PeerError::EndOfStream { lane }
        } else {
            return false;
        };
        connection.told[way] = true;
        machine.handle_peer_error(end, clock);
        return true;
    };
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let framer = &mut connection.framers[way];
        let space = framer.space();
        assert!(!space.is_empty(), "a framer always has space");
        let count = space.len().min(rest.len());
        space[..count].copy_from_slice(&rest[..count]);
        framer.filled(count);
        rest = &rest[count..];
        hand_over(connection, way, machine, single_stream, clock, on_frame);
    }
    true
}

fn hand_over<M: Machine>(
    connection: &mut Connection,
    way: usize,
    machine: &mut M,
    single_stream: bool,
    clock: Time,
    on_frame: &mut impl FnMut(FrameKind),
) {
    loop {
        let carried = connection.lane;
        match connection.framers[way].next_frame() {
            Ok(None) => return,
            Ok(Some((header, body))) if !connection.carries[way] => {
                let Ok(Frame::Join(join)) = Frame::decode(header.kind, body) else {
                    panic!("a connection begins with JOIN")
                };
                if machine.handle_join(header.lane, &join, clock).is_err() {
                    connection.told[way] = true;
                    return;
                }
                connection.carries[way] = true;
            }
            Ok(Some((header, _))) if header.lane != carried && !single_stream => {
                let lane = header.lane.number();
                return machine.handle_peer_error(Violation::WrongLane { lane }.into(), clock);
            }
            Ok(Some((header, body))) => {
                on_frame(header.kind);
                machine.handle_frame(header.lane, header.kind, body, clock);
            }
            Err((kind, source)) => {
                connection.told[way] = true;
                return machine.handle_peer_error(PeerError::Decode { kind, source }, clock);
            }
        }
    }
}
