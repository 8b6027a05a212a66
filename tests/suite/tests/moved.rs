//! Pages that moved inside a base of which no manifest is agreed: they are found wherever they were, although frames are
//! applied while the base is still being read, and although a base in place is overwritten as they are put.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::frame::{Ack, Frame, FrameHeader, FrameKind, HEADER_BYTES};
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::time::Span;
use pagewire_test_support::checkers::{check_equal, check_safety, check_success};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::{Cut, LinkConfig};
use pagewire_test_support::memory::{ImageSink, SinkFaults};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{Outcome, World, WorldConfig};
use proptest::prelude::*;

const PAGE: usize = 4096;

/// Regions of pages that are met once. The holdings of each region are announced when it has been read: frames about the
/// first ones are applied while the later ones are still to be read.
fn noise(pages: &[u64], seed: u64) -> Image {
    let region = |&pages: &u64| Region { bytes: pages * PAGE as u64, install_size: InstallSize::KIB_4 };
    Image::filled(pages.iter().map(region).collect(), Mix::NOISE, &mut Rng::new(seed))
}

/// What holds `base` and no manifest of it: the file that becomes the new image, or one that stays beside it.
fn sink(base: &Image, stays: bool) -> ImageSink {
    let sink = ImageSink::holding(base.clone());
    sink.state().old = stays.then(|| base.clone());
    sink
}

fn run(image: &Image, sink: &ImageSink, change: impl FnOnce(&mut WorldConfig)) -> Outcome {
    let mut config = WorldConfig::new(1);
    config.sender.compress = false;
    config.record = true;
    change(&mut config);
    let outcome = World::new(image, sink, config).run();
    check_success(&outcome, image, sink);
    outcome
}

fn copy(from: &Image, (region, page): (usize, u64), to: &mut Image, (to_region, to_page): (usize, u64)) {
    to.page_mut(to_region, to_page).copy_from_slice(from.page(region, page));
}

fn acks(outcome: &Outcome) -> Vec<Ack> {
    let acks = outcome.recording.iter().filter_map(|(_, bytes)| {
        let header = FrameHeader::decode(bytes.first_chunk().unwrap()).unwrap();
        match Frame::decode(header.kind, &bytes[HEADER_BYTES..]).unwrap() {
            Frame::Ack(ack) => Some(ack),
            _ => None,
        }
    });
    acks.collect()
}

#[test]
fn a_page_that_moved_from_the_end_to_the_beginning_costs_no_bytes() {
    let before = noise(&[256, 12_000], 1);
    for (stays, lanes) in [(true, 1), (false, 1), (true, 4), (false, 4)] {
        let mut after = before.clone();
        copy(&before, (1, 11_999), &mut after, (0, 3));
        let sink = sink(&before, stays);
        let outcome = run(&after, &sink, |config| config.sender.lanes = lanes);
        assert_eq!((outcome.sent.inline, outcome.sent.wants), (0, 0), "stays: {stays}");
    }
}

#[test]
fn pages_that_changed_places_cost_no_bytes() {
    let before = noise(&[256, 12_000], 2);
    for stays in [true, false] {
        let mut after = before.clone();
        for page in 0..200 {
            copy(&before, (1, 11_700 + page), &mut after, (0, page));
            copy(&before, (0, page), &mut after, (1, 11_700 + page));
        }
        let outcome = run(&after, &sink(&before, stays), |_| ());
        assert_eq!((outcome.sent.inline, outcome.sent.wants), (0, 0), "stays: {stays}");
    }
}

#[test]
fn a_page_whose_old_place_is_zero_now_costs_no_bytes() {
    let before = noise(&[256, 12_000], 3);
    for stays in [true, false] {
        let mut after = before.clone();
        copy(&before, (1, 11_999), &mut after, (0, 3));
        after.page_mut(1, 11_999).fill(0);
        let outcome = run(&after, &sink(&before, stays), |_| ());
        assert_eq!((outcome.sent.inline, outcome.sent.wants, outcome.received.zero), (0, 0, 1), "stays: {stays}");
    }
}

/// In place a page that moved up would find its source overwritten, if each were put when it is stated.
#[test]
fn an_image_that_moved_up_or_down_costs_the_bytes_of_what_is_new() {
    let before = noise(&[256, 6000], 4);
    for (stays, up, moved) in
        [(true, true, 700), (false, true, 700), (true, false, 700), (false, false, 700), (false, true, 1)]
    {
        let mut after = before.clone();
        if up {
            after.bytes[1].rotate_right(moved * PAGE);
        } else {
            after.bytes[1].rotate_left(moved * PAGE);
        }
        let new = if up { 0..moved as u64 } else { 6000 - moved as u64..6000 };
        new.clone().for_each(|page| after.rewrite(1, page, Mix::NOISE, &mut Rng::new(!page)));
        let outcome = run(&after, &sink(&before, stays), |_| ());
        assert_eq!(outcome.sent.wants, new.end - new.start, "stays: {stays}, up: {up}");
    }
}

