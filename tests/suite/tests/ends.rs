//! How sessions end that nobody attacks with frames: silence, trickles, cancels, ends of streams, broken destinations.
//!
//! Names are clauses of docs/SPEC.md; the ids are those of the project's lists of failures and attacks.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::digest::Digest;
use pagewire_protocol::error::{CloseCode, PeerError};
use pagewire_protocol::frame::{Ack, Done, Frame, FrameKind, LaneId, Ping, Want};
use pagewire_protocol::limits::{HANDSHAKE_SPAN_MAX, SILENCE_MAX, STALL_SPAN_MAX};
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::session::{Machine, Phase};
use pagewire_protocol::time::Span;
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::memory::{ImageSink, SinkFaults};
use pagewire_test_support::peer::{AgainstReceiver, AgainstSender, Script, Statement};
use pagewire_test_support::rng::Rng;

const CONTROL: LaneId = LaneId::CONTROL;
const BULK: LaneId = LaneId::bulk(0);

fn image(pages: u64) -> Image {
    Image::random(pages, Mix::NOISE, &mut Rng::new(pages))
}

fn ask<M: Machine>(script: &mut Script<M>, lane: LaneId) {
    script.say(lane, &Frame::Ping(Ping { token: 1, answer: false }));
}

/// C10: whoever cancels while an offer is decided on has cancelled it: no word follows CLOSE.
#[test]
fn an_offer_that_is_taken_too_late_is_not_taken() {
    let (image, sink) = (image(4), ImageSink::empty(&image(4)));
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Deciding, &image, &sink);
    script.engine.cancel();
    script.take(&sink);
    assert_eq!(script.failure().0, CloseCode::CANCELLED);
    assert!(script.engine.is_over() && script.last(FrameKind::ACCEPT).is_none());
}

/// SPEC 9.2; A18: a peer that greets and then says nothing, or nothing at all.
#[test]
fn a_handshake_that_takes_ten_seconds_ends_the_session() {
    let image = image(4);
    for phase in [Phase::Greeting, Phase::Waiting] {
        let mut script = AgainstReceiver::receiver(1);
        script.enter(phase, &image, &ImageSink::empty(&image));
        script.wait(Span::from_millis(9_999));
        // Signs of life do not extend it.
        if phase == Phase::Waiting {
            ask(&mut script, CONTROL);
        }
        assert!(script.outcome().is_none());
        script.wait(Span::from_millis(2));
        assert_eq!(
            script.failure(),
            (CloseCode::TIMEOUT, "the peer is too slow: handshake not complete after 10 s".to_owned())
        );
    }
    for phase in [Phase::Greeting, Phase::Opening] {
        let mut script = AgainstSender::sender(&image, 1);
        script.enter(phase, &image);
        script.wait(Span::from_secs(11));
        assert_eq!(script.failure().0, CloseCode::TIMEOUT);
    }
}

/// SPEC 9.4; C07, I8: a silent peer is given up after fifteen seconds, in every phase, and asked before.
#[test]
fn a_silent_peer_is_given_up_after_fifteen_seconds() {
    let image = image(4);
    for phase in [Phase::Deciding, Phase::Receiving] {
        let mut script = AgainstReceiver::receiver(1);
        script.enter(phase, &image, &ImageSink::empty(&image));
        script.wait(SILENCE_MAX);
        assert!(script.said.iter().any(|said| said.kind == FrameKind::PING), "it was asked");
        assert_eq!(script.failure(), (CloseCode::TIMEOUT, "the peer is too slow: nothing heard for 15 s".to_owned()));
    }
    for phase in [Phase::Sending, Phase::Finishing] {
        let mut script = AgainstSender::sender(&image, 1);
        script.enter(phase, &image);
        script.wait(SILENCE_MAX);
        assert_eq!(script.failure().0, CloseCode::TIMEOUT, "{phase:?}");
    }
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Parting, &image, &ImageSink::empty(&image));
    script.wait(SILENCE_MAX);
    assert!(script.outcome().unwrap().is_ok(), "the image lasts");
}

/// A18, SPEC 9.4: one lane that is silent is enough.
#[test]
fn a_single_silent_lane_ends_the_session() {
    let image = image(4);
    let mut script = AgainstReceiver::receiver(2);
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    for _ in 0..4 {
        script.wait(Span::from_secs(4));
        ask(&mut script, CONTROL);
        ask(&mut script, BULK);
    }
    assert_eq!(script.failure().0, CloseCode::TIMEOUT);
}

