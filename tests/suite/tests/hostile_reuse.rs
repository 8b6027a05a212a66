//! Raw peers that lie about an agreed base, or about pages that they do not have: the session ends with the right code, or goes on unharmed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::challenge::{Challenge, PageProof};
use pagewire_protocol::compress::Compressor;
use pagewire_protocol::digest::{Digest, page_digest};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{Codec, Frame, FrameKind, Have, LaneId, RoundEnd};
use pagewire_protocol::session::Phase;
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::memory::{ImageBase, ImageSink, Neighbour};
use pagewire_test_support::peer::{AgainstReceiver, AgainstSender, CHALLENGE, SESSION, Statement};
use pagewire_test_support::rng::Rng;

const CONTROL: LaneId = LaneId::CONTROL;
const BULK: LaneId = LaneId::bulk(0);
const PUBLIC: [u8; 32] = [0; 32];

fn image(pages: u64) -> Image {
    Image::random(pages, Mix::NOISE, &mut Rng::new(pages))
}

fn digest(image: &Image, page: u64) -> Digest {
    page_digest(&DedupDomain::public(), image.page(0, page).first_chunk().unwrap())
}

/// A receiver that holds `base` under its manifest, agreed with a sender of an image like it.
fn receiving(base: &Image, stays: bool) -> (AgainstReceiver, ImageSink) {
    let sink = ImageSink::claiming(base, PUBLIC, base.clone(), stays);
    let mut script = AgainstReceiver::receiver(1);
    script.known = vec![base.root(&PUBLIC)];
    script.enter(Phase::Receiving, base, &sink);
    (script, sink)
}

fn refuses(base: &Image, stays: bool, body: &[u8], code: CloseCode, text: &str) {
    let (mut script, _) = receiving(base, stays);
    script.raw(BULK, FrameKind::PAGES, body);
    let (got, reason) = script.failure();
    assert_eq!(got, code);
    assert!(reason.contains(text), "{reason}");
}

/// Page 3 with a byte that is not the base's, and the statement of it.
fn changed(base: &Image) -> ([u8; 4096], Statement) {
    let mut page = *base.page(0, 3).first_chunk().unwrap();
    page[7] ^= 1;
    (page, Statement::at(0, 3).inline(&page))
}

/// SPEC 6.24
#[test]
fn shifted_entries_need_a_held_source_in_a_base_that_stays() {
    let base = image(10);
    let shifted = |shift| Statement { shift, ..Statement::at(0, 2).shifted(digest(&base, 0)) };
    let text = "a shifted entry, but its source is not held or does not stay";
    refuses(&base, false, &shifted(-2).body(), CloseCode::VIOLATION, text);
    for shift in [-3, 8, i64::MAX, i64::MIN] {
        refuses(&base, true, &shifted(shift).body(), CloseCode::VIOLATION, text);
    }
    let (mut script, sink) = receiving(&base, true);
    script.raw(BULK, FrameKind::PAGES, &shifted(-2).body());
    assert!(script.closed().is_none());
    assert_eq!(sink.state().image.page(0, 2), base.page(0, 0));
}

/// SPEC 6.8: where the bytes in the base are not what the sender thinks, it is asked for its own.
#[test]
fn a_shifted_entry_that_finds_other_bytes_is_wanted() {
    let base = image(10);
    let (mut script, sink) = receiving(&base, true);
    let statement = Statement { shift: 1, ..Statement::at(0, 2).shifted(digest(&base, 9)) };
    script.raw(BULK, FrameKind::PAGES, &statement.body());
    script.listen();
    let Some(Frame::Ack(ack)) = script.last(FrameKind::ACK) else { panic!("no wants") };
    assert_eq!((ack.wants[0].first, ack.wants[0].count), (2, 1));
    assert_eq!(sink.state().written, (0, 0));
}

