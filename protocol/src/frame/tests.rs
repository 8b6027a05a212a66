//! What holds for every frame: round trip, cut at every byte, one byte too many, each limit plus one.

use super::*;
use crate::challenge::PageProof;
use crate::digest::Digest;
use crate::domain::LineageId;
use crate::error::CloseCode;
use crate::handover::{Epoch, Handover, HostId, Message, Word};
use crate::limits::*;
use crate::page::{InstallSize, Layout, Region};
use alloc::string::ToString;
use alloc::vec;

fn pages_head(count: u32) -> PagesHead {
    PagesHead { round: 0, region: 0, codec: Codec::NONE, first: 0, count, digest: Digest([1; 32]), shift: 0 }
}

/// The body of a PAGES frame with one page of each kind: zero, base, reference, inline.
fn pages_body(proofs: &[PageProof]) -> Vec<u8> {
    let head = PagesHead { round: 3, first: 7, digest: Digest([8; 32]), ..pages_head(4) };
    let kinds = [EntryKind::ZERO, EntryKind::BASE, EntryKind::REFERENCE, EntryKind::INLINE];
    let mut body = Vec::new();
    head.encode(&kinds.map(|kind| Run { kind, count: 1 }), &[Digest([9; 32])], proofs, &mut body);
    body.extend_from_slice(&[1; PAGE_BYTES]);
    body
}

/// The body of a PAGES frame that leaves two pages behind and does not state the one between them.
fn absent_body() -> Vec<u8> {
    let head = PagesHead { round: 3, first: 7, digest: Digest([8; 32]), ..pages_head(3) };
    let kinds = [EntryKind::ABSENT, EntryKind::SKIPPED, EntryKind::ABSENT];
    let mut body = Vec::new();
    head.encode(&kinds.map(|kind| Run { kind, count: 1 }), &[], &[], &mut body);
    body
}

fn hello() -> Hello {
    let body = hello::HelloBody {
        features_offered: 3,
        features_required: 1,
        codecs: Codec::ALL_BITS,
        install_sizes: 0b10_0001,
        nonce: [4; 16],
        agent: "pagewire/0.1".to_string(),
        extensions: vec![Extension { tag: 9, required: false, data: vec![1, 2, 3] }],
    };
    Hello { version_min: 1, version_max: 2, role: Role::Sender, body }
}

fn open() -> Open {
    let region = Region { bytes: 123_456, install_size: InstallSize::KIB_64 };
    Open {
        transcript: [1; 32],
        session: [2; 16],
        name: ImageName::new("vm-1.img").unwrap(),
        fresh: true,
        live: Some(LiveOpen {
            guest: LineageId([6; 16]),
            epoch: Epoch::new(3),
            host: HostId([8; 32]),
            arbiter: false,
            post_copy: true,
        }),
        single_stream: false,
        lanes: 2,
        domain_key: [0; 32],
        layout: Layout::new(vec![region, region]).unwrap(),
        lineage: LineageId([6; 16]),
        known: vec![Digest([7; 32]), Digest([8; 32])],
    }
}

fn accept() -> Accept {
    let (transcript, secret, held_pages) = ([1; 32], [2; 32], vec![0]);
    Accept {
        transcript,
        secret,
        lanes: 2,
        window: 1 << 20,
        held_pages,
        agreed: 2,
        base_stays: true,
        challenge: None,
        host: None,
        post_copy: false,
    }
}

fn handover() -> Handover {
    Handover {
        lineage: LineageId([6; 16]),
        session: [2; 16],
        epoch: Epoch::new(3),
        root: Digest([7; 32]),
        sender: HostId([8; 32]),
        receiver: HostId([9; 32]),
        arbiter: true,
        post_copy: false,
    }
}

fn blob() -> Blob<'static> {
    Blob { name: ImageName::new("device-state").unwrap(), version: 2, length: 9, offset: 4, part: b"state" }
}

