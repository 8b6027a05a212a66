//! Raw peers against the engines of a live session: words out of place, blobs that do not fit, roots of something else,
//! and peers that only give signs of life. Whatever they say, the session ends with the right code and text, or goes on
//! unharmed, and no guest is left standing for ever.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{
    Ack, Blob, Done, Frame, FrameKind, HEADER_BYTES, ImageName, LaneId, Ping, Role, RoundEnd, Want,
};
use pagewire_protocol::handover::{Epoch, Handover, HostId, Message, Word};
use pagewire_protocol::limits::{BLOB_BYTES_MAX, BLOBS_MAX, STALL_SPAN_MAX};
use pagewire_protocol::session::{FEATURE_LIVE, Machine, Phase, Policy};
use pagewire_protocol::time::{Span, Time};
use pagewire_receiver::Event as ReceiverEvent;
use pagewire_sender::{AskEngine, Event as SenderEvent};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::live_peer::{FROM, LIVE, TO, blobs, handover, live_receiver, live_sender, root};
use pagewire_test_support::memory::ImageSink;
use pagewire_test_support::peer::{AgainstReceiver, AgainstSender, Script, Statement};
use pagewire_test_support::rng::Rng;

const CONTROL: LaneId = LaneId::CONTROL;
const BULK: LaneId = LaneId::bulk(0);

fn image() -> Image {
    Image::random(4, Mix::NOISE, &mut Rng::new(4))
}

fn page(image: &Image, page: u64) -> &[u8; 4096] {
    image.page(0, page).first_chunk().unwrap()
}

/// A receiver of a guest that holds nothing, ready for its first page.
fn receiving() -> (AgainstReceiver, Image) {
    let (image, mut script) = (image(), live_receiver());
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    script.settle();
    (script, image)
}

/// A receiver that has said READY.
fn ready() -> (AgainstReceiver, Image) {
    let (image, mut script) = (image(), live_receiver());
    script.bring_guest(&image, &ImageSink::empty(&image));
    let events = script.events();
    let is_ready = |event: &ReceiverEvent| matches!(event, ReceiverEvent::Ready(got, came) if (*got, came) == (handover(&image), &blobs()));
    assert!(events.iter().any(is_ready), "{events:?}");
    (script, image)
}

/// A sender whose guest stands still and is all stated.
fn offering() -> (AgainstSender, Image) {
    let image = image();
    let mut script = live_sender(&image);
    let told = script.take_guest(&image);
    assert!(told.contains(&SenderEvent::Offer(handover(&image))), "{told:?}");
    (script, image)
}

fn said(events: &[ReceiverEvent]) -> Vec<Message> {
    let said = events.iter().filter_map(|event| match event {
        ReceiverEvent::Said(message) => Some(*message),
        _ => None,
    });
    said.collect()
}

/// Nothing but signs of life comes for `span`: says when the session ended.
fn ping_for<M: Machine>(script: &mut Script<M>, span: Span) -> Option<Span> {
    let began = script.now;
    while script.now < began + span {
        script.wait(Span::from_secs(1));
        for lane in [CONTROL, BULK] {
            script.say(lane, &Frame::Ping(Ping { token: 1, answer: false }));
        }
        script.settle();
        if script.engine.is_over() {
            return Some(script.now.since(began));
        }
    }
    None
}

/// SPEC 4.21, 7.6: a session that hands a guest over ends with nothing less.
#[test]
fn done_does_not_end_a_live_session() {
    let (mut script, image) = offering();
    script.say(CONTROL, &Frame::Done(Done { pages: 4, root: root(&image, &blobs()) }));
    let expected = "DONE, in a session that ends with a hand-over".to_owned();
    assert_eq!(script.failure(), (CloseCode::VIOLATION, expected.clone()));
    let (mut script, image) = ready();
    script.say(CONTROL, &Frame::Done(Done { pages: 4, root: root(&image, &blobs()) }));
    assert_eq!(script.failure(), (CloseCode::VIOLATION, expected));
}

