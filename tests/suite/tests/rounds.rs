//! Rounds, as a scripted sender makes them: which are due on which lane, pages that are stated again, the root that comes
//! before them. Today's sender makes one; a receiver has to take any number.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{Ack, Frame, FrameKind, HEADER_BYTES, LaneId, RoundEnd, Want};
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::session::Phase;
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::memory::ImageSink;
use pagewire_test_support::peer::{AgainstReceiver, Statement, digests};
use pagewire_test_support::rng::Rng;

const BULK: LaneId = LaneId::bulk(0);

fn image(pages: u64) -> Image {
    Image::random(pages, Mix::NOISE, &mut Rng::new(pages))
}

fn page(image: &Image, page: u64) -> &[u8; 4096] {
    image.page(0, page).first_chunk().unwrap()
}

/// A receiver of four pages that holds nothing, ready for the first of them.
fn receiving() -> (AgainstReceiver, Image) {
    let (image, mut script) = (image(4), AgainstReceiver::receiver(1));
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    (script, image)
}

fn refuses(kind: FrameKind, body: &[u8], text: &str) {
    let (mut script, _) = receiving();
    script.raw(BULK, kind, body);
    assert_eq!(script.failure(), (CloseCode::VIOLATION, text.to_owned()));
}

/// States `pages` of a region inline, in a round.
fn stated(image: &Image, round: u32, pages: std::ops::Range<u64>) -> Vec<u8> {
    let statement = Statement { round, ..Statement::at(0, pages.start) };
    pages.fold(statement, |statement, at| statement.inline(page(image, at))).body()
}

fn end(script: &mut AgainstReceiver, lane: u8, round: u32, frames: u64) {
    script.say(LaneId::bulk(lane), &Frame::Round(RoundEnd { round, frames }));
}

/// SPEC 6.20; A14, A24: rounds of the past and of the future, counts that are wrong, a round that ends twice.
#[test]
fn rounds_that_are_not_due_are_violations() {
    let (_, image) = receiving();
    let statement = Statement { round: 1, ..Statement::at(0, 0) }.inline(page(&image, 0));
    refuses(FrameKind::PAGES, &statement.body(), "round 1, expected 0");
    let round = |round, frames| {
        let mut bytes = Vec::new();
        Frame::Round(RoundEnd { round, frames }).encode(BULK, &mut bytes);
        bytes.split_off(HEADER_BYTES)
    };
    refuses(FrameKind::ROUND, &round(1, 0), "round 1, expected 0");
    refuses(FrameKind::ROUND, &round(0, 1), "1 frames acknowledged, 0 sent");
    let (mut script, _) = receiving();
    script.raw(BULK, FrameKind::ROUND, &round(0, 0));
    script.raw(BULK, FrameKind::ROUND, &round(0, 0));
    assert_eq!(script.failure().0, CloseCode::VIOLATION);
    // Answers to wants may follow the end of their round, but not the first frame of the next.
    let (mut script, _) = receiving();
    let stated = |round| Statement { round, ..Statement::at(0, 0) }.inline(page(&image, 0)).body();
    script.raw(BULK, FrameKind::ROUND, &round(0, 0));
    for round in [0, 1] {
        script.raw(BULK, FrameKind::PAGES, &stated(round));
        assert!(script.outcome().is_none(), "round {round}");
    }
    script.raw(BULK, FrameKind::PAGES, &stated(0));
    assert_eq!(script.failure(), (CloseCode::VIOLATION, "round 0, expected 1".to_owned()));
    // A lane that is ahead does not speak for the others.
    let image = self::image(1024);
    let mut script = AgainstReceiver::receiver(2);
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    script.raw(BULK, FrameKind::ROUND, &round(0, 0));
    let other = Statement { round: 1, ..Statement::at(0, 512) }.inline(page(&image, 512));
    script.raw(LaneId::bulk(1), FrameKind::PAGES, &other.body());
    assert_eq!(script.failure(), (CloseCode::VIOLATION, "round 1, expected 0".to_owned()));
}

/// SPEC 6.20, 6.22: two rounds, a page stated in both, the root before the pages; the newer bytes are the image.
#[test]
fn a_page_that_is_stated_again_ends_with_the_newer_bytes() {
    let older = image(4);
    let mut newer = older.clone();
    newer.page_mut(0, 2).fill(3);
    let sink = ImageSink::empty(&older);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &older, &sink);
    script.raw(BULK, FrameKind::PAGES, &stated(&older, 0, 0..4));
    end(&mut script, 0, 0, 1);
    // ROOT has its own lane and need not wait for the round that it closes.
    script.end_with(1, &newer);
    script.settle();
    assert!(script.outcome().is_none() && script.last(FrameKind::DONE).is_none());
    script.raw(BULK, FrameKind::PAGES, &stated(&newer, 1, 2..3));
    script.settle();
    assert!(script.last(FrameKind::DONE).is_none(), "its round has not ended");
    end(&mut script, 0, 1, 2);
    script.settle();
    assert!(script.last(FrameKind::DONE).is_some());
    assert!(sink.state().finished && sink.state().image == newer);
}