/// One sample of each kind, in the order of [`FrameKind::ALL`].
fn samples(pages: &[u8]) -> Vec<Frame<'_>> {
    let accept = Accept { held_pages: vec![5, 0], ..accept() };
    let want = Want { region: 1, first: 9, count: 2 };
    vec![
        Frame::Hello(hello()),
        Frame::Open(open()),
        Frame::Accept(accept),
        Frame::Join(Join { session: [2; 16], proof: Digest([3; 32]) }),
        Frame::Have(Have { region: 1, first: 4, digests: vec![Digest([5; 32]); 2] }),
        Frame::Pages(Pages::decode(pages).unwrap()),
        Frame::Ack(Ack { frames: 6, settled: 5, wants: vec![want; 2] }),
        Frame::Round(RoundEnd { round: 1, frames: 6 }),
        Frame::Root(Root { round: 1, pages: 62, digest: Digest([7; 32]) }),
        Frame::Done(Done { pages: 62, root: Digest([7; 32]) }),
        Frame::Ping(Ping { token: 0x0102_0304_0506_0708, answer: true }),
        Frame::Close(Close::new(CloseCode::SOURCE, "vm.img: no such file")),
        Frame::Blob(blob()),
        Frame::Handover(Message { word: Word::Ready, handover: handover() }),
        Frame::Handover(Message { word: Word::Commit, handover: handover() }),
        Frame::Handover(Message { word: Word::Started, handover: Handover { post_copy: true, ..handover() } }),
        Frame::Handover(Message { word: Word::Reject, handover: handover() }),
        Frame::Handover(Message { word: Word::Gone, handover: handover() }),
        Frame::Fill(Fill {
            transcript: [1; 32],
            session: [2; 16],
            lanes: 2,
            single_stream: false,
            handover: handover(),
        }),
        Frame::Lack(Lack { transcript: [1; 32], secret: [2; 32], window: 1 << 20, pages: 62, lanes: 2, holds: true }),
        Frame::Lacking(Lacking { first: 8, bits: &[0b101, 0xff] }),
        Frame::Fault(Fault { urgency: Urgency::NOW, pages: vec![want; 2] }),
    ]
}

#[test]
fn every_frame_round_trips_and_is_refused_when_cut_or_too_long() {
    let pages = pages_body(&[]);
    let samples = samples(&pages);
    let kinds: Vec<FrameKind> = samples.iter().map(Frame::kind).collect();
    assert_eq!(kinds, FrameKind::ALL);
    for frame in samples {
        let mut bytes = Vec::new();
        frame.encode(LaneId::bulk(1), &mut bytes);
        let header = FrameHeader::decode(bytes.first_chunk().unwrap()).unwrap();
        assert_eq!((header.kind, header.lane, header.frame_bytes()), (frame.kind(), LaneId::bulk(1), bytes.len()));
        let body = &bytes[HEADER_BYTES..];
        assert_eq!(Frame::decode(header.kind, body).unwrap(), frame);
        for cut in 0..body.len() {
            // A whole digest or want less is a shorter legal list, some bytes less a shorter part.
            let shorter = match header.kind {
                FrameKind::HAVE => cut > 16 && (cut - 16) % 32 == 0,
                FrameKind::ACK => cut >= 16 && cut % 16 == 0,
                FrameKind::FAULT => cut > 8 && cut % 16 == 8,
                FrameKind::LACKING => cut > 8,
                FrameKind::BLOB => cut > 16 + "device-state".len(),
                _ => false,
            };
            assert_eq!(Frame::decode(header.kind, &body[..cut]).is_ok(), shorter, "{} cut at {cut}", header.kind);
        }
        // Of the sample's blob no byte is left to come; of a bitmap there may be.
        let mut longer = body.to_vec();
        longer.push(0);
        let fits = header.kind == FrameKind::LACKING;
        assert_eq!(Frame::decode(header.kind, &longer).is_ok(), fits, "{} and a byte", header.kind);
    }
}

