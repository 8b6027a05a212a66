//! C40: a process that stands still for ten minutes, with its clock or without, at any moment of a live session, and then
//! goes on as if nothing had happened. No two hosts run the guest, and no time that passed decides who does.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::frame::Role;
use pagewire_protocol::handover::Word;
use pagewire_protocol::time::Span;
use pagewire_sender::Tracking;
use pagewire_sender::converge::Limits;
use pagewire_test_support::attempt::{Attempt, End};
use pagewire_test_support::guest::{Guest, Pattern};
use pagewire_test_support::host::Lease;
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::LinkConfig;
use pagewire_test_support::live_peer::blobs;
use pagewire_test_support::memory::ImageSink;
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{Harm, When, WorldConfig};
use std::collections::BTreeMap;

const TEN_MINUTES: Span = Span::from_secs(600);

fn attempt(harms: &[(Role, When, Harm)], lease: bool) -> Attempt {
    let image = Image::random(32, Mix::MEMORY, &mut Rng::new(41));
    let guest = Guest::new(image, Pattern::Uniform, 60, Tracking::Dirty, 42);
    let sink = ImageSink::empty(&guest.state().image);
    let mut config = WorldConfig::new(43);
    config.live = Some(Limits { downtime: Span::from_millis(100), ..Limits::default() });
    config.link = LinkConfig { rate: Some(4_000_000), ..LinkConfig::delaying(Span::from_millis(2)) };
    config.pause_span = Span::from_millis(3);
    config.blobs = blobs();
    config.harms = harms.to_vec();
    if lease {
        let lease = Lease::default();
        config.hosts.iter_mut().for_each(|host| host.lease = Some(lease.clone()));
    }
    Attempt::new(guest, sink, config)
}

fn sleeps(role: Role, when: When, clock_runs: bool) -> (Role, When, Harm) {
    (role, when, Harm::Sleeps { span: TEN_MINUTES, clock_runs })
}

/// Every frame of a session, every word, and what lies between.
fn moments() -> Vec<When> {
    let frames = attempt(&[], false).outcome.frames.len() as u64;
    let words = [Word::Ready, Word::Commit, Word::Started, Word::Gone].map(When::Said);
    (1..=frames).map(When::Frames).chain([When::Rounds(1), When::Pausing, When::Offered]).chain(words).collect()
}

#[test]
fn c40_a_process_that_stands_still_at_any_moment_leaves_one_runner() {
    let mut ends = BTreeMap::new();
    for when in moments() {
        for role in [Role::Sender, Role::Receiver] {
            for clock_runs in [true, false] {
                for lease in [true, false] {
                    let what = (when, role, clock_runs, lease);
                    let mut attempt = attempt(&[sleeps(role, when, clock_runs)], lease);
                    let end = attempt.settle(true, &what);
                    assert_ne!(end, End::Lost, "nothing has crashed: {what:?}");
                    attempt.replay(&what);
                    *ends.entry((role == Role::Sender, end)).or_insert(0) += 1;
                }
            }
        }
    }
    assert_eq!(ends.len(), 4, "each of them with each end: {ends:?}");
}

/// One after the other, and both at once.
#[test]
fn c40_both_sides_may_stand_still() {
    let moments = moments();
    for one in moments.iter().step_by(2) {
        for other in moments.iter().rev().take(12) {
            let harms = [sleeps(Role::Sender, *one, true), sleeps(Role::Receiver, *other, false)];
            assert_ne!(attempt(&harms, false).settle(true, &harms), End::Lost);
        }
    }
}

/// Between HANDED and STARTED nobody runs it, and no time changes that: what the receiver says does.
#[test]
fn c40_a_receiver_that_wakes_up_with_commit_unread_decides_alone() {
    for clock_runs in [true, false] {
        let asleep = attempt(&[sleeps(Role::Receiver, When::Said(Word::Commit), clock_runs)], false);
        let [one, other] = &asleep.outcome.hosts;
        assert_eq!(one.told_to_run, 0, "HANDED is not taken back by time");
        assert!(asleep.outcome.sender.is_err() && !asleep.guest.state().runs());
        assert!(other.told_to_run <= 1);
        let mut asleep = asleep;
        let end = asleep.settle(true, &clock_runs);
        assert_eq!(asleep.hosts()[0].told_to_run, u64::from(end == End::Here), "one of them, once");
        assert_eq!(asleep.hosts()[1].told_to_run, u64::from(end == End::There), "one of them, once");
    }
}

/// A sender that sleeps over READY has waited too long by its clock, or has not: either way it decides once.
#[test]
fn c40_a_sender_that_wakes_up_with_ready_unread_decides_once() {
    for clock_runs in [true, false] {
        let mut asleep = attempt(&[sleeps(Role::Sender, When::Offered, clock_runs)], false);
        assert!(asleep.guest.state().runs(), "the receiver has given up meanwhile");
        assert_eq!(asleep.hosts()[1].told_to_run, 0);
        assert_eq!(asleep.settle(true, &clock_runs), End::Here);
    }
}
