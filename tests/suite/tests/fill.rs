//! Post-copy by seeds: a guest leaves pages behind, runs where it is, and gets them, whatever is cut when.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::frame::{FrameKind, LaneId};
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{InstallSize, Place, Region};
use pagewire_protocol::time::Span;
use pagewire_sender::Tracking;
use pagewire_sender::converge::{AtLimit, Limits};
use pagewire_test_support::guest::{Guest, Pattern};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::{Cut, LinkConfig};
use pagewire_test_support::live_peer::blobs;
use pagewire_test_support::memory::{ImageBase, ImageSink};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{FillHarm, FillWorld, FillWorldConfig, Habit, Left, Outcome, World, WorldConfig};

/// A guest that was handed over, and what it lacks.
struct Moved {
    image: Image,
    sink: ImageSink,
    left: Left,
    live: Outcome,
}

fn seeds(default: u64) -> u64 {
    std::env::var("PAGEWIRE_SEEDS").map_or(default, |seeds| seeds.parse().unwrap())
}

/// The live part: it ends in a hand-over that leaves pages behind, unless the guest wrote so little that all went before.
fn hand_over(guest: &Guest, sink: ImageSink, mut config: WorldConfig, at_once: bool) -> Option<Moved> {
    config.post_copy = Some(at_once);
    config.live.get_or_insert(Limits {
        downtime: Span::from_millis(1),
        rounds: 2,
        at_limit: AtLimit::PostCopy,
        ..Limits::default()
    });
    config.blobs = blobs();
    config.guest = Some(guest.clone());
    let (seed, image) = (config.seed, guest.state().image.clone());
    let (live, left) = World::new(&image, &sink, config).run_apart();
    assert!(live.sender.is_ok() && live.receiver.is_ok(), "seed {seed}: {:?} {:?}", live.sender, live.receiver);
    assert_eq!((live.hosts[0].told_to_run, live.hosts[1].told_to_run), (0, 1), "seed {seed}");
    let state = guest.state();
    assert!(!state.runs(), "seed {seed}: two runners");
    let Some(left) = left else {
        assert!(!at_once && sink.state().image == state.image, "seed {seed}: nothing was left behind");
        return None;
    };
    assert_eq!(left.remainder.pages(), left.guest.pages(), "seed {seed}: both sides know the same");
    assert_eq!(left.remainder.handover(), left.guest.handover(), "seed {seed}: and by the same root");
    Some(Moved { image: state.image.clone(), sink, left, live })
}

fn regions(rng: &mut Rng) -> Vec<Region> {
    let sizes = [InstallSize::KIB_4, InstallSize::KIB_64, InstallSize::MIB_2];
    let region = |rng: &mut Rng| {
        let install_size = rng.pick(&sizes);
        let pages = rng.between(1, if install_size == InstallSize::MIB_2 { 1100 } else { 300 });
        // Not all of the last page belongs to it.
        Region { bytes: pages * PAGE_BYTES as u64 - rng.below(4096), install_size }
    };
    (0..rng.between(1, 3)).map(|_| region(rng)).collect()
}

fn link(rng: &mut Rng) -> LinkConfig {
    LinkConfig {
        delay: Span::from_nanos(rng.between(0, 3_000_000)),
        rate: Some(rng.between(4, 200) * 1_000_000),
        buffer: rng.between(1, 256) as usize * 1024,
        piece_max: rng.between(500, 100_000) as usize,
        trickles_from: None,
    }
}

/// A guest that has left, by seed: of several regions, at once or after rounds, onto a base that stays or none.
fn moved(seed: u64) -> Option<Moved> {
    let rng = &mut Rng::new(seed);
    let image = Image::filled(regions(rng), Mix::MEMORY, rng);
    let mut config = WorldConfig::new(seed);
    config.sender.lanes = rng.between(1, 4) as u8;
    config.link = link(rng);
    config.pause_span = Span::from_nanos(rng.below(5_000_000));
    let at_once = rng.chance(50);
    let sink = if rng.chance(40) {
        let mut base = image.clone();
        base.touch(rng.pick(&[3, 30, 95]), Mix::MEMORY, rng);
        // Every fourth sender knows nothing of it: the receiver reads it while pages are left behind.
        if seed % 4 != 3 {
            config.bases = vec![ImageBase::whole(&base, [0; 32])];
        }
        ImageSink::claiming(&base, [0; 32], base.clone(), true)
    } else {
        ImageSink::empty(&image)
    };
    // It writes more than the link takes: without post-copy it would never leave.
    let guest = Guest::new(image, rng.pick(&Pattern::ALL), 400_000, Tracking::Dirty, rng.word());
    hand_over(&guest, sink, config, at_once)
}