/// SPEC 11.2; A14: words of a hand-over have no place in a session at rest, whether or not the feature is agreed.
#[test]
fn words_and_blobs_in_a_session_at_rest_are_violations() {
    let image = image();
    for agreed in [false, true] {
        let features_offered = if agreed { FEATURE_LIVE } else { 0 };
        let policy = Policy { features_offered, ..Policy::default() };
        for word in [Word::Ready, Word::Commit, Word::Started, Word::Reject, Word::Gone] {
            let mut config = pagewire_sender::SenderConfig::new(ImageName::new("vm.img").unwrap());
            (config.session, config.policy) = ([5; 16], policy.clone());
            let mut script = AgainstSender::sender_with(&image, Vec::new(), config);
            script.features = features_offered;
            script.enter(Phase::Finishing, &image);
            script.word(word, handover(&image));
            assert_eq!(script.failure().0, CloseCode::VIOLATION, "{word:?} {agreed}");
            for phase in [Phase::Deciding, Phase::Receiving] {
                let mut script = AgainstReceiver::receiver_with(&policy, 1);
                script.features = features_offered;
                script.enter(phase, &image, &ImageSink::empty(&image));
                script.word(word, handover(&image));
                assert_eq!(script.failure().0, CloseCode::VIOLATION, "{word:?} {agreed}");
            }
            // What lasts stays the receiver's, whatever comes instead of the acknowledgement.
            let mut script = AgainstReceiver::receiver_with(&policy, 1);
            script.features = features_offered;
            script.enter(Phase::Parting, &image, &ImageSink::empty(&image));
            script.word(word, handover(&image));
            assert!(matches!(script.outcome(), Some(Ok(()))));
            assert!(said(&script.events()).is_empty(), "nobody is told");
        }
        let mut script = AgainstReceiver::receiver_with(&policy, 1);
        script.features = features_offered;
        script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
        script.bring(&blobs());
        assert_eq!(script.failure().0, CloseCode::VIOLATION, "{agreed}");
    }
}