/// Two pages by their changed words, those of SPEC 5.15's example, in a zstd frame of one block as it is.
fn words_body() -> Vec<u8> {
    let head = PagesHead { codec: Codec::WORDS, shift: -5, ..pages_head(2) };
    let mut content = vec![0; 128];
    (content[0], content[127]) = (0b110, 0x80);
    content.extend(1u64.to_le_bytes().into_iter().chain(*b"pagewire").chain([0, 0, 0, 0, 0, 0, 0, 2]));
    let mut body = Vec::new();
    head.encode(&[Run { kind: EntryKind::INLINE, count: 2 }], &[], &[], &mut body);
    // Magic, one segment of one block, its size of 152 bytes, and again with "last" and "raw" in front.
    body.extend([0x28, 0xb5, 0x2f, 0xfd, 0x20, 152, (152 << 3 | 1) as u8, (152 << 3 >> 8) as u8, 0]);
    body.extend(content);
    body
}

#[cfg(feature = "zstd")]
#[test]
fn the_vector_of_changed_words_is_the_example_of_the_specification() {
    let body = words_body();
    let pages = Pages::decode(&body).unwrap();
    let (mut bytes, mut expected) = (vec![0; 8192], vec![0; 8192]);
    let mut decompressor = crate::compress::Decompressor::new().unwrap();
    decompressor.decompress_words(pages.payload, &mut bytes).unwrap();
    expected[8] = 1;
    expected[16..24].copy_from_slice(b"pagewire");
    expected[8191] = 2;
    assert!(bytes == expected);
}

#[test]
fn golden_vectors_decode_and_encode_to_the_same_bytes() {
    let (pages, proven) = (pages_body(&[]), pages_body(&[PageProof([10; 16])]));
    let named = samples(&pages).into_iter().map(|frame| (frame.kind().name().to_lowercase(), frame));
    let challenge = Accept { challenge: Some([3; 32]), ..accept() };
    let (absent, words) = (absent_body(), words_body());
    let more = [
        ("accept-challenge", Frame::Accept(challenge)),
        ("pages-proofs", Frame::Pages(Pages::decode(&proven).unwrap())),
        ("pages-absent", Frame::Pages(Pages::decode(&absent).unwrap())),
        ("pages-words", Frame::Pages(Pages::decode(&words).unwrap())),
    ];
    for (name, frame) in named.chain(more.map(|(name, frame)| (name.to_string(), frame))) {
        let mut bytes = Vec::new();
        frame.encode(LaneId::bulk(1), &mut bytes);
        let hex: alloc::string::String = bytes.iter().map(|byte| alloc::format!("{byte:02x}")).collect();
        let path = std::format!("{}/vectors/{name}.txt", env!("CARGO_MANIFEST_DIR"));
        let lines: Vec<&str> = hex.as_bytes().chunks(96).map(|line| core::str::from_utf8(line).unwrap()).collect();
        let golden = std::fs::read_to_string(&path).unwrap_or_default().replace("\r\n", "\n");
        let (stored, text) = golden.split_once("\n\n").unwrap_or(("", ""));
        if std::env::var_os("PAGEWIRE_BLESS").is_some() {
            let text = match &frame {
                Frame::Pages(pages) => {
                    let runs: Vec<Run> = pages.runs().collect();
                    let references: Vec<Digest> = pages.references().collect();
                    let proofs: Vec<PageProof> = pages.proofs().collect();
                    let proofs = if proofs.is_empty() { "".to_string() } else { alloc::format!("{proofs:#?}\n") };
                    alloc::format!(
                        "{:#?}\n{runs:#?}\n{references:#?}\n{proofs}payload: {} bytes",
                        pages.head,
                        pages.payload.len()
                    )
                }
                other => alloc::format!("{other:#?}"),
            };
            std::fs::write(&path, alloc::format!("{}\n\nlane 2\n{text}\n", lines.join("\n"))).unwrap();
            continue;
        }
        assert_eq!(stored, lines.join("\n"), "{path}");
        assert!(text.starts_with("lane 2\n"), "{path} shows what the bytes mean");
    }
}

#[test]
fn rejects_headers_that_are_no_frame() {
    let good = FrameHeader { length: 16, kind: FrameKind::PING, lane: LaneId::CONTROL }.encode();
    assert!(FrameHeader::decode(&good).is_ok());
    let changed = |at: usize, value: u8| {
        let mut bytes = good;
        bytes[at] = value;
        FrameHeader::decode(&bytes)
    };
    for (at, value) in [(4, 0), (4, 23), (4, 255), (5, 1), (5, 2), (6, 10), (6, 255), (7, 1), (0, 17), (3, 255)] {
        assert!(changed(at, value).is_err(), "byte {at} = {value}");
    }
    let ignorable = [0, 0, 1, 0, 200, 1, 0, 0];
    assert!(!FrameHeader::decode(&ignorable).unwrap().kind.is_known());
    assert!(FrameHeader::decode(&[1, 0, 1, 0, 200, 1, 0, 0]).is_err(), "over the control limit");
}