/// SPEC 9.7; A18: a lane that is granted and never joined.
#[test]
fn a_granted_lane_that_nobody_joins_ends_the_session() {
    let image = image(4);
    let sink = ImageSink::empty(&image);
    let mut script = AgainstReceiver::receiver(2);
    script.enter(Phase::Deciding, &image, &sink);
    script.take(&sink);
    script.join(BULK, &AgainstReceiver::honest_join(BULK)).unwrap();
    script.wait(Span::from_millis(9_999));
    assert!(script.outcome().is_none());
    // Signs of life on the others do not extend it.
    ask(&mut script, CONTROL);
    ask(&mut script, BULK);
    script.wait(Span::from_millis(2));
    let text = "the peer is too slow: a granted lane was not joined within 10 s".to_owned();
    assert_eq!((HANDSHAKE_SPAN_MAX, script.failure()), (Span::from_secs(10), (CloseCode::TIMEOUT, text)));
}

/// SPEC 9.8; A18: a peer that lives and states nothing; each page it states gives it as long again.
#[test]
fn a_peer_that_lives_and_states_nothing_is_given_up_after_two_minutes() {
    let image = image(4);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    let live = |script: &mut AgainstReceiver, seconds: u64| {
        for _ in 0..seconds / 10 {
            script.wait(Span::from_secs(10));
            ask(script, CONTROL);
            ask(script, BULK);
        }
    };
    live(&mut script, 110);
    let page = image.page(0, 0).first_chunk().unwrap();
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 0).inline(page).body());
    live(&mut script, 110);
    assert!(script.outcome().is_none());
    live(&mut script, 10);
    let text = "the peer is too slow: no page was stated for 120 s".to_owned();
    assert_eq!((STALL_SPAN_MAX, script.failure()), (Span::from_secs(120), (CloseCode::TIMEOUT, text)));
}

/// SPEC 8.2: that a lane broke is told, unless it is the one on which to tell.
#[test]
fn a_broken_lane_is_told_while_the_control_lane_works() {
    let image = image(4);
    for (lane, told) in [(1, true), (0, false)] {
        let broken = || PeerError::Broken { lane, reason: "reset".to_owned() };
        let mut script = AgainstReceiver::receiver(1);
        script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
        script.engine.handle_peer_error(broken(), script.now);
        assert_eq!((script.outcome().unwrap().is_err(), script.closed().is_some()), (true, told), "receiver, {lane}");
        let mut script = AgainstSender::sender(&image, 1);
        script.enter(Phase::Sending, &image);
        script.engine.handle_peer_error(broken(), script.now);
        assert_eq!((script.outcome().unwrap().is_err(), script.closed().is_some()), (true, told), "sender, {lane}");
    }
}

/// SPEC 9.5: bytes of a frame under way are life, in either direction.
#[test]
fn a_large_frame_on_a_slow_link_is_a_sign_of_life() {
    let image = image(4);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    for _ in 0..6 {
        script.wait(Span::from_secs(14));
        for lane in [CONTROL, BULK] {
            script.engine.handle_progress(lane, script.now);
        }
    }
    assert!(script.outcome().is_none());
    script.wait(SILENCE_MAX);
    assert_eq!(script.failure().0, CloseCode::TIMEOUT);
}

/// SPEC 4.18; A20: a thousand questions have one answer.
#[test]
fn a_flood_of_pings_makes_one_answer() {
    let image = image(4);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    for _ in 0..1000 {
        ask(&mut script, CONTROL);
    }
    script.listen();
    assert_eq!(script.said.iter().filter(|said| said.kind == FrameKind::PING).count(), 1);
}