/// SPEC 12.1, 12.2, 12.3; A16, A28: a blob out of order, after ROOT, over its cap, or one too many.
#[test]
fn blobs_that_do_not_fit_end_the_session() {
    let name = |text: &str| ImageName::new(text).unwrap();
    let part = |text: &str, length, offset, part: &'static [u8]| {
        Frame::Blob(Blob { name: name(text), version: 1, length, offset, part })
    };
    let refused: &[(&[Frame<'_>], CloseCode)] = &[
        (&[part("a", 6, 3, b"abc")], CloseCode::VIOLATION),
        (&[part("a", 6, 0, b"abc"), part("b", 3, 0, b"abc")], CloseCode::VIOLATION),
        (&[part("a", 6, 0, b"abc"), part("a", 6, 4, b"c")], CloseCode::VIOLATION),
        (&[part("a", 6, 0, b"abc"), part("a", 7, 3, b"c")], CloseCode::VIOLATION),
        (&[part("a", 3, 0, b"abc"), part("a", 3, 0, b"abc")], CloseCode::VIOLATION),
        (&[part("a", BLOB_BYTES_MAX + 1, 0, b"abc")], CloseCode::MALFORMED),
        (&[part("a", u32::MAX, u32::MAX - 1, b"abc")], CloseCode::MALFORMED),
        (&[part("a", 2, 0, b"abc")], CloseCode::MALFORMED),
        (&[part("a", 2, 0, b"")], CloseCode::MALFORMED),
    ];
    for (at, (frames, code)) in refused.iter().enumerate() {
        let (mut script, _) = receiving();
        frames.iter().for_each(|frame| script.say(CONTROL, frame));
        assert_eq!(script.failure().0, *code, "case {at}");
    }
    let (mut script, _) = receiving();
    for at in 0..BLOBS_MAX {
        script.say(CONTROL, &part(&format!("b{at}"), 0, 0, b""));
    }
    assert!(script.outcome().is_none());
    script.say(CONTROL, &part("one-more", 0, 0, b""));
    assert_eq!(script.failure().0, CloseCode::VIOLATION);
    // ROOT while one is not whole, and a part after ROOT.
    let (mut script, image) = receiving();
    script.say(CONTROL, &part("a", 6, 0, b"abc"));
    script.root(&image, root(&image, &blobs()));
    assert_eq!(script.failure(), (CloseCode::VIOLATION, "blob a: 3 bytes have not come".to_owned()));
    let (mut script, image) = receiving();
    script.root(&image, root(&image, &blobs()));
    script.bring(&blobs());
    assert_eq!(script.failure().0, CloseCode::VIOLATION);
}

/// SPEC 12.4; A16, I3: the image root alone, other blobs, or blobs in another order are not what was stated.
#[test]
fn a_root_that_does_not_cover_the_blobs_ends_the_session() {
    let image = image();
    let swapped = {
        let mut swapped = Blobs::new();
        blobs().iter().collect::<Vec<_>>().iter().rev().for_each(|blob| {
            swapped.insert(blob.name().clone(), blob.version(), blob.bytes().to_vec()).unwrap();
        });
        swapped
    };
    for digest in
        [image.root(&[0; 32]), root(&image, &Blobs::new()), root(&image, &swapped), Digest::default(), Digest([1; 32])]
    {
        let (mut script, image) = receiving();
        script.state_all(&image);
        script.bring(&blobs());
        script.root(&image, digest);
        script.settle();
        let (code, text) = script.failure();
        assert_eq!(code, CloseCode::DIGEST);
        assert!(text.starts_with("root mismatch: "), "{text}");
        assert!(script.events().iter().all(|event| !matches!(event, ReceiverEvent::Ready(..))));
    }
}

/// SPEC 4.21: no guest, no epoch; nor terms of the other kind.
#[test]
fn terms_of_another_kind_are_refused() {
    let image = image();
    for (guest, epoch) in [(LineageId([0; 16]), LIVE.epoch), (LIVE.guest, Epoch::ZERO)] {
        let mut script = live_receiver();
        script.live.as_mut().map(|live| (live.guest, live.epoch) = (guest, epoch)).unwrap();
        script.enter(Phase::Deciding, &image, &ImageSink::empty(&image));
        assert_eq!(script.failure().0, CloseCode::MALFORMED);
    }
    let mut script = live_receiver();
    script.host = None;
    script.enter(Phase::Deciding, &image, &ImageSink::empty(&image));
    script.take(&ImageSink::empty(&image));
    assert_eq!(script.failure(), (CloseCode::REFUSED, "refused: no guest is taken over here".to_owned()));
    // A host that is named for a session at rest names nobody.
    let mut script = AgainstReceiver::receiver(1);
    script.host = Some(TO);
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    assert!(matches!(script.last(FrameKind::ACCEPT), Some(Frame::Accept(accept)) if accept.host.is_none()));

    let text = "terms of another kind, in a session that asked for others".to_owned();
    let mut script = live_sender(&image);
    script.host = None;
    script.enter(Phase::Sending, &image);
    assert_eq!(script.failure(), (CloseCode::VIOLATION, text.clone()));
    let mut script = AgainstSender::sender(&image, 1);
    script.host = Some(TO);
    script.enter(Phase::Sending, &image);
    assert_eq!(script.failure(), (CloseCode::VIOLATION, text));
}

/// SPEC 7.3, 11.2; A14: a word is heard where it has a place, and ends the session everywhere else.
#[test]
fn words_are_heard_only_where_they_have_a_place() {
    let image = image();
    let handover = handover(&image);
    for word in [Word::Ready, Word::Commit, Word::Started, Word::Reject, Word::Gone] {
        for phase in [Phase::Opening, Phase::Sending, Phase::Finishing] {
            let mut script = live_sender(&image);
            if phase == Phase::Finishing {
                script.take_guest(&image);
            } else {
                script.enter(phase, &image);
            }
            script.word(word, handover);
            let heard = std::iter::from_fn(|| script.engine.poll_event())
                .any(|event| event == SenderEvent::Said(Message { word, handover }));
            let has_place = !word.is_senders() && phase != Phase::Sending;
            assert_eq!((heard, script.outcome().is_none()), (has_place, has_place), "{word:?} {phase:?}");
        }
        for phase in [Phase::Waiting, Phase::Deciding, Phase::Receiving, Phase::Parting] {
            let mut script = live_receiver();
            if phase == Phase::Parting {
                script.bring_guest(&image, &ImageSink::empty(&image));
            } else {
                script.enter(phase, &image, &ImageSink::empty(&image));
            }
            script.word(word, handover);
            let heard = said(&script.events()).contains(&Message { word, handover });
            let has_place = word.is_senders() && matches!(phase, Phase::Waiting | Phase::Parting);
            assert_eq!((heard, script.outcome().is_none()), (has_place, has_place), "{word:?} {phase:?}");
        }
    }
}

/// SPEC 11.4: a binding of nobody, of no epoch, or of one host on both sides is not even a word.
#[test]
fn bindings_without_a_guest_an_epoch_or_two_hosts_are_malformed() {
    let (_, image) = offering();
    let honest = handover(&image);
    for wrong in [
        Handover { lineage: LineageId([0; 16]), ..honest },
        Handover { epoch: Epoch::ZERO, ..honest },
        Handover { receiver: FROM, ..honest },
        Handover { sender: TO, receiver: TO, ..honest },
    ] {
        let (mut script, _) = offering();
        script.word(Word::Ready, wrong);
        assert_eq!(script.failure().0, CloseCode::MALFORMED);
        let (mut script, _) = ready();
        script.word(Word::Commit, wrong);
        assert_eq!(script.failure().0, CloseCode::MALFORMED);
    }
}

/// C16, I8: a receiver that takes nothing, or all and never says READY, and answers every sign of life: the guest does
/// not stand still for ever.
#[test]
fn a_guest_that_stands_still_is_not_left_standing_by_signs_of_life() {
    let (mut script, _) = offering();
    let over = ping_for(&mut script, Span::from_secs(1000)).expect("it ends");
    assert!(over >= STALL_SPAN_MAX && over <= STALL_SPAN_MAX + Span::from_secs(2), "{over:?}");
    let text = "a guest that stands still was not taken on for 120 s";
    assert_eq!(script.failure(), (CloseCode::TIMEOUT, format!("the peer is too slow: {text}")));

    // READY that came, words of others, and acknowledgements without news do not extend it.
    let (mut script, image) = offering();
    let (began, frames) = (script.now, script.frames(BULK));
    while !script.engine.is_over() && script.now < began + Span::from_secs(1000) {
        ping_for(&mut script, Span::from_secs(7));
        if script.engine.is_over() {
            break;
        }
        script.word(Word::Ready, handover(&image));
        script.say(BULK, &Frame::Ack(Ack { frames, settled: frames, wants: Vec::new() }));
    }
    assert!(script.now.since(began) <= STALL_SPAN_MAX + Span::from_secs(8));
}

/// I8: a sender that says nothing after READY, or nothing but COMMITs of others, does not hold the guest's name for ever.
#[test]
fn a_receiver_does_not_wait_for_ever_for_commit() {
    let (mut script, image) = ready();
    let other = Handover { epoch: Epoch::new(7), ..handover(&image) };
    let began = script.now;
    while !script.engine.is_over() && script.now < began + Span::from_secs(1000) {
        ping_for(&mut script, Span::from_secs(7));
        if !script.engine.is_over() {
            script.word(Word::Commit, other);
        }
    }
    let waited = script.now.since(began);
    assert!(waited >= STALL_SPAN_MAX && waited <= STALL_SPAN_MAX + Span::from_secs(8), "{waited:?}");
    assert_eq!(
        script.failure(),
        (CloseCode::TIMEOUT, "the peer is too slow: READY came to nothing for 120 s".to_owned())
    );
}

/// SPEC 6.12; A21: each round of a live session has its share of wants and no more.
#[test]
fn a_flood_of_wants_ends_a_live_session() {
    let (mut script, _) = offering();
    let frames = script.frames(BULK);
    let all = Want { region: 0, first: 0, count: 4 };
    // The one that looks is the round in which the guest stood still; it had at least one before.
    let mut asked = 0u64;
    while script.outcome().is_none() {
        script.say(BULK, &Frame::Ack(Ack { frames, settled: frames, wants: vec![all] }));
        asked += 4;
        assert!(asked <= 4 * 3 * 4, "{asked} wants of four pages in a few rounds");
    }
    assert!(asked > 4 * 3, "more than in one round");
}

/// SPEC 6.20: rounds without end use up nothing, and wants are bounded by the rounds that began.
#[test]
fn a_sender_that_never_ends_its_rounds_gains_nothing() {
    let (mut script, image) = receiving();
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 0).inline(page(&image, 0)).body());
    for round in 0..5_000 {
        script.say(BULK, &Frame::Round(RoundEnd { round, frames: 1 }));
    }
    script.settle();
    assert!(script.outcome().is_none());
    assert!(script.said.iter().filter(|said| said.kind == FrameKind::ACK).count() < 20, "one answer for many");
    for round in [4_999, 5_001, u32::MAX] {
        let mut again = receiving().0;
        again.say(BULK, &Frame::Round(RoundEnd { round, frames: 0 }));
        assert_eq!(again.failure().0, CloseCode::VIOLATION);
    }
}

