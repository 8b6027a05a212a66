//! What goes wrong while a guest runs and its memory follows, C27, C28 and C33 to C37 of the project's list of failures: the
//! guest runs on what it has, nothing is installed twice, and the memory at the sender stays until all is there.
//!
//! C29 is in hostile_fill, as are C34 and C35 for single frames; C30 to C32 are in receiver/tests/handler_death.rs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::error::{CloseCode, PeerError};
use pagewire_protocol::frame::{Close, Fill, Frame, FrameKind, LaneId, Ping, Role};
use pagewire_protocol::limits::{PAGE_BYTES, STALL_SPAN_MAX};
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::session::{Machine, Policy};
use pagewire_protocol::time::Span;
use pagewire_receiver::ErrorKind;
use pagewire_receiver::fill::{FillEngine, Incomplete};
use pagewire_test_support::fill_peer::{AgainstFilled, AgainstFiller, FEATURES, all_absent};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::link::{Cut, LinkConfig};
use pagewire_test_support::memory::ImageSink;
use pagewire_test_support::peer::{AgainstReceiver, SESSION, Statement};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{FillHarm, FillOutcome, FillWorld, FillWorldConfig, Habit};

const PAGES: u64 = 400;

fn image() -> Image {
    let region = |pages: u64, install_size| Region { bytes: pages * PAGE_BYTES as u64, install_size };
    let regions = vec![region(300, InstallSize::KIB_4), region(100, InstallSize::KIB_64)];
    Image::filled(regions, Mix::NOISE, &mut Rng::new(3))
}

fn fill(harms: Vec<FillHarm>, touches: u64) -> FillOutcome {
    let (left, sink) = all_absent(&image(), None);
    let mut config = FillWorldConfig::new(1);
    let delay = Span::from_millis(1);
    config.link = LinkConfig { rate: Some(20_000_000), buffer: 64 << 10, ..LinkConfig::delaying(delay) };
    config.vcpus = vec![Habit::Random, Habit::Sequential, Habit::HotSet];
    (config.harms, config.window, config.touches) = (harms, 200_000, touches);
    (config.sender.lanes, config.sender.compress) = (2, false);
    FillWorld::new(image(), sink, config).run(left)
}

/// States all of the image, and lets the receiver take it in.
fn state_all(script: &mut AgainstFilled, image: &Image) {
    for (region, pages) in [(0, 300), (1, 100)] {
        let page = |at| image.page(usize::from(region), at).first_chunk().unwrap();
        let all = (0..pages).fold(Statement::at(region, 0), |all, at| all.inline(page(at)));
        script.raw(LaneId::bulk(0), FrameKind::PAGES, &all.body());
    }
    script.settle();
}

fn pages_sent(outcome: &FillOutcome) -> u64 {
    outcome.sent.iter().map(|sent| sent.inline).sum()
}

/// C27: a connection breaks, or falls silent, at any byte of any lane: the guest runs on, and who waits goes on later.
#[test]
fn c27_a_guest_runs_on_what_it_has_when_the_network_breaks() {
    let whole = fill(Vec::new(), 0);
    assert_eq!((whole.sessions.len(), pages_sent(&whole), whole.received.again), (1, PAGES, 0));
    for lane in [LaneId::CONTROL, LaneId::URGENT, LaneId::bulk(0), LaneId::bulk(1)] {
        for (at, to_receiver) in (0..12).flat_map(|at| [(at * at * 5_000, true), (at * 40, false)]) {
            for cut in [Cut::Bytes(at), Cut::Silence(at)] {
                let outcome = fill(vec![FillHarm::Cut(lane, to_receiver, cut)], 100);
                let what = (lane, to_receiver, cut);
                assert!(outcome.sessions.len() <= 2, "{what:?}");
                // Not more than was under way goes again: windows of two lanes, and what the writers held; but a page
                // that was under way when the guest touched it.
                let again = pages_sent(&outcome) - outcome.received.inline;
                let asked = 16 * outcome.received.faults;
                assert!(again <= asked + 2 * (200_000 + (64 << 10)) / 4096 + 4 * 64, "{what:?}: {again} pages again");
            }
        }
    }
}

/// C28: what should mend it breaks, too, in every step, again and again; there is no last attempt.
#[test]
fn c28_sessions_that_fail_before_the_first_page_change_nothing() {
    let kinds = [FrameKind::HELLO, FrameKind::FILL, FrameKind::LACK, FrameKind::LACKING, FrameKind::JOIN];
    let harms: Vec<FillHarm> = kinds.iter().cycle().take(40).map(|kind| FillHarm::CutAt(*kind)).collect();
    let outcome = fill(harms, 0);
    assert_eq!(outcome.sessions.len(), 41);
    assert!(outcome.sessions[..40].iter().all(|(sender, receiver)| sender.is_err() && receiver.is_err()));
    assert_eq!((pages_sent(&outcome), outcome.received.again), (PAGES, 0));
    let late = (1..30).flat_map(|frames| [FillHarm::StopSender(frames), FillHarm::StopReceiver(frames)]);
    let outcome = fill(late.collect(), 0);
    assert!(outcome.received.inline == PAGES && outcome.sessions.len() > 8, "{}", outcome.sessions.len());
}