/// SPEC 3.6: both sides have proved what the pages of an agreed base are, so the frame's table says it all. A sender that
/// proves them one by one means another frame, and is asked for the pages; one that calls a page base that it has replaced
/// does not get its root.
#[test]
fn base_pages_of_an_agreed_base_count_once() {
    let base = image(10);
    let all =
        |agreed| (0..10).fold(Statement { agreed, ..Statement::at(0, 0) }, |all, page| all.base(digest(&base, page)));
    let wants = |statement: Statement| {
        let (mut script, sink) = receiving(&base, true);
        script.raw(BULK, FrameKind::PAGES, &statement.body());
        script.listen();
        assert_eq!(sink.state().image, base);
        let ack = script.last(FrameKind::ACK);
        ack.map(|ack| if let Frame::Ack(ack) = ack { ack.wants.iter().map(|want| want.count).sum() } else { 0 })
    };
    assert_eq!(wants(all(true)).unwrap_or(0), 0);
    assert_eq!(wants(all(false)), Some(10));
    let mut newer = base.clone();
    newer.page_mut(0, 3).fill(7);
    let (mut script, sink) = receiving(&base, true);
    script.raw(BULK, FrameKind::PAGES, &all(true).body());
    let page = newer.page(0, 3).first_chunk().unwrap();
    script.raw(BULK, FrameKind::PAGES, &Statement { agreed: true, ..Statement::at(0, 3).inline(page) }.body());
    script.raw(BULK, FrameKind::PAGES, &all(true).body());
    script.say(BULK, &Frame::Round(RoundEnd { round: 0, frames: 3 }));
    script.end_with(0, &base);
    script.settle();
    assert_eq!(script.failure().0, CloseCode::DIGEST);
    assert!(!sink.state().finished);
}

/// SPEC 5.14
#[test]
fn deltas_need_an_agreed_base_and_shifts_one_that_stays() {
    let base = image(10);
    let (page, statement) = changed(&base);
    let text = "a delta against a base that is not agreed or does not stay";
    let shifted = Statement { shift: 1, ..statement.clone() };
    for codec in [Codec::DELTA, Codec::WORDS] {
        refuses(&base, false, &shifted.encoded(codec, &[1; 50]), CloseCode::VIOLATION, text);
    }
    for delta in [statement.delta(base.page(0, 3)), statement.words(base.page(0, 3))] {
        let mut script = AgainstReceiver::receiver(1);
        script.enter(Phase::Receiving, &base, &ImageSink::holding(base.clone()));
        script.settle();
        script.raw(BULK, FrameKind::PAGES, &delta);
        assert_eq!(script.failure().0, CloseCode::VIOLATION);
        let (mut script, sink) = receiving(&base, false);
        script.raw(BULK, FrameKind::PAGES, &delta);
        assert_eq!(sink.state().image.page(0, 3), page);
    }
}

/// SPEC 5.5, 5.15: what is no content of changed words whatever the old bytes are is malformed, and installs nothing.
#[test]
fn words_that_are_none_end_the_session() {
    let base = image(10);
    let (page, statement) = changed(&base);
    let two = statement.clone().inline(base.page(0, 4).first_chunk().unwrap());
    let (mut compressor, mut right, mut whole) = (Compressor::new().unwrap(), Vec::new(), Vec::new());
    assert!(compressor.compress_words([page].iter(), base.page(0, 3), &mut right));
    assert!(compressor.compress(&[7; 4096], 1, &mut whole));
    let trailing = [right.as_slice(), &[0]].concat();
    for (statement, payload, text) in [
        (&two, right, "bytes of masks and changed words"),
        (&statement, whole, "content of changed words: 4096 > 4095"),
        (&statement, trailing, "not one whole zstd frame"),
        (&statement, vec![7; 100], "not one whole zstd frame"),
    ] {
        let (mut script, sink) = receiving(&base, true);
        script.raw(BULK, FrameKind::PAGES, &statement.encoded(Codec::WORDS, &payload));
        let (code, reason) = script.failure();
        assert_eq!(code, CloseCode::MALFORMED);
        assert!(reason.contains(text), "{reason}");
        assert_eq!(sink.state().image, base);
    }
}

