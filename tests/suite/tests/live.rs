//! A guest that runs while its memory moves, in the simulator: rounds until the rest fits the downtime, nothing lost by an
//! attempt that failed, and what is done when it writes too fast.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::frame::{ImageName, Role};
use pagewire_protocol::handover::Whereabouts;
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::time::{Span, Time};
use pagewire_protocol::trace::Seen;
use pagewire_sender::converge::{AtLimit, Limits, Reason};
use pagewire_sender::{ErrorKind, Tracking};
use pagewire_test_support::guest::{Guest, Pattern};
use pagewire_test_support::host::{Host, reconnect};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::LinkConfig;
use pagewire_test_support::memory::ImageSink;
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{Outcome, World, WorldConfig};

/// 4 MiB, over a link of 8 MB a second: half a second for all of it.
const PAGES: u64 = 1024;
const RATE: u64 = 8_000_000;

fn guest(pattern: Pattern, writes_a_second: u64, tracking: Tracking, seed: u64) -> Guest {
    let image = Image::random(PAGES, Mix::MEMORY, &mut Rng::new(seed));
    Guest::new(image, pattern, writes_a_second, tracking, seed ^ 1)
}

fn config(guest: &Guest, seed: u64, limits: Limits) -> WorldConfig {
    let mut config = WorldConfig::new(seed);
    config.live = Some(limits);
    config.link = LinkConfig { rate: Some(RATE), buffer: 256 << 10, ..LinkConfig::delaying(Span::from_millis(1)) };
    config.guest = Some(guest.clone());
    config.blobs = blobs();
    config
}

/// What goes with the memory: a device state of two parts, and one that is empty.
fn blobs() -> Blobs {
    let mut blobs = Blobs::new();
    blobs.insert(ImageName::new("device-state").unwrap(), 3, (0..50_000u32).map(|at| at as u8).collect()).unwrap();
    blobs.insert(ImageName::new("clock").unwrap(), 1, Vec::new()).unwrap();
    blobs
}

fn limits(downtime_ms: u64) -> Limits {
    Limits { downtime: Span::from_millis(downtime_ms), ..Limits::default() }
}

fn run(guest: &Guest, sink: &ImageSink, config: WorldConfig) -> Outcome {
    let image = guest.state().image.clone();
    World::new(&image, sink, config).run()
}

/// What arrived is what the guest had when it was paused.
fn moved(guest: &Guest, sink: &ImageSink, outcome: &Outcome) {
    outcome.sender.as_ref().unwrap();
    outcome.receiver.as_ref().unwrap();
    let state = guest.state();
    assert!(!state.runs(), "it was left paused");
    assert_eq!(state.image, *state.frozen.as_ref().unwrap(), "nobody wrote to it since");
    assert_eq!(sink.state().image, state.image);
    assert_eq!(outcome.blobs.as_ref(), Some(&blobs()));
}

/// SPEC 4.21, 6.30, 12.4
#[test]
fn every_pattern_of_writes_arrives_as_it_was_when_the_guest_stopped() {
    for tracking in [Tracking::Dirty, Tracking::Unknown] {
        for pattern in Pattern::ALL {
            for lanes in [1, 3] {
                let guest = guest(pattern, 150, tracking, 7);
                let sink = ImageSink::empty(&guest.state().image);
                let mut config = config(&guest, 1, limits(100));
                (config.sender.lanes, config.pause_span) = (lanes, Span::from_millis(3));
                let outcome = run(&guest, &sink, config);
                moved(&guest, &sink, &outcome);
                assert!(outcome.rounds.len() >= 2, "{tracking:?} {pattern:?}: {:?}", outcome.rounds);
                let last = outcome.rounds.last().unwrap();
                assert!(last.stated < PAGES / 4, "{tracking:?} {pattern:?}: {last:?}");
            }
        }
    }
}

/// I1, I2, I3: whatever became of a session, when its hosts can talk again the guest is at one of them, and all of it.
/// Says whether it has moved.
fn settled(guest: &Guest, sink: &ImageSink, outcome: &mut Outcome) -> bool {
    let [one, other] = &mut outcome.hosts;
    let left = |host: &Host| matches!(host.handovers.whereabouts(), Whereabouts::There | Whereabouts::InDoubt);
    assert_eq!(guest.state().runs(), !left(one), "it runs unless its host knows better: {:?}", one.records);
    assert!(!(guest.state().runs() && other.has_guest()), "two runners: {:?} {:?}", one.records, other.records);
    if outcome.sender.is_ok() {
        assert!(other.has_guest(), "success is the other host's");
    }
    reconnect(one, other);
    let (here, there) = (!left(one), other.has_guest());
    assert!(here != there, "at one of them: {:?} {:?}", one.records, other.records);
    if there {
        let state = guest.state();
        assert!(!state.runs() && sink.state().image == state.image, "all of it");
    }
    there
}

