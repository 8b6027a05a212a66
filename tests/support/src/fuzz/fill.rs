//! The targets of sessions that fill a guest: an engine against a peer that is nearly right.

use super::{Input, common, older, small_image, statement};
use crate::fill_peer::{AgainstFilled, AgainstFiller, all_absent};
use crate::image::Image;
use crate::peer::{SECRET, SESSION};
use pagewire_protocol::digest::{Digest, join_proof};
use pagewire_protocol::frame::{EntryKind, Frame, FrameKind, Join, LaneId, Pages, Role, Urgency, Want};
use pagewire_protocol::handover::{Handover, Message, Word};
use pagewire_protocol::page::RegionId;
use pagewire_protocol::session::Machine;
use std::collections::BTreeSet;

fn lane(input: &mut Input<'_>) -> LaneId {
    if input.byte() & 1 == 0 { LaneId::bulk(0) } else { LaneId::URGENT }
}

fn wants(input: &mut Input<'_>) -> Vec<Want> {
    let wants = (0..input.byte() % 4).map(|_| Want {
        region: u16::from(input.byte() % 3),
        first: input.number(),
        count: u32::try_from(input.number()).unwrap_or(u32::MAX).max(1),
    });
    wants.collect()
}

fn word(handover: Handover, input: &mut Input<'_>) -> Frame<'static> {
    let words = [Word::Gone, Word::Commit, Word::Ready, Word::Started];
    let word = words[usize::from(input.byte()) % words.len()];
    Frame::Handover(Message { word, handover: Handover { arbiter: input.byte() & 1 != 0, ..handover } })
}

/// A real receiver whose guest lacks all pages. None is installed twice, and DONE is said of all, as they are.
pub fn fill_receiver_session(data: &[u8]) {
    fill(data);
}

/// The same, and how many pages are lacking in the end, if it was content.
pub fn fill(data: &[u8]) -> (u64, bool) {
    let mut input = Input(data);
    let (image, flags) = (small_image(), input.byte());
    let base = (flags & 1 != 0).then(|| older(&image));
    let (left, sink) = all_absent(&image, base.as_ref());
    let handover = *left.guest.handover();
    let (mut script, mut guest) = (AgainstFilled::filled(), Some(left.guest));
    match flags >> 4 {
        0..12 => script.begin(guest.take().unwrap()),
        12..14 => script.greet(Role::Sender),
        _ => {}
    }
    while !input.0.is_empty() && !script.engine.is_over() {
        match input.byte() % 16 {
            op @ 0..8 => common(op, &mut script, &mut input),
            8 => {
                let lane = LaneId::from_wire(input.byte() % 10).unwrap();
                let proof = join_proof(&SECRET, &SESSION, lane.number());
                let proof = if input.byte() & 1 == 0 { proof } else { Digest::default() };
                let _ = script.engine.handle_join(lane, &Join { session: SESSION, proof }, script.now);
            }
            9 => {
                let mut fill = script.honest_fill(handover);
                fill.transcript[0] ^= input.byte() & 1;
                script.say(LaneId::CONTROL, &Frame::Fill(fill));
            }
            10 => {
                let word = word(handover, &mut input);
                script.say(LaneId::CONTROL, &word);
            }
            11 => script.engine.touch(RegionId(u16::from(input.byte() % 3)), input.number()),
            12 if guest.is_some() && script.last(FrameKind::LACK).is_none() => {
                // Taken only if it was asked for.
                if let Some(pagewire_receiver::fill::FillEvent::Asked(_)) = script.engine.poll_event() {
                    let terms = pagewire_receiver::fill::FillTerms {
                        lanes: 1,
                        window: 1 << 20,
                        secret: SECRET,
                        ahead: Vec::new(),
                    };
                    script.engine.accept(guest.take().unwrap(), terms, script.now);
                }
            }
            12 => script.engine.release(),
            13 => script.raw(LaneId::CONTROL, FrameKind(input.byte() % 24), input.bytes()),
            _ => {
                let (lane, body) = (lane(&mut input), statement(&image, &mut input));
                script.raw(lane, FrameKind::PAGES, &body);
            }
        }
    }
    script.settle();
    let content = matches!(script.engine.outcome(), Some(Ok(())));
    let done = script.last(FrameKind::DONE).is_some();
    let state = sink.state();
    let absent = state.absent.as_ref().expect("its guest runs");
    if let Some(Frame::Done(done)) = script.last(FrameKind::DONE) {
        assert_eq!((done.pages, done.root), (image.pages(), state.image.root(&[0; 32])), "DONE of something else");
    }
    assert!(!done || (absent.count() == 0 && state.finished), "DONE, and {} pages are absent", absent.count());
    assert!(!content || done, "content without DONE");
    let lacking = script.engine.into_incomplete().or(guest).expect("the guest outlives its session").pages();
    assert_eq!(lacking, absent.count(), "the next session goes on with what is absent");
    (lacking, content)
}

/// A real sender of all pages of a guest. It gives nothing up before each has gone.
pub fn fill_sender_session(data: &[u8]) {
    serve(data);
}

/// The same, and whether it was told that all is there, and was content.
pub fn serve(data: &[u8]) -> (bool, bool) {
    let mut input = Input(data);
    let (image, flags) = (small_image(), input.byte());
    let left = all_absent(&image, None).0;
    let handover = *left.remainder.handover();
    let mut script = AgainstFiller::filler(left);
    match flags >> 4 {
        0..10 => script.begin(&image),
        10..15 => {
            script.greet(Role::Receiver);
            script.listen();
        }
        _ => {}
    }
    let (mut filled, mut wanted) = (false, 0u64);
    while !input.0.is_empty() && !script.engine.is_over() {
        match input.byte() % 16 {
            op @ 0..8 => common(op, &mut script, &mut input),
            8 => {
                let mut lack = script.honest_lack(image.pages().wrapping_add(input.number()));
                (lack.window, lack.holds) = (input.number().clamp(1, 1 << 20), input.byte() & 1 != 0);
                script.lack(lack);
            }
            9 => {
                let first = input.number().saturating_mul(8);
                let flaw = input.byte();
                let all = [0xff ^ if flaw < 200 { 0 } else { flaw & 0xf }, 0xff, 0xff, 0x0f];
                script.lacking(first, &all[(first / 8).min(3) as usize..]);
            }
            10 => {
                let root = if input.byte() & 1 == 0 { image.root(&[0; 32]) } else { Digest([1; 32]) };
                script.done(image.pages().wrapping_add(input.number()), root);
            }
            11 | 12 => {
                let urgency = if input.byte() & 1 == 0 { Urgency::NOW } else { Urgency::AHEAD };
                let pages = wants(&mut input);
                script.fault(urgency, &pages);
            }
            13 => {
                let pages = wants(&mut input);
                wanted += pages.iter().map(|want| u64::from(want.count)).sum::<u64>();
                script.want(&pages);
            }
            14 => script.release(handover),
            _ => script.raw(LaneId::CONTROL, FrameKind(input.byte() % 24), input.bytes()),
        }
        filled |= script.is_filled();
    }
    script.settle();
    filled |= script.is_filled();
    script.release(handover);
    let content = matches!(script.engine.outcome(), Some(Ok(())));
    assert!(!content || filled, "given up before DONE");
    assert!(!filled || stated(&script, &image) == image.pages(), "given up before all has gone");
    let on_urgent = |said: &&crate::peer::Said| said.lane == LaneId::URGENT && said.kind == FrameKind::PAGES;
    let answers = script.said.iter().filter(on_urgent).count() as u64;
    assert!(answers <= image.pages().saturating_add(wanted), "{answers} answers");
    let left = script.engine.into_remainder().expect("what is left outlives its session");
    assert_eq!(left.pages(), image.pages());
    (filled, content)
}

/// Pages that were stated at least once.
fn stated(script: &AgainstFiller, image: &Image) -> u64 {
    let mut pages = BTreeSet::new();
    for said in script.said.iter().filter(|said| said.kind == FrameKind::PAGES) {
        let frame = Pages::decode(&said.body).unwrap();
        let mut next = frame.head.first;
        for run in frame.runs() {
            let first = next;
            next += u64::from(run.count);
            if run.kind != EntryKind::SKIPPED {
                pages.extend((first..next).map(|page| image.layout().place(RegionId(frame.head.region), page).0));
            }
        }
    }
    pages.len() as u64
}