/// SPEC 6.29: a page that is skipped at any place is not stated by it, and a frame that skips all states nothing.
#[test]
fn skipped_pages_are_never_taken_for_stated_ones() {
    for missing in 0..4 {
        let (mut script, image) = receiving();
        let statement = (0..4).fold(Statement::at(0, 0), |statement, at| {
            if at == missing { statement.skipped() } else { statement.inline(page(&image, at)) }
        });
        script.raw(BULK, FrameKind::PAGES, &statement.body());
        script.end_round(1);
        script.bring(&blobs());
        script.root(&image, root(&image, &blobs()));
        script.settle();
        assert_eq!(script.failure().0, CloseCode::DIGEST, "page {missing}");
    }
    let (mut script, image) = receiving();
    let none = (0..4).fold(Statement::at(0, 0), |statement, _| statement.skipped());
    for _ in 0..100 {
        script.raw(BULK, FrameKind::PAGES, &none.body());
    }
    assert_eq!(script.engine.progress().0, 0);
    script.raw(
        BULK,
        FrameKind::PAGES,
        &(0..4).fold(Statement::at(0, 0), |all, at| all.inline(page(&image, at))).body(),
    );
    script.raw(BULK, FrameKind::PAGES, &none.body());
    script.end_round(102);
    script.bring(&blobs());
    script.root(&image, root(&image, &blobs()));
    script.settle();
    let events = script.events();
    assert!(events.iter().any(|event| matches!(event, ReceiverEvent::Ready(got, _) if *got == handover(&image))));
}

