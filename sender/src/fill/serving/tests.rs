//! What goes when: faults once, traces first, and the rest behind the last touch.

use super::*;
use crate::memory::{MappedMemory, MappedRegion, Mapping};
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::handover::{Epoch, Handover, HostId};
use pagewire_protocol::page::InstallSize;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const PAGES: u64 = 400;

/// Serves a guest that lacks everything, without a window or cap in the way.
fn serving() -> Serving<MappedMemory> {
    let mapping = Arc::new(Mapping::private(usize::try_from(PAGES).unwrap() * PAGE_BYTES).unwrap());
    // No page is zero.
    (0..mapping.len()).step_by(PAGE_BYTES).for_each(|at| mapping.byte(at).unwrap().store(1, Ordering::Relaxed));
    let memory = MappedMemory::new(vec![MappedRegion::of(mapping, InstallSize::KIB_4)]).unwrap();
    let (sender, receiver) = (HostId([1; 32]), HostId([2; 32]));
    let handover = Handover {
        lineage: LineageId([3; 16]),
        session: [4; 16],
        epoch: Epoch::ZERO,
        root: Digest::default(),
        sender,
        receiver,
        arbiter: false,
        post_copy: true,
    };
    let remainder = Remainder::recover(memory, &[0; 32], handover).unwrap();
    let lack = Lack { transcript: [0; 32], secret: [0; 32], window: 1 << 30, pages: PAGES, lanes: 1, holds: false };
    let ways = Ways { compress: false, workers: 0, bandwidth_limit: None, batch_pages: 16 };
    let mut serving = Serving::new(remainder, &lack, ways);
    serving.handle_lacking(&Lacking { first: 0, bits: &[0xFF; 50] }).unwrap();
    serving
}

fn name(serving: &mut Serving<MappedMemory>, urgency: Urgency, pages: &[(u64, u32)]) {
    let pages = pages.iter().map(|&(first, count)| Want { region: 0, first, count }).collect();
    serving.handle_fault(&Fault { urgency, pages }).unwrap();
}

/// Inline pages of the next frame in the background.
fn step(serving: &mut Serving<MappedMemory>) -> u64 {
    let before = serving.counts.inline;
    assert!(serving.step(Time::ZERO).unwrap());
    serving.lanes.poll_frame(LaneId::bulk(0), Time::ZERO).unwrap();
    serving.counts.inline - before
}

#[test]
fn what_the_guest_waited_for_does_not_go_again_in_the_background() {
    let mut serving = serving();
    name(&mut serving, Urgency::NOW, &[(100, 1), (102, 1)]);
    assert!(serving.next_urgent().unwrap().is_some() && serving.next_urgent().unwrap().is_some());
    assert!(serving.next_urgent().unwrap().is_none());
    // Behind the last of them first, and at last what lies before them.
    assert_eq!((step(&mut serving), serving.cursor, serving.counts.prepaged), (16, 119, 16));
    while !serving.is_sent() {
        step(&mut serving);
    }
    assert_eq!((serving.counts.inline, serving.counts.faults, serving.counts.prepaged), (PAGES, 2, 16));
}

#[test]
fn what_went_in_the_background_goes_at_once_if_the_guest_waits_for_it() {
    let mut serving = serving();
    assert_eq!(step(&mut serving), 16);
    name(&mut serving, Urgency::NOW, &[(3, 1)]);
    assert!(serving.next_urgent().unwrap().is_some(), "it may be far behind on its lane");
    name(&mut serving, Urgency::NOW, &[(3, 1)]);
    assert!(serving.next_urgent().unwrap().is_none(), "and once");
}

#[test]
fn what_the_guest_will_touch_goes_first_and_without_its_neighbours() {
    let mut serving = serving();
    name(&mut serving, Urgency::AHEAD, &[(300, 1), (7, 20), (300, 1), (50, 2)]);
    assert_eq!([(); 4].map(|()| step(&mut serving)), [1, 16, 4, 2]);
    assert_eq!(serving.counts.prepaged, 23);
    while !serving.is_sent() {
        step(&mut serving);
    }
    assert_eq!((serving.counts.inline, serving.counts.prepaged), (PAGES, 23));
}

#[test]
fn what_is_wanted_goes_in_the_order_in_which_it_will_be_touched_and_once() {
    let mut serving = serving();
    name(&mut serving, Urgency::AHEAD, &[(300, 1), (7, 20), (50, 2)]);
    serving.announcing = Announcing::On;
    while serving.lacking.count() > 0 {
        assert_eq!(step(&mut serving), 0, "digests alone");
    }
    assert_eq!((serving.counts.announced, serving.counts.prepaged), (PAGES, 0));
    let wants = [(5, 10), (51, 1), (300, 1)].map(|(first, count)| Want { region: 0, first, count }).to_vec();
    let lane = LaneId::bulk(0);
    let frames = serving.lanes.planned(lane);
    serving.handle_ack(lane, &Ack { frames, settled: frames, wants }, Time::ZERO).unwrap();
    // The guest does not wait for the background to come to it.
    name(&mut serving, Urgency::NOW, &[(9, 1)]);
    assert!(serving.next_urgent().unwrap().is_some());
    assert_eq!([(); 4].map(|()| step(&mut serving)), [1, 7, 1, 2]);
    assert!(serving.is_sent());
    assert_eq!((serving.counts.inline, serving.counts.faults, serving.counts.prepaged), (12, 1, 9));
}
