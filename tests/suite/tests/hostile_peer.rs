//! Raw peers against each engine: whatever they say, the engine ends the session with the right code and text, or goes
//! on unharmed. Names are clauses of docs/SPEC.md; the ids are those of the project's list of attacks.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::digest::Digest;
use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{
    Ack, Close, Codec, Done, Frame, FrameKind, Have, Join, LaneId, Ping, Role, Root, RoundEnd, Want,
};
use pagewire_protocol::limits::WANTS_A_PAGE_MAX;
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::session::{Agreed, Machine, Phase, check};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::memory::{ImageSink, SinkFaults};
use pagewire_test_support::peer::{AgainstReceiver, AgainstSender, Statement, digests};
use pagewire_test_support::rng::Rng;

const CONTROL: LaneId = LaneId::CONTROL;
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

/// A receiver that holds all of `base` and has said so.
fn receiving_onto(base: &Image) -> AgainstReceiver {
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, base, &ImageSink::holding(base.clone()));
    script.settle();
    script
}

/// A sender of `pages` pages that has stated all of them.
fn finishing(pages: u64) -> (AgainstSender, Image) {
    let image = image(pages);
    let mut script = AgainstSender::sender(&image, 1);
    script.enter(Phase::Finishing, &image);
    (script, image)
}

fn refuses(lane: LaneId, kind: FrameKind, body: &[u8], code: CloseCode, text: &str) {
    let (mut script, _) = receiving();
    script.raw(lane, kind, body);
    assert_eq!(script.failure(), (code, text.to_owned()));
}

fn encoded(frame: &Frame<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(CONTROL, &mut bytes);
    bytes.split_off(8)
}

/// A body of each kind that decodes.
fn sample(kind: FrameKind, image: &Image) -> Vec<u8> {
    let root = image.root(&[0; 32]);
    match kind {
        FrameKind::HAVE => encoded(&Frame::Have(Have { region: 0, first: 0, digests: vec![root] })),
        FrameKind::PAGES => Statement::at(0, 0).inline(page(image, 0)).body(),
        FrameKind::ACK => encoded(&Frame::Ack(Ack::default())),
        FrameKind::ROUND => encoded(&Frame::Round(RoundEnd { round: 0, frames: 0 })),
        FrameKind::ROOT => encoded(&Frame::Root(Root { round: 0, pages: image.pages(), digest: root })),
        FrameKind::DONE => encoded(&Frame::Done(Done { pages: image.pages(), root })),
        FrameKind::PING => encoded(&Frame::Ping(Ping { token: 1, answer: false })),
        FrameKind::CLOSE => encoded(&Frame::Close(Close::new(CloseCode::CANCELLED, "enough"))),
        FrameKind::JOIN => encoded(&Frame::Join(AgainstReceiver::honest_join(BULK))),
        _ => Vec::new(),
    }
}

/// One cell of the matrix: what `check` says is what the engine does.
fn judge_cell(
    role: Role,
    phase: Phase,
    lane: LaneId,
    kind: FrameKind,
    outcome: Option<Result<(), String>>,
    close: Option<Close>,
) {
    let cell = format!("{} {} {lane:?} {kind}", role.name(), phase.name());
    let verdict = check(role, phase, Agreed::AtRest, lane, kind);
    match (phase, verdict) {
        (Phase::Over, _) => assert!(outcome.is_none() && close.is_none(), "{cell}: a session that is over stays so"),
        (Phase::Parting, Err(_)) => {
            assert_eq!(outcome, Some(Ok(())), "{cell}: the image lasts whatever the sender says")
        }
        (_, Err(violation)) => {
            assert_eq!(outcome, Some(Err(violation.to_string())), "{cell}");
            let close = close.unwrap_or_else(|| panic!("{cell}: the peer is told"));
            assert_eq!((close.code, close.reason), (CloseCode::VIOLATION, violation.to_string()), "{cell}");
        }
        (_, Ok(())) => {
            let text = outcome.and_then(Result::err).unwrap_or_default();
            assert!(!text.contains("is not expected"), "{cell}: {text}");
        }
    }
}

