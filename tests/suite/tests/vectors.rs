//! The golden vectors, seen from outside the crate: files that another implementation reads, too.
#![expect(clippy::unwrap_used, reason = "a test that cannot read its inputs has failed")]

use pagewire_protocol::batch::batch_digest;
use pagewire_protocol::blobs::Blobs;
use pagewire_protocol::challenge::Challenge;
use pagewire_protocol::digest::{Digest, PageHasher, join_proof, page_digest, transcript_digest};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::frame::{Codec, EntryKind, Frame, FrameHeader, FrameKind, HEADER_BYTES, ImageName, Pages, Run};
use pagewire_protocol::framing::Framer;
use pagewire_protocol::handover::{Handover, Record, RecordKind};
use pagewire_protocol::page::{InstallSize, Layout, Region};
use pagewire_protocol::tree::{DigestTree, image_root, live_root};
use pagewire_test_suite::{files, read};

/// Each vector: its file's name, and the frame.
fn vectors() -> Vec<(String, Vec<u8>)> {
    let files = files(".txt").unwrap().into_iter().filter(|file| file.path.starts_with("protocol/vectors/"));
    let vector = |file: pagewire_test_suite::SourceFile| {
        let text = file.text.replace("\r\n", "\n");
        let (hex, _) = text.split_once("\n\n").unwrap();
        let digits: Vec<u8> = hex.chars().filter_map(|c| u8::try_from(c.to_digit(16)?).ok()).collect();
        let name = file.path.rsplit('/').next().unwrap_or_default().to_owned();
        (name, digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
    };
    files.map(vector).collect()
}

/// What a framer makes of `bytes`: each frame's header and body, until it wants more or refuses.
fn frames(bytes: &[u8]) -> Result<Vec<(FrameHeader, Vec<u8>)>, String> {
    let (mut framer, mut found, mut rest) = (Framer::new(), Vec::new(), bytes);
    loop {
        while let Some((header, body)) = framer.next_frame().map_err(|error| format!("{error:?}"))? {
            found.push((header, body.to_vec()));
        }
        if rest.is_empty() {
            return Ok(found);
        }
        let space = framer.space();
        let count = space.len().min(rest.len());
        space[..count].copy_from_slice(&rest[..count]);
        framer.filled(count);
        rest = &rest[count..];
    }
}

/// The frame encoded again.
fn encoded(header: FrameHeader, body: &[u8]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    Frame::decode(header.kind, body).map_err(|error| error.to_string())?.encode(header.lane, &mut bytes);
    Ok(bytes)
}

// SPEC 10.3
#[test]
fn vectors_decode_and_encode_to_the_same_bytes() {
    let mut kinds = Vec::new();
    for (name, bytes) in vectors() {
        let frames = frames(&bytes).unwrap();
        assert_eq!(frames.len(), 1, "{name}");
        let (header, body) = &frames[0];
        assert_eq!(encoded(*header, body).as_ref(), Ok(&bytes), "{name}");
        kinds.push(header.kind);
    }
    kinds.sort();
    kinds.dedup();
    assert_eq!(kinds, FrameKind::ALL, "a vector for each kind");
}

#[test]
fn a_vector_cut_at_any_byte_is_incomplete() {
    for (name, bytes) in vectors() {
        for cut in 0..bytes.len() {
            assert_eq!(frames(&bytes[..cut]), Ok(Vec::new()), "{name} cut at {cut}");
        }
    }
}

#[test]
fn a_body_cut_at_any_byte_is_refused_or_a_shorter_list() {
    for (name, bytes) in vectors() {
        for cut in 0..bytes.len() - HEADER_BYTES {
            let mut short = bytes[..HEADER_BYTES + cut].to_vec();
            short[..4].copy_from_slice(&u32::try_from(cut).unwrap().to_le_bytes());
            let frames = frames(&short).unwrap();
            let (header, body) = &frames[0];
            if let Ok(again) = encoded(*header, body) {
                let list = [FrameKind::HAVE, FrameKind::ACK, FrameKind::BLOB, FrameKind::LACKING, FrameKind::FAULT]
                    .contains(&header.kind);
                // Under a codec a payload is of any length.
                let coded = Pages::decode(body).is_ok_and(|pages| pages.head.codec != Codec::NONE);
                assert!((list || header.kind == FrameKind::PAGES && coded) && again == short, "{name} cut at {cut}");
            }
        }
    }
}

#[test]
fn two_vectors_in_a_row_are_two_frames() {
    let all = vectors();
    for (one, other) in all.iter().zip(all.iter().cycle().skip(1)) {
        let stream = [one.1.as_slice(), &other.1].concat();
        assert_eq!(frames(&stream).unwrap().len(), 2, "{} {}", one.0, other.0);
    }
}

#[test]
fn spec_lists_every_vector() {
    let spec = read("docs/SPEC.md").unwrap();
    let listed = spec.lines().filter(|line| line.starts_with("| `") && line.contains(".txt` |")).count();
    assert_eq!(listed, vectors().len());
    for (name, bytes) in vectors() {
        assert!(spec.contains(&format!("| `{name}` | {} |", bytes.len())), "{name} has {} bytes", bytes.len());
    }
}

/// The check at the end of the record HANDED of the hand-over of `ready.txt`.
fn record_check() -> Digest {
    let (_, ready) = vectors().into_iter().find(|(name, _)| name == "ready.txt").unwrap();
    let handover = Handover::decode(&ready[HEADER_BYTES..]).unwrap();
    let file = Record { kind: RecordKind::Handed, handover }.encode();
    Digest(*file.last_chunk().unwrap())
}

/// What appendix B of SPEC shows, in its order.
fn digests() -> Vec<Digest> {
    let domain = DedupDomain::public();
    let hasher = PageHasher::new(&domain);
    let ones = page_digest(&domain, &[1; 4096]);
    let mut short = [0; 4096];
    short[..100].fill(1);
    let tree = |pages| DigestTree::new(&hasher, pages);
    let mut region = tree(257);
    region.set(256, ones);
    let mut lacking = tree(257);
    lacking.set(0, ones);
    lacking.set_absent(256..257);
    let install = |bytes, install_size| Region { bytes, install_size };
    let regions = vec![install(257 * 4096, InstallSize::KIB_4), install(0, InstallSize::MIB_2)];
    let root = region.root();
    let image = image_root(&domain, &Layout::new(regions).unwrap(), &mut [region, tree(0)]);
    let mut blobs = Blobs::new();
    let without = live_root(&domain, image, &blobs);
    blobs.insert(ImageName::new("a").unwrap(), 1, b"xyz".to_vec()).unwrap();
    let skipped = [(EntryKind::SKIPPED, 2), (EntryKind::INLINE, 1)].map(|(kind, count)| Run { kind, count });
    let based = [(EntryKind::BASE, 2), (EntryKind::INLINE, 1)].map(|(kind, count)| Run { kind, count });
    vec![
        hasher.zero(),
        ones,
        page_digest(&domain, &short),
        tree(256).root(),
        tree(65_536).root(),
        tree(0).root(),
        root,
        lacking.root(),
        image,
        batch_digest((&domain, false), 7, skipped, &[ones]),
        batch_digest((&domain, false), 7, based, &[ones, ones, ones]),
        batch_digest((&domain, true), 7, based, &[ones]),
        transcript_digest(b"sender", b"receiver"),
        without,
        live_root(&domain, image, &blobs),
        record_check(),
        join_proof(&[2; 32], &[3; 16], 4),
    ]
}

#[test]
fn digests_are_those_of_spec() {
    let spec = read("docs/SPEC.md").unwrap();
    let rows = spec.lines().skip_while(|line| !line.starts_with("## Appendix B")).filter(|line| line.ends_with("` |"));
    let shown: Vec<&str> = rows.filter_map(|row| row.rsplit('`').nth(1)).collect();
    let proof = Challenge::new(&[2; 32], &[3; 16], &[0; 32]).prove(&[1; 4096]);
    let proof: String = proof.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let ours: Vec<String> = digests().iter().map(Digest::to_string).chain([proof]).collect();
    assert_eq!(shown, ours);
}
