//! The bodies of the fuzz targets: any bytes in, no panic out, and the invariants of each decoder and each engine.
//!
//! `fuzz/` calls them under libFuzzer, `tests/suite/tests/corpus.rs` over the committed corpora. The session targets
//! read their input as operations: frames that are nearly right reach further than noise.

mod fill;
mod live;

pub use fill::{fill, fill_receiver_session, fill_sender_session, serve};
pub use live::{hand_over, live_receiver_session, live_sender_session, take_over};

use crate::image::{Image, Mix};
use crate::memory::{ImageBase, ImageSink, Neighbour};
use crate::peer::{AgainstReceiver, AgainstSender, CHALLENGE, SECRET, SESSION, Script, Statement, digests};
use crate::rng::Rng;
use pagewire_protocol::challenge::{Challenge, PageProof};
use pagewire_protocol::compress::{Compressor, Decompressor, compress_delta};
use pagewire_protocol::digest::{Digest, join_proof, page_digest, record_check, trace_check};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::error::PeerError;
use pagewire_protocol::frame::{
    Ack, Codec, Done, Frame, FrameKind, HEADER_BYTES, Have, Join, LaneId, Pages, Root, RoundEnd, Want,
};
use pagewire_protocol::framing::Framer;
use pagewire_protocol::handover::{Handover, Handovers, Record, RecordKind};
use pagewire_protocol::limits::{PAGE_BYTES, REGIONS_MAX};
use pagewire_protocol::page::{InstallSize, Place, Region};
use pagewire_protocol::session::{Job, Machine, Phase};
use pagewire_protocol::time::Span;
use pagewire_protocol::trace::{TraceParser, encode_header};
use pagewire_protocol::words::{differ, patch};
use pagewire_receiver::OtherPages;
use pagewire_sender::{Base, SenderConfig};
use pagewire_store::manifest::{self, BLOCK, Manifest, ManifestError, VisitId};
use pagewire_store::touches;
use std::collections::BTreeSet;

/// A fuzz target: what it does with an input.
pub type Target = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("framing", framing),
    ("frame", frame),
    ("pages", pages),
    ("decompress", decompress),
    ("manifest", manifest),
    ("record", record),
    ("trace", trace),
    ("touches", touches),
    ("sender_session", sender_session),
    ("receiver_session", receiver_session),
    ("live_sender_session", live_sender_session),
    ("live_receiver_session", live_receiver_session),
    ("fill_sender_session", fill_sender_session),
    ("fill_receiver_session", fill_receiver_session),
];

/// However a stream is cut, the same frames and the same error come out, and no more than a frame is held.
pub fn framing(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else { return };
    let whole = cut_into_frames(stream, usize::MAX);
    let pieces = cut_into_frames(stream, usize::from(cut) + 1);
    assert_eq!(whole, pieces);
}

fn cut_into_frames(stream: &[u8], piece: usize) -> Vec<Result<(FrameKind, Vec<u8>), String>> {
    let mut framer = Framer::new();
    let mut seen = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        let space = framer.space();
        assert!(!space.is_empty());
        let count = space.len().min(rest.len()).min(piece);
        space[..count].copy_from_slice(&rest[..count]);
        framer.filled(count);
        rest = &rest[count..];
        loop {
            match framer.next_frame() {
                Ok(Some((header, body))) => seen.push(Ok((header.kind, body.to_vec()))),
                Ok(None) => break,
                Err((kind, error)) => {
                    seen.push(Err(format!("{kind}: {error}")));
                    return seen;
                }
            }
        }
    }
    seen
}