/// SPEC 7.3; A14: every kind, on every kind of lane, in every phase, at both roles.
#[test]
fn every_frame_is_taken_or_refused_as_the_table_says() {
    let image = image(4);
    let sender_phases = [Phase::Greeting, Phase::Opening, Phase::Sending, Phase::Finishing, Phase::Over];
    let receiver_phases =
        [Phase::Greeting, Phase::Waiting, Phase::Deciding, Phase::Receiving, Phase::Parting, Phase::Over];
    for &kind in FrameKind::ALL {
        for lane in [CONTROL, BULK, LaneId::URGENT] {
            for phase in sender_phases {
                let mut script = AgainstSender::sender(&image, 1);
                script.enter(phase, &image);
                let before = script.outcome().is_some();
                assert_eq!(before, phase == Phase::Over);
                script.raw(lane, kind, &sample(kind, &image));
                let outcome = script.outcome().map(|outcome| outcome.map_err(|error| error.to_string()));
                judge_cell(Role::Sender, phase, lane, kind, outcome, script.closed());
            }
            for phase in receiver_phases {
                let mut script = AgainstReceiver::receiver(1);
                script.enter(phase, &image, &ImageSink::empty(&image));
                let _ = script.outcome();
                script.raw(lane, kind, &sample(kind, &image));
                let outcome = script.outcome().map(|outcome| outcome.map_err(|error| error.to_string()));
                judge_cell(Role::Receiver, phase, lane, kind, outcome, script.closed());
            }
        }
    }
}

/// A14: the same frame cut at every length is refused as malformed or as false, and never taken.
#[test]
fn truncated_and_oversized_bodies_are_malformed() {
    let (_, image) = receiving();
    let body = Statement::at(0, 0).inline(page(&image, 0)).reference(digests(&image)[0]).zero().body();
    for cut in (0..body.len()).step_by(7) {
        let (mut script, _) = receiving();
        script.raw(BULK, FrameKind::PAGES, &body[..cut]);
        assert_eq!(script.failure().0, CloseCode::MALFORMED, "cut at {cut}");
    }
    let longer = [body, vec![0]].concat();
    refuses(
        BULK,
        FrameKind::PAGES,
        &longer,
        CloseCode::MALFORMED,
        "malformed PAGES frame: payload bytes: 4097, expected 4096",
    );
    refuses(
        BULK,
        FrameKind::ROUND,
        &[0; 17],
        CloseCode::MALFORMED,
        "malformed ROUND frame: 1 bytes too many after the last field",
    );
    refuses(
        CONTROL,
        FrameKind::ROOT,
        &[0; 47],
        CloseCode::MALFORMED,
        "malformed ROOT frame: digest: 32 bytes needed at offset 16, 31 left",
    );
}

/// SPEC 6.1; A11: ranges that wrap, lie outside, or name no region; nothing is written.
#[test]
fn pages_outside_the_image_are_malformed() {
    let huge = [u64::MAX, u64::MAX - 1, 1 << 63, 1 << 32, 4, 3];
    for (region, first, count) in
        huge.map(|first| (0, first, 2)).into_iter().chain([(0, 0, 5), (1, 0, 1), (u16::MAX, 0, 1)])
    {
        let (image, sink) = (image(4), ImageSink::empty(&image(4)));
        let mut script = AgainstReceiver::receiver(1);
        script.enter(Phase::Receiving, &image, &sink);
        let statement = (0..count).fold(Statement::at(region, first), |statement, _| statement.inline(page(&image, 0)));
        script.raw(BULK, FrameKind::PAGES, &statement.body());
        let text = if region == 0 {
            format!("malformed PAGES frame: region 0 has 4 pages, {count} from {first} are not inside")
        } else {
            format!("malformed PAGES frame: region: {region} > 1")
        };
        assert_eq!(script.failure(), (CloseCode::MALFORMED, text));
        assert_eq!(sink.state().written, (0, 0));
    }
}

