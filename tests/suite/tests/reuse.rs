//! A guest comes back: both sides know the manifest of what it left, and only what changed travels.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::frame::{Codec, EntryKind, FrameKind, HEADER_BYTES, Pages};
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::time::Span;
use pagewire_receiver::OtherPages;
use pagewire_sender::STRAY_MAX;
use pagewire_test_support::checkers::check_success;
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::LinkConfig;
use pagewire_test_support::memory::{ImageBase, ImageSink, Neighbour};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{Outcome, World, WorldConfig};
use proptest::prelude::*;
use std::collections::BTreeSet;

const KEY: [u8; 32] = [5; 32];

fn run(image: &Image, sink: &ImageSink, bases: Vec<ImageBase>, change: impl FnOnce(&mut WorldConfig)) -> Outcome {
    let mut config = WorldConfig::new(1);
    config.sender.domain_key = KEY;
    config.bases = bases;
    config.link = LinkConfig {
        delay: Span::from_millis(1),
        rate: Some(100_000_000),
        buffer: 1 << 20,
        piece_max: 1 << 18,
        trickles_from: None,
    };
    change(&mut config);
    World::new(image, sink, config).run()
}

fn frames(outcome: &Outcome, kind: FrameKind) -> usize {
    outcome.frames.iter().filter(|(_, of, _)| *of == kind).count()
}

/// The codecs of all PAGES frames, as bits.
fn codecs_of(outcome: &Outcome) -> u32 {
    let pages = outcome.recording.iter().filter(|(_, bytes)| bytes[4] == FrameKind::PAGES.0);
    pages.fold(0, |bits, (_, bytes)| bits | Pages::decode(&bytes[HEADER_BYTES..]).unwrap().head.codec.bit())
}

/// SPEC 6.11: no frame that states a page of an image at rest again, which is an answer, rests on the base.
fn check_answers(outcome: &Outcome) {
    let mut stated = BTreeSet::new();
    for (_, bytes) in outcome.recording.iter().filter(|(_, bytes)| bytes[4] == FrameKind::PAGES.0) {
        let pages = Pages::decode(&bytes[HEADER_BYTES..]).unwrap();
        let (mut answers, mut rests, mut next) = (false, pages.head.codec.is_delta(), pages.head.first);
        for run in pages.runs() {
            rests |= matches!(run.kind, EntryKind::BASE | EntryKind::SHIFTED);
            for page in next..next + u64::from(run.count) {
                answers |= run.kind != EntryKind::SKIPPED && !stated.insert((pages.head.region, page));
            }
            next += u64::from(run.count);
        }
        assert!(!(answers && rests), "an answer rests on the base: {:?}", pages.head);
    }
}

/// Cuts an image of one region, or adds zeros to it.
fn resize(image: &mut Image, length: u64) {
    image.regions[0].bytes = length;
    let whole = length.div_ceil(4096) as usize * 4096;
    image.bytes[0].resize(whole, 0);
    image.bytes[0][length as usize..].fill(0);
}