#[test]
fn a_guest_that_writes_little_switches_over_after_few_rounds_within_its_downtime() {
    // Two hundredths of its pages a second.
    let guest = guest(Pattern::Uniform, PAGES / 50, Tracking::Dirty, 3);
    let sink = ImageSink::empty(&guest.state().image);
    let outcome = run(&guest, &sink, config(&guest, 2, limits(30)));
    moved(&guest, &sink, &outcome);
    assert!(outcome.rounds.len() <= 4, "{:?}", outcome.rounds);
    assert!(outcome.rounds.last().unwrap().spent <= Span::from_millis(30), "{:?}", outcome.rounds);
}

/// What is left after round 0 fits the downtime already: one more round leaves a small part of it, and there is no third.
#[test]
fn one_more_round_is_made_where_it_shortens_the_downtime() {
    let guest = guest(Pattern::Uniform, PAGES / 4, Tracking::Dirty, 3);
    let sink = ImageSink::empty(&guest.state().image);
    let mut config = config(&guest, 2, limits(400));
    config.link.rate = Some(RATE / 2);
    let outcome = run(&guest, &sink, config);
    moved(&guest, &sink, &outcome);
    let [first, second, last] = outcome.rounds.as_slice() else { panic!("{:?}", outcome.rounds) };
    assert!(first.predicted.unwrap() <= Span::from_millis(400), "it could have been stopped then: {first:?}");
    assert!(last.pages * 2 < second.pages, "{:?}", outcome.rounds);
    assert!(
        outcome.decisions.iter().any(|what| what.contains("another round, after which")),
        "{:?}",
        outcome.decisions
    );
}

#[test]
fn a_guest_that_writes_faster_than_the_link_carries_is_handled_as_told() {
    let fast = || guest(Pattern::Uniform, 40 * PAGES, Tracking::Dirty, 4);
    let stays = fast();
    let sink = ImageSink::empty(&stays.state().image);
    let outcome = run(&stays, &sink, config(&stays, 3, limits(30)));
    let error = outcome.sender.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::NotConverging { reason: Reason::Dirtying, .. }), "{error:?}");
    assert!(outcome.rounds.len() <= 3, "recognised by the third round: {:?}", outcome.rounds);
    {
        let state = stays.state();
        assert_eq!((state.runs(), state.turns, state.tracked), (true, (0, 0), false));
    }

    let forced = fast();
    let sink = ImageSink::empty(&forced.state().image);
    let outcome = run(&forced, &sink, config(&forced, 3, Limits { at_limit: AtLimit::Force, ..limits(30) }));
    moved(&forced, &sink, &outcome);

    let slowed = fast();
    let sink = ImageSink::empty(&slowed.state().image);
    let outcome = run(&slowed, &sink, config(&slowed, 3, Limits { throttles: true, ..limits(20) }));
    moved(&slowed, &sink, &outcome);
    assert!(outcome.decisions.iter().any(|what| what.contains("slowed down by 20 %")), "{:?}", outcome.decisions);
}

/// A guest with a hot set over a slow link, and what came of it; with several rounds, so that history can tell.
fn with_hot_set(tracking: Tracking, defer_hot: bool, seed: u64) -> Outcome {
    let guest = guest(Pattern::HotSet, 5 * PAGES, tracking, seed);
    let sink = ImageSink::empty(&guest.state().image);
    let mut config = config(&guest, seed, Limits { defer_hot, at_limit: AtLimit::Force, ..limits(140) });
    config.link.rate = Some(RATE / 8);
    let outcome = run(&guest, &sink, config);
    moved(&guest, &sink, &outcome);
    outcome
}

#[test]
fn pages_that_are_written_all_the_time_wait_for_the_last_round() {
    for tracking in [Tracking::Dirty, Tracking::Unknown] {
        let (mut sums, mut spent) = ([0, 0], 0.0);
        for seed in 5..15 {
            let [waiting, eager] = [true, false].map(|defer| with_hot_set(tracking, defer, seed));
            let last = waiting.rounds.last().unwrap();
            assert!(waiting.rounds.len() >= 3, "{:?}", waiting.rounds);
            let middle = &waiting.rounds[1..waiting.rounds.len() - 1];
            // By reading all, a round would look at every page if none waited.
            let most = if tracking == Tracking::Dirty { PAGES / 2 } else { PAGES - PAGES / 20 / 2 };
            assert!(middle.iter().any(|round| round.dirty > 0 && round.pages < most), "{tracking:?} {middle:?}");
            assert!(last.pages >= PAGES / 20 / 2, "the hot ones came at the end: {last:?}");
            if tracking == Tracking::Unknown {
                assert!(eager.rounds.iter().all(|round| round.pages == PAGES), "none waits: {:?}", eager.rounds);
            }
            let bytes = |outcome: &Outcome| outcome.rounds.iter().map(|round| round.bytes).sum::<u64>();
            sums = [sums[0] + bytes(&waiting), sums[1] + bytes(&eager)];
            spent += last.spent.as_secs_f64();
            assert!(last.bytes > 0 && last.spent > Span::ZERO, "what the last round cost is told: {last:?}");
        }

        assert!(sums[0] * 100 < sums[1] * 95, "{tracking:?}: {sums:?}");
        assert!(spent / 10.0 < 0.16, "about as long as is allowed: {spent}");
    }
}

