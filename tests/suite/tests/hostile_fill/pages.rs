//! Pages that no honest sender brings.

use super::*;

/// SPEC 13.7: what pages may not be stated as.
#[test]
fn rejects_statements_that_a_guest_that_runs_cannot_use() {
    let image = image();
    let first = || Statement::at(0, 0);
    let inline = || first().inline(page(&image, 0, 0));
    let digest = Digest([7; 32]);
    let leaving = |statement: &Statement| {
        let mut body = statement.body();
        body[64] = 7;
        body
    };
    let half = (0..8).fold(Statement::at(1, 0), |statement, at| statement.inline(page(&image, 1, at)));
    let skipping = (0..16).fold(Statement::at(1, 0), |statement, at| match at {
        0 => statement.skipped(),
        _ => statement.inline(page(&image, 1, at)),
    });
    let cases: [(&str, Vec<u8>); 10] = [
        ("a round", Statement { round: 1, ..first() }.inline(page(&image, 0, 0)).body()),
        ("rests on the base", first().base(digest).body()),
        ("rests on the base", first().shifted(digest).body()),
        ("absent", leaving(&first().zero())),
        ("proofs", first().reference(digest).proof(pagewire_protocol::challenge::PageProof([1; 16])).body()),
        ("no page at all", first().skipped().skipped().body()),
        ("", Statement::at(0, 10).inline(page(&image, 0, 0)).body()),
        ("", half.body()),
        ("part of an install page", skipping.body()),
        ("", Statement::at(2, 0).zero().body()),
    ];
    for (part, body) in cases {
        for lane in [BULK, LaneId::URGENT] {
            let (mut script, sink) = filling();
            script.raw(lane, FrameKind::PAGES, &body);
            let (_, text) = script.fill_failure();
            assert!(text.contains(part), "{text}, not {part}");
            assert_eq!(absent(&sink), PAGES, "nothing is installed");
        }
    }
    let (mut script, sink) = filling();
    let delta = Statement { payload: vec![0; PAGE_BYTES], ..inline() };
    script.raw(BULK, FrameKind::PAGES, &delta.delta(page(&image, 0, 1)));
    violates(script.fill_failure(), "delta", "a delta");
    assert_eq!(absent(&sink), PAGES);
    for frame in [
        Frame::Done(Done { pages: PAGES, root: digest }),
        Frame::Handover(Message { word: Word::Commit, handover: *all_absent(&image, None).0.guest.handover() }),
        Frame::Ack(Ack::default()),
    ] {
        let (mut script, _) = filling();
        script.say(LaneId::CONTROL, &frame);
        violates(script.fill_failure(), "", frame.kind());
    }
}

/// SPEC 5.6
#[test]
fn rejects_a_codec_that_was_not_agreed() {
    let (left, sink) = all_absent(&image(), None);
    let policy = Policy { features_offered: FEATURES, codecs: Codec::NONE.bit(), ..Policy::default() };
    let mut script = AgainstFilled::filled_with(&policy);
    script.begin(left.guest);
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 0).inline(&[7; PAGE_BYTES]).compressed());
    violates(script.fill_failure(), "codec that was not agreed", "zstd");
    assert_eq!(absent(&sink), PAGES);
}

/// A15, A21: pages that the hand-over had brought are neither asked for, nor lacking, nor brought.
#[test]
fn rejects_pages_that_were_not_left_behind() {
    let image = Image::random(64, Mix::NOISE, &mut Rng::new(5));
    let moved = || {
        let (left, sink) = partly_absent(&image);
        let here = (0..64).find(|page| !sink.state().absent.as_ref().unwrap().contains(*page));
        let here = here.expect("some pages went before the guest did");
        (left, sink, here)
    };
    for named in [FrameKind::FAULT, FrameKind::ACK, FrameKind::LACKING] {
        let (left, _, here) = moved();
        let pages = left.remainder.pages();
        let mut script = AgainstFiller::filler(left);
        script.greet(Role::Receiver);
        script.listen();
        let lack = script.honest_lack(if named == FrameKind::LACKING { 1 } else { pages });
        script.lack(lack);
        match named {
            FrameKind::FAULT => script.fault(Urgency::NOW, &[want(0, here, 1)]),
            FrameKind::ACK => script.want(&[want(0, here, 1)]),
            _ => script.lacking(0, &(1u64 << here).to_le_bytes()),
        }
        violates(script.fill_failure(), "was not left behind", named);
    }
    let (left, sink, here) = moved();
    let before = sink.state().image.clone();
    let mut script = AgainstFilled::filled();
    script.begin(left.guest);
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, here).zero().body());
    violates(script.fill_failure(), "a page that was not lacking", here);
    assert!(sink.state().image == before);
}