/// The first byte selects the kind: what decodes encodes to what decodes to the same.
pub fn frame(data: &[u8]) {
    let Some((&kind, body)) = data.split_first() else { return };
    // One more than there are, and zero.
    let kind = FrameKind(kind % 24);
    if body.len() > kind.size_max() as usize {
        return;
    }
    match Frame::decode(kind, body) {
        Ok(frame) => {
            assert_eq!(frame.kind(), kind);
            let mut bytes = Vec::new();
            frame.encode(LaneId::CONTROL, &mut bytes);
            assert_eq!(Frame::decode(kind, &bytes[HEADER_BYTES..]).as_ref(), Ok(&frame));
            // CLOSE escapes its text when it is judged; everything else has one encoding.
            assert!(kind == FrameKind::CLOSE || bytes[HEADER_BYTES..] == *body, "{kind} has two encodings");
        }
        Err(error) => assert!(error.to_string().len() < 8192),
    }
}

/// PAGES alone: counts agree with each other and with the bytes.
pub fn pages(data: &[u8]) {
    let Ok(pages) = Pages::decode(data) else { return };
    let covered: u64 = pages.runs().map(|run| u64::from(run.count)).sum();
    assert_eq!(covered, u64::from(pages.head.count));
    assert!(pages.inline_pages() + pages.references().count() <= 512);
    let mut bytes = Vec::new();
    pages.encode(&mut bytes);
    assert_eq!(bytes, data);
}

/// Any payload into a buffer of up to sixteen pages: filled exactly, or an error. From 16 on it is what differs from these
/// pages, from 32 on without the zstd frame around it: what that makes has one shortest form, and it leads there as well.
pub fn decompress(data: &[u8]) {
    let Some((&way, payload)) = data.split_first() else { return };
    let old: Vec<u8> = (0..(usize::from(way) % 16 + 1) * PAGE_BYTES).map(|at| (at / 8) as u8).collect();
    let mut pages = old.clone();
    match way / 16 {
        0 => drop(Decompressor::new().unwrap().decompress(payload, &mut pages)),
        1 => {
            if Decompressor::new().unwrap().decompress_words(payload, &mut pages).is_err() {
                assert!(pages == old, "a payload that is refused changes nothing");
            }
        }
        _ if patch(payload, &mut pages).is_ok() => {
            let (mut content, mut again) = (Vec::new(), old.clone());
            assert!(differ(pages.as_chunks().0.iter(), &old, pages.len(), &mut content));
            assert!(content.len() <= payload.len());
            patch(&content, &mut again).unwrap();
            assert!(again == pages);
        }
        _ => assert!(pages == old, "content that is refused changes nothing"),
    }
}

/// A manifest's header: as it is (first byte even), or a body that is sealed here, for the fuzzer cannot. What decodes has
/// one encoding, and a present bitmap that is sealed for it reads as it was written.
pub fn manifest(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let mut block = [0; BLOCK];
    if kind & 1 == 0 {
        block.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
    } else {
        let key = data.get(16..48).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; 32]);
        block = manifest::seal(&key, data);
    }
    let len = match Manifest::decode(&block, 0) {
        Err(ManifestError::Length { found: 0, expected }) => expected,
        refused => return assert!(refused.is_err(), "a manifest is never empty"),
    };
    let mut manifest = Manifest::decode(&block, len).unwrap();
    assert!(manifest.encode() == block, "two encodings");
    assert!(Manifest::decode(&block, len + 1).is_err());
    let (offset, bytes) = manifest.present_span();
    if bytes > 64 * 1024 {
        return;
    }
    let bitmap: Vec<u8> = data.iter().rev().copied().cycle().take(bytes as usize).collect();
    manifest.present = manifest.seal_present(&bitmap);
    let padded = (manifest.digest_offset(0) - offset) as usize;
    let mut bitmap_and_padding = bitmap.clone();
    bitmap_and_padding.resize(padded, 0);
    if let Ok(present) = manifest.decode_present(&bitmap_and_padding) {
        assert_eq!((present.len(), present.bytes()), (manifest.layout.pages(), bitmap));
    }
    assert!(manifest.decode_present(&[bitmap_and_padding.as_slice(), &[1]].concat()).is_err());
}

