//! Hostile peers of sessions that fill a guest: whatever they say, nothing is installed that is not proven, nothing twice,
//! nothing is given up too soon, and the work they cause is bounded.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::batch::batch_digest;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{
    ABSENT_DIGEST, Ack, Codec, Done, EntryKind, Frame, FrameKind, LaneId, PagesHead, Role, Run, Urgency, Want,
};
use pagewire_protocol::handover::{Message, Word};
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{InstallSize, Region};
use pagewire_protocol::session::{Agreed, Job, Machine, Phase, Policy, check};
use pagewire_protocol::time::Span;
use pagewire_protocol::tree::image_root;
use pagewire_receiver::Event as ReceiverEvent;
use pagewire_sender::GuestMemory;
use pagewire_sender::fill::Remainder;
use pagewire_test_support::fill_peer::{AgainstFilled, AgainstFiller, FEATURES, all_absent, partly_absent};
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::live_peer::{LIVE, TO, live_receiver, live_sender};
use pagewire_test_support::memory::{ImageMemory, ImageSink, SourceFaults};
use pagewire_test_support::peer::{AgainstReceiver, Statement};
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::Left;

mod pages;

const BULK: LaneId = LaneId::bulk(0);
/// Pages of the image: 10 of 4 KiB, and 18 in install pages of 64 KiB.
const PAGES: u64 = 28;

fn image() -> Image {
    let regions = [(40_000, InstallSize::KIB_4), (70_000, InstallSize::KIB_64)]
        .map(|(bytes, install_size)| Region { bytes, install_size });
    Image::filled(regions.to_vec(), Mix::NOISE, &mut Rng::new(11))
}

fn page(image: &Image, region: usize, page: u64) -> &[u8; PAGE_BYTES] {
    image.page(region, page).first_chunk().unwrap()
}

const fn want(region: u16, first: u64, count: u32) -> Want {
    Want { region, first, count }
}

/// A sender whose receiver has greeted.
fn greeted() -> AgainstFiller {
    let mut script = AgainstFiller::filler(all_absent(&image(), None).0);
    script.greet(Role::Receiver);
    script.listen();
    script
}

/// A sender that was told that all is lacking.
fn serving() -> AgainstFiller {
    let mut script = AgainstFiller::filler(all_absent(&image(), None).0);
    script.begin(&image());
    script
}

/// A receiver of which all is absent, and that waits for pages.
fn filling() -> (AgainstFilled, ImageSink) {
    let (left, sink) = all_absent(&image(), None);
    let mut script = AgainstFilled::filled();
    script.begin(left.guest);
    (script, sink)
}

fn absent(sink: &ImageSink) -> u64 {
    sink.state().absent.as_ref().unwrap().count()
}

fn violates<T>((code, text): (CloseCode, String), part: &str, what: T)
where
    T: std::fmt::Debug,
{
    assert_eq!(code, CloseCode::VIOLATION, "{what:?}: {text}");
    assert!(text.contains(part), "{what:?}: {text}");
}

/// SPEC 13.5: terms that no receiver can mean.
#[test]
fn rejects_terms_of_another_session_and_of_more_than_was_left_behind() {
    for (at, part) in ["transcript", "more lanes granted", "pages lacking"].into_iter().enumerate() {
        let mut script = greeted();
        let mut lack = script.honest_lack(PAGES);
        match at {
            0 => lack.transcript[0] ^= 1,
            1 => lack.lanes = 2,
            _ => lack.pages = PAGES + 1,
        }
        script.lack(lack);
        assert!(script.fill_failure().1.contains(part));
        assert_eq!(script.engine.into_remainder().unwrap().pages(), PAGES, "it is kept");
    }
}

