//! The session targets of guests that run: engine and host together against a peer that is nearly right.

use super::{Input, common, small_image, statement};
use crate::host::{Action, Host};
use crate::live_peer::{FROM, TO, blobs, live_receiver, live_sender, root};
use crate::memory::ImageSink;
use crate::peer::{AgainstReceiver, AgainstSender};
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{Ack, Blob, Done, Frame, FrameKind, ImageName, LaneId, Root, RoundEnd, Want};
use pagewire_protocol::handover::{Handover, Input as Told, RecordKind, Word};
use pagewire_protocol::session::{Machine, Phase};
use pagewire_receiver::Event as ReceiverEvent;
use pagewire_sender::Event as SenderEvent;

const WORDS: [Word; 5] = [Word::Ready, Word::Commit, Word::Started, Word::Reject, Word::Gone];

/// The hand-over of an honest session that brings the small image, and one with a flaw.
fn binding(input: &mut Input<'_>) -> Handover {
    let mut handover = crate::live_peer::handover(&small_image());
    match input.byte() {
        0..200 => {}
        200..210 => handover.root = Digest([input.byte(); 32]),
        210..220 => handover.session = [input.byte(); 16],
        220..230 => handover.epoch = pagewire_protocol::handover::Epoch::new(input.number()),
        230..240 => handover.sender.0[0] ^= input.byte(),
        240..250 => handover.receiver.0[0] ^= input.byte(),
        250..253 => handover.arbiter = true,
        _ => handover.post_copy = true,
    }
    handover
}

fn word(input: &mut Input<'_>) -> (Word, Handover) {
    (WORDS[usize::from(input.byte()) % WORDS.len()], binding(input))
}

/// A real receiver and its host. It is ready only for what it was told the root of, and starts only what it was ready for.
pub fn live_receiver_session(data: &[u8]) {
    take_over(data);
}

/// The same, and what its host is in the end.
pub fn take_over(data: &[u8]) -> Host {
    let mut input = Input(data);
    let (image, flags) = (small_image(), input.byte());
    let sink = if flags & 1 == 0 { ImageSink::empty(&image) } else { ImageSink::holding(super::older(&image)) };
    let (mut script, mut host) = (live_receiver(), Host::new(2));
    let phases = [Phase::Receiving, Phase::Receiving, Phase::Waiting, Phase::Deciding];
    script.enter(phases[usize::from(flags >> 4) % phases.len()], &image, &sink);
    let (all, mut frames, mut ready) = (blobs(), 0u64, Vec::new());
    let mut parts = all.parts().collect::<Vec<_>>().into_iter();
    while !input.0.is_empty() && !script.engine.is_over() {
        match input.byte() % 16 {
            op @ 0..8 => common(op, &mut script, &mut input),
            8 => script.take(&sink),
            9 => script.raw(LaneId::CONTROL, FrameKind(input.byte() % 24), input.bytes()),
            10 => {
                let told = frames.wrapping_add(input.number());
                let round = RoundEnd { round: u32::from(input.byte() / 64), frames: told };
                script.say(LaneId::bulk(0), &Frame::Round(round));
            }
            11 => {
                let flags = input.byte();
                let digests = [root(&image, &all), image.root(&[0; 32]), root(&image, &Blobs::new()), Digest([1; 32])];
                let (round, digest) = (u32::from(flags / 64), digests[usize::from(flags) % digests.len()]);
                script.say(LaneId::CONTROL, &Frame::Root(Root { round, pages: image.pages(), digest }));
            }
            12 => {
                if let Some(part) = parts.next() {
                    script.say(LaneId::CONTROL, &Frame::Blob(flawed(part, &mut input)));
                }
            }
            13 => {
                let (word, handover) = word(&mut input);
                script.word(word, handover);
            }
            _ => {
                let body = statement(&image, &mut input);
                script.raw(LaneId::bulk(0), FrameKind::PAGES, &body);
                frames += 1;
            }
        }
        tell_receiver(&mut script, &mut host, &mut ready);
    }
    script.settle();
    tell_receiver(&mut script, &mut host, &mut ready);
    assert!(host.told_to_run <= 1 && (host.told_to_run == 0 || !ready.is_empty()), "started without READY");
    for (handover, blobs) in &ready {
        let state = sink.state();
        assert!(state.finished && state.image == image, "ready with a wrong image");
        assert_eq!(handover.root, root(&image, blobs), "ready for something else");
    }
    let settled = host.records.iter().any(|record| record.kind == RecordKind::Gone);
    assert!(settled || !matches!(script.engine.outcome(), Some(Ok(()))), "content before GONE");
    host
}

/// A part as it is, or with a byte or a field that is wrong.
fn flawed<'a>(part: Blob<'a>, input: &mut Input<'_>) -> Blob<'a> {
    match input.byte() {
        0..200 => part,
        200..215 => Blob { offset: part.offset.wrapping_add(u32::from(input.byte())), ..part },
        215..230 => Blob { version: part.version ^ u32::from(input.byte()), ..part },
        230..245 => Blob { name: ImageName::new("another").unwrap(), ..part },
        _ => Blob { part: &part.part[..part.part.len() / 2], ..part },
    }
}