/// A session that ends while it is looked for the guest stays ended, and the guest is there for the next one.
#[test]
fn c28_a_guest_that_is_found_for_a_session_that_has_ended_is_kept() {
    let ends: [fn(&mut AgainstFilled); 3] = [
        |script| script.say(LaneId::CONTROL, &Frame::Close(Close::new(CloseCode::CANCELLED, "not now"))),
        |script| script.engine.handle_peer_error(PeerError::EndOfStream { lane: 0 }, script.now),
        |script| script.engine.cancel(),
    ];
    let (left, _) = all_absent(&image(), None);
    let (handover, mut guest) = (*left.guest.handover(), left.guest);
    for end in ends {
        let mut script = AgainstFilled::filled();
        script.greet(Role::Sender);
        let fill = script.honest_fill(handover);
        script.say(LaneId::CONTROL, &Frame::Fill(fill));
        end(&mut script);
        script.grant(guest);
        assert!(script.engine.is_over() && script.last(FrameKind::LACK).is_none(), "it stays ended");
        assert_eq!(script.engine.guest().map(Incomplete::pages), Some(PAGES));
        assert!(script.engine.outcome().unwrap().is_err());
        guest = script.engine.into_incomplete().expect("the guest runs on");
    }
    // Nor is one looked for when the session ends before it is known to be one of these.
    let policy = Policy { features_offered: FEATURES, ..Policy::default() };
    let mut script = AgainstReceiver::receiver_with(&policy, 1);
    script.features = FEATURES;
    script.greet(Role::Sender);
    let transcript = script.transcript;
    let fill = Fill { transcript, session: SESSION, lanes: 1, single_stream: false, handover };
    script.say(LaneId::CONTROL, &Frame::Fill(fill.clone()));
    script.engine.cancel();
    let mut engine = FillEngine::<ImageSink>::answering(script.engine.into_endpoint(), fill, script.now);
    assert!(engine.is_over() && engine.poll_event().is_none());
    let mut script = AgainstFilled::filled();
    script.begin(guest);
    assert_eq!(script.engine.guest().map(Incomplete::pages), Some(PAGES), "the next one goes on with it");
}

/// C33: the end of the stream is not the end of the memory.
#[test]
fn c33_the_end_of_a_stream_is_an_error_while_pages_are_lacking() {
    for lane in [LaneId::CONTROL, LaneId::bulk(0), LaneId::URGENT] {
        let (left, sink) = all_absent(&image(), None);
        let mut script = AgainstFilled::filled();
        script.begin(left.guest);
        let page = *image().page(0, 0).first_chunk().unwrap();
        script.raw(LaneId::bulk(0), FrameKind::PAGES, &Statement::at(0, 0).inline(&page).body());
        script.engine.handle_peer_error(PeerError::EndOfStream { lane: lane.number() }, script.now);
        script.settle();
        assert!(matches!(script.engine.outcome(), Some(Err(ErrorKind::Peer(PeerError::EndOfStream { .. })))));
        assert!(script.last(FrameKind::DONE).is_none() && !sink.state().finished);
        assert_eq!(script.engine.into_incomplete().unwrap().pages(), PAGES - 1);
        let mut script = AgainstFiller::filler(all_absent(&image(), None).0);
        script.begin(&image());
        script.settle();
        script.engine.handle_peer_error(PeerError::EndOfStream { lane: lane.number() }, script.now);
        assert!(!script.is_filled());
        assert_eq!(script.engine.into_remainder().unwrap().pages(), PAGES, "the memory stays");
    }
}

/// C34: the urgent lane and the background bring the same page; the first wins, whichever it is.
#[test]
fn c34_a_page_that_comes_on_two_lanes_is_installed_once() {
    let image = image();
    let page = |at: u64| Statement::at(0, at).inline(image.page(0, at).first_chunk().unwrap()).body();
    for lanes in [[LaneId::URGENT, LaneId::bulk(0)], [LaneId::bulk(0), LaneId::URGENT]] {
        let (left, sink) = all_absent(&image, None);
        let mut script = AgainstFilled::filled();
        script.begin(left.guest);
        // The sink refuses a second one.
        lanes.into_iter().for_each(|lane| script.raw(lane, FrameKind::PAGES, &page(7)));
        let counts = script.engine.guest().unwrap().counts();
        assert_eq!((counts.inline, counts.again), (1, 1));
        assert_eq!(sink.state().written.0, 1);
    }
}