/// SPEC 6.8: a delta against other bytes, and one that is no zstd frame, install nothing and are wanted.
#[test]
fn deltas_that_do_not_fit_are_wanted() {
    let base = image(10);
    let (_, statement) = changed(&base);
    let old = base.page(0, 3);
    for body in [statement.delta(old), statement.words(old), statement.encoded(Codec::DELTA, &[7; 100])] {
        let mut rotten = base.clone();
        rotten.page_mut(0, 3)[100] ^= 1;
        let sink = ImageSink::claiming(&base, PUBLIC, rotten.clone(), true);
        let mut script = AgainstReceiver::receiver(1);
        script.known = vec![base.root(&PUBLIC)];
        script.enter(Phase::Receiving, &base, &sink);
        script.raw(BULK, FrameKind::PAGES, &body);
        script.listen();
        let Some(Frame::Ack(ack)) = script.last(FrameKind::ACK) else { panic!("no wants") };
        assert_eq!((ack.wants[0].first, ack.wants[0].count), (3, 1));
        assert_eq!(sink.state().image, rotten);
    }
}

/// A02: a digest that the sender never had the page for brings nothing from another domain, and in its own domain a
/// page that is held: what is asked for is what the receiver lacks.
#[test]
fn a_digest_of_nothing_here_is_wanted_and_never_installed() {
    let (base, other) = (image(10), image(11));
    let (mut script, sink) = receiving(&base, true);
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 5).reference(digest(&other, 5)).body());
    script.listen();
    let Some(Frame::Ack(ack)) = script.last(FrameKind::ACK) else { panic!("no wants") };
    assert_eq!((ack.wants[0].first, ack.wants[0].count), (5, 1));
    assert_eq!(sink.state().image, base);
}

/// A receiver that holds `base` and keeps `other`, a guest of the same domain.
fn beside(base: &Image, other: &Image) -> (AgainstReceiver, ImageSink) {
    let sink = ImageSink::claiming(base, PUBLIC, base.clone(), true);
    let mut script = AgainstReceiver::receiver(1);
    script.known = vec![base.root(&PUBLIC)];
    script.others = Some(Box::new(Neighbour { image: other.clone(), key: PUBLIC, rotten: false }));
    script.enter(Phase::Receiving, base, &sink);
    (script, sink)
}

fn proof(image: &Image, page: u64) -> PageProof {
    Challenge::new(&CHALLENGE, &SESSION, &PUBLIC).prove(image.page(0, page).first_chunk().unwrap())
}

fn is_wanted(script: &mut AgainstReceiver, page: u64) -> bool {
    script.listen();
    matches!(script.last(FrameKind::ACK), Some(Frame::Ack(ack)) if ack.wants.first().is_some_and(|want| want.first == page))
}

/// A02, SPEC 6.28: whoever names the digest of another guest's page gets it only with a proof of having its bytes.
#[test]
fn a_digest_alone_brings_no_page_of_another_guest() {
    let (base, other) = (image(10), image(11));
    let named = || Statement::at(0, 5).reference(digest(&other, 7));
    let (mut script, sink) = beside(&base, &other);
    script.raw(BULK, FrameKind::PAGES, &named().body());
    assert!(is_wanted(&mut script, 5));
    assert_eq!(sink.state().image, base);
    let (mut script, sink) = beside(&base, &other);
    script.raw(BULK, FrameKind::PAGES, &named().proof(proof(&other, 7)).body());
    assert!(script.closed().is_none() && !is_wanted(&mut script, 5));
    assert_eq!(sink.state().image.page(0, 5), other.page(0, 7));
}