/// SPEC 13.6, C29: what a receiver says that it lacks.
#[test]
fn rejects_bitmaps_that_cannot_be_true() {
    let all = [0xff, 0xff, 0xff, 0x0f];
    let cases: [(&str, u64, u64, &[u8]); 7] = [
        ("does not continue the last", PAGES, 8, &all),
        ("behind the end", PAGES, 0, &[0xff, 0xff, 0xff, 0x1f]),
        ("behind the end", PAGES, 0, &[0xff, 0xff, 0xff, 0x0f, 0]),
        ("another number of pages", PAGES - 1, 0, &all),
        // Page 1 of the second region, which has large pages.
        ("part of an install page", PAGES - 1, 0, &[0xff, 0xf7, 0xff, 0x0f]),
        // Page 3 of the first.
        ("never brought", PAGES - 1, 0, &[0xf7, 0xff, 0xff, 0x0f]),
        ("never brought", 0, 0, &[0; 4]),
    ];
    for (part, pages, first, bits) in cases {
        let mut script = greeted();
        let lack = script.honest_lack(pages);
        script.lack(lack);
        script.lacking(first, bits);
        violates(script.fill_failure(), part, bits);
        assert_eq!(script.engine.into_remainder().unwrap().pages(), PAGES, "it is kept");
    }
    // In the wrong order, and once more when all is said.
    let mut script = greeted();
    let lack = script.honest_lack(PAGES);
    script.lack(lack);
    script.lacking(0, &all[..2]);
    script.lacking(0, &all);
    violates(script.fill_failure(), "does not continue", "again");
    let mut script = serving();
    script.lacking(32, &[0]);
    violates(script.fill_failure(), "does not continue", "more");
}

/// SPEC 13.9, A21: pages outside the guest, and parts of large ones.
#[test]
fn rejects_requests_for_what_was_not_left_behind() {
    for named in [want(2, 0, 1), want(0, 10, 1), want(0, 9, 2), want(0, u64::MAX, 1), want(1, 1, 1), want(1, 0, 1)] {
        let mut script = serving();
        script.fault(Urgency::NOW, &[named]);
        script.fill_failure();
        let mut script = serving();
        script.fault(Urgency::AHEAD, &[named]);
        script.fill_failure();
        let mut script = serving();
        script.want(&[named]);
        script.fill_failure();
    }
}

fn urgent_answers(script: &AgainstFiller) -> u64 {
    script.said.iter().filter(|said| said.lane == LaneId::URGENT && said.kind == FrameKind::PAGES).count() as u64
}

/// A21: a page is answered once, however often it is asked for, and whoever asks without end is cut off.
#[test]
fn a_flood_of_requests_gets_one_copy_of_each_page_and_ends() {
    for urgency in [Urgency::NOW, Urgency::AHEAD] {
        let (mut script, mut requests) = (serving(), 0u64);
        while !script.engine.is_over() && requests < 10_000_000 {
            script.fault(urgency, &[want(0, 3, 1)]);
            script.listen();
            requests += 1;
        }
        assert_eq!(requests, 4 * PAGES + 1, "four a page on average");
        assert_eq!(urgent_answers(&script), u64::from(urgency == Urgency::NOW));
        script.fill_failure();
    }
    let (mut script, mut requests) = (serving(), 0u64);
    while !script.engine.is_over() && requests < 100 {
        script.fault(Urgency::NOW, &[want(0, 0, 10), want(1, 0, 18)]);
        script.settle();
        requests += 1;
    }
    assert_eq!((requests, urgent_answers(&script)), (5, 12), "ten pages, and two large ones");
    violates(script.fill_failure(), "", "all pages");
    // So is whoever wants what has come.
    let (mut script, mut requests) = (serving(), 0u64);
    while !script.engine.is_over() && requests < 1000 {
        script.settle();
        script.want(&[want(0, 0, 10)]);
        requests += 1;
    }
    assert!(requests < 12, "{requests}");
}

/// What went because it was asked for does not go again in the background.
#[test]
fn a_page_that_was_asked_for_goes_once() {
    for told in [true, false] {
        let mut script = greeted();
        let lack = script.honest_lack(PAGES);
        script.lack(lack);
        let all = [0xff, 0xff, 0xff, 0x0f];
        if told {
            script.lacking(0, &all);
        }
        script.fault(Urgency::NOW, &[want(0, 3, 1), want(1, 16, 2)]);
        script.listen();
        assert_eq!(urgent_answers(&script), 2);
        if !told {
            script.lacking(0, &all);
        }
        script.settle();
        let sent = script.engine.counts();
        assert_eq!((sent.inline, sent.faults), (PAGES, 2), "told first: {told}");
    }
}