/// Pages of round 0 that were written before they were read go once, and half of what is dirty then is such; pages that
/// wait go for certain. A prediction by the mean of both falls short by half.
#[test]
fn a_switchover_lasts_about_as_long_as_was_predicted_though_hot_pages_wait() {
    let (mut predicted, mut spent) = (0.0, 0.0);
    for seed in 0..10 {
        let image = Image::random(PAGES, Mix::NOISE, &mut Rng::new(seed));
        let guest = Guest::new(image, Pattern::HotSet, 4 * PAGES, Tracking::Dirty, seed);
        let sink = ImageSink::empty(&guest.state().image);
        let mut config = config(&guest, seed, Limits { at_limit: AtLimit::Force, ..limits(400) });
        (config.link.rate, config.sender.compress) = (Some(RATE / 4), false);
        let outcome = run(&guest, &sink, config);
        moved(&guest, &sink, &outcome);
        let [.., judged, last] = outcome.rounds.as_slice() else { panic!("{:?}", outcome.rounds) };
        predicted += judged.predicted.unwrap().as_secs_f64();
        spent += last.spent.as_secs_f64();
    }
    assert!((0.96..1.04).contains(&(spent / predicted)), "{spent} s, predicted were {predicted} s");
}

/// What the guest wrote all the time until it left is named, whoever found it out; what it wrote now and then is not.
#[test]
fn the_pages_that_a_guest_wrote_all_the_time_are_known_when_it_has_left() {
    for tracking in [Tracking::Dirty, Tracking::Unknown] {
        for defer_hot in [true, false] {
            let outcome = with_hot_set(tracking, defer_hot, 5);
            let hot = outcome.hot.unwrap();
            let written = hot.runs(0..PAGES / 20).flatten().count() as u64;
            assert!(written > PAGES / 20 * 3 / 4, "{tracking:?}: {written} of {}", PAGES / 20);
            let others = hot.count() - written;
            assert!(others < PAGES / 8, "{tracking:?}: {others} of {PAGES}");
            let stays = guest(Pattern::HotSet, 0, tracking, 5);
            let sink = ImageSink::empty(&stays.state().image);
            let idle = run(&stays, &sink, config(&stays, 5, limits(1)));
            assert_eq!(idle.hot.map(|hot| hot.count()), Some(0), "{tracking:?}");
        }
    }
}

#[test]
fn free_pages_never_travel_until_they_are_written() {
    let guest = guest(Pattern::Uniform, 40, Tracking::Dirty, 6);
    let mut free = PageBitmap::new(PAGES);
    free.insert_range(100..900);
    guest.state().free = Some(free);
    let sink = ImageSink::empty(&guest.state().image);
    let outcome = run(&guest, &sink, config(&guest, 5, limits(100)));
    outcome.sender.as_ref().unwrap();
    assert!(outcome.wire[0] < 260 * 4096 + 100_000, "{:?}", outcome.wire);
    let (state, sink) = (guest.state(), sink.state());
    let free = state.free.as_ref().unwrap();
    for page in 0..PAGES {
        let expected: &[u8] = if free.contains(page) { &[0; 4096] } else { state.image.page(0, page) };
        assert_eq!(sink.image.page(0, page), expected, "page {page}");
    }
}