/// SPEC 6.1; A11: an install page is not cut.
#[test]
fn pages_that_cut_an_install_page_are_malformed() {
    let region = Region { bytes: 64 * 4096, install_size: InstallSize::KIB_64 };
    let image = Image::filled(vec![region], Mix::NOISE, &mut Rng::new(1));
    for (first, count) in [(0, 15), (1, 16), (8, 16), (0, 17)] {
        let mut script = AgainstReceiver::receiver(1);
        script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
        let statement = (0..count).fold(Statement::at(0, first), |statement, _| statement.zero());
        script.raw(BULK, FrameKind::PAGES, &statement.body());
        assert_eq!(script.failure().0, CloseCode::MALFORMED, "{first} {count}");
    }
}

/// SPEC 6.8; A06, A15: bytes under another page's digest are not installed.
#[test]
fn pages_that_do_not_have_their_digest_end_the_session() {
    let (image, sink) = (image(4), ImageSink::empty(&image(4)));
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &image, &sink);
    let digest = Some(Digest([1; 32]));
    let statement = Statement { digest, ..Statement::at(0, 1) }.inline(page(&image, 1)).inline(page(&image, 2));
    script.raw(BULK, FrameKind::PAGES, &statement.body());
    assert_eq!(script.failure(), (CloseCode::DIGEST, "digest mismatch in 2 pages from page 1 of region 0".to_owned()));
    assert_eq!(sink.state().written, (0, 0));
}

/// SPEC 7.5, I3; A16: a sender that says one image and another root.
#[test]
fn a_root_or_count_that_differs_ends_the_session() {
    for (pages, wrong) in [(4, true), (5, false), (3, false), (0, true)] {
        let (mut script, image) = receiving();
        let statement = (0..4).fold(Statement::at(0, 0), |statement, at| statement.inline(page(&image, at)));
        script.raw(BULK, FrameKind::PAGES, &statement.body());
        script.end_round(1);
        let digest = if wrong { Digest([1; 32]) } else { image.root(&[0; 32]) };
        script.say(CONTROL, &Frame::Root(Root { round: 0, pages, digest }));
        let (code, text) = script.failure();
        assert_eq!(code, CloseCode::DIGEST);
        assert!(text.starts_with("root mismatch: "), "{text}");
    }
}

/// A16, I3: pages that were never stated are not forgotten by a right root.
#[test]
fn a_round_that_ends_before_all_pages_came_ends_the_session() {
    let (mut script, image) = receiving();
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 0).inline(page(&image, 0)).body());
    script.end_round(1);
    script.say(CONTROL, &Frame::Root(Root { round: 0, pages: 4, digest: image.root(&[0; 32]) }));
    let (code, text) = script.failure();
    assert_eq!(code, CloseCode::DIGEST);
    assert!(text.ends_with("over 1 here"), "{text}");
}

/// SPEC 6.22: ROOT once; it may come before everything else.
#[test]
fn a_second_root_is_a_violation() {
    let (mut script, image) = receiving();
    let root = Frame::Root(Root { round: 0, pages: 4, digest: image.root(&[0; 32]) });
    script.say(CONTROL, &root);
    assert!(script.outcome().is_none());
    script.say(CONTROL, &root);
    assert_eq!(script.failure().0, CloseCode::VIOLATION);
}

/// SPEC 6.4; A15: a base that is not there.
#[test]
fn base_entries_without_a_base_are_violations() {
    let (_, image) = receiving();
    let body = Statement::at(0, 0).base(digests(&image)[0]).body();
    refuses(
        BULK,
        FrameKind::PAGES,
        &body,
        CloseCode::VIOLATION,
        "base entry, but nothing is held for page 0 of region 0",
    );
}