#[test]
fn accepts_lengths_up_to_each_kinds_limit_and_no_further() {
    for &kind in FrameKind::ALL {
        for length in [0, 1, kind.size_max() - 1, kind.size_max(), kind.size_max() + 1, i32::MAX as u32, u32::MAX] {
            let header = FrameHeader { length, kind, lane: LaneId::CONTROL }.encode();
            assert_eq!(FrameHeader::decode(&header).is_ok(), length <= kind.size_max(), "{kind} {length}");
        }
    }
}

fn pages_with(runs: &[Run], count: u32, codec: Codec, references: usize, payload: usize) -> Result<(), DecodeError> {
    let head = PagesHead { codec, ..pages_head(count) };
    let mut body = Vec::new();
    head.encode(runs, &vec![Digest([0; 32]); references], &[], &mut body);
    body.resize(body.len() + payload, 0);
    Pages::decode(&body).map(drop)
}

#[test]
fn rejects_pages_whose_counts_disagree() {
    let run = |kind, count| Run { kind, count };
    let zero = |count| run(EntryKind::ZERO, count);
    let cover = COVER_PAGES_MAX as u16;
    assert!(pages_with(&[zero(cover)], COVER_PAGES_MAX, Codec::NONE, 0, 0).is_ok());
    assert!(pages_with(&[zero(cover + 1)], COVER_PAGES_MAX + 1, Codec::NONE, 0, 0).is_err());
    assert!(pages_with(&[zero(2)], 3, Codec::NONE, 0, 0).is_err());
    assert!(pages_with(&[zero(0), zero(1)], 1, Codec::NONE, 0, 0).is_err());
    assert!(pages_with(&[], 0, Codec::NONE, 0, 0).is_err());
    assert!(pages_with(&[zero(1)], 1, Codec::NONE, 0, 1).is_err());
    assert!(pages_with(&[zero(1)], 1, Codec::ZSTD, 0, 0).is_err());
    let inline =
        |count: u16, codec, payload| pages_with(&[run(EntryKind::INLINE, count)], u32::from(count), codec, 0, payload);
    assert!(inline(512, Codec::NONE, 512 * PAGE_BYTES).is_ok());
    assert!(inline(513, Codec::NONE, 513 * PAGE_BYTES).is_err());
    assert!(inline(1, Codec::NONE, PAGE_BYTES - 1).is_err());
    assert!(inline(1, Codec::ZSTD, PAGE_BYTES - 1).is_ok());
    for codec in [Codec::DELTA, Codec::WORDS] {
        assert!(inline(1, codec, PAGE_BYTES - 1).is_ok());
        assert!(inline(1, codec, PAGE_BYTES).is_err());
        assert!(inline(1, codec, 0).is_err());
    }
    assert!(pages_with(&[zero(1)], 1, Codec::DELTA, 0, 1).is_err());
    assert!(inline(1, Codec::ZSTD, PAGE_BYTES).is_err());
    assert!(inline(1, Codec::ZSTD, 0).is_err());
    assert!(pages_with(&[run(EntryKind::REFERENCE, 2)], 2, Codec::NONE, 1, 0).is_err());
    assert!(pages_with(&[run(EntryKind::REFERENCE, 513)], 513, Codec::NONE, 513, 0).is_err());
    let alternating: Vec<Run> =
        (0..1026).map(|at| if at % 2 == 0 { zero(1) } else { run(EntryKind::BASE, 1) }).collect();
    assert!(pages_with(&alternating[..1025], 1025, Codec::NONE, 0, 0).is_ok());
    assert!(pages_with(&alternating, 1026, Codec::NONE, 0, 0).is_err());
}