/// What changed among pages that did not is wanted while the base is read: only so many wait as their bytes take no
/// time worth speaking of.
#[test]
fn pages_that_changed_where_they_lie_are_wanted_before_the_base_is_read() {
    let before = noise(&[4096, 28_000], 5);
    let mut after = before.clone();
    (0..4096).filter(|page| page % 2 == 0).for_each(|page| after.rewrite(0, page, Mix::NOISE, &mut Rng::new(!page)));
    let outcome = run(&after, &sink(&before, true), |_| ());
    assert_eq!(outcome.sent.wants, 2048);
    let is = |kind| move |(_, of, _): &(bool, FrameKind, _)| *of == kind;
    let last_have = outcome.frames.iter().rposition(is(FrameKind::HAVE)).unwrap();
    let wanted = acks(&outcome).iter().position(|ack| !ack.wants.is_empty()).unwrap();
    let first_want =
        outcome.frames.iter().enumerate().filter(|(_, frame)| is(FrameKind::ACK)(frame)).nth(wanted).unwrap().0;
    assert!(first_want < last_have, "{first_want} {last_have}");
}

/// SPEC 6.26, 6.27
#[test]
fn an_acknowledgement_settles_no_frame_of_which_pages_wait() {
    let before = noise(&[256, 12_000], 6);
    let mut after = before.clone();
    after.rewrite(0, 3, Mix::NOISE, &mut Rng::new(9));
    copy(&before, (1, 11_999), &mut after, (0, 4));
    let outcome = run(&after, &sink(&before, true), |_| ());
    let acks = acks(&outcome);
    let waits = acks.iter().position(|ack| ack.frames > ack.settled).expect("a frame of which pages wait");
    assert_eq!(acks[waits].settled, 0);
    let settles = acks.iter().position(|ack| ack.settled > 0).unwrap();
    let wanted: Vec<u64> = acks[..=settles].iter().flat_map(|ack| &ack.wants).map(|want| want.first).collect();
    assert_eq!(wanted, [3], "wanted no later than its frame is settled");
    assert!(acks.iter().all(|ack| ack.settled <= ack.frames) && acks.is_sorted_by_key(|ack| ack.settled));
    assert!(acks.last().is_some_and(|ack| ack.settled == ack.frames));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever moved where, over whatever links and lanes, and wherever a session before was cut while pages waited, the
    /// image arrives byte for byte.
    #[test]
    fn what_moved_arrives_as_it_was_sent(
        seed: u64, regions in proptest::collection::vec(1u64..1500, 1..4), shift in 0usize..900, touched in 0u64..100,
        stays: bool, lanes in 1u8..=4, window in prop::sample::select(vec![1u64, 400_000, 64 << 20]),
        cuts in proptest::collection::vec(0u64..3_000_000, 0..3), dedup: bool, delay in 0u64..3,
    ) {
        let mut rng = Rng::new(seed);
        let before = noise(&regions, seed);
        let mut after = before.clone();
        let mix = Mix { zero: 40, pool: 20, text: 0 };
        after.bytes.iter_mut().for_each(|bytes| {
            let by = (shift * PAGE).min(bytes.len());
            bytes.rotate_right(by);
        });
        if touched < 40 {
            after.touch(touched, mix, &mut rng);
        }
        let config = |cut: Option<u64>| {
            let mut config = WorldConfig::new(seed);
            (config.sender.lanes, config.window, config.sender.dedup) = (lanes, window, dedup);
            config.link = LinkConfig::delaying(Span::from_millis(delay));
            config.cuts.extend(cut.map(|bytes| (pagewire_protocol::frame::LaneId::bulk(0), true, Cut::Bytes(bytes))));
            config
        };
        let mut sink = sink(&before, stays);
        for cut in cuts {
            let outcome = World::new(&after, &sink, config(Some(cut))).run();
            if outcome.receiver.is_ok() {
                check_equal(&sink.state().image, &after);
            }
            let left = sink.state().image.clone();
            sink = ImageSink::new(left, regions.clone(), true, SinkFaults::default());
        }
        // Wants are not compared: DONE may overtake one whose page came meanwhile.
        let outcome = World::new(&after, &sink, config(None)).run();
        check_safety(&outcome, &after, &sink);
        prop_assert!(outcome.sender.is_ok() && outcome.receiver.is_ok(), "{:?} {:?}", outcome.sender, outcome.receiver);
        check_equal(&sink.state().image, &after);
    }
}