fn rot(image: &Image, every: u64) -> Image {
    let mut rotten = image.clone();
    for region in 0..image.regions.len() {
        (0..image.regions[region].pages())
            .step_by(every as usize)
            .for_each(|page| rotten.page_mut(region, page)[0] ^= 1);
    }
    rotten
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever either side believes of the base, and whatever its bytes really are, the image arrives byte for byte.
    #[test]
    fn what_arrives_over_an_agreed_base_is_a_copy(
        seed: u64, lengths in proptest::collection::vec(1u64..3_000_000, 1..4), touched in 0u64..60, moved in 0usize..40,
        stays: bool, lanes in 1u8..=8, theirs in 0u64..30, ours in 0u64..30, bytes: bool, lost in 0u8..8, text in 0u64..60,
        length in 1u64..3_000_000,
    ) {
        let mut rng = Rng::new(seed);
        let mix = Mix { zero: 10, pool: 20, text };
        let regions = lengths.into_iter().map(|bytes| Region { bytes, install_size: InstallSize::KIB_4 }).collect();
        let before = Image::filled(regions, mix, &mut rng);
        let mut image = before.clone();
        for (region, bytes) in image.bytes.iter_mut().enumerate() {
            // The last page may be short: what lies beyond the end of a region stays zero.
            let whole = before.regions[region].bytes as usize / 4096 * 4096;
            bytes[..whole].rotate_right((moved * 4096).min(whole));
        }
        image.touch(touched, mix, &mut rng);
        let rotten = |every: u64| if every == 0 { before.clone() } else { rot(&before, every) };
        // An image of one region may have grown or shrunk since.
        let mut theirs = rotten(theirs);
        if image.regions.len() == 1 {
            resize(&mut image, length);
            resize(&mut theirs, length);
        }
        let sink = ImageSink::claiming(&before, KEY, theirs, stays);
        let mut base = ImageBase::whole(&before, KEY);
        base.bytes = bytes.then(|| rotten(ours));
        base.lost = lost == 0;
        // SPEC 5.6: one delta codec, the other, both or none.
        let codecs = u32::try_from(seed % 4).unwrap() << 2 | Codec::ZSTD.bit() | Codec::NONE.bit();
        let outcome = run(&image, &sink, vec![base], |config| {
            config.sender.lanes = lanes;
            config.receiver_policy.codecs = codecs;
            config.record = true;
        });
        check_success(&outcome, &image, &sink);
        check_answers(&outcome);
        prop_assert_eq!(codecs_of(&outcome) & !codecs, 0);
        prop_assert_eq!(frames(&outcome, FrameKind::HAVE), 0);
    }

    /// An unchanged image costs next to nothing, and all of the base was read.
    #[test]
    fn an_unchanged_return_costs_a_few_frames(seed: u64, pages in 1u64..3000, trusted: bool) {
        let image = Image::random(pages, Mix::MEMORY, &mut Rng::new(seed));
        let sink = ImageSink::claiming(&image, KEY, image.clone(), true);
        sink.state().trusted = trusted;
        let outcome = run(&image, &sink, vec![ImageBase::whole(&image, KEY)], |_| ());
        check_success(&outcome, &image, &sink);
        prop_assert!(outcome.wire[0] + outcome.wire[1] < 2_000, "{:?}", outcome.wire);
        prop_assert_eq!(outcome.received.base, pages);
        let read = if trusted { (0, pages) } else { (pages, 0) };
        prop_assert_eq!((outcome.received.scanned, outcome.received.unverified), read);
        prop_assert_eq!(sink.state().written, (0, 0));
    }

    /// I7: pages that are not what the manifest says are counted and fetched, and no others.
    #[test]
    fn damaged_pages_of_a_base_are_fetched(seed: u64, every in 2u64..40) {
        let image = Image::random(900, Mix { zero: 0, pool: 0, text: 0 }, &mut Rng::new(seed));
        let sink = ImageSink::claiming(&image, KEY, rot(&image, every), true);
        let outcome = run(&image, &sink, vec![ImageBase::whole(&image, KEY)], |_| ());
        check_success(&outcome, &image, &sink);
        let damaged = 900u64.div_ceil(every);
        prop_assert_eq!((outcome.received.damaged, outcome.received.wants), (damaged, damaged));
        prop_assert!(outcome.sent.inline >= damaged);
    }
}

/// A random image, and the same with `moved` pages in front of all others.
fn shifted_pair(seed: u64, pages: u64, moved: usize) -> (Image, Image) {
    let mix = Mix { zero: 0, pool: 0, text: 0 };
    let before = Image::random(pages, mix, &mut Rng::new(seed));
    let mut after = before.clone();
    after.bytes[0].rotate_right(moved * 4096);
    for page in 0..moved as u64 {
        after.rewrite(0, page, mix, &mut Rng::new(seed ^ page));
    }
    (before, after)
}

#[test]
fn pages_that_moved_cost_a_share_of_a_run() {
    let (before, after) = shifted_pair(3, 6000, 17);
    let sink = ImageSink::claiming(&before, KEY, before.clone(), true);
    let outcome = run(&after, &sink, vec![ImageBase::whole(&before, KEY)], |_| ());
    check_success(&outcome, &after, &sink);
    assert!(outcome.sent.reference > 5000, "{:?}", outcome.sent);
    // Until enough has changed for anybody to look, pages travel whole.
    assert!(outcome.wire[0] < 700 * 4096, "{:?}", outcome.wire);
}

#[test]
fn without_a_base_that_stays_nothing_is_said_to_have_moved() {
    let (before, after) = shifted_pair(4, 2000, 5);
    let sink = ImageSink::claiming(&before, KEY, before.clone(), false);
    let outcome = run(&after, &sink, vec![ImageBase::whole(&before, KEY)], |_| ());
    check_success(&outcome, &after, &sink);
    assert_eq!(outcome.received.reference, 0);
}

