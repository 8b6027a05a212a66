//! What goes wrong while a guest runs and its memory is on the way, C01 to C15 of the project's list of failures: the guest
//! runs on, nobody else starts it, nothing of it is lost, and the next attempt brings it over.
//!
//! C03 needs a transport that proves identities, which there is none of yet: no connection of a live session can fail in a
//! handshake of its own. What C01 says of addresses is in cli/tests/live_ends.rs, as no address is resolved here.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{FrameKind, LaneId, Role};
use pagewire_protocol::handover::Whereabouts;
use pagewire_protocol::limits::{SILENCE_MAX, STALL_SPAN_MAX};
use pagewire_protocol::time::{Span, Time};
use pagewire_sender::converge::{Limits, Reason};
use pagewire_sender::{ErrorKind, Tracking};
use pagewire_test_support::attempt::{Attempt, End};
use pagewire_test_support::guest::{Guest, Pattern};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::{Cut, LinkConfig};
use pagewire_test_support::live_peer::blobs;
use pagewire_test_support::memory::{ImageBase, ImageSink, Neighbour, SinkFaults};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{Decision, Harm, Outcome, When, WorldConfig};

const PAGES: u64 = 256;
/// A fifth of a second for all of them.
const RATE: u64 = 5_000_000;
/// Worlds begin after a second.
const BEGIN: Span = Span::from_secs(1);

fn guest(pattern: Pattern) -> Guest {
    let image = Image::random(PAGES, Mix::MEMORY, &mut Rng::new(31));
    let guest = Guest::new(image, pattern, PAGES, Tracking::Dirty, 32);
    guest.state().keep_history();
    guest
}

fn config() -> WorldConfig {
    let mut config = WorldConfig::new(33);
    config.live = Some(Limits { downtime: Span::from_millis(6), ..Limits::default() });
    let delay = Span::from_millis(1);
    config.link = LinkConfig { rate: Some(RATE), buffer: 64 << 10, piece_max: 9_000, ..LinkConfig::delaying(delay) };
    config.sender.lanes = 2;
    config.pause_span = Span::from_millis(4);
    config.blobs = blobs();
    config
}

fn attempt(change: impl FnOnce(&mut WorldConfig)) -> Attempt {
    let guest = guest(Pattern::Sweeping);
    let sink = ImageSink::empty(&guest.state().image);
    let mut config = config();
    change(&mut config);
    Attempt::new(guest, sink, config)
}

/// Frames and rounds of a session that nothing happens to.
fn lengths() -> (u64, usize) {
    let outcome = attempt(|_| ()).outcome;
    (outcome.frames.len() as u64, outcome.rounds.len())
}

fn sent_pages(outcome: &Outcome) -> usize {
    outcome.frames.iter().filter(|(_, kind, _)| *kind == FrameKind::PAGES).count()
}

/// The next attempt brings all of it, onto what the last one left.
fn arrives(attempt: Attempt, what: &str) {
    let Attempt { guest, sink, mut outcome } = attempt;
    outcome.hosts.iter_mut().for_each(|host| host.told_to_run = 0);
    let base = ImageSink::holding(sink.state().image.clone());
    let mut config = config();
    (config.hosts, config.sender.session) = (outcome.hosts, [77; 16]);
    let mut next = Attempt::new(guest, base, config);
    let Outcome { sender, receiver, .. } = &next.outcome;
    assert!(sender.is_ok() && receiver.is_ok(), "{what}: {sender:?} {receiver:?}");
    assert_eq!(next.settle(true, &what), End::There);
}

