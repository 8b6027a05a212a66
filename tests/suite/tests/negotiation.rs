//! Two peers agree on the same session, or both say why not (SPEC 4.3, 4.9, 10; attacks A23, A25).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{Codec, Frame, FrameKind, LaneId, Role};
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::session::{Machine, Phase, Policy};
use pagewire_test_support::checkers::check_success;
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::memory::ImageSink;
use pagewire_test_support::peer::{AgainstReceiver, Statement};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{Outcome, World, WorldConfig};

fn speaks(version_min: u16, version_max: u16) -> Policy {
    Policy { version_min, version_max, ..Policy::default() }
}

fn session(sender: Policy, receiver: Policy) -> (Outcome, Image, ImageSink) {
    let image = Image::random(20, Mix::MEMORY, &mut Rng::new(1));
    let sink = ImageSink::empty(&image);
    let mut config = WorldConfig::new(1);
    (config.sender.policy, config.receiver_policy) = (sender, receiver);
    (World::new(&image, &sink, config).run(), image, sink)
}

fn texts(outcome: Outcome) -> [String; 2] {
    [outcome.sender.unwrap_err().to_string(), outcome.receiver.unwrap_err().to_string()]
}

/// SPEC 4.3: the highest common version.
#[test]
fn a_peer_of_two_versions_speaks_with_one_of_the_first() {
    for (sender, receiver) in [(speaks(1, 2), speaks(1, 1)), (speaks(1, 1), speaks(1, 2)), (speaks(1, 2), speaks(1, 2))]
    {
        let (outcome, image, sink) = session(sender, receiver);
        check_success(&outcome, &image, &sink);
    }
}

/// SPEC 4.3; C02: before the first page, with both ranges, on both sides.
#[test]
fn a_peer_of_another_version_is_refused_with_both_ranges_on_both_sides() {
    let (outcome, _, sink) = session(speaks(2, 2), speaks(1, 1));
    assert_eq!(sink.state().written, (0, 0));
    assert!(outcome.frames.iter().all(|(_, kind, _)| *kind == FrameKind::HELLO || *kind == FrameKind::CLOSE));
    assert_eq!(
        texts(outcome),
        [
            "no common protocol version: 2-2 here, 1-1 there".to_owned(),
            "no common protocol version: 1-1 here, 2-2 there".to_owned(),
        ]
    );
}

/// SPEC 4.3: what one side insists on, the other must offer.
#[test]
fn a_required_feature_that_is_not_offered_is_refused_on_both_sides() {
    let requiring = Policy { features_offered: 0b10, features_required: 0b10, ..Policy::default() };
    let text = "required features 0x2 are not all offered: 0x0".to_owned();
    let (outcome, ..) = session(requiring.clone(), Policy::default());
    assert_eq!(texts(outcome), [text.clone(), text.clone()]);
    let (outcome, ..) = session(Policy::default(), requiring.clone());
    assert_eq!(texts(outcome), [text.clone(), text]);
    let offering = Policy { features_offered: 0b110, ..Policy::default() };
    let (outcome, image, sink) = session(requiring, offering);
    check_success(&outcome, &image, &sink);
}

/// SPEC 4.3: two receivers have nothing to say to each other.
#[test]
fn equal_roles_are_refused() {
    let mut script = AgainstReceiver::receiver(1);
    let hello = script.hello.clone();
    script.raw(LaneId::CONTROL, FrameKind::HELLO, &hello);
    assert_eq!(script.failure(), (CloseCode::INCOMPATIBLE, "both sides are receivers".to_owned()));
}

/// SPEC 4.9; A25: whoever changes a HELLO on the way is found out before the first page.
#[test]
fn a_hello_that_was_changed_on_the_way_is_refused() {
    // Offsets in the frame: header 8, magic 8, version_min, version_max, role, features offered and required, codecs, sizes.
    for (to_receiver, at, flip) in [
        (true, 18, 1 ^ 2),
        (false, 18, 1 ^ 2),
        (true, 24, 1),
        (false, 24, 1),
        (true, 40, 2),
        (false, 40, 2),
        (true, 44, 1 << 4),
        (false, 44, 1 << 4),
        (true, 50, 0xff),
        (false, 50, 0xff),
    ] {
        let image = Image::random(20, Mix::MEMORY, &mut Rng::new(1));
        let sink = ImageSink::empty(&image);
        let mut config = WorldConfig::new(1);
        (config.sender.policy, config.receiver_policy) = (speaks(1, 2), speaks(1, 2));
        config.sender.policy.features_offered = 1;
        config.receiver_policy.features_offered = 1;
        config.meddler = Some(Box::new(move |way, bytes| {
            if way == to_receiver && bytes[4] == FrameKind::HELLO.0 {
                bytes[at] ^= flip;
            }
        }));
        let outcome = World::new(&image, &sink, config).run();
        let [sender, receiver] = texts(outcome);
        let text = "hello transcript differs: somebody changed the negotiation on the way";
        assert_eq!(receiver, text, "{to_receiver} {at}");
        assert!(sender.contains(text), "{sender}");
        assert_eq!(sink.state().written, (0, 0));
    }
}