#[test]
fn small_changes_travel_as_deltas_and_only_if_the_old_bytes_are_here() {
    let before = Image::random(2000, Mix { zero: 0, pool: 0, text: 0 }, &mut Rng::new(1));
    let mut after = before.clone();
    (0..2000).step_by(3).for_each(|page| after.page_mut(0, page)[100] ^= 0x55);
    for stays in [true, false] {
        let sink = ImageSink::claiming(&before, KEY, before.clone(), stays);
        let outcome = run(&after, &sink, vec![ImageBase::whole(&before, KEY)], |_| ());
        check_success(&outcome, &after, &sink);
        assert!(outcome.received.delta > 500, "{:?}", outcome.received);
        assert!(outcome.wire[0] < 100_000 + 512 * 4096, "{:?}", outcome.wire);
        assert_eq!(outcome.sent.delta + outcome.sent.inline, 667);
    }
    let sink = ImageSink::claiming(&before, KEY, before.clone(), true);
    let base = ImageBase { bytes: None, ..ImageBase::whole(&before, KEY) };
    let outcome = run(&after, &sink, vec![base], |_| ());
    check_success(&outcome, &after, &sink);
    assert_eq!((outcome.received.delta, outcome.received.inline), (0, 667));
}

#[test]
fn a_page_or_two_that_moved_do_not_make_all_deltas_useless() {
    let before = Image::random(9000, Mix { zero: 0, pool: 0, text: 0 }, &mut Rng::new(1));
    // What one page says is no shift. Two are believed, and nothing else fits: deltas are lost in the rest of their batch,
    // and in the batches after it that have `STRAY_MAX` changed pages at most between them.
    let batch = WorldConfig::new(1).sender.batch_pages;
    let stray = STRAY_MAX + u64::from(batch).div_ceil(3);
    for (moved, lost) in [(1, 0), (2, stray)] {
        let mut after = before.clone();
        (0..9000).step_by(3).for_each(|page| after.page_mut(0, page)[100] ^= 0x55);
        for page in 3072..3072 + moved {
            after.page_mut(0, page).copy_from_slice(&before.clone().page_mut(0, page + 777)[..]);
        }
        let sink = ImageSink::claiming(&before, KEY, before.clone(), true);
        let outcome = run(&after, &sink, vec![ImageBase::whole(&before, KEY)], |_| ());
        check_success(&outcome, &after, &sink);
        // Of two pages next to each other one had not changed where it was.
        let (received, changed) = (outcome.received, 3000 + moved - 1);
        assert_eq!(received.delta + received.inline + received.reference, changed, "{received:?}");
        assert!(received.inline <= lost && received.reference == moved, "{moved}: {received:?}");
        assert!(outcome.wire[0] < 100_000 + lost * 4096, "{moved}: {:?}", outcome.wire);
    }
}

/// SPEC 6.11: pages that could not be had from a damaged base are wanted once, however well deltas serve the rest.
#[test]
fn what_failed_as_a_delta_does_not_come_back_as_one() {
    let mix = Mix { zero: 0, pool: 0, text: 0 };
    let before = Image::random(2000, mix, &mut Rng::new(1));
    let mut after = before.clone();
    for page in 0..2000 {
        // Half of it is new, or the link would never be what the sender waits for, and no way would be chosen for it.
        if page % 2 == 0 {
            after.rewrite(0, page, mix, &mut Rng::new(page));
        } else {
            after.page_mut(0, page)[100] ^= 0x55;
        }
    }
    for (stays, lanes) in [(true, 1), (false, 1), (true, 3), (false, 3)] {
        let sink = ImageSink::claiming(&before, KEY, rot(&before, 2), stays);
        let outcome = run(&after, &sink, vec![ImageBase::whole(&before, KEY)], |config| {
            config.sender.lanes = lanes;
            config.record = true;
        });
        check_success(&outcome, &after, &sink);
        check_answers(&outcome);
        let wants = outcome.received.wants;
        assert!((1..=2000).contains(&wants), "{wants} wants of pages of which no two are the same");
    }
}