/// I1, I5, I6: the guest runs where it was, nobody watches its writes, nothing but whole pages of it is at the receiver,
/// and the next attempt succeeds.
fn stays(mut attempt: Attempt, what: &str) {
    assert!(attempt.outcome.sender.is_err() && attempt.outcome.receiver.is_err(), "{what}");
    assert_eq!(attempt.hosts()[1].told_to_run, 0, "{what}");
    assert!(attempt.outcome.blobs.is_none(), "{what}: it was never all there");
    {
        let state = attempt.guest.state();
        let died = attempt.outcome.hosts[0].dead;
        assert!(state.runs() || died, "{what}");
        assert!(!state.tracked, "{what}");
        let taken = attempt.outcome.rounds.iter().map(|round| round.dirty).max().unwrap_or_default();
        assert!(state.dirty.count() >= taken, "{what}: dirty bits are given back");
        let (sink, history) = (attempt.sink.state(), state.history.as_ref().unwrap());
        for place in 0..PAGES {
            let page = sink.image.page(0, place);
            let is_whole = |(of, bytes): &(u64, Vec<u8>)| *of == place && bytes.as_slice() == page;
            assert!(page.iter().all(|&byte| byte == 0) || history.iter().any(is_whole), "{what}: page {place}");
        }
    }
    assert_eq!(attempt.settle(true, &what), End::Here);
    arrives(attempt, what);
}

/// Moments before the guest is paused: that of every fifth frame, and of each round's end.
fn moments() -> Vec<When> {
    let (frames, rounds) = lengths();
    assert!(rounds >= 3, "{rounds}");
    (1..frames * 3 / 4).step_by(5).map(When::Frames).chain((1..rounds - 1).map(When::Rounds)).collect()
}

#[test]
fn c01_a_connection_that_is_never_made_leaves_the_guest_alone() {
    let attempt = attempt(|config| config.cuts.push((LaneId::CONTROL, true, Cut::Bytes(0))));
    assert_eq!((sent_pages(&attempt.outcome), attempt.guest.state().turns), (0, (0, 0)));
    stays(attempt, "C01");
    // A lane that cannot be joined is one of the session's.
    for lane in [LaneId::bulk(0), LaneId::bulk(1)] {
        stays(self::attempt(|config| config.cuts.push((lane, true, Cut::Bytes(0)))), "C01");
    }
}

#[test]
fn c02_hosts_that_do_not_fit_find_out_before_the_first_page() {
    type Mismatch = fn(&mut WorldConfig);
    let mismatches: [(Mismatch, &[&str]); 3] = [
        (
            |config| {
                (config.receiver_policy.version_min, config.receiver_policy.version_max) = (2, 3);
            },
            &["1-1", "2-3"],
        ),
        (
            |config| {
                let policy = &mut config.receiver_policy;
                (policy.features_offered, policy.features_required) = (1 << 40, 1 << 40);
            },
            &["0x10000000000", "0x2"],
        ),
        (
            |config| {
                let text = "region 0: 2097152 bytes here, 1048576 there";
                config.decision = Decision::Refuse(CloseCode::REFUSED, text.to_owned());
            },
            &["2097152", "1048576"],
        ),
    ];
    for (mismatch, values) in mismatches {
        let attempt = attempt(mismatch);
        assert_eq!((sent_pages(&attempt.outcome), attempt.guest.state().turns.0), (0, 0));
        let error = attempt.outcome.sender.as_ref().unwrap_err().to_string();
        assert!(values.iter().all(|value| error.contains(value)), "{error}");
        stays(attempt, "C02");
    }
}

/// A receiver that was not told to take guests does not offer the feature that a live session needs.
#[test]
fn c02_a_receiver_without_the_feature_is_no_place_for_a_guest() {
    let image = Image::random(4, Mix::NOISE, &mut Rng::new(1));
    let mut script = pagewire_test_support::live_peer::live_sender(&image);
    script.features = 0;
    script.enter(pagewire_protocol::session::Phase::Opening, &image);
    assert_eq!(script.failure().0, CloseCode::INCOMPATIBLE);
}