/// A02, SPEC 6.28
#[test]
fn a_wrong_proof_of_a_page_that_is_here_ends_the_session() {
    let (base, other) = (image(10), image(11));
    let elsewhere =
        |random, session| Challenge::new(&random, &session, &PUBLIC).prove(other.page(0, 7).first_chunk().unwrap());
    let guesses = [PageProof([0; 16]), proof(&other, 8), elsewhere([1; 32], SESSION), elsewhere(CHALLENGE, [1; 16])];
    for guess in guesses {
        let (mut script, sink) = beside(&base, &other);
        script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 5).reference(digest(&other, 7)).proof(guess).body());
        let (code, reason) = script.failure();
        assert_eq!(code, CloseCode::VIOLATION);
        assert!(
            reason.contains("the proof of page 5 of region 0 is wrong: the sender does not have its bytes"),
            "{reason}"
        );
        assert_eq!(sink.state().image, base);
    }
}

/// What nobody has is wanted whatever its proof; what the guest itself has needs none.
#[test]
fn a_proof_is_asked_for_pages_of_other_guests_alone() {
    let (base, other) = (image(10), image(11));
    let (mut script, sink) = beside(&base, &other);
    script.raw(
        BULK,
        FrameKind::PAGES,
        &Statement::at(0, 5).reference(digest(&image(12), 3)).proof(PageProof([9; 16])).body(),
    );
    assert!(script.closed().is_none() && is_wanted(&mut script, 5));
    for statement in [
        Statement::at(0, 5).reference(digest(&base, 1)),
        Statement::at(0, 6).reference(digest(&base, 2)).proof(PageProof([9; 16])),
    ] {
        script.raw(BULK, FrameKind::PAGES, &statement.body());
    }
    assert!(script.closed().is_none());
    assert_eq!(sink.state().image.page(0, 5), base.page(0, 1));
    assert_eq!(sink.state().image.page(0, 6), base.page(0, 2));
}

/// SPEC 6.28
#[test]
fn proofs_that_nothing_asked_for_are_a_violation() {
    let base = image(10);
    let statement = Statement::at(0, 5).reference(digest(&base, 1)).proof(proof(&base, 1));
    refuses(&base, true, &statement.body(), CloseCode::VIOLATION, "proofs that nothing asked for");
}

/// SPEC 4.20: terms about a base that was never named, or another number of pages than it has.
#[test]
fn terms_about_a_base_that_was_not_named_are_violations() {
    let image = image(10);
    for (named, agreed, held) in [(0, 1, 10), (1, 2, 10), (1, 8, 10), (1, 1, 9), (1, 1, 0), (1, 1, 11)] {
        let bases = (0..named).map(|_| Box::new(ImageBase::whole(&image, PUBLIC)) as Box<dyn pagewire_sender::Base>);
        let mut config = pagewire_sender::SenderConfig::new(pagewire_protocol::frame::ImageName::new("vm").unwrap());
        config.session = [3; 16];
        let mut script = AgainstSender::sender_with(&image, bases.collect(), config);
        script.enter(Phase::Opening, &image);
        let mut accept = script.honest_accept(&image);
        (accept.agreed, accept.held_pages) = (agreed, vec![held]);
        script.say(CONTROL, &Frame::Accept(accept));
        assert_eq!(script.failure().0, CloseCode::VIOLATION, "{named} {agreed} {held}");
    }
}

/// SPEC 6.13: of an agreed base nothing is announced.
#[test]
fn holdings_of_an_agreed_base_are_a_violation() {
    let image = image(300);
    let config = pagewire_sender::SenderConfig::new(pagewire_protocol::frame::ImageName::new("vm").unwrap());
    let mut script = AgainstSender::sender_with(&image, vec![Box::new(ImageBase::whole(&image, PUBLIC))], config);
    script.enter(Phase::Opening, &image);
    let mut accept = script.honest_accept(&image);
    (accept.agreed, accept.held_pages) = (1, vec![300]);
    script.take(accept);
    script.say(CONTROL, &Frame::Have(Have { region: 0, first: 0, digests: vec![Digest([1; 32]); 1] }));
    assert_eq!(script.failure().0, CloseCode::VIOLATION);
}