/// C34, A15: a page that is there already is dropped, for the guest may have written to it; it is counted, and not for ever.
#[test]
fn pages_that_are_there_are_dropped_counted_and_capped() {
    let image = image();
    for stated in [Statement::at(0, 2).inline(page(&image, 0, 2)), Statement::at(0, 2).zero()] {
        let (mut script, sink) = filling();
        script.raw(LaneId::URGENT, FrameKind::PAGES, &Statement::at(0, 2).inline(page(&image, 0, 2)).body());
        assert_eq!(absent(&sink), PAGES - 1);
        sink.state().image.page_mut(0, 2).fill(0x77);
        let mut again = 0u64;
        while !script.engine.is_over() && again < 1000 {
            script.raw(BULK, FrameKind::PAGES, &stated.body());
            again += 1;
            let counts = script.engine.guest().unwrap().counts();
            assert_eq!((counts.again, counts.inline), (again, 1));
        }
        assert_eq!(again, 4 * PAGES + 1, "four a page on average");
        assert_eq!(sink.state().image.page(0, 2), [0x77; PAGE_BYTES], "what the guest wrote stays");
        script.fill_failure();
    }
}

/// Digests of pages that are not here are asked for once; whoever says nothing else is cut off.
#[test]
fn references_without_bytes_are_capped() {
    let (mut script, sink) = filling();
    let mut frames = 0u64;
    while !script.engine.is_over() && frames < 1000 {
        script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 2).reference(Digest([9; 32])).body());
        script.listen();
        frames += 1;
    }
    assert_eq!((frames, absent(&sink)), (4 * PAGES + 2, PAGES), "wanted once, then four a page on average");
    script.fill_failure();
}

/// C35, A06: an answer that is not what its digest says is not installed but wanted again, and not for ever.
#[test]
fn wrong_answers_are_not_installed_and_wanted_again() {
    let image = image();
    let right = || Statement::at(0, 2).inline(page(&image, 0, 2));
    // Other bytes, another page's, those of a page of another place, and one byte short under zstd.
    let other = Statement { payload: page(&image, 0, 3).to_vec(), ..right() };
    let moved = Statement { first: 3, digest: Some(right().batch_digest()), ..right() };
    let mut short = Vec::new();
    let bytes = [5; PAGE_BYTES - 1];
    assert!(pagewire_protocol::compress::Compressor::new().unwrap().compress(&bytes, 1, &mut short));
    let wrong = [other.body(), moved.body(), right().encoded(Codec::ZSTD, &short), right().encoded(Codec::ZSTD, &[1])];
    for body in wrong {
        let (mut script, sink) = filling();
        script.engine.touch(pagewire_protocol::page::RegionId(0), 2);
        script.listen();
        script.raw(LaneId::URGENT, FrameKind::PAGES, &body);
        script.settle();
        assert_eq!(absent(&sink), PAGES, "nothing is installed");
        let Some(Frame::Ack(ack)) = script.last(FrameKind::ACK) else { panic!("no ACK") };
        assert!(ack.wants.iter().all(|want| want.region == 0 && (2..=3).contains(&want.first) && want.count == 1));
        assert_eq!(ack.wants.len(), 1);
        // The right one is taken.
        script.raw(BULK, FrameKind::PAGES, &right().body());
        assert_eq!(absent(&sink), PAGES - 1);
        let mut frames = 0;
        while !script.engine.is_over() && frames < 1000 {
            let body = Statement { digest: Some(Digest([1; 32])), ..Statement::at(0, 4) }.zero().body();
            script.raw(BULK, FrameKind::PAGES, &body);
            script.settle();
            frames += 1;
        }
        assert!(frames <= 3 * PAGES + 1, "{frames}");
        script.fill_failure();
        let guest = script.engine.into_incomplete().unwrap();
        assert_eq!(guest.pages(), PAGES - 1, "the next session goes on with what is lacking");
    }
}

/// SPEC 13.7: the padding behind a region's end is zero.
#[test]
fn a_page_with_bytes_behind_its_regions_end_is_not_installed() {
    let image = image();
    let mut last = *page(&image, 0, 9);
    last[PAGE_BYTES - 1] = 1;
    let (mut script, sink) = filling();
    script.raw(BULK, FrameKind::PAGES, &Statement::at(0, 9).inline(&last).body());
    script.settle();
    assert_eq!(absent(&sink), PAGES);
    assert!(matches!(script.last(FrameKind::ACK), Some(Frame::Ack(ack)) if ack.wants.len() == 1));
}