#[test]
fn c04_a_receiver_that_is_killed_leaves_the_guest_running() {
    for when in moments() {
        let attempt = attempt(|config| config.harms.push((Role::Receiver, when, Harm::Dies)));
        assert!(attempt.guest.state().runs() && attempt.outcome.hosts[1].dead, "{when:?}");
        stays(attempt, &format!("C04 {when:?}"));
    }
}

#[test]
fn c05_a_sender_that_is_killed_leaves_nothing_that_could_run() {
    for when in moments() {
        let mut attempt = attempt(|config| config.harms.push((Role::Sender, when, Harm::Dies)));
        let [one, other] = attempt.hosts();
        assert!(one.dead && one.records.is_empty() && other.records.is_empty(), "{when:?}");
        assert_eq!(other.handovers.whereabouts(), Whereabouts::Unrecorded, "{when:?}");
        // Its memory's watcher is gone with it.
        attempt.guest.state().tracked = false;
        stays(attempt, &format!("C05 {when:?}"));
    }
}

#[test]
fn c06_a_reset_in_the_middle_of_a_frame_leaves_no_torn_page() {
    let mut reached = 0;
    for lane in [LaneId::CONTROL, LaneId::bulk(0), LaneId::bulk(1)] {
        for to_receiver in [true, false] {
            for bytes in [1, 100, 2_000, 5_001, 70_003, 150_001] {
                let cut = Cut::Bytes(bytes);
                let mut attempt = attempt(|config| config.cuts.push((lane, to_receiver, cut)));
                if attempt.outcome.sender.is_ok() {
                    assert_eq!(attempt.settle(true, &cut), End::There, "so few bytes went there");
                    continue;
                }
                if attempt.outcome.rounds.is_empty() || attempt.guest.state().turns.0 == 0 {
                    stays(attempt, &format!("C06 {lane:?} {to_receiver} {bytes}"));
                    reached += 1;
                } else if attempt.settle(true, &cut) == End::Here {
                    arrives(attempt, &format!("C06 {lane:?} {to_receiver} {bytes}"));
                }
            }
        }
    }
    assert!(reached >= 12, "{reached}");
}

/// I8: both are alive and neither hears the other, or only one does: 15 s, and a little to say so.
#[test]
fn c07_a_silent_cut_ends_both_sides_in_bounded_time() {
    let mut reached = 0;
    for lane in [LaneId::CONTROL, LaneId::bulk(0), LaneId::bulk(1)] {
        for ways in [&[true][..], &[false], &[true, false]] {
            for bytes in [1, 200, 3_000, 60_000] {
                let attempt = attempt(|config| {
                    config.cuts.extend(ways.iter().map(|&way| (lane, way, Cut::Silence(bytes))));
                });
                let outcome = &attempt.outcome;
                if outcome.sender.is_ok() || attempt.guest.state().turns.0 > 0 {
                    // So much never went there, or not before the end; live_faults.rs has what happens then.
                    continue;
                }
                let bound = Time::ZERO + BEGIN + SILENCE_MAX + SILENCE_MAX + Span::from_secs(2);
                assert!(outcome.sender_over <= bound && outcome.receiver_over <= bound, "{lane:?} {ways:?} {bytes}");
                stays(attempt, &format!("C07 {lane:?} {ways:?} {bytes}"));
                reached += 1;
            }
        }
    }
    assert!(reached >= 10, "{reached}");
}

/// One byte a second is no sign of life: whole frames are. The rate that a transport insists on is in transport/.
#[test]
fn c08_a_trickle_is_given_up() {
    for after in [1, 20, 40, 60, 80] {
        let from = Time::ZERO + BEGIN + Span::from_millis(after);
        let attempt = attempt(|config| config.link.trickles_from = Some(from));
        let bound = from + SILENCE_MAX + SILENCE_MAX + Span::from_secs(2);
        assert!(attempt.outcome.sender_over <= bound && attempt.outcome.receiver_over <= bound, "{after}");
        stays(attempt, &format!("C08 {after}"));
    }
}