fn cut(rng: &mut Rng) -> FillHarm {
    let lane = rng.pick(&[LaneId::CONTROL, LaneId::URGENT, LaneId::bulk(0), LaneId::bulk(1)]);
    let bytes = rng.pick(&[2_000, 200_000, 2_000_000]);
    let bytes = rng.below(bytes);
    let kinds = [FrameKind::FILL, FrameKind::LACK, FrameKind::LACKING, FrameKind::DONE, FrameKind::FAULT];
    match rng.below(10) {
        0..5 => FillHarm::Cut(lane, rng.chance(70), Cut::Bytes(bytes)),
        5 => FillHarm::Cut(lane, rng.chance(70), Cut::Silence(bytes)),
        6 => FillHarm::StopSender(rng.between(1, 60)),
        7 => FillHarm::StopReceiver(rng.between(1, 60)),
        _ => FillHarm::CutAt(rng.pick(&kinds)),
    }
}

fn world(seed: u64) -> FillWorldConfig {
    let rng = &mut Rng::new(seed ^ 0xf1_77);
    let mut config = FillWorldConfig::new(seed);
    config.lanes = rng.between(1, 4) as u8;
    config.sender.lanes = rng.between(1, 4) as u8;
    config.sender.single_stream = rng.chance(20);
    config.sender.compress = rng.chance(50);
    config.sender.workers = rng.between(1, 2) as usize;
    config.sender.bandwidth_limit = rng.chance(20).then(|| rng.between(2, 20) * 1_000_000);
    config.sender.batch_pages = rng.pick(&[16, 64, 256]);
    config.link = link(rng);
    config.window = rng.pick(&[1, 100_000, 4 << 20]);
    config.vcpus = (0..rng.between(1, 4)).map(|_| rng.pick(&Habit::ALL)).collect();
    config.think = Span::from_nanos(rng.between(20_000, 1_000_000));
    config.touches = rng.between(10, 300);
    config.harms = (0..rng.below(6)).map(|_| cut(rng)).collect();
    if rng.chance(30) {
        config.ahead = (0..rng.between(1, 400)).map(|_| Place(rng.below(6000) as u32)).collect();
    }
    config
}

/// SPEC 13: whatever is cut when, every vCPU reads what it should, every page is installed once and none over what the
/// guest wrote, and the memory is given up when all is there. The worlds check each of these as they go.
#[test]
fn a_guest_reads_the_right_bytes_and_gets_each_page_once_whatever_breaks() {
    let (mut whole, mut broken, mut local, mut wanted, mut faults, mut hybrid) = (0, 0, 0, 0, 0, 0);
    let seeds = seeds(300);
    for seed in 0..seeds {
        let Some(Moved { image, sink, left, live }) = moved(seed) else {
            whole += 1;
            continue;
        };
        hybrid += u64::from(live.rounds.len() > 1);
        let config = world(seed);
        let harms = config.harms.len();
        let outcome = FillWorld::new(image, sink, config).run(left);
        assert!(outcome.sessions.len() <= harms + 1, "seed {seed}: {:?}", outcome.sessions);
        broken += outcome.sessions.iter().filter(|(sender, _)| sender.is_err()).count() as u64;
        local += outcome.received.local;
        wanted += outcome.sent.iter().map(|sent| sent.wants).sum::<u64>();
        faults += outcome.received.faults;
    }
    assert!(whole < seeds / 10 + 1, "{whole} of {seeds} guests left nothing behind");
    if seeds >= 300 {
        assert!(broken > 100 && hybrid > 30, "{broken} sessions broke, {hybrid} guests left after rounds");
        assert!(local > 1000 && wanted > 1000 && faults > 1000, "{local} {wanted} {faults}");
    }
}

/// The live part: all of the guest is left behind, and comes, each page once, in one session.
#[test]
fn a_guest_that_leaves_at_once_gets_all_of_its_memory() {
    for seed in 0..20 {
        let rng = &mut Rng::new(seed);
        let image = Image::filled(regions(rng), Mix::MEMORY, rng);
        let guest = Guest::new(image.clone(), rng.pick(&Pattern::ALL), 10_000, Tracking::Dirty, seed);
        let Moved { image: then, sink, left, live } =
            hand_over(&guest, ImageSink::empty(&image), WorldConfig::new(seed), true).unwrap();
        assert_eq!(left.guest.pages(), image.pages(), "seed {seed}");
        assert!(live.frames.iter().filter(|(_, kind, _)| *kind == FrameKind::PAGES).count() < 20, "seed {seed}");
        let outcome = FillWorld::new(then, sink, FillWorldConfig::new(seed)).run(left);
        assert!(matches!(outcome.sessions.as_slice(), [(Ok(()), Ok(()))]), "seed {seed}: {:?}", outcome.sessions);
    }
}