/// First touches as [`touches()`] takes them.
pub fn first_touches(places: &[Place]) -> Vec<u8> {
    touches::encode(VisitId([7; 16]), &DedupDomain::public(), places)
}

/// What a guest touched first: as it is (first byte even), or sealed here, for the fuzzer cannot. What decodes has one
/// encoding, and is legal: pages of the image, each once.
pub fn touches(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let (visit, domain, pages) = (VisitId([7; 16]), DedupDomain::public(), u64::from(kind) * 64);
    let mut bytes = data.to_vec();
    if kind & 1 == 1 {
        bytes = [&bytes, domain.seal(&[b"touches", &bytes]).0.as_slice()].concat();
    }
    let Ok(places) = touches::decode(&bytes, visit, &domain, pages) else { return };
    let numbers: BTreeSet<u32> = places.iter().map(|place| place.0).collect();
    assert!(numbers.len() == places.len() && numbers.last().is_none_or(|last| u64::from(*last) < pages));
    assert!(touches::encode(visit, &domain, &places) == bytes, "two encodings");
}

/// A record of a hand-over: as it is (first byte even), or a body that is checked here, for the fuzzer cannot. What
/// decodes has one encoding, and a journal takes it or refuses it.
pub fn record(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let mut bytes = data.to_vec();
    if kind & 1 == 1 {
        bytes.resize(Record::BYTES - 32, 0);
        bytes.extend_from_slice(&record_check(&bytes));
    }
    let Ok(record) = Record::decode(&bytes) else { return };
    assert!(record.encode() == bytes, "two encodings");
    let Handover { lineage, sender, receiver, .. } = record.handover;
    let known = [sender, receiver].map(|me| Handovers::restore(me, lineage, &[record], kind & 2 == 0).is_ok());
    assert_eq!(known == [true; 2], record.kind == RecordKind::Gone, "GONE alone is a record of both sides");
    assert_ne!(known, [false; 2], "every record is somebody's");
}

/// A trace: as it is (first byte even), or its parts without their checks, which are made here, for the fuzzer cannot.
/// What is read has one encoding, and no more is asked for than a bitmap of the image.
pub fn trace(data: &[u8]) {
    let Some((&kind, mut rest)) = data.split_first() else { return };
    let (mut parser, mut head, mut is_checked) = (TraceParser::default(), Vec::new(), false);
    loop {
        let wanted = parser.wants();
        let bitmap = parser.layout().map_or(0, |layout| layout.pages().div_ceil(8));
        assert!(wanted as u64 <= bitmap.max(REGIONS_MAX as u64 * 16) + 8, "{wanted} bytes of a part");
        // Parts with a check follow those without.
        let is_sealed_here = kind & 1 == 1 && is_checked;
        let Some((part, behind)) = rest.split_at_checked(if is_sealed_here { wanted - 8 } else { wanted }) else {
            return;
        };
        rest = behind;
        let mut part = part.to_vec();
        if is_sealed_here {
            part.extend(trace_check(&head, &part));
        }
        match (parser.part(&part), is_checked) {
            (Err(_), _) => return,
            (Ok(record), true) => {
                let again = record.map(|record| record.encode());
                let again = again.or_else(|| encode_header(parser.layout()?).ok());
                assert_eq!(again, Some([head.as_slice(), &part].concat()), "two encodings");
            }
            (Ok(_), false) => head = part,
        }
        is_checked = !is_checked;
    }
}

/// Numbers out of the input; zeros behind its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn number(&mut self) -> u64 {
        let byte = self.byte();
        // Mostly small, sometimes at the edges of the type.
        match byte {
            0..=239 => u64::from(byte),
            240..=247 => 1 << (8 * u32::from(byte - 240)),
            _ => u64::MAX - u64::from(255 - byte),
        }
    }

    fn bytes(&mut self) -> &'a [u8] {
        let (head, rest) =
            self.0.split_at(usize::from(self.byte()).min(self.0.len().saturating_sub(1)).min(self.0.len()));
        self.0 = rest;
        head
    }
}