/// C36: DONE, or what answers it, is lost: the memory stays until DONE is said again, and no page goes twice.
#[test]
fn c36_a_done_that_is_lost_is_said_again() {
    let outcome = fill(vec![FillHarm::CutAt(FrameKind::DONE), FillHarm::CutAt(FrameKind::DONE)], 0);
    assert_eq!(outcome.sessions.len(), 3);
    assert_eq!((outcome.sent[1].inline, outcome.sent[2].inline), (0, 0), "nothing is lacking");
    assert_eq!(pages_sent(&outcome), PAGES);
    // The guest is whole at the receiver, and the sender has nothing to keep.
    let outcome = fill(vec![FillHarm::CutAt(FrameKind::GONE)], 0);
    let (sender, receiver) = &outcome.sessions[0];
    assert!(outcome.sessions.len() == 1 && sender.is_ok() && receiver.is_err(), "{receiver:?}");
}

/// SPEC 9.8, C36: a sender that lives and never says GONE does not hold the guest's session for ever; the guest has all, and
/// the next session is told so.
#[test]
fn c36_a_receiver_does_not_wait_for_ever_for_gone() {
    let image = image();
    let (left, _) = all_absent(&image, None);
    let mut script = AgainstFilled::filled();
    script.begin(left.guest);
    state_all(&mut script, &image);
    assert!(script.last(FrameKind::DONE).is_some());
    let began = script.now;
    while !script.engine.is_over() && script.now < began + Span::from_secs(1000) {
        script.wait(Span::from_secs(4));
        for lane in [LaneId::CONTROL, LaneId::bulk(0), LaneId::URGENT] {
            script.say(lane, &Frame::Ping(Ping { token: 1, answer: false }));
        }
        // Nor do pages that come too late extend it.
        script.raw(LaneId::bulk(0), FrameKind::PAGES, &Statement::at(0, 0).zero().body());
        script.settle();
    }
    let waited = script.now.since(began);
    assert!(waited >= STALL_SPAN_MAX && waited <= STALL_SPAN_MAX + Span::from_secs(4), "{waited:?}");
    let text = "the peer is too slow: DONE came to nothing for 120 s".to_owned();
    assert_eq!(script.fill_failure(), (CloseCode::TIMEOUT, text));
    let mut next = AgainstFilled::filled();
    next.begin(script.engine.into_incomplete().unwrap());
    assert!(matches!(next.last(FrameKind::LACK), Some(Frame::Lack(lack)) if lack.pages == 0));
    assert!(next.last(FrameKind::DONE).is_some());
}

/// SPEC 9.8, C36: nor does a sender wait for ever for DONE, whatever signs of life come; its memory stays.
#[test]
fn c36_a_sender_does_not_wait_for_ever_for_done() {
    let image = image();
    let mut script = AgainstFiller::filler(all_absent(&image, None).0);
    script.begin(&image);
    script.settle();
    assert_eq!(script.engine.counts().inline, PAGES, "all has gone");
    let began = script.now;
    while !script.engine.is_over() && script.now < began + Span::from_secs(1000) {
        script.wait(Span::from_secs(4));
        for lane in [LaneId::CONTROL, LaneId::bulk(0), LaneId::URGENT] {
            script.say(lane, &Frame::Ping(Ping { token: 1, answer: false }));
        }
        script.settle();
    }
    let waited = script.now.since(began);
    assert!(waited >= STALL_SPAN_MAX && waited <= STALL_SPAN_MAX + Span::from_secs(4), "{waited:?}");
    assert_eq!(script.fill_failure().0, CloseCode::TIMEOUT);
    assert_eq!(script.engine.into_remainder().unwrap().pages(), PAGES, "it is kept");
}

/// C37: DONE is said when all lasts, and not when that fails; the next session has nothing to bring but that.
#[test]
fn c37_done_is_not_said_of_memory_that_does_not_last() {
    let image = image();
    let (left, sink) = all_absent(&image, None);
    sink.state().fail_finish(true);
    let mut script = AgainstFilled::filled();
    script.begin(left.guest);
    state_all(&mut script, &image);
    assert!(script.last(FrameKind::DONE).is_none(), "nobody may give the memory up");
    assert!(script.fill_failure().1.contains("cannot be synced"));
    sink.state().fail_finish(false);
    let guest = script.engine.into_incomplete().unwrap();
    assert_eq!(guest.pages(), 0);
    let mut script = AgainstFilled::filled();
    script.begin(guest);
    assert!(sink.state().finished && script.last(FrameKind::DONE).is_some());
}