/// SPEC 6.15: a receiver that writes in place would lose what it has not read.
#[test]
fn pages_stated_before_their_holdings_are_violations() {
    let base = image(600);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &base, &ImageSink::holding(base.clone()));
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 300).zero().body());
    assert_eq!(
        script.failure(),
        (CloseCode::VIOLATION, "pages stated before their holdings for page 300 of region 0".to_owned())
    );
}

/// SPEC 6.8: a wrong belief about the base is asked again, not believed.
#[test]
fn base_entries_that_are_not_the_base_are_wanted() {
    let base = image(4);
    let mut script = receiving_onto(&base);
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 0).base(Digest([1; 32])).zero().body());
    script.settle();
    let Some(Frame::Ack(ack)) = script.last(FrameKind::ACK) else { panic!("wants travel at once") };
    assert_eq!(ack, Ack { frames: 1, settled: 1, wants: vec![Want { region: 0, first: 0, count: 2 }] });
}

/// SPEC 6.8: a page of the base that was lost since it was announced is the receiver's trouble, not the sender's fault.
#[test]
fn base_entries_of_pages_that_were_lost_are_wanted() {
    let base = image(400);
    let faults = SinkFaults { rot: Some((0, 1)), ..SinkFaults::default() };
    let mut script = AgainstReceiver::receiver(1);
    let sink = ImageSink::new(base.clone(), vec![400], true, faults);
    sink.state().old = Some(base.clone());
    script.enter(Phase::Receiving, &base, &sink);
    script.settle();
    let lost = digests(&base)[300];
    for (statement, first) in [(Statement::at(0, 0).reference(lost), 0), (Statement::at(0, 300).base(lost), 300)] {
        script.raw(BULK, FrameKind::PAGES, &statement.body());
        script.settle();
        let Some(Frame::Ack(ack)) = script.last(FrameKind::ACK) else { panic!("wants travel at once") };
        assert_eq!(ack.wants, [Want { region: 0, first, count: 1 }]);
    }
    assert!(script.outcome().is_none());
}

/// SPEC 6.3: pages on a lane that is not theirs, batches over more than one group.
#[test]
fn pages_on_another_lane_or_over_two_groups_are_violations() {
    let image = image(1024);
    for (lane, first, text) in [
        (1, 0, "page 0 of region 0 does not travel on lane 2"),
        (0, 512, "page 512 of region 0 does not travel on lane 1"),
        (0, 511, "a batch that crosses a group for page 511 of region 0"),
    ] {
        let mut script = AgainstReceiver::receiver(2);
        script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
        let statement = Statement::at(0, first).inline(page(&image, 0)).inline(page(&image, 1));
        script.raw(LaneId::bulk(lane), FrameKind::PAGES, &statement.body());
        assert_eq!(script.failure(), (CloseCode::VIOLATION, text.to_owned()));
    }
}

/// SPEC 6.12; A20: references to nothing, again and again: every answer is in memory bounded by the image.
#[test]
fn a_flood_of_references_that_miss_ends_the_session() {
    let (mut script, _) = receiving();
    let body = (0..4).fold(Statement::at(0, 0), |statement, _| statement.reference(Digest([9; 32]))).body();
    for round in 0..=WANTS_A_PAGE_MAX {
        assert!(script.outcome().is_none(), "round {round}");
        script.raw(BULK, FrameKind::PAGES, &body);
    }
    assert_eq!(
        script.failure(),
        (CloseCode::VIOLATION, "16 wants for 4 pages: the peer cannot keep what it gets".to_owned())
    );
}

/// SPEC 6.12; A21: wants of all pages, again and again: a bounded number of answers, then the end.
#[test]
fn a_flood_of_wants_ends_the_session() {
    let (mut script, _) = finishing(100);
    let ack = Frame::Ack(Ack { frames: 1, settled: 1, wants: vec![Want { region: 0, first: 0, count: 100 }] });
    for _ in 0..WANTS_A_PAGE_MAX {
        script.say(BULK, &ack);
        script.settle();
    }
    assert!(script.outcome().is_none());
    assert!(script.said.iter().map(|said| said.body.len()).sum::<usize>() < 5 * 100 * 4200);
    script.say(BULK, &ack);
    assert_eq!(
        script.failure(),
        (CloseCode::VIOLATION, "400 wants for 100 pages: the peer cannot keep what it gets".to_owned())
    );
}