/// The root over an image of which nothing has come: whoever took the guest knows it.
fn root_of_nothing(image: &Image) -> Digest {
    let hasher = PageHasher::new(&DedupDomain::public());
    let mut trees = image.trees(&hasher);
    for (tree, region) in trees.iter_mut().zip(&image.regions) {
        (0..region.pages()).for_each(|page| tree.set(page, ABSENT_DIGEST));
    }
    image_root(hasher.domain(), &image.layout(), &mut trees)
}

/// SPEC 13.11, I4: DONE too early, of something else, twice.
#[test]
fn gives_nothing_up_for_a_done_that_is_not_true() {
    let image = image();
    let (root, nothing) = (image.root(&[0; 32]), root_of_nothing(&image));
    let refused = |mut script: AgainstFiller, code| {
        assert!(!script.is_filled());
        assert_eq!(script.fill_failure().0, code);
        script
    };
    let wrong = [(PAGES, root), (PAGES, Digest([1; 32])), (PAGES + 1, root), (0, nothing)];
    let wrong = wrong.into_iter().map(|said| (said, CloseCode::DIGEST));
    // The root is right, as nothing has been read.
    for ((pages, root), code) in wrong.chain([((PAGES, nothing), CloseCode::VIOLATION)]) {
        let mut script = serving();
        script.done(pages, root);
        let script = refused(script, code);
        assert_eq!(script.engine.into_remainder().unwrap().pages(), PAGES, "it is kept");
    }
    // When nothing is told, and when all has gone.
    let mut script = greeted();
    let lack = script.honest_lack(PAGES);
    script.lack(lack);
    script.done(PAGES, nothing);
    refused(script, CloseCode::DIGEST);
    let mut script = serving();
    script.settle();
    script.done(PAGES, Digest([1; 32]));
    refused(script, CloseCode::DIGEST);
    let mut script = serving();
    script.settle();
    script.done(PAGES, root);
    assert!(script.is_filled());
    script.done(PAGES, root);
    assert!(!script.is_filled(), "once");
    assert_eq!(script.fill_failure().0, CloseCode::VIOLATION);
}

/// I4: whoever embeds the engine cannot say GONE before all is there.
#[test]
fn gone_is_not_said_before_done() {
    let left = all_absent(&image(), None).0;
    let handover = *left.remainder.handover();
    let mut script = AgainstFiller::filler(left);
    script.begin(&image());
    script.settle();
    script.release(handover);
    assert!(script.last(FrameKind::GONE).is_none() && !script.engine.is_over());
    script.done(PAGES, image().root(&[0; 32]));
    script.release(handover);
    assert!(script.last(FrameKind::GONE).is_some());
    assert!(matches!(script.engine.outcome(), Some(Ok(()))));
}

/// A31: what cannot be read as a whole is not sent, in the background or for a guest that waits.
#[test]
fn nothing_is_sent_of_a_page_that_cannot_be_read() {
    for asked in [false, true] {
        let image = image();
        let Left { remainder, guest } = all_absent(&image, None).0;
        let handover = *remainder.handover();
        let faults = SourceFaults { fail_read_after: Some(2), ..SourceFaults::default() };
        let memory: Box<dyn GuestMemory> = Box::new(ImageMemory::new(image.clone(), faults));
        // Two regions are read to digest them; the next read fails.
        let remainder = Remainder::recover(memory, &[0; 32], handover).unwrap();
        let mut script = AgainstFiller::filler(Left { remainder, guest });
        script.begin(&image);
        if asked {
            script.fault(Urgency::NOW, &[want(0, 3, 1)]);
            script.listen();
        }
        script.settle();
        assert_eq!(script.fill_failure().0, CloseCode::SOURCE);
        assert!(script.last(FrameKind::PAGES).is_none());
        assert_eq!(script.engine.into_remainder().unwrap().pages(), PAGES);
    }
}