/// I9: in each state, twice; with none running and after the end see live_faults.rs (C26) and ends.rs.
#[test]
fn c09_a_cancel_at_the_sender_leaves_the_guest_running_before_commit_and_is_refused_after() {
    let (mut stayed, mut refused) = (0, 0);
    let all = (1..lengths().0 + 3).map(When::Frames).chain([When::Pausing, When::Offered]);
    for when in all.chain((0..4).map(When::Rounds)) {
        let stop = (Role::Sender, when, Harm::Stops);
        let mut attempt = attempt(|config| config.harms.extend([stop, stop]));
        if attempt.outcome.sender.is_ok() {
            let late = attempt.outcome.harmed.is_empty() || attempt.hosts()[0].records.len() == 1;
            assert!(late, "{when:?}");
            assert_eq!(attempt.settle(true, &when), End::There, "{when:?}");
            refused += 1;
            continue;
        }
        assert!(matches!(attempt.outcome.sender.as_ref().unwrap_err().kind, ErrorKind::Cancelled), "{when:?}");
        assert!(attempt.guest.state().runs(), "{when:?}");
        assert_eq!(attempt.settle(true, &when), End::Here, "{when:?}");
        stayed += 1;
        if stayed % 7 == 0 {
            arrives(attempt, "C09");
        }
    }
    assert!(stayed > 20 && refused > 2, "{stayed} {refused}");
}

#[test]
fn c10_a_cancel_at_the_receiver_reaches_the_sender_with_its_reason() {
    for when in moments() {
        let attempt = attempt(|config| config.harms.push((Role::Receiver, when, Harm::Stops)));
        let error = attempt.outcome.sender.as_ref().unwrap_err().to_string();
        assert!(error.contains("cancelled"), "{when:?}: {error}");
        stays(attempt, &format!("C10 {when:?}"));
    }
}

#[test]
fn c11_a_guest_that_never_converges_stays_and_its_rate_is_named() {
    type Bound = fn(&mut Limits);
    let bounded: [(Bound, Reason); 3] = [
        (|_| (), Reason::Dirtying),
        (|limits| limits.rounds = 1, Reason::Rounds),
        (|limits| (limits.total, limits.downtime) = (Some(Span::from_millis(50)), Span::from_millis(1)), Reason::Total),
    ];
    for (at, (bound, reason)) in bounded.into_iter().enumerate() {
        // The first writes everything again and again; the others something, and always more than fits.
        let rate = if at == 0 { 40 * PAGES } else { 4 * PAGES };
        let image = Image::random(PAGES, Mix::NOISE, &mut Rng::new(31));
        let guest = Guest::new(image, Pattern::Uniform, rate, Tracking::Dirty, 32);
        let sink = ImageSink::empty(&guest.state().image);
        let mut config = config();
        let mut limits = Limits { downtime: Span::from_millis(2), ..Limits::default() };
        bound(&mut limits);
        config.live = Some(limits);
        let attempt = Attempt::new(guest, sink, config);
        let error = attempt.outcome.sender.as_ref().unwrap_err();
        let ErrorKind::NotConverging { reason: found, dirty_rate } = error.kind else { panic!("{error:?}") };
        assert_eq!(found, reason);
        let named = format!("at {dirty_rate:.0} changed pages a second");
        assert!(dirty_rate >= 50.0 && error.to_string().contains(&named), "{error}");
        assert!(attempt.outcome.rounds.len() <= 8, "{reason:?}: {}", attempt.outcome.rounds.len());
        assert!(
            attempt.outcome.decisions.iter().any(|what| what.contains("give up")),
            "{:?}",
            attempt.outcome.decisions
        );
        let state = attempt.guest.state();
        assert_eq!((state.runs(), state.turns, state.tracked), (true, (0, 0), false));
    }
}