/// A21: wants that are not answered because nothing is read leave the sender's memory bounded.
#[test]
fn wants_without_reading_make_no_frames() {
    let image = image(100);
    let mut script = AgainstSender::sender(&image, 1);
    script.enter(Phase::Sending, &image);
    while script.engine.work(script.now) {}
    let made = script.engine.counts().inline;
    assert!(made < 100 && made > 0 || script.engine.poll_job().is_some(), "it waits for the link: {made}");
}

/// SPEC 6.1, 6.10; A11, A21: wants outside the image, and of pages that were not stated.
#[test]
fn wants_of_pages_that_are_not_there_are_refused() {
    for (region, first, count, code) in [
        (0, 100, 1, CloseCode::MALFORMED),
        (0, u64::MAX, 2, CloseCode::MALFORMED),
        (0, 1 << 63, u32::MAX, CloseCode::MALFORMED),
        (1, 0, 1, CloseCode::MALFORMED),
        (0, 0, 101, CloseCode::MALFORMED),
    ] {
        let (mut script, _) = finishing(100);
        script.say(BULK, &Frame::Ack(Ack { frames: 0, settled: 0, wants: vec![Want { region, first, count }] }));
        assert_eq!(script.failure().0, code, "{region} {first} {count}");
    }
    let image = image(100);
    let mut script = AgainstSender::sender(&image, 1);
    script.enter(Phase::Sending, &image);
    script.say(BULK, &Frame::Ack(Ack { frames: 0, settled: 0, wants: vec![Want { region: 0, first: 0, count: 1 }] }));
    assert_eq!(
        script.failure(),
        (CloseCode::VIOLATION, "want of a page that was not stated for page 0 of region 0".to_owned())
    );
}

/// SPEC 6.16: acknowledgements of what was not sent, or that go back.
#[test]
fn acknowledgements_of_more_than_was_sent_or_that_go_back_are_violations() {
    let (mut script, _) = finishing(100);
    let sent = script.frames(BULK);
    script.say(BULK, &Frame::Ack(Ack { frames: sent + 1, settled: sent + 1, wants: Vec::new() }));
    assert_eq!(script.failure(), (CloseCode::VIOLATION, format!("{} frames acknowledged, {sent} sent", sent + 1)));
    let (mut script, _) = finishing(100);
    script.say(BULK, &Frame::Ack(Ack { frames: sent, settled: sent, wants: Vec::new() }));
    script.say(BULK, &Frame::Ack(Ack { frames: sent - 1, settled: sent - 1, wants: Vec::new() }));
    assert_eq!(script.failure(), (CloseCode::VIOLATION, format!("{} frames acknowledged, {sent} sent", sent - 1)));
    let (mut script, _) = finishing(100);
    script.say(BULK, &Frame::Ack(Ack { frames: u64::MAX, settled: u64::MAX, wants: Vec::new() }));
    assert_eq!(script.failure().0, CloseCode::VIOLATION);
    let (mut script, _) = finishing(100);
    script.say(BULK, &Frame::Ack(Ack { frames: sent, settled: sent, wants: Vec::new() }));
    script.say(BULK, &Frame::Ack(Ack { frames: sent, settled: sent - 1, wants: Vec::new() }));
    assert_eq!(script.failure(), (CloseCode::VIOLATION, format!("{} frames acknowledged, {sent} sent", sent - 1)));
}