#[test]
fn rejects_pages_with_unknown_or_reserved_values() {
    let body = pages_body(&[]);
    for (at, value) in [(6, 3), (7, 1), (7, 2), (22, 1), (56, 1), (64, 0), (64, 8), (65, 1)] {
        let mut bad = body.clone();
        bad[at] = value;
        assert!(Pages::decode(&bad).is_err(), "byte {at} = {value}");
    }
}

/// SPEC 5.3, 5.4
#[test]
fn payloads_are_aligned_whatever_goes_before_them_and_padding_is_zero() {
    let page = [7; PAGE_BYTES];
    let shapes = (1..=33).flat_map(|runs| (0..=4).map(move |references| (runs, references)));
    for ((runs, references), proven) in shapes.flat_map(|shape| [(shape, 0), (shape, 1)]) {
        // The last run is the inline page; zero and base alternate before it, then the references, one run each.
        let zeros = (0..runs - 1).map(|at| if at % 2 == 0 { EntryKind::ZERO } else { EntryKind::BASE });
        let kinds = zeros.chain((0..references).map(|_| EntryKind::REFERENCE)).chain([EntryKind::INLINE]);
        let runs: Vec<Run> = kinds.map(|kind| Run { kind, count: 1 }).collect();
        let count = runs.len() as u32;
        let head = pages_head(count);
        let mut body = Vec::new();
        let proofs = vec![PageProof([4; 16]); references * proven];
        head.encode(&runs, &vec![Digest([2; 32]); references], &proofs, &mut body);
        let lists = 4 * runs.len() + 32 * references + 16 * proofs.len();
        let (fields, payload) = (64 + lists, body.len());
        assert_eq!((HEADER_BYTES + payload) % 64, 0);
        assert_eq!(payload - fields, (64 - (8 + lists) % 64) % 64, "as SPEC 5.3 computes it");
        body.extend_from_slice(&page);
        let pages = Pages::decode(&body).unwrap();
        assert_eq!((pages.payload, pages.proofs().collect::<Vec<_>>()), (page.as_slice(), proofs));
        for at in fields..payload {
            let mut bad = body.clone();
            bad[at] = 1;
            assert!(Pages::decode(&bad).is_err(), "padding at {at}");
        }
    }
    let delta = PagesHead { shift: -5, codec: Codec::DELTA, ..pages_head(1) };
    let mut body = Vec::new();
    delta.encode(&[Run { kind: EntryKind::INLINE, count: 1 }], &[], &[], &mut body);
    assert_eq!((HEADER_BYTES + body.len()) % 64, 0, "behind the shift too");
    body.push(1);
    assert_eq!(Pages::decode(&body).unwrap().head, delta);
    let none = [Run { kind: EntryKind::REFERENCE, count: 1 }];
    let head = pages_head(1);
    let mut body = Vec::new();
    head.encode(&none, &[Digest([2; 32])], &[], &mut body);
    assert_eq!(body.len(), 64 + 4 + 32, "no payload, no padding");
    body.resize(body.len() + 20, 0);
    assert!(Pages::decode(&body).is_err(), "padding without a payload");
}

#[test]
fn rejects_hellos_of_strangers_and_over_limits() {
    let encoded = |hello: &Hello| {
        let mut body = Vec::new();
        hello.encode(&mut body);
        body
    };
    let judge = |change: &dyn Fn(&mut Hello)| {
        let mut hello = hello();
        change(&mut hello);
        Hello::decode(&encoded(&hello))
    };
    assert!(judge(&|_| ()).is_ok());
    assert!(matches!(Hello::decode(b"GET / HTTP/1.1\r\n\r\n"), Err(DecodeError::Magic(_))));
    assert!(judge(&|hello| hello.version_min = 0).is_err());
    assert!(judge(&|hello| hello.version_min = 3).is_err());
    assert!(judge(&|hello| hello.body.agent = "x".repeat(64)).is_ok());
    assert!(judge(&|hello| hello.body.agent = "x".repeat(65)).is_err());
    assert!(judge(&|hello| hello.body.extensions[0].required = true).is_err());
    let extension = |bytes| Extension { tag: 1, required: false, data: vec![0; bytes] };
    assert!(judge(&|hello| hello.body.extensions = vec![extension(1024)]).is_ok());
    assert!(judge(&|hello| hello.body.extensions = vec![extension(1025)]).is_err());
    assert!(judge(&|hello| hello.body.extensions = vec![extension(0); 16]).is_ok());
    assert!(judge(&|hello| hello.body.extensions = vec![extension(0); 17]).is_err());
    let mut role = encoded(&hello());
    role[12] = 3;
    assert!(Hello::decode(&role).is_err());
    role[12] = 1;
    role[15] = 1;
    assert!(Hello::decode(&role).is_err());
}