#[test]
fn c12_a_destination_that_fails_is_named_and_costs_the_guest_nothing() {
    let faults = |after| {
        [
            SinkFaults { fail_write_after: Some(after), ..SinkFaults::default() },
            SinkFaults { fail_read_after: Some(after), ..SinkFaults::default() },
            SinkFaults { fail_finish: true, ..SinkFaults::default() },
        ]
    };
    for faults in [0, 1, 5, 20].into_iter().flat_map(faults) {
        let guest = guest(Pattern::HotSet);
        // Something to read: the receiver looks at what it has.
        let sink = ImageSink::new(Image::zeros(guest.state().image.regions.clone()), vec![PAGES], true, faults);
        let mut attempt = Attempt::new(guest, sink, config());
        if attempt.outcome.sender.is_ok() {
            assert_eq!(attempt.settle(true, &faults), End::There, "it never got so far: {faults:?}");
            continue;
        }
        let error = attempt.outcome.sender.as_ref().unwrap_err().to_string();
        assert!(error.contains("destination: "), "the sender is told: {error}");
        stays(attempt, &format!("C12 {faults:?}"));
    }
}

/// What either side keeps of earlier visits: gone, unreadable, or not what it says.
fn with_history(change: impl FnOnce(&mut WorldConfig, &mut ImageBase), rotten: bool) {
    let guest = guest(Pattern::Bursts);
    let mut config = config();
    let (now, key) = (guest.state().image.clone(), config.sender.domain_key);
    let mut earlier = now.clone();
    earlier.touch(30, Mix::MEMORY, &mut Rng::new(5));
    let mut there = earlier.clone();
    if rotten {
        (0..PAGES).step_by(3).for_each(|page| there.page_mut(0, page)[9] ^= 1);
    }
    let sink = ImageSink::claiming(&earlier, key, there, rotten);
    let mut base = ImageBase::whole(&earlier, key);
    change(&mut config, &mut base);
    config.bases = vec![base];
    let mut attempt = Attempt::new(guest, sink, config);
    let Outcome { sender, receiver, .. } = &attempt.outcome;
    assert!(sender.is_ok() && receiver.is_ok(), "{sender:?} {receiver:?}");
    assert_eq!(attempt.settle(true, &"C13, C14"), End::There);
}

#[test]
fn c13_a_store_that_cannot_be_read_never_fails_a_session() {
    with_history(|_, base| base.lost = true, false);
    with_history(|_, base| base.bytes = None, false);
}

/// I7: digests are of bytes that were read, never of what somebody noted.
#[test]
fn c14_pages_that_were_damaged_at_rest_are_fetched_again() {
    with_history(|_, _| (), true);
    with_history(|_, base| base.bytes = None, true);
    with_history(
        |config, base| {
            let (image, key) = (base.image.clone(), base.key);
            config.others = Some(Box::new(Neighbour { image, key, rotten: true }));
        },
        true,
    );
}

/// A17: what goes out is what was digested, however the page looks meanwhile; and it goes again.
#[test]
fn c15_a_page_that_is_written_while_it_is_read_arrives_as_it_was_in_the_end() {
    for tracking in [Tracking::Dirty, Tracking::Unknown] {
        for pattern in Pattern::ALL {
            let image = Image::random(PAGES, Mix::MEMORY, &mut Rng::new(31));
            let guest = Guest::new(image, pattern, PAGES, tracking, 32);
            guest.state().writes_under_reads = true;
            let sink = ImageSink::empty(&guest.state().image);
            let mut attempt = Attempt::new(guest, sink, config());
            let Outcome { sender, receiver, rounds, .. } = &attempt.outcome;
            assert!(sender.is_ok() && receiver.is_ok(), "{tracking:?} {pattern:?}: {sender:?} {receiver:?}");
            assert!(rounds.len() > 1 && attempt.outcome.sender_over < Time::ZERO + STALL_SPAN_MAX);
            assert_eq!(attempt.settle(true, &"C15"), End::There);
        }
    }
}