/// SPEC 6.20: every lane has its own round; the image is complete when the root's has ended on all of them.
#[test]
fn rounds_are_due_lane_by_lane() {
    let older = image(1024);
    let mut newer = older.clone();
    newer.page_mut(0, 7).fill(3);
    let sink = ImageSink::empty(&older);
    let mut script = AgainstReceiver::receiver(2);
    script.enter(Phase::Receiving, &older, &sink);
    script.raw(BULK, FrameKind::PAGES, &stated(&older, 0, 0..512));
    end(&mut script, 0, 0, 1);
    script.raw(BULK, FrameKind::PAGES, &stated(&newer, 1, 7..8));
    end(&mut script, 0, 1, 2);
    script.end_with(1, &newer);
    script.raw(LaneId::bulk(1), FrameKind::PAGES, &stated(&newer, 0, 512..1024));
    end(&mut script, 1, 0, 1);
    script.settle();
    assert!(script.outcome().is_none() && script.last(FrameKind::DONE).is_none(), "one lane is behind");
    end(&mut script, 1, 1, 1);
    script.settle();
    assert!(script.last(FrameKind::DONE).is_some() && sink.state().image == newer);
}

/// SPEC 6.23: the older bytes of a page do not stand in for those that are wanted.
#[test]
fn a_page_that_is_stated_again_and_wanted_is_not_present() {
    let older = image(4);
    let mut newer = older.clone();
    newer.page_mut(0, 2).fill(3);
    let sink = ImageSink::empty(&older);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &older, &sink);
    script.raw(BULK, FrameKind::PAGES, &stated(&older, 0, 0..4));
    end(&mut script, 0, 0, 1);
    let statement = Statement { round: 1, ..Statement::at(0, 2) }.reference(digests(&newer)[2]);
    script.raw(BULK, FrameKind::PAGES, &statement.body());
    end(&mut script, 0, 1, 2);
    script.end_with(1, &newer);
    script.settle();
    assert!(script.outcome().is_none() && script.last(FrameKind::DONE).is_none());
    let Some(Frame::Ack(ack)) = script.last(FrameKind::ACK) else { panic!("the page is wanted") };
    assert_eq!(ack, Ack { frames: 2, settled: 2, wants: vec![Want { region: 0, first: 2, count: 1 }] });
    script.raw(BULK, FrameKind::PAGES, &stated(&newer, 1, 2..3));
    script.settle();
    assert!(script.last(FrameKind::DONE).is_some() && sink.state().image == newer);
}

/// SPEC 6.29: a skipped page stays what it was, present or wanted, and its place is part of the proof.
#[test]
fn a_page_that_is_skipped_stays_what_it_was() {
    let older = image(4);
    let mut newer = older.clone();
    newer.page_mut(0, 3).fill(3);
    let sink = ImageSink::empty(&older);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &older, &sink);
    let first = Statement::at(0, 0).inline(page(&older, 0)).reference(digests(&older)[1]).inline(page(&older, 2));
    script.raw(BULK, FrameKind::PAGES, &first.inline(page(&older, 3)).body());
    end(&mut script, 0, 0, 1);
    let again = Statement { round: 1, ..Statement::at(0, 0) }.skipped().skipped().skipped().inline(page(&newer, 3));
    script.raw(BULK, FrameKind::PAGES, &again.body());
    end(&mut script, 0, 1, 2);
    script.end_with(1, &newer);
    script.settle();
    assert!(script.outcome().is_none() && script.last(FrameKind::DONE).is_none(), "page 1 is wanted still");
    script.raw(BULK, FrameKind::PAGES, &stated(&newer, 1, 1..2));
    script.settle();
    assert!(script.last(FrameKind::DONE).is_some() && sink.state().image == newer);

    // What is moved by a skipped page is not what was proven.
    let (mut script, image) = receiving();
    let honest = Statement::at(0, 0).skipped().inline(page(&image, 1)).skipped();
    let mut moved = Statement::at(0, 0).inline(page(&image, 1)).skipped().skipped();
    moved.digest = Some(honest.batch_digest());
    script.raw(BULK, FrameKind::PAGES, &moved.body());
    assert_eq!(script.failure().0, CloseCode::DIGEST);
}

/// SPEC 6.8, 6.23: nor when the sender believed that the base had them.
#[test]
fn a_page_that_is_stated_again_as_a_base_that_is_not_there_is_not_present() {
    let base = image(4);
    let mut newer = base.clone();
    newer.page_mut(0, 2).fill(3);
    let sink = ImageSink::holding(base.clone());
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &base, &sink);
    script.settle();
    let all = digests(&base).into_iter().fold(Statement::at(0, 0), Statement::base);
    script.raw(BULK, FrameKind::PAGES, &all.body());
    end(&mut script, 0, 0, 1);
    // Believed to be in the base once more, wrongly.
    let again = Statement { round: 1, ..Statement::at(0, 2) }.base(digests(&newer)[2]);
    script.raw(BULK, FrameKind::PAGES, &again.body());
    end(&mut script, 0, 1, 2);
    script.end_with(1, &newer);
    script.settle();
    assert!(script.outcome().is_none() && script.last(FrameKind::DONE).is_none());
    script.raw(BULK, FrameKind::PAGES, &stated(&newer, 1, 2..3));
    script.settle();
    assert!(script.last(FrameKind::DONE).is_some() && sink.state().image == newer);
}

/// A cover frame over groups of other lanes could overtake a later round of theirs.
#[test]
fn with_several_lanes_a_frame_over_two_groups_is_refused() {
    let image = Image::zeros(vec![Region { bytes: 4 << 20, install_size: InstallSize::KIB_4 }]);
    for (lanes, refused) in [(1, false), (2, true)] {
        let sink = ImageSink::empty(&image);
        let mut script = AgainstReceiver::receiver(lanes);
        script.enter(Phase::Receiving, &image, &sink);
        let cover = (0..1024).fold(Statement::at(0, 0), |statement, _| statement.zero());
        script.raw(BULK, FrameKind::PAGES, &cover.body());
        script.settle();
        let said = format!("{:?}", script.outcome());
        assert_eq!(said.contains("crosses a group"), refused, "{lanes} lanes: {said}");
    }
}