/// SPEC 4.6, 13.3: words that belong to another kind of session.
#[test]
fn rejects_the_words_of_other_sessions() {
    // ACCEPT to FILL.
    let image = image();
    let mut script = greeted();
    let accept = live_sender(&image).honest_accept(&image);
    script.say(LaneId::CONTROL, &Frame::Accept(accept));
    script.fill_failure();
    // LACK to OPEN.
    let mut script = live_sender(&image);
    script.features = FEATURES;
    script.enter(Phase::Opening, &image);
    let lack = greeted().honest_lack(1);
    script.say(LaneId::CONTROL, &Frame::Lack(lack));
    assert_eq!(script.failure().0, CloseCode::VIOLATION);
    // FILL where nobody agreed on post-copy.
    let mut script = live_receiver();
    script.greet(Role::Sender);
    let fill = AgainstFilled::filled().honest_fill(*all_absent(&image, None).0.remainder.handover());
    script.say(LaneId::CONTROL, &Frame::Fill(fill));
    assert_eq!(script.failure().0, CloseCode::VIOLATION);
    // A receiver that does not speak of post-copy is no peer of such a session.
    let mut script = AgainstFiller::filler(all_absent(&image, None).0);
    script.features = 0;
    script.greet(Role::Receiver);
    assert_eq!(script.fill_failure().0, CloseCode::INCOMPATIBLE);
}

/// A receiver of a guest that may start before all of its pages are there.
fn arriving(image: &Image, sink: &ImageSink) -> AgainstReceiver {
    sink.state().waits = true;
    let policy = Policy { features_offered: FEATURES, ..Default::default() };
    let mut script = AgainstReceiver::receiver_with(&policy, 1);
    let live = pagewire_protocol::frame::LiveOpen { post_copy: true, ..LIVE };
    (script.features, script.live, script.host) = (FEATURES, Some(live), Some(TO));
    script.enter(Phase::Receiving, image, sink);
    script.settle();
    script
}

/// A frame of pages of the second region that are zero or absent.
fn leaving(first: u64, count: u32, kinds: &[(EntryKind, u16)]) -> Vec<u8> {
    let runs: Vec<Run> = kinds.iter().map(|&(kind, count)| Run { kind, count }).collect();
    let digest = batch_digest((&DedupDomain::public(), false), first, runs.iter().copied(), &[]);
    let head = PagesHead { round: 0, region: 1, codec: Codec::NONE, first, count, digest, shift: 0 };
    let mut body = Vec::new();
    head.encode(&runs, &[], &[], &mut body);
    body
}

/// All of the first region.
fn first_region(image: &Image) -> Vec<u8> {
    (0..10).fold(Statement::at(0, 0), |statement, at| statement.inline(page(image, 0, at))).body()
}

/// The root over an image of whose second region these pages are absent; before them are zeros.
fn root_with_absent(image: &Image, absent: std::ops::Range<u64>) -> Digest {
    let hasher = PageHasher::new(&DedupDomain::public());
    let mut trees = image.trees(&hasher);
    (0..absent.start).for_each(|page| trees[1].set(page, hasher.zero()));
    absent.for_each(|page| trees[1].set(page, ABSENT_DIGEST));
    let root = image_root(&DedupDomain::public(), &image.layout(), &mut trees);
    pagewire_protocol::tree::live_root(&DedupDomain::public(), root, &Default::default())
}

/// SPEC 7.4: pages that come while the memory is made to wait for those that are absent change nothing; they stay lacking.
#[test]
fn a_late_answer_does_not_make_absent_pages_present() {
    let image = image();
    let sink = ImageSink::empty(&image);
    let mut script = arriving(&image, &sink);
    script.raw(BULK, FrameKind::PAGES, &first_region(&image));
    script.raw(BULK, FrameKind::PAGES, &leaving(0, 18, &[(EntryKind::ABSENT, 18)]));
    script.end_round(2);
    script.root(&image, root_with_absent(&image, 0..18));
    let job = script.engine.poll_job().expect("all has come");
    let late = (0..16).fold(Statement::at(1, 0), |statement, at| statement.inline(page(&image, 1, at)));
    script.raw(BULK, FrameKind::PAGES, &late.body());
    script.raw(BULK, FrameKind::PAGES, &leaving(16, 2, &[(EntryKind::ZERO, 2)]));
    script.engine.handle_job(job.run(), Span::ZERO, script.now);
    assert!(script.outcome().is_none(), "late answers are no fault");
    let ready = script.events().into_iter().find_map(|event| match event {
        ReceiverEvent::Ready(handover, _) => Some(handover),
        _ => None,
    });
    assert!(ready.is_some_and(|handover| handover.post_copy), "{ready:?}");
    let guest = script.engine.into_incomplete().expect("it lacks pages");
    assert_eq!((guest.pages(), absent(&sink)), (18, 18), "all that is waited for is asked for");
}