/// C09, C10, I9: cancel in every phase, twice, after the end; the peer is told why.
#[test]
fn a_session_can_be_cancelled_in_every_phase() {
    let image = image(4);
    for phase in [Phase::Greeting, Phase::Opening, Phase::Sending, Phase::Finishing] {
        let mut script = AgainstSender::sender(&image, 1);
        script.enter(phase, &image);
        script.engine.cancel(pagewire_sender::ErrorKind::Cancelled);
        script.engine.cancel(pagewire_sender::ErrorKind::Cancelled);
        assert_eq!(script.failure(), (CloseCode::CANCELLED, "cancelled".to_owned()), "{phase:?}");
    }
    for phase in [Phase::Greeting, Phase::Waiting, Phase::Deciding, Phase::Receiving] {
        let mut script = AgainstReceiver::receiver(1);
        script.enter(phase, &image, &ImageSink::empty(&image));
        script.engine.cancel();
        script.engine.cancel();
        assert_eq!(script.failure(), (CloseCode::CANCELLED, "cancelled".to_owned()), "{phase:?}");
    }
}

/// I9: what is over is not cancelled any more; what lasts, lasts.
#[test]
fn cancelling_what_has_succeeded_changes_nothing() {
    let image = image(4);
    for phase in [Phase::Parting, Phase::Over] {
        let mut script = AgainstReceiver::receiver(1);
        script.enter(phase, &image, &ImageSink::empty(&image));
        script.engine.cancel();
        assert!(script.outcome().unwrap().is_ok());
        assert!(script.closed().is_none());
    }
    let mut script = AgainstSender::sender(&image, 1);
    script.enter(Phase::Over, &image);
    script.engine.cancel(pagewire_sender::ErrorKind::Cancelled);
    assert!(script.outcome().unwrap().is_ok() && script.closed().is_none());
}

/// I3; fact 3: an end of stream is not success, in any phase but after DONE.
#[test]
fn an_end_of_stream_is_a_failure_unless_done_was_said() {
    let image = image(4);
    for phase in [Phase::Greeting, Phase::Opening, Phase::Sending, Phase::Finishing] {
        let mut script = AgainstSender::sender(&image, 1);
        script.enter(phase, &image);
        script.engine.handle_peer_error(PeerError::EndOfStream { lane: 0 }, script.now);
        let text = script.outcome().unwrap().unwrap_err().to_string();
        assert_eq!(text, "the connection of lane 0 ended before the transfer was complete");
    }
}

/// I3; A16: DONE with another root, or another count, is not success.
#[test]
fn a_done_that_does_not_fit_is_a_failure() {
    for (pages, root) in [(4, Digest([1; 32])), (3, image(4).root(&[0; 32])), (0, Digest([0; 32]))] {
        let image = image(4);
        let mut script = AgainstSender::sender(&image, 1);
        script.enter(Phase::Finishing, &image);
        script.say(CONTROL, &Frame::Done(Done { pages, root }));
        assert_eq!(script.failure().0, CloseCode::DIGEST);
    }
}

/// C12: a destination that cannot be read, written or finished is a clear failure on both sides.
#[test]
fn a_destination_that_fails_says_so() {
    let image = image(300);
    for (faults, text) in [
        (
            SinkFaults { fail_read_after: Some(0), ..SinkFaults::default() },
            "destination: base cannot be read: cannot read",
        ),
        (
            SinkFaults { fail_write_after: Some(0), ..SinkFaults::default() },
            "destination: cannot be written: no space left",
        ),
        (
            SinkFaults { fail_finish: true, ..SinkFaults::default() },
            "destination: cannot be finished: cannot be synced",
        ),
    ] {
        let sink = ImageSink::new(self::image(300), vec![300], true, faults);
        let mut script = AgainstReceiver::receiver(1);
        script.enter(Phase::Receiving, &image, &sink);
        script.settle();
        if script.engine.is_over() {
            assert_eq!(script.failure(), (CloseCode::DESTINATION, text.to_owned()));
            continue;
        }
        script.deliver(&image);
        script.settle();
        assert_eq!(script.failure(), (CloseCode::DESTINATION, text.to_owned()));
    }
}

/// An answer of zeros alone has nothing behind it that would push it out.
#[test]
fn a_want_of_zero_pages_after_everything_was_stated_is_answered() {
    let image = Image::zeros(vec![Region { bytes: 1 << 20, install_size: InstallSize::KIB_4 }]);
    let mut script = AgainstSender::sender(&image, 1);
    script.enter(Phase::Finishing, &image);
    let before = script.frames(BULK);
    let wants = vec![Want { region: 0, first: 3, count: 1 }];
    script.say(BULK, &Frame::Ack(Ack { frames: before, settled: before, wants }));
    script.settle();
    assert_eq!(script.frames(BULK), before + 1);
}