/// SPEC 4.9: nor is a transcript that was changed in OPEN or ACCEPT.
#[test]
fn a_transcript_that_differs_in_open_or_accept_is_refused() {
    for kind in [FrameKind::OPEN, FrameKind::ACCEPT] {
        let image = Image::random(20, Mix::MEMORY, &mut Rng::new(1));
        let sink = ImageSink::empty(&image);
        let mut config = WorldConfig::new(1);
        config.meddler = Some(Box::new(move |_, bytes| {
            if bytes[4] == kind.0 {
                bytes[8] ^= 1;
            }
        }));
        let outcome = World::new(&image, &sink, config).run();
        assert!(texts(outcome).iter().all(|text| text.contains("hello transcript differs")), "{kind}");
    }
}

/// SPEC 2.5: a later version's frames are skipped where it says so, and refused otherwise.
#[test]
fn ignorable_unknown_frames_are_skipped_and_others_refused() {
    for (flags, skipped) in [(1u8, true), (0, false), (3, false)] {
        let image = Image::random(20, Mix::MEMORY, &mut Rng::new(1));
        let sink = ImageSink::empty(&image);
        let mut config = WorldConfig::new(1);
        config.meddler = Some(Box::new(move |_, bytes| {
            let unknown = [5, 0, 0, 0, 200, flags, bytes[6], 0, 1, 2, 3, 4, 5];
            if bytes[4] != FrameKind::JOIN.0 && bytes[4] != FrameKind::HELLO.0 {
                bytes.splice(0..0, unknown);
            }
        }));
        let outcome = World::new(&image, &sink, config).run();
        if skipped {
            check_success(&outcome, &image, &sink);
        } else {
            assert!(texts(outcome).iter().any(|text| text == "malformed unknown (200) frame"));
        }
    }
}

/// SPEC 2.5: in every phase, also before HELLO.
#[test]
fn ignorable_unknown_frames_are_skipped_in_every_phase() {
    let image = Image::random(4, Mix::NOISE, &mut Rng::new(1));
    for phase in [Phase::Greeting, Phase::Waiting, Phase::Deciding, Phase::Receiving, Phase::Parting] {
        let mut script = AgainstReceiver::receiver(1);
        script.enter(phase, &image, &ImageSink::empty(&image));
        script.raw(LaneId::CONTROL, FrameKind(99), b"later");
        assert!(script.outcome().is_none() && !script.engine.is_over(), "{phase:?}");
    }
}

/// SPEC 4.8: an install size that was not agreed.
#[test]
fn an_install_size_that_one_side_lacks_is_refused() {
    let region = Region { bytes: 4 << 20, install_size: InstallSize::MIB_2 };
    let image = Image::zeros(vec![region]);
    let mut script = AgainstReceiver::receiver(1);
    let mut hello = Policy::default().hello(Role::Sender, [9; 16]);
    hello.body.install_sizes = 1;
    let mut body = Vec::new();
    hello.encode(&mut body);
    script.transcript = pagewire_protocol::digest::transcript_digest(&body, &script.hello).0;
    script.raw(LaneId::CONTROL, FrameKind::HELLO, &body);
    let open = script.honest_open(&image);
    script.say(LaneId::CONTROL, &Frame::Open(open));
    assert_eq!(script.failure(), (CloseCode::INCOMPATIBLE, "install size 2097152 is not supported there".to_owned()));
}

/// SPEC 5.6: a codec that was not agreed is neither used nor taken.
#[test]
fn a_codec_that_was_not_agreed_is_refused() {
    let image = Image::random(4, Mix { zero: 0, pool: 0, text: 100 }, &mut Rng::new(1));
    let mut script = AgainstReceiver::receiver(1);
    let policy = Policy { codecs: Codec::NONE.bit(), ..Policy::default() };
    let mut body = Vec::new();
    policy.hello(Role::Sender, [9; 16]).encode(&mut body);
    script.transcript = pagewire_protocol::digest::transcript_digest(&body, &script.hello).0;
    script.raw(LaneId::CONTROL, FrameKind::HELLO, &body);
    let open = script.honest_open(&image);
    script.say(LaneId::CONTROL, &Frame::Open(open));
    script.take(&ImageSink::empty(&image));
    script.join(LaneId::bulk(0), &AgainstReceiver::honest_join(LaneId::bulk(0))).unwrap();
    let statement = Statement::at(0, 0).inline(image.page(0, 0).first_chunk().unwrap());
    script.raw(LaneId::bulk(0), FrameKind::PAGES, &statement.compressed());
    assert_eq!(
        script.failure(),
        (CloseCode::VIOLATION, "a codec that was not agreed for page 0 of region 0".to_owned())
    );
}