#[test]
fn a_trace_has_every_page_that_was_written_while_somebody_watched() {
    for (tracking, seen) in [(Tracking::Dirty, Seen::Harvest), (Tracking::Unknown, Seen::Compare)] {
        let guest = guest(Pattern::Uniform, 400, tracking, 6);
        // Worlds begin after a second.
        guest.run_until(Time::ZERO + Span::from_secs(1));
        let before = guest.state().image.clone();
        let sink = ImageSink::empty(&before);
        let config = config(&guest, 5, limits(100));
        let trace = config.trace.clone();
        let outcome = run(&guest, &sink, config);
        moved(&guest, &sink, &outcome);
        let (records, state) = (trace.records(), guest.state());
        assert!(records.iter().all(|record| record.seen == seen));
        assert!(records.windows(2).all(|pair| pair[0].at <= pair[1].at));
        let mut traced = PageBitmap::new(PAGES);
        records.iter().for_each(|record| traced.insert_all(&record.pages));
        let changed = |page: u64| before.page(0, page) != state.image.page(0, page);
        let unchanged = traced.runs(0..PAGES).flatten().filter(|&page| !changed(page)).count() as u64;
        // A page may be written with what it had: zeros, or what others have.
        assert!(
            traced.count() > 50 && unchanged * 4 < traced.count(),
            "{tracking:?}: {unchanged} of {}",
            traced.count()
        );
        if seen == Seen::Harvest {
            assert!(records.len() >= outcome.rounds.len(), "one at the end of each round, and more");
            // The hosts greet each other for some milliseconds before it is watched.
            let missed = (0..PAGES).filter(|&page| changed(page) && !traced.contains(page)).count();
            assert!(missed <= 3, "{missed}");
        } else {
            let found: Vec<u64> = records.iter().map(|record| record.pages.count()).collect();
            let stated: Vec<u64> = outcome.rounds.iter().skip(1).map(|round| round.stated).collect();
            assert_eq!(found, stated, "one for each round that had another in front of it");
        }
    }
}

/// C04, C06, C09: whenever an attempt is stopped, the guest runs on, its dirty bits are what they were, and the next attempt
/// loses nothing.
#[test]
fn an_attempt_that_fails_leaves_the_guest_running_with_its_dirty_bits() {
    let world = || {
        let guest = guest(Pattern::Sweeping, 400, Tracking::Dirty, 9);
        let sink = ImageSink::empty(&guest.state().image);
        let config = config(&guest, 9, limits(40));
        (guest, sink, config)
    };
    let (unharmed, sink, config) = world();
    let all = run(&unharmed, &sink, config).frames.len() as u64;
    let (mut paused, mut moved_on) = (0, 0);
    for frames in (1..10).chain((10..all).step_by(17)).chain(all - 12..all) {
        let (guest, sink, mut first) = world();
        first.cancel = Some((Role::Sender, frames));
        let mut outcome = run(&guest, &sink, first);
        if settled(&guest, &sink, &mut outcome) {
            moved_on += 1;
            continue;
        }
        {
            let mut state = guest.state();
            if !state.runs() {
                // It was in doubt, and the other host has rejected it.
                state.resume();
            }
            assert!(!state.tracked, "frames {frames}");
            assert_eq!(state.turns.0, state.turns.1, "frames {frames}: let run as often as it was paused");
            paused += state.turns.0;
            let taken: u64 = outcome.rounds.iter().map(|round| round.dirty).max().unwrap_or(0);
            assert!(state.dirty.count() >= taken, "frames {frames}");
        }
        // The second attempt starts where the first one left: the sink keeps what it has.
        let base = ImageSink::holding(sink.state().image.clone());
        let outcome = run(&guest, &base, self::config(&guest, frames + 1, limits(100)));
        moved(&guest, &base, &outcome);
    }
    assert!(paused > 0 && moved_on > 0, "{paused} were stopped while the guest stood still, {moved_on} too late");
}

#[test]
fn a_dirty_log_that_fails_ends_the_attempt_and_counts_all_as_dirty() {
    for after in 0..3 {
        let guest = guest(Pattern::Uniform, 100, Tracking::Dirty, 8);
        guest.state().fail_harvest_after = Some(after);
        let sink = ImageSink::empty(&guest.state().image);
        let outcome = run(&guest, &sink, config(&guest, 6, limits(1)));
        assert!(matches!(outcome.sender.unwrap_err().kind, ErrorKind::Source(_)));
        let state = guest.state();
        assert!(state.runs() && state.dirty.count() == PAGES, "{} of {PAGES}", state.dirty.count());
    }
}

/// Frames cover whole install pages, and yet no page is looked at twice in a round.
#[test]
fn regions_of_large_pages_arrive_whole_by_frames_of_every_size() {
    for install_size in [InstallSize::KIB_64, InstallSize::MIB_2] {
        for batch_pages in [16, 512] {
            let region = Region { bytes: 1500 * 4096 - 5, install_size };
            let image = Image::filled(vec![region, region], Mix::NOISE, &mut Rng::new(1));
            let guest = Guest::new(image, Pattern::Uniform, 1500, Tracking::Dirty, 2);
            let sink = ImageSink::empty(&guest.state().image);
            let mut config = config(&guest, 1, limits(10));
            (config.sender.batch_pages, config.sender.compress) = (batch_pages, false);
            config.link.rate = Some(4 * RATE);
            let outcome = run(&guest, &sink, config);
            moved(&guest, &sink, &outcome);
            let looked_at: u64 = outcome.rounds.iter().map(|round| round.pages).sum();
            assert_eq!((guest.state().reads, outcome.sent.wants), (looked_at, 0), "{install_size:?} {batch_pages}");
            assert!(outcome.rounds.len() > 2, "{:?}", outcome.rounds);
        }
    }
}