#[test]
fn rejects_lists_and_numbers_at_each_limit_plus_one() {
    let have = |count| {
        let mut body = Vec::new();
        Have { region: 0, first: 0, digests: vec![Digest([0; 32]); count] }.encode(&mut body);
        Have::decode(&body).is_ok()
    };
    assert_eq!([0, 1, 64, 65].map(have), [false, true, true, false]);
    let ack = |count| {
        let mut body = Vec::new();
        Ack { frames: 0, settled: 0, wants: vec![Want { region: 0, first: 0, count: 1 }; count] }.encode(&mut body);
        Ack::decode(&body).is_ok()
    };
    assert_eq!([0, 1, WANTS_MAX, WANTS_MAX + 1].map(ack), [true, true, true, false]);
    let settled = |settled| {
        let mut body = Vec::new();
        Ack { frames: 7, settled, wants: Vec::new() }.encode(&mut body);
        Ack::decode(&body).is_ok()
    };
    assert_eq!([0, 7, 8, u64::MAX].map(settled), [true, true, false, false]);
    let judged = |accept: Accept| {
        let mut body = Vec::new();
        accept.encode(&mut body);
        Accept::decode(&body).is_ok()
    };
    assert_eq!(
        [0, ROOTS_MAX, ROOTS_MAX + 1].map(|at| judged(Accept { agreed: at as u8, ..accept() })),
        [true, true, false]
    );
    let accept = |lanes, window, regions| judged(Accept { lanes, window, held_pages: vec![0; regions], ..accept() });
    assert!(accept(8, WINDOW_BYTES, 64));
    assert!(
        !accept(0, 1, 1)
            && !accept(9, 1, 1)
            && !accept(1, 0, 1)
            && !accept(1, WINDOW_BYTES + 1, 1)
            && !accept(1, 1, 65)
    );
    let open = |lanes| {
        let mut body = Vec::new();
        Open { lanes, ..open() }.encode(&mut body);
        Open::decode(&body).is_ok()
    };
    assert_eq!([0, 1, 8, 9].map(open), [false, true, true, false]);
    let known = |count| {
        let mut body = Vec::new();
        Open { known: vec![Digest([1; 32]); count], ..self::open() }.encode(&mut body);
        Open::decode(&body).is_ok()
    };
    assert_eq!([0, ROOTS_MAX, ROOTS_MAX + 1].map(known), [true, true, false]);
}

fn refuses_each<const N: usize>(kind: FrameKind, good: &[u8], changes: [(usize, u8); N]) {
    assert!(Frame::decode(kind, good).is_ok(), "{kind}");
    for (at, value) in changes {
        let mut bad = good.to_vec();
        bad[at] = value;
        assert!(Frame::decode(kind, &bad).is_err(), "{kind}: byte {at} = {value}");
    }
}