/// Two regions of a few pages, with duplicates and zeros.
fn small_image() -> Image {
    let regions = [(40_000, InstallSize::KIB_4), (70_000, InstallSize::KIB_64)]
        .map(|(bytes, install_size)| Region { bytes, install_size });
    Image::filled(regions.to_vec(), Mix::MEMORY, &mut Rng::new(11))
}

/// What any peer may do to any engine.
fn common<M: Machine>(op: u8, script: &mut Script<M>, input: &mut Input<'_>) {
    let lane = LaneId::from_wire(input.byte() % 10).unwrap();
    match op {
        0 => script.raw(lane, FrameKind(input.byte() % 14), input.bytes()),
        1 => script.wait(Span::from_millis(input.number().min(20_000))),
        2 => {
            script.engine.work(script.now);
        }
        3 => {
            if let Some(job) = script.engine.poll_job() {
                script.engine.handle_job(job.run(), Span::from_nanos(input.number()), script.now);
            }
        }
        4 => script.listen(),
        5 => script.settle(),
        6 => script.engine.handle_peer_error(PeerError::EndOfStream { lane: lane.number() }, script.now),
        _ => script.engine.handle_lane_open(lane, script.now),
    }
    assert!(script.said.iter().map(|said| said.body.len()).sum::<usize>() < 16 << 20, "what it says is bounded");
}

/// A real receiver, offered frames that are nearly right. It is content only with the image whose root it was told.
pub fn receiver_session(data: &[u8]) {
    let mut input = Input(data);
    let flags = input.byte();
    let image = small_image();
    let sink = match flags & 5 {
        0 => ImageSink::empty(&image),
        1 => ImageSink::holding(older(&image)),
        // What is said to be held, and is not quite.
        _ => ImageSink::claiming(
            &older(&image),
            [0; 32],
            if flags & 8 == 0 { older(&image) } else { image.clone() },
            flags & 1 == 0,
        ),
    };
    let mut script = AgainstReceiver::receiver(flags / 2 % 2 + 1);
    script.known = vec![older(&image).root(&[0; 32])];
    let neighbour = Neighbour { image: image.clone(), key: [0; 32], rotten: flags & 4 != 0 };
    script.others = (flags & 8 != 0).then(|| Box::new(neighbour) as Box<dyn OtherPages>);
    let phases =
        [Phase::Receiving, Phase::Receiving, Phase::Receiving, Phase::Greeting, Phase::Waiting, Phase::Deciding];
    script.enter(phases[usize::from(flags >> 4) % phases.len()], &image, &sink);
    let mut frames = [0u64; LaneId::COUNT];
    while !input.0.is_empty() && !script.engine.is_over() {
        let op = input.byte() % 16;
        match op {
            0..8 => common(op, &mut script, &mut input),
            8 => {
                let lane = LaneId::from_wire(input.byte() % 10).unwrap();
                let proof = join_proof(&SECRET, &SESSION, lane.number());
                let proof = if input.byte() & 1 == 0 { proof } else { Digest::default() };
                let _ = script.join(lane, &Join { session: SESSION, proof });
            }
            9 => script.take(&sink),
            10 => {
                let lane = LaneId::bulk(input.byte() % 3);
                let told = frames[lane.index()].wrapping_add(input.number());
                script.say(lane, &Frame::Round(RoundEnd { round: u32::from(input.byte() / 64), frames: told }));
            }
            11 => {
                let pages = image.pages().wrapping_add(input.number());
                let flags = input.byte();
                let digest = if flags & 1 == 0 { image.root(&[0; 32]) } else { Digest([1; 32]) };
                script.say(LaneId::CONTROL, &Frame::Root(Root { round: u32::from(flags / 64), pages, digest }));
            }
            12 => script.say(LaneId::CONTROL, &Frame::Done(Done { pages: image.pages(), root: image.root(&[0; 32]) })),
            _ => {
                let lane = LaneId::bulk(input.byte() % 3);
                let body = statement(&image, &mut input);
                script.raw(lane, FrameKind::PAGES, &body);
                frames[lane.index()] += 1;
            }
        }
    }
    script.settle();
    let content = matches!(script.engine.outcome(), Some(Ok(()))) || script.last(FrameKind::DONE).is_some();
    if content {
        let state = sink.state();
        assert!(state.finished && state.image == image, "content with a wrong image");
    }
}