#[test]
fn pages_known_to_be_unchanged_are_not_read_but_for_a_sample() {
    let before = Image::random(4096, Mix::MEMORY, &mut Rng::new(1));
    let mut after = before.clone();
    let mut unchanged = PageBitmap::new(4096);
    unchanged.insert_range(0..4096);
    for page in (5..4096).step_by(100) {
        after.rewrite(0, page, Mix { zero: 0, pool: 0, text: 0 }, &mut Rng::new(page));
        unchanged.remove(page);
    }
    let base = ImageBase::whole(&before, KEY);
    let (root, session) = (before.root(&KEY), base.session);
    let send = |root, session, unchanged: &PageBitmap, after: &Image| {
        let sink = ImageSink::claiming(&before, KEY, before.clone(), true);
        let hint = Some((root, session, unchanged.clone()));
        let outcome = run(after, &sink, vec![base.clone()], |config| config.unchanged = hint);
        (outcome, sink)
    };
    let (outcome, sink) = send(root, session, &unchanged, &after);
    check_success(&outcome, &after, &sink);
    let known = unchanged.count();
    assert_eq!(outcome.sent.unread + outcome.sent.sampled, known);
    assert!((10..=16).contains(&outcome.sent.sampled), "{:?}", outcome.sent);
    // A hint for another image or another arrival is none.
    for (root, session) in [(after.root(&KEY), session), (root, [1; 16])] {
        let (outcome, sink) = send(root, session, &unchanged, &after);
        check_success(&outcome, &after, &sink);
        assert_eq!(outcome.sent.unread, 0);
    }
    // A wrong hint is found by the sample.
    let mut other = after.clone();
    (0..4096).for_each(|page| other.page_mut(0, page)[9] ^= 1);
    let (outcome, _) = send(root, session, &unchanged, &other);
    let error = outcome.sender.unwrap_err().to_string();
    assert!(error.contains("was said to be unchanged since the base, and is not"), "{error}");
}

#[test]
fn a_store_that_does_not_help_costs_a_line_of_open() {
    let image = Image::random(3000, Mix::MEMORY, &mut Rng::new(1));
    let other = Image::random(3000, Mix::MEMORY, &mut Rng::new(2));
    let cold = run(&image, &ImageSink::empty(&image), Vec::new(), |_| ());
    let sink = ImageSink::empty(&image);
    let outcome = run(&image, &sink, vec![ImageBase::whole(&other, KEY)], |_| ());
    check_success(&outcome, &image, &sink);
    assert!(outcome.wire[0] - cold.wire[0] <= 32, "{:?} {:?}", outcome.wire, cold.wire);
    assert!(outcome.wire[1].abs_diff(cold.wire[1]) <= 200, "{:?} {:?}", outcome.wire, cold.wire);
}

/// A06, I7: what another guest has is used only if its bytes have the digest.
#[test]
fn pages_of_other_guests_of_a_domain_are_found_and_checked() {
    let neighbour = Image::random(300, Mix { zero: 0, pool: 0, text: 0 }, &mut Rng::new(1));
    let mut image = neighbour.clone();
    image.bytes[0].rotate_right(7 * 4096);
    for rotten in [false, true] {
        let sink = ImageSink::empty(&image);
        let others = Neighbour { image: neighbour.clone(), key: KEY, rotten };
        let outcome = run(&image, &sink, Vec::new(), |config| config.others = Some(Box::new(others)));
        check_success(&outcome, &image, &sink);
        let found = if rotten { 0 } else { 300 };
        assert_eq!((outcome.received.others, outcome.received.inline), (found, 300 - found));
    }
}

/// SPEC 6.28: proofs go with announcements where they are asked for, and nowhere else.
#[test]
fn announced_pages_are_proved_where_the_receiver_has_pages_of_others() {
    let neighbour = Image::random(600, Mix::NOISE, &mut Rng::new(1));
    let mut image = neighbour.clone();
    image.touch(30, Mix::MEMORY, &mut Rng::new(2));
    for (asked, based) in [(true, false), (true, true), (false, true)] {
        let sink = if based { ImageSink::holding(neighbour.clone()) } else { ImageSink::empty(&image) };
        let others = Neighbour { image: neighbour.clone(), key: KEY, rotten: false };
        let outcome = run(&image, &sink, Vec::new(), |config| {
            config.others = asked.then(|| Box::new(others) as Box<dyn OtherPages>);
            config.record = true;
        });
        check_success(&outcome, &image, &sink);
        let pages = outcome.recording.iter().filter(|(_, bytes)| bytes[4] == FrameKind::PAGES.0);
        let (mut proved, mut proofs) = (0, 0);
        for (_, bytes) in pages {
            let pages = Pages::decode(&bytes[HEADER_BYTES..]).unwrap();
            proofs += pages.proofs().count();
            proved += if pages.proofs().next().is_some() { pages.references().count() } else { 0 };
        }
        assert_eq!((proofs, proofs > 0), (proved, asked), "{based}");
        assert_eq!(outcome.received.others > 0, asked && !based);
    }
}

/// A01: digests of two domains never compare, so that nothing of the one is found for the other.
#[test]
fn a_base_of_another_domain_is_no_base() {
    let image = Image::random(300, Mix::MEMORY, &mut Rng::new(1));
    let sink = ImageSink::claiming(&image, [6; 32], image.clone(), true);
    let outcome = run(&image, &sink, vec![ImageBase::whole(&image, KEY)], |config| config.sender.fresh = true);
    check_success(&outcome, &image, &sink);
    assert_eq!(outcome.received.base, 0);
}