#[test]
fn rejects_words_of_fill_sessions_at_each_limit_plus_one() {
    let encoded = |frame: Frame<'_>| {
        let mut bytes = Vec::new();
        frame.encode(LaneId::CONTROL, &mut bytes);
        bytes.split_off(HEADER_BYTES)
    };
    let fill = Fill { transcript: [1; 32], session: [2; 16], lanes: 8, single_stream: true, handover: handover() };
    // Lanes, the flag, reserved bytes; what the binding has of these is its own to judge.
    refuses_each(FrameKind::FILL, &encoded(Frame::Fill(fill)), [(48, 0), (48, 9), (49, 2), (50, 1), (55, 1)]);
    let lack = Lack { transcript: [1; 32], secret: [2; 32], window: WINDOW_BYTES, pages: 62, lanes: 8, holds: true };
    let changes = [(64, 1), (80, 0), (80, 9), (81, 2), (82, 1), (87, 1)];
    refuses_each(FrameKind::LACK, &encoded(Frame::Lack(lack.clone())), changes);
    assert!(Frame::decode(FrameKind::LACK, &encoded(Frame::Lack(Lack { window: 0, ..lack }))).is_err());
    let lacking = |bits: usize| encoded(Frame::Lacking(Lacking { first: 16, bits: &vec![0xff; bits] }));
    refuses_each(FrameKind::LACKING, &lacking(1), [(0, 17), (0, 12)]);
    assert!(Frame::decode(FrameKind::LACKING, &lacking(0)).is_err());
    let most = FrameHeader { length: Lacking::SIZE_MAX, kind: FrameKind::LACKING, lane: LaneId::CONTROL };
    assert_eq!(lacking(LACKING_BYTES_MAX as usize).len(), Lacking::SIZE_MAX as usize);
    assert!(FrameHeader::decode(&most.encode()).is_ok());
    let want = Want { region: 1, first: 9, count: 2 };
    let fault = |pages: usize| {
        let mut body = Vec::new();
        Fault { urgency: Urgency::AHEAD, pages: vec![want; pages] }.encode(&mut body);
        body
    };
    // Urgency, reserved bytes, a page's reserved bytes and its count.
    refuses_each(FrameKind::FAULT, &fault(1), [(0, 0), (0, 3), (1, 1), (7, 1), (10, 1), (12, 0)]);
    assert!(Frame::decode(FrameKind::FAULT, &fault(0)).is_err(), "a fault of nothing");
    assert!(Frame::decode(FrameKind::FAULT, &fault(WANTS_MAX)).is_ok());
    assert!(Frame::decode(FrameKind::FAULT, &fault(WANTS_MAX + 1)).is_err());
}

// SPEC 12.2
#[test]
fn rejects_parts_of_blobs_that_are_not_inside_them() {
    let bytes = |count: u32| vec![0u8; count as usize];
    let judged = |length: u32, offset: u32, part: &[u8]| {
        let mut body = Vec::new();
        Blob { length, offset, part, ..blob() }.encode(&mut body);
        Blob::decode(&body).is_ok()
    };
    assert!(judged(9, 0, b"nine byte") && judged(9, 8, b"e") && judged(0, 0, b""));
    assert!(!judged(9, 9, b"") && !judged(9, 8, b"te") && !judged(0, 0, b"x") && !judged(9, u32::MAX, b"x"));
    assert!(judged(BLOB_BYTES_MAX, BLOB_BYTES_MAX - 1, b"x") && !judged(BLOB_BYTES_MAX + 1, 0, b"x"));
    let most = BLOB_PART_BYTES_MAX;
    assert!(judged(most + 1, 0, &bytes(most)) && !judged(most + 1, 0, &bytes(most + 1)));
    for (at, value) in [(12, 0), (12, 65), (13, 1), (15, 1), (16, b'/'), (16, 0xff)] {
        let mut body = Vec::new();
        blob().encode(&mut body);
        body[at] = value;
        assert!(Blob::decode(&body).is_err(), "byte {at} = {value}");
    }
}

#[test]
fn close_reasons_are_escaped_and_cut() {
    let close = Close::new(CloseCode::SOURCE, "a\u{1b}[31mb\nc\u{e4}");
    assert_eq!(close.reason, "a\\u{1b}[31mb\\nc\\u{e4}");
    let mut body = Vec::new();
    Close { code: CloseCode(500), retry: true, reason: "x\ny".to_string() }.encode(&mut body);
    let decoded = Close::decode(&body).unwrap();
    assert_eq!((decoded.code.name(), decoded.retry, decoded.reason.as_str()), ("unknown", true, "x\\ny"));
    assert_eq!(Close::new(CloseCode::SOURCE, &"x".repeat(5000)).reason.len(), REASON_BYTES_MAX);
    let mut long = Vec::new();
    Close { code: CloseCode(0), retry: true, reason: "x".to_string() }.encode(&mut long);
    assert!(Close::decode(&long).is_err());
}