/// ABSENT where the receiver did not agree to post-copy, and of part of an install page.
#[test]
fn rejects_absent_pages_without_post_copy_and_parts_of_install_pages() {
    let image = image();
    let whole = leaving(0, 18, &[(EntryKind::ABSENT, 18)]);
    let mut script = live_receiver();
    script.enter(Phase::Receiving, &image, &ImageSink::empty(&image));
    script.settle();
    script.raw(BULK, FrameKind::PAGES, &whole);
    violates(script.failure(), "without post-copy", "not agreed");
    let part = leaving(0, 18, &[(EntryKind::ZERO, 1), (EntryKind::ABSENT, 17)]);
    for (body, refused) in [(whole, false), (part, true)] {
        let root = root_with_absent(&image, u64::from(refused)..18);
        let sink = ImageSink::empty(&image);
        let mut script = arriving(&image, &sink);
        script.raw(BULK, FrameKind::PAGES, &first_region(&image));
        script.raw(BULK, FrameKind::PAGES, &body);
        script.end_round(2);
        script.root(&image, root);
        script.settle();
        match script.outcome() {
            Some(Err(error)) => assert!(refused && format!("{error:?}").contains("part of an install"), "{error:?}"),
            Some(Ok(())) => panic!("it is over only when its guest has started"),
            None => assert!(!refused && absent_of(&sink) == Some(18), "it is ready"),
        }
    }
}

fn absent_of(sink: &ImageSink) -> Option<u64> {
    sink.state().absent.as_ref().map(|absent| absent.count())
}

/// Counts a frame that the table refuses, and holds what became of the session against that.
fn judged(role: Role, cell: (Phase, LaneId, FrameKind), failure: impl FnOnce() -> (CloseCode, String)) -> usize {
    let (phase, lane, kind) = cell;
    let Err(violation) = check(role, phase, Agreed::PostCopy, lane, kind) else { return 0 };
    assert_eq!(failure(), (CloseCode::VIOLATION, violation.to_string()), "{cell:?}");
    1
}

/// SPEC 13.3; A14: every kind, on every kind of lane, in the phases of fill sessions: what the table refuses ends them.
#[test]
fn every_frame_is_refused_where_the_table_says() {
    let image = image();
    let lanes = [LaneId::CONTROL, BULK, LaneId::URGENT];
    let cells = FrameKind::ALL.iter().flat_map(|&kind| lanes.map(|lane| (kind, lane)));
    let mut refused = 0;
    for (kind, lane) in cells {
        for phase in [Phase::Opening, Phase::Serving] {
            let mut script = if phase == Phase::Opening { greeted() } else { serving() };
            script.raw(lane, kind, &[]);
            refused += judged(Role::Sender, (phase, lane, kind), || script.fill_failure());
        }
        for phase in [Phase::Waiting, Phase::Deciding, Phase::Filling] {
            let left = all_absent(&image, None).0;
            let mut script = AgainstFilled::filled();
            match phase {
                Phase::Filling => script.begin(left.guest),
                _ => script.greet(Role::Sender),
            }
            if phase == Phase::Deciding {
                let fill = script.honest_fill(*left.remainder.handover());
                script.say(LaneId::CONTROL, &Frame::Fill(fill));
            }
            script.raw(lane, kind, &[]);
            refused += judged(Role::Receiver, (phase, lane, kind), || script.fill_failure());
        }
    }
    assert!(refused > 250, "{refused}");
}