/// The image some time ago: some pages differ.
fn older(image: &Image) -> Image {
    let mut base = image.clone();
    base.touch(40, Mix::MEMORY, &mut Rng::new(12));
    base
}

/// Statements about pages: mostly true ones.
fn statement(image: &Image, input: &mut Input<'_>) -> Vec<u8> {
    let flags = input.byte();
    let region = flags % 2;
    let first = input.number();
    let count = u64::from(input.byte() % 20) + 1;
    let mut statement = Statement { round: u32::from(flags / 64), ..Statement::at(u16::from(region), first) };
    let base = older(image);
    let held = base.regions[usize::from(region)].pages();
    let known = [digests(image), digests(&base)].concat();
    // What its inline pages were.
    let mut was = Vec::new();
    for page in first..first.saturating_add(count) {
        let inside = page < image.regions[usize::from(region)].pages();
        let at = if inside { page } else { 0 };
        let mut bytes = *image.page(usize::from(region), at).first_chunk().unwrap();
        statement = match input.byte() {
            0..128 if bytes == [0; PAGE_BYTES] => statement.zero(),
            0..128 => statement.inline(&bytes),
            128..150 => statement.zero(),
            150..200 => statement.reference(known[usize::from(input.byte()) % known.len()]),
            200..220 => statement.base(known[usize::from(input.byte()) % known.len()]),
            220..230 => {
                statement.shift = (input.number() % 7).cast_signed() - 3;
                let from = page.saturating_add_signed(statement.shift);
                let from = if from < held { from } else { 0 };
                let page = base.page(usize::from(region), from).first_chunk().unwrap();
                statement.shifted(page_digest(&DedupDomain::public(), page))
            }
            230..235 => statement.skipped(),
            flaw => {
                bytes[usize::from(input.byte()) * 16] ^= flaw;
                statement.inline(&bytes)
            }
        };
        if statement.payload.len() > was.len() {
            was.extend_from_slice(if at < held { base.page(usize::from(region), at) } else { &[0; PAGE_BYTES] });
        }
    }
    if flags & 12 != 0 {
        statement.proofs = proofs(image, &statement.references, flags & 12);
    }
    match input.byte() {
        0..170 => statement.body(),
        170..200 if !statement.payload.is_empty() => {
            let mut payload = Vec::new();
            if flags & 16 == 0 {
                compress_delta(&statement.payload, &was, &mut payload);
                return statement.encoded(Codec::DELTA, &payload);
            }
            if !Compressor::new().unwrap().compress_words(statement.payload.as_chunks().0.iter(), &was, &mut payload) {
                return statement.body();
            }
            statement.encoded(Codec::WORDS, &payload)
        }
        170..200 => statement.body(),
        200..230 if statement.payload.chunks(64).all(|chunk| chunk == &statement.payload[..64]) => statement.body(),
        200..230 => {
            let mut body = statement.body();
            let at = input.number() as usize % body.len();
            body[at] ^= 1;
            body
        }
        _ => {
            let body = statement.body();
            body[..body.len() - (input.number() as usize % body.len())].to_vec()
        }
    }
}

/// Proofs of references: right for pages of the image (8), wrong (4), or one too few (12).
fn proofs(image: &Image, references: &[Digest], how: u8) -> Vec<PageProof> {
    let challenge = Challenge::new(&CHALLENGE, &SESSION, &[0; 32]);
    let pages = (0..image.regions[0].pages()).map(|page| image.page(0, page).first_chunk().unwrap());
    let known: Vec<(Digest, PageProof)> =
        pages.map(|page| (page_digest(&DedupDomain::public(), page), challenge.prove(page))).collect();
    let right = |digest: &Digest| known.iter().find(|(of, _)| of == digest).map(|(_, proof)| *proof);
    let proofs = references.iter().map(|digest| right(digest).filter(|_| how != 4).unwrap_or(PageProof([how; 16])));
    proofs.skip(usize::from(how == 12)).collect()
}