/// One question, and whoever answers it.
struct Asked {
    engine: AskEngine,
    now: Time,
}

impl Asked {
    fn greeted(features_offered: u64) -> Self {
        let now = Time::ZERO + Span::from_secs(1);
        let question = Message { word: Word::Commit, handover: handover(&image()) };
        let mut asked = Self { engine: AskEngine::new(question, [8; 16], now), now };
        let hello = Policy { features_offered, ..Policy::default() }.hello(Role::Receiver, [9; 16]);
        asked.say(&Frame::Hello(hello));
        asked
    }

    fn say(&mut self, frame: &Frame<'_>) {
        let mut bytes = Vec::new();
        frame.encode(CONTROL, &mut bytes);
        self.engine.handle_frame(CONTROL, frame.kind(), &bytes[HEADER_BYTES..], self.now);
    }

    fn answer(&mut self, word: Word) {
        self.say(&Frame::Handover(Message { word, handover: handover(&image()) }));
    }

    fn said(&mut self) -> Vec<FrameKind> {
        let now = self.now;
        std::iter::from_fn(|| self.engine.poll_frame(CONTROL, now))
            .map(|frame| FrameKind(frame.pieces().collect::<Vec<_>>().concat()[4]))
            .collect()
    }
}

/// SPEC 11.2; A14: who is asked may answer with READY, STARTED or REJECT, within the time of a handshake.
#[test]
fn a_question_takes_only_an_answer() {
    for word in [Word::Ready, Word::Started, Word::Reject] {
        let mut asked = Asked::greeted(FEATURE_LIVE);
        assert_eq!(asked.said(), [FrameKind::HELLO, FrameKind::COMMIT]);
        asked.answer(word);
        assert_eq!(asked.engine.poll_event().map(|message| message.word), Some(word));
        asked.engine.finish();
        assert_eq!(asked.engine.outcome().map(|outcome| outcome.is_ok()), Some(true));
        assert_eq!(asked.said(), [FrameKind::CLOSE]);
    }
    let wrong = [
        Frame::Done(Done { pages: 1, root: Digest::default() }),
        Frame::Ack(Ack::default()),
        Frame::Handover(Message { word: Word::Commit, handover: handover(&image()) }),
        Frame::Handover(Message { word: Word::Gone, handover: handover(&image()) }),
    ];
    for frame in &wrong {
        let mut asked = Asked::greeted(FEATURE_LIVE);
        asked.say(frame);
        assert!(asked.engine.is_over() && asked.engine.outcome().is_some_and(|outcome| outcome.is_err()), "{frame:?}");
        assert_eq!(asked.engine.poll_event(), None);
        assert_eq!(asked.said(), [FrameKind::CLOSE]);
    }
    // ACCEPT has a place in this phase, but not on this connection.
    let mut asked = Asked::greeted(FEATURE_LIVE);
    asked.say(&Frame::Accept(live_sender(&image()).honest_accept(&image())));
    assert!(asked.engine.outcome().is_some_and(|outcome| outcome.is_err()));
    // Rubbish, and a peer that hands no guests over.
    let mut asked = Asked::greeted(FEATURE_LIVE);
    asked.engine.handle_frame(CONTROL, FrameKind::STARTED, &[9; 144], asked.now);
    assert!(asked.engine.outcome().is_some_and(|outcome| outcome.is_err()));
    let mut asked = Asked::greeted(0);
    assert!(asked.engine.outcome().is_some_and(|outcome| outcome.is_err()));
    assert!(!asked.said().contains(&FrameKind::COMMIT), "nothing was asked");
}

