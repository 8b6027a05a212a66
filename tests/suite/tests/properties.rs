//! What holds for every image, base, layout and fault: the slow twin of a transfer is a copy.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::frame::LaneId;
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::time::Span;
use pagewire_test_support::checkers::{check_safety, check_success};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::{Cut, LinkConfig};
use pagewire_test_support::memory::{ImageSink, SinkFaults, SourceFaults};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{Outcome, World, WorldConfig};
use proptest::prelude::*;

fn regions() -> impl Strategy<Value = Vec<Region>> {
    let length = prop_oneof![Just(0u64), 1u64..10_000, (1u64..40).prop_map(|pages| pages * 4096), 1u64..5_000_000];
    let size = prop_oneof![Just(InstallSize::KIB_4), Just(InstallSize::KIB_64), Just(InstallSize::MIB_2)];
    let region = (length, size).prop_map(|(bytes, install_size)| Region { bytes, install_size });
    proptest::collection::vec(region, 1..5)
}

fn mix() -> impl Strategy<Value = Mix> {
    (0u64..100, 0u64..100, 0u64..100).prop_map(|(zero, pool, text)| {
        let pool = pool.min(100 - zero);
        Mix { zero, pool, text: text.min(100 - zero - pool) }
    })
}

fn pages(image: &Image) -> Vec<u64> {
    image.regions.iter().map(Region::pages).collect()
}

fn run(image: &Image, sink: &ImageSink, change: impl FnOnce(&mut WorldConfig)) -> Outcome {
    let mut config = WorldConfig::new(1);
    config.link = LinkConfig {
        delay: Span::from_millis(1),
        rate: Some(500_000_000),
        buffer: 1 << 20,
        piece_max: 1 << 18,
        trickles_from: None,
    };
    change(&mut config);
    World::new(image, sink, config).run()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// The image arrives byte for byte, whatever was there and however much of it.
    #[test]
    fn what_arrives_is_a_copy(
        regions in regions(), mix in mix(), seed: u64, touched in 0u64..100, held in 0u64..=100,
        lanes in 1u8..=8, single in any::<bool>(), zeros in any::<bool>(),
    ) {
        let mut rng = Rng::new(seed);
        let image = Image::filled(regions, mix, &mut rng);
        let mut base = image.clone();
        base.touch(touched, mix, &mut rng);
        let held: Vec<u64> = pages(&image).iter().map(|pages| pages * held / 100).collect();
        for (bytes, held) in base.bytes.iter_mut().zip(&held) {
            bytes[usize::try_from(held * 4096).unwrap()..].fill(0);
        }
        let sink = ImageSink::new(base, held, zeros, SinkFaults::default());
        let outcome = run(&image, &sink, |config| {
            (config.sender.lanes, config.sender.single_stream) = (lanes, single);
        });
        check_success(&outcome, &image, &sink);
    }

    /// After any cut the next session succeeds on what was left.
    #[test]
    fn any_cut_is_resumed(seed: u64, at in 0u64..1_500_000, lane in 0u8..3, to_receiver in any::<bool>()) {
        let mut rng = Rng::new(seed);
        let image = Image::random(400, Mix::MEMORY, &mut rng);
        let sink = ImageSink::empty(&image);
        let lane = LaneId::from_wire(lane).unwrap();
        let outcome = run(&image, &sink, |config| {
            config.sender.lanes = 2;
            config.cuts = vec![(lane, to_receiver, Cut::Bytes(at))];
        });
        check_safety(&outcome, &image, &sink);
        let second = ImageSink::holding(sink.state().image.clone());
        let outcome = run(&image, &second, |_| ());
        check_success(&outcome, &image, &second);
    }

    /// Cold, on one lane, every content travels once.
    #[test]
    fn duplicates_travel_once(regions in regions(), mix in mix(), seed: u64) {
        let image = Image::filled(regions, mix, &mut Rng::new(seed));
        let sink = ImageSink::empty(&image);
        let outcome = run(&image, &sink, |_| ());
        check_success(&outcome, &image, &sink);
        prop_assert_eq!(outcome.received.inline, image.distinct());
        prop_assert_eq!(outcome.received.wants, 0);
    }

    /// An unchanged image costs next to nothing, whatever its regions.
    #[test]
    fn an_unchanged_image_sends_no_page(regions in regions(), mix in mix(), seed: u64) {
        let image = Image::filled(regions, mix, &mut Rng::new(seed));
        let sink = ImageSink::holding(image.clone());
        let outcome = run(&image, &sink, |_| ());
        check_success(&outcome, &image, &sink);
        prop_assert_eq!(outcome.received.base, image.pages());
        prop_assert_eq!(sink.state().written, (0, 0));
        let bound = 1_200 + 200 * image.regions.len() as u64;
        prop_assert!(outcome.wire[0] <= bound, "{} bytes", outcome.wire[0]);
    }

    /// SPEC 6.9, I7: a base that rots after it was announced is found where it is used, and never believed.
    #[test]
    fn a_base_that_rots_is_repaired_or_ends_in_a_clear_error(seed: u64, touched in 1u64..100, every in 1u64..50, pool in 0u64..80) {
        let mut rng = Rng::new(seed);
        let mix = Mix { zero: 5, pool, text: 0 };
        let image = Image::random(700, mix, &mut rng);
        let mut base = image.clone();
        // Shifted contents make references that rest on other pages of the base.
        base.bytes[0].rotate_left(4096 * 3);
        base.touch(touched, mix, &mut rng);
        let held = pages(&image);
        let sink = ImageSink::new(base, held, true, SinkFaults { rot: Some((0, every)), ..SinkFaults::default() });
        let outcome = run(&image, &sink, |_| ());
        match outcome.receiver {
            // What the scan has seen and nobody read again is the disk's own affair; what was read again is right.
            Ok(()) => prop_assert!(outcome.sender.is_ok()),
            Err(error) => prop_assert!(error.to_string().contains("returned other bytes than were put there"), "{error}"),
        }
    }

    /// C12, C13: whatever fails at either side, nobody is content with a wrong image.
    #[test]
    fn faults_of_memory_and_disk_end_the_session_clearly(seed: u64, kind in 0u8..6, after in 0u64..12) {
        let mut rng = Rng::new(seed);
        let image = Image::random(600, Mix::MEMORY, &mut rng);
        let mut base = image.clone();
        base.touch(50, Mix::MEMORY, &mut rng);
        let mut faults = SinkFaults::default();
        let mut source = SourceFaults::default();
        match kind {
            0 => faults.fail_read_after = Some(after),
            1 => faults.fail_write_after = Some(after),
            2 => faults.fail_finish = true,
            3 => source.fail_read_after = Some(after),
            4 => source.unsteady = true,
            _ => source.change_after = Some((after, 0, after * 40)),
        }
        let held = pages(&image);
        let sink = ImageSink::new(base, held, true, faults);
        let outcome = run(&image, &sink, |config| config.source_faults = source);
        if kind < 5 {
            check_safety(&outcome, &image, &sink);
        }
        if kind == 2 || kind == 4 {
            prop_assert!(outcome.receiver.is_err() && outcome.sender.is_err());
        }
    }
}