/// A real sender, answered by a receiver that is nearly right. It is content only with a DONE that fits.
pub fn sender_session(data: &[u8]) {
    let mut input = Input(data);
    let flags = input.byte();
    let image = small_image();
    let mut config = SenderConfig::new(pagewire_protocol::frame::ImageName::new("vm.img").unwrap());
    (config.session, config.nonce, config.lanes) = (SESSION, [8; 16], flags / 2 % 2 + 1);
    (config.dedup, config.compress, config.batch_pages) = (flags & 4 == 0, flags & 8 == 0, 16);
    let base: Box<dyn Base> = Box::new(ImageBase::whole(&older(&image), [0; 32]));
    let mut script = AgainstSender::sender_with(&image, vec![base], config);
    let phase = [Phase::Opening, Phase::Opening, Phase::Sending, Phase::Greeting][usize::from(flags >> 4) % 4];
    script.enter(phase, &image);
    if phase == Phase::Opening {
        let mut accept = script.honest_accept(&image);
        accept.held_pages = if flags & 1 == 0 { vec![0, 0] } else { vec![input.number() % 11, input.number() % 19] };
        accept.window = input.number().clamp(1, 1 << 20);
        let terms = input.byte();
        (accept.base_stays, accept.challenge) = (terms & 1 != 0, (terms & 2 != 0).then_some([terms; 32]));
        if terms & 4 != 0 {
            accept.agreed = terms / 8 % 3;
            accept.held_pages =
                if terms & 128 == 0 { image.regions.iter().map(Region::pages).collect() } else { accept.held_pages };
        }
        script.take(accept);
    }
    let mut fits = false;
    while !input.0.is_empty() && !script.engine.is_over() {
        let op = input.byte() % 12;
        match op {
            0..8 => common(op, &mut script, &mut input),
            8 => {
                let region = u16::from(input.byte() % 3);
                let base = older(&image);
                let mut tree = base.trees(&pagewire_protocol::digest::PageHasher::new(
                    &pagewire_protocol::domain::DedupDomain::public(),
                ));
                let digest = tree.get_mut(usize::from(region)).map(|tree| tree.subtree(0)).unwrap_or_default();
                let have = Have {
                    region,
                    first: input.number() % 3,
                    digests: vec![digest; usize::from(input.byte() % 3) + 1],
                };
                script.say(LaneId::CONTROL, &Frame::Have(have));
            }
            9 => {
                let pages = image.pages().wrapping_add(input.number());
                let root = if input.byte() & 1 == 0 { image.root(&[0; 32]) } else { Digest([1; 32]) };
                fits |= (pages, root) == (image.pages(), image.root(&[0; 32]));
                script.say(LaneId::CONTROL, &Frame::Done(Done { pages, root }));
            }
            _ => {
                let lane = LaneId::bulk(input.byte() % 3);
                let wants = (0..input.byte() % 4).map(|_| Want {
                    region: u16::from(input.byte() % 3),
                    first: input.number(),
                    count: u32::try_from(input.number()).unwrap_or(u32::MAX).max(1),
                });
                let wants: Vec<Want> = wants.collect();
                let frames = script.frames(lane).saturating_sub(u64::from(input.byte() % 4));
                let settled = frames.saturating_sub(wants.len() as u64);
                script.say(lane, &Frame::Ack(Ack { frames, settled, wants }));
            }
        }
    }
    script.settle();
    if matches!(script.engine.outcome(), Some(Ok(()))) {
        assert!(fits, "content without a DONE that fits");
    }
}