/// SPEC 9.2: a peer that answers for ever, or with signs of life only, is not listened to for ever.
#[test]
fn a_question_ends_after_the_time_of_a_handshake() {
    for answers in [false, true] {
        let mut asked = Asked::greeted(FEATURE_LIVE);
        let began = asked.now;
        while !asked.engine.is_over() {
            asked.now = asked.now + Span::from_millis(100);
            assert!(asked.now.since(began) <= Span::from_secs(10), "it ends");
            asked.say(&Frame::Ping(Ping { token: 1, answer: false }));
            if answers {
                asked.answer(Word::Ready);
            }
            if asked.engine.poll_timeout().is_some_and(|due| due <= asked.now) {
                asked.engine.handle_timeout(asked.now);
            }
            asked.said();
        }
        assert!(asked.engine.outcome().is_some_and(|outcome| outcome.is_err()));
    }
}

/// I10: which host a connection speaks for is not in its frames.
#[test]
fn a_receiver_tells_the_host_that_accepted_and_no_other() {
    let (mut script, image) = offering();
    let other = Handover { receiver: HostId([9; 32]), ..handover(&image) };
    script.word(Word::Ready, other);
    // The engine only carries words; who they are about is judged by the host, see live_faults.rs.
    let heard: Vec<SenderEvent> = std::iter::from_fn(|| script.engine.poll_event()).collect();
    assert_eq!(heard, [SenderEvent::Said(Message { word: Word::Ready, handover: other })]);
    assert!(script.outcome().is_none());
}