/// SPEC 6.10: a want covers whole install pages, and the answer brings all of them.
#[test]
fn wants_cover_whole_install_pages() {
    for install_size in [InstallSize::KIB_64, InstallSize::MIB_2] {
        let mut rng = Rng::new(4);
        let region = Region { bytes: 4 << 20, install_size };
        let image = Image::filled(vec![region], Mix::NOISE, &mut rng);
        let mut base = image.clone();
        base.rewrite(0, 77, Mix::NOISE, &mut rng);
        let sink = ImageSink::holding(base);
        let outcome = run(&image, &sink, |_| ());
        check_success(&outcome, &image, &sink);
        assert_eq!(outcome.received.wants, u64::from(install_size.pages()));
    }
}

/// SPEC 6.4: pages beyond what is held are zero, not base, also in a subtree that is equal.
#[test]
fn a_shorter_base_of_an_image_that_ends_in_zeros_is_used() {
    let mut image = Image::random(20, Mix::NOISE, &mut Rng::new(5));
    image.bytes[0][10 * 4096..].fill(0);
    let sink = ImageSink::new(image.clone(), vec![10], true, SinkFaults::default());
    let outcome = run(&image, &sink, |_| ());
    check_success(&outcome, &image, &sink);
    assert_eq!((outcome.received.base, outcome.received.zero), (10, 10));
}

/// SPEC 6.13: the last HAVE of each region names that region, not the next.
#[test]
fn bases_of_several_regions_are_announced_under_their_own_names() {
    let region = |bytes| Region { bytes, install_size: InstallSize::KIB_4 };
    let image =
        Image::filled(vec![region(3 << 20), region(0), region(40 << 20), region(5000)], Mix::MEMORY, &mut Rng::new(6));
    let sink = ImageSink::holding(image.clone());
    let outcome = run(&image, &sink, |_| ());
    check_success(&outcome, &image, &sink);
    assert_eq!(outcome.received.base, image.pages());
}

/// I7: a page that was counted on and turns out damaged is an error, not part of a whole image.
#[test]
fn a_damaged_page_that_was_counted_on_ends_the_session() {
    let mut image = Image::random(600, Mix::NOISE, &mut Rng::new(7));
    let mut base = image.clone();
    // The second part of the image is new and refers to a page of the first, which is unchanged and rots.
    let wanted = image.page(0, 3).to_vec();
    image.page_mut(0, 500).copy_from_slice(&wanted);
    base.page_mut(0, 500).fill(1);
    let sink = ImageSink::new(base, vec![600], true, SinkFaults { rot: Some((0, 3)), ..SinkFaults::default() });
    let outcome = run(&image, &sink, |_| ());
    let text = outcome.receiver.unwrap_err().to_string();
    assert_eq!(text, "destination: returned other bytes than were put there");
}

/// A memory that changes between two looks is named as the source's fault.
#[test]
fn memory_that_changes_between_two_looks_is_the_sources_fault() {
    let mut rng = Rng::new(8);
    let image = Image::random(300, Mix::NOISE, &mut rng);
    let sink = ImageSink::holding(Image::random(300, Mix::NOISE, &mut rng));
    let outcome = run(&image, &sink, |config| config.source_faults.change_after = Some((1, 0, 5)));
    let text = outcome.sender.unwrap_err().to_string();
    assert!(text.starts_with("source: page 5 changed between two looks at it"), "{text}");
    assert!(outcome.receiver.is_err());
}