/// Hybrid: what the guest wrote in the last round follows it, and nothing else does.
#[test]
fn a_guest_that_writes_too_much_leaves_what_is_dirty_behind() {
    let mut behind = 0;
    for seed in 0..20 {
        let rng = &mut Rng::new(seed);
        let image = Image::random(600, Mix::NOISE, rng);
        let guest = Guest::new(image.clone(), Pattern::ALL[seed as usize % 4], 2_000, Tracking::Dirty, seed);
        let mut config = WorldConfig::new(seed);
        config.link = LinkConfig { rate: Some(10_000_000), ..LinkConfig::delaying(Span::from_millis(1)) };
        let Some(Moved { image: then, sink, left, live }) = hand_over(&guest, ImageSink::empty(&image), config, false)
        else {
            continue;
        };
        behind += 1;
        assert!(left.guest.pages() < 600 && !live.rounds.is_empty(), "seed {seed}: {:?}", live.rounds);
        let outcome = FillWorld::new(then, sink, FillWorldConfig::new(seed)).run(left);
        assert!(matches!(outcome.sessions.as_slice(), [(Ok(()), Ok(()))]), "seed {seed}: {:?}", outcome.sessions);
    }
    assert!(behind > 10, "{behind}");
}

/// A guest that waits gets its page in the time that its link takes, though bulk lanes are full: alone, where the urgent
/// lane has a connection of its own; behind what a connection holds already, where all lanes share one.
#[test]
fn a_guest_that_waits_is_served_before_the_background() {
    let mut waits = 0;
    for seed in 0..seeds(60) {
        let rng = &mut Rng::new(seed);
        let install_size = rng.pick(&[InstallSize::KIB_4, InstallSize::KIB_64, InstallSize::MIB_2]);
        let image = Image::filled(vec![Region { bytes: 4 << 20, install_size }], Mix::NOISE, rng);
        let guest = Guest::new(image.clone(), Pattern::Uniform, 0, Tracking::Dirty, seed);
        let Moved { image, sink, left, .. } =
            hand_over(&guest, ImageSink::empty(&image), WorldConfig::new(seed), true).unwrap();
        let mut config = world(seed);
        (config.harms, config.ahead, config.window) = (Vec::new(), Vec::new(), 4 << 20);
        (config.link.rate, config.sender.bandwidth_limit) = (Some(20_000_000), None);
        config.vcpus = vec![Habit::Random; rng.between(1, 4) as usize];
        let (delay, rate) = (config.link.delay.as_nanos(), 20_000_000);
        let answer = u64::from(install_size.bytes()) + 4096;
        // Frames of the background that left before: the writer's buffer, and one frame more than fits it.
        let ahead =
            if config.sender.single_stream { config.link.buffer as u64 + answer.max(256 * 4096) + 4096 } else { 0 };
        // An answer that the background overtakes is still on the lane when its vCPU asks for the next page.
        let bytes = answer * 2 * config.vcpus.len() as u64 + ahead + 4096;
        let bound = 2 * delay + bytes * 1_000_000_000 / rate + 1_000_000;
        let outcome = FillWorld::new(image, sink, config).run(left);
        waits += u64::from(outcome.longest_wait > Span::ZERO);
        let longest = outcome.longest_wait.as_nanos();
        assert!(longest <= bound, "seed {seed}: {longest} ns, {bound} at most");
    }
    assert!(waits > 20, "{waits} guests waited");
}

/// What is found by a digest may be gone when it is needed, with its disk or its store: the sender has it.
#[test]
fn what_a_store_loses_while_a_guest_is_filled_comes_from_the_sender() {
    let (mut wanted, mut guests) = (0, 0);
    for seed in 0..seeds(60) {
        let Some(Moved { image, sink, left, .. }) = moved(seed) else { continue };
        guests += u64::from(sink.state().old.take().is_some());
        let outcome = FillWorld::new(image, sink, world(seed)).run(left);
        assert_eq!(outcome.received.local, 0, "seed {seed}");
        wanted += outcome.sent.iter().map(|sent| sent.wants).sum::<u64>();
    }
    assert!(guests > 10 && wanted > 100, "{guests} guests, {wanted} pages");
}

/// C35: frames that are changed on their way are not installed, and come again.
#[test]
fn frames_that_are_not_what_was_sent_come_again() {
    let mut wanted = 0;
    for seed in 0..seeds(60) {
        let Some(Moved { image, sink, left, .. }) = moved(seed) else { continue };
        let mut config = world(seed);
        (config.ahead, config.harms) = (Vec::new(), Vec::new());
        let mut chance = Rng::new(seed);
        config.meddler = Some(Box::new(move |to_receiver, bytes| {
            if to_receiver && FrameKind(bytes[4]) == FrameKind::PAGES && chance.chance(10) {
                // In the batch digest, or in the last page.
                let at = if chance.chance(50) { 8 + 24 } else { bytes.len() - 1 };
                bytes[at] ^= if at == 32 || bytes.len() > 4096 { 1 } else { 0 };
            }
        }));
        let outcome = FillWorld::new(image, sink, config).run(left);
        wanted += outcome.sent.iter().map(|sent| sent.wants).sum::<u64>();
    }
    assert!(wanted > 100, "{wanted}");
}