/// SPEC 6.13: holdings out of order, more than announced, of no region.
#[test]
fn holdings_out_of_order_are_violations() {
    let image = image(1000);
    for (region, first, count) in [(0, 1, 1), (0, 0, 5), (1, 0, 1), (u16::MAX, u64::MAX, 1), (0, u64::MAX, 2)] {
        let mut script = AgainstSender::sender(&image, 1);
        script.enter(Phase::Opening, &image);
        let mut accept = script.honest_accept(&image);
        accept.held_pages = vec![1000];
        script.take(accept);
        script.say(CONTROL, &Frame::Have(Have { region, first, digests: vec![Digest([1; 32]); count] }));
        assert_eq!(script.failure().0, CloseCode::VIOLATION, "{region} {first} {count}");
    }
}

/// SPEC 4.13; A23: terms that the sender did not ask for.
#[test]
fn terms_beyond_what_was_asked_for_are_violations() {
    let image = image(10);
    for (lanes, held_pages) in
        [(2, vec![0]), (8, vec![0]), (1, vec![]), (1, vec![0, 0]), (1, vec![11]), (1, vec![u64::MAX])]
    {
        let mut script = AgainstSender::sender(&image, 1);
        script.enter(Phase::Opening, &image);
        let mut accept = script.honest_accept(&image);
        (accept.lanes, accept.held_pages) = (lanes, held_pages.clone());
        script.say(CONTROL, &Frame::Accept(accept));
        assert_eq!(script.failure().0, CloseCode::VIOLATION, "{lanes} {held_pages:?}");
    }
}

/// SPEC 4.16; A27: a wrong proof, another session, a lane that is joined or was not granted; the session goes on.
#[test]
fn joins_that_prove_nothing_are_refused_and_the_session_goes_on() {
    let image = image(4);
    let sink = ImageSink::empty(&image);
    let mut script = AgainstReceiver::receiver(2);
    let honest = AgainstReceiver::honest_join(LaneId::bulk(0));
    script.enter(Phase::Deciding, &image, &sink);
    assert!(script.join(LaneId::bulk(0), &honest).is_err(), "before ACCEPT");
    script.take(&sink);
    let refused = |script: &mut AgainstReceiver, lane: LaneId, join: &Join, text: &str| {
        assert_eq!(
            script.join(lane, join).unwrap_err().to_string(),
            format!("lane {} cannot be joined: {text}", lane.number())
        );
    };
    refused(&mut script, LaneId::bulk(0), &Join { proof: Digest([0; 32]), ..honest.clone() }, "the proof is wrong");
    refused(&mut script, LaneId::bulk(0), &Join { session: [0; 16], ..honest.clone() }, "the proof is wrong");
    refused(&mut script, LaneId::bulk(1), &honest, "the proof is wrong");
    refused(&mut script, LaneId::bulk(2), &AgainstReceiver::honest_join(LaneId::bulk(2)), "it was not granted");
    refused(&mut script, LaneId::URGENT, &AgainstReceiver::honest_join(LaneId::URGENT), "it was not granted");
    refused(&mut script, CONTROL, &AgainstReceiver::honest_join(CONTROL), "it was not granted");
    for lane in [0, 1].map(LaneId::bulk) {
        script.join(lane, &AgainstReceiver::honest_join(lane)).unwrap();
        refused(&mut script, lane, &AgainstReceiver::honest_join(lane), "it is joined already");
    }
    script.deliver(&image);
    script.settle();
    assert!(script.last(FrameKind::DONE).is_some() && sink.state().finished);
}

/// SPEC 2.7: with a single stream a header may name any lane, but not one that was not granted.
#[test]
fn frames_of_a_lane_that_was_not_granted_are_refused_on_a_single_stream() {
    let image = image(4);
    for kind in [FrameKind::ROUND, FrameKind::PAGES, FrameKind::PING] {
        let mut script = AgainstReceiver::receiver(1);
        script.enter(Phase::Waiting, &image, &ImageSink::empty(&image));
        let mut open = script.honest_open(&image);
        open.single_stream = true;
        script.say(CONTROL, &Frame::Open(open));
        script.take(&ImageSink::empty(&image));
        script.raw(LaneId::bulk(4), kind, &sample(kind, &image));
        assert_eq!(script.failure().0, CloseCode::VIOLATION, "{kind}");
    }
    for kind in [FrameKind::ACK, FrameKind::PING] {
        let (mut script, _) = finishing(4);
        script.raw(LaneId::bulk(4), kind, &sample(kind, &image));
        assert_eq!(script.failure().0, CloseCode::VIOLATION, "{kind}");
    }
}