fn tell_receiver(script: &mut AgainstReceiver, host: &mut Host, ready: &mut Vec<(Handover, Blobs)>) {
    for event in script.events() {
        let actions = match event {
            ReceiverEvent::Ready(handover, blobs) => {
                ready.push((handover, blobs));
                host.ready(handover)
            }
            ReceiverEvent::Said(message) => host.hear(FROM, message),
            ReceiverEvent::Fill(_) => {
                script.engine.refuse(CloseCode::REFUSED, "no guest lacks pages here");
                Vec::new()
            }
            ReceiverEvent::Offered(_) | ReceiverEvent::Verified | ReceiverEvent::Finished => Vec::new(),
        };
        for action in actions {
            if let Action::Say(message) = action {
                script.engine.say(message);
            }
        }
        if host.records.iter().any(|record| record.kind == RecordKind::Gone) {
            script.engine.release();
        }
    }
}

/// What a guest was told by its session.
#[derive(Default)]
struct Guest {
    stands: bool,
    offered: bool,
}

/// A real sender and its host. Its guest runs on unless it was handed over, and is gone only by STARTED.
pub fn live_sender_session(data: &[u8]) {
    hand_over(data);
}

/// The same, and what its host is in the end.
pub fn hand_over(data: &[u8]) -> Host {
    let mut input = Input(data);
    let (image, flags) = (small_image(), input.byte());
    let (mut script, mut host, mut guest) = (live_sender(&image), Host::new(1), Guest::default());
    host.open(crate::peer::SESSION);
    let phases = [Phase::Sending, Phase::Sending, Phase::Opening, Phase::Greeting];
    script.enter(phases[usize::from(flags >> 4) % phases.len()], &image);
    while !input.0.is_empty() && !script.engine.is_over() {
        match input.byte() % 14 {
            op @ 0..8 => common(op, &mut script, &mut input),
            8 => script.raw(LaneId::CONTROL, FrameKind(input.byte() % 24), input.bytes()),
            9 => {
                let digest = if input.byte() & 1 == 0 { root(&image, &blobs()) } else { image.root(&[0; 32]) };
                script.say(LaneId::CONTROL, &Frame::Done(Done { pages: image.pages(), root: digest }));
            }
            10 => {
                let (word, handover) = word(&mut input);
                script.word(word, handover);
            }
            11 if guest.stands => {
                let stands = if input.byte() < 240 { Ok(blobs()) } else { Err("it runs on".to_owned()) };
                script.engine.paused(stands, script.now);
            }
            11 => script.engine.paused(Ok(blobs()), script.now),
            12 => {
                let accept = script.honest_accept(&image);
                script.take(accept);
            }
            _ => {
                let wants = (0..input.byte() % 4).map(|_| Want {
                    region: u16::from(input.byte() % 3),
                    first: input.number(),
                    count: u32::try_from(input.number()).unwrap_or(u32::MAX).max(1),
                });
                let wants: Vec<Want> = wants.collect();
                let frames = script.frames(LaneId::bulk(0)).saturating_sub(u64::from(input.byte() % 4));
                let settled = frames.saturating_sub(wants.len() as u64);
                script.say(LaneId::bulk(0), &Frame::Ack(Ack { frames, settled, wants }));
            }
        }
        tell_sender(&mut script, &mut host, &mut guest);
    }
    script.settle();
    tell_sender(&mut script, &mut host, &mut guest);
    let gone = host.records.iter().any(|record| record.kind == RecordKind::Gone);
    match script.engine.outcome() {
        Some(Ok(())) => assert!(gone && guest.offered, "content without GONE"),
        Some(Err(_)) if !guest.offered => assert!(!guest.stands, "left standing"),
        Some(Err(_)) => {
            let left = !host.records.is_empty();
            host.handle(Told::Timeout);
            assert!(left || host.told_to_run == 1, "neither handed nor let run");
        }
        None => {}
    }
    host
}

fn tell_sender(script: &mut AgainstSender, host: &mut Host, guest: &mut Guest) {
    while let Some(event) = script.engine.poll_event() {
        let actions = match event {
            SenderEvent::Pause => {
                assert!(!guest.offered && !guest.stands, "paused twice");
                guest.stands = true;
                Vec::new()
            }
            SenderEvent::Resume => {
                assert!(guest.stands && !guest.offered, "let run by the session, not by its host");
                guest.stands = false;
                Vec::new()
            }
            SenderEvent::Offer(handover) => {
                guest.offered = true;
                host.offer(handover);
                Vec::new()
            }
            SenderEvent::Said(message) => host.hear(TO, message),
            SenderEvent::Accepted { .. }
            | SenderEvent::Judged
            | SenderEvent::Throttle(_)
            | SenderEvent::Stated
            | SenderEvent::Finished => Vec::new(),
        };
        for action in actions {
            match action {
                Action::Say(message) => script.engine.say(message),
                Action::Release | Action::Fill(_) => script.engine.release(),
                Action::Run => script.engine.cancel(pagewire_sender::ErrorKind::Rejected),
            }
        }
    }
}