/// SPEC 1.2: an image without a page, a region without one.
#[test]
fn an_empty_image_is_complete_at_its_root() {
    let image = Image::zeros(vec![Region { bytes: 0, install_size: InstallSize::MIB_2 }]);
    let sink = ImageSink::empty(&image);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Over, &image, &sink);
    assert!(script.outcome().unwrap().is_ok() && sink.state().finished);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &image, &sink);
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 0).zero().body());
    assert_eq!(script.failure().0, CloseCode::MALFORMED);
}

/// SPEC 5.5; A10, A13: payloads that are more, less or other than they say; nothing is written.
#[test]
fn payloads_of_any_other_size_are_malformed() {
    let two = Statement::at(0, 0).inline(&[5; 4096]).inline(&[6; 4096]);
    let one = Statement::at(0, 0).inline(&[5; 4096]);
    let payload = |statement: &Statement, len: usize| statement.compressed()[len..].to_vec();
    let (two_payload, one_payload) = (payload(&two, 60), payload(&one, 60));
    let wide_window = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00];
    let trailing = [one_payload.clone(), vec![0]].concat();
    let twice = [one_payload.clone(), one_payload.clone()].concat();
    for body in [
        one.encoded(Codec::ZSTD, &two_payload),
        two.encoded(Codec::ZSTD, &one_payload),
        one.encoded(Codec::ZSTD, &wide_window),
        one.encoded(Codec::ZSTD, &trailing),
        two.encoded(Codec::ZSTD, &twice),
        one.encoded(Codec::ZSTD, &[1; 4095]),
        one.encoded(Codec::ZSTD, &[]),
        one.encoded(Codec::NONE, &[1; 4095]),
        one.encoded(Codec::NONE, &[1; 8192]),
    ] {
        let (mut script, _) = receiving();
        script.raw(BULK, FrameKind::PAGES, &body);
        assert_eq!(script.failure().0, CloseCode::MALFORMED);
    }
    let (mut script, _) = receiving();
    script.raw(BULK, FrameKind::PAGES, &two.compressed());
    assert!(script.outcome().is_none(), "the honest one is taken");
}

/// SPEC 5.7: two images must not share a root.
#[test]
fn bytes_beyond_the_end_of_a_region_are_malformed() {
    let region = Region { bytes: 4096 + 100, install_size: InstallSize::KIB_4 };
    let image = Image::filled(vec![region], Mix::NOISE, &mut Rng::new(1));
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    let mut last = *page(&image, 1);
    last[100] = 1;
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 0).inline(page(&image, 0)).inline(&last).body());
    assert_eq!(script.failure().0, CloseCode::MALFORMED);
}

/// SPEC 5.7, 6.9: nor by way of a reference.
#[test]
fn a_reference_never_brings_bytes_beyond_the_end_of_a_region() {
    let region = Region { bytes: 4096 + 100, install_size: InstallSize::KIB_4 };
    let image = Image::filled(vec![region], Mix::NOISE, &mut Rng::new(1));
    let sink = ImageSink::empty(&image);
    let mut script = AgainstReceiver::receiver(1);
    script.enter(Phase::Receiving, &image, &sink);
    script.raw(
        BULK,
        FrameKind::PAGES,
        &Statement::at(0, 0).inline(page(&image, 0)).reference(digests(&image)[0]).body(),
    );
    script.settle();
    let Some(Frame::Ack(ack)) = script.last(FrameKind::ACK) else { panic!("the page is wanted") };
    assert_eq!(ack.wants, [Want { region: 0, first: 1, count: 1 }]);
}
