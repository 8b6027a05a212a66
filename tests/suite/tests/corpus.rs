//! Every committed fuzz input runs through the same function as under the fuzzer (A12), with debug assertions.
//!
//! `PAGEWIRE_RECORD=1` writes the seeds that are made rather than found: golden vectors and the streams of simulated
//! sessions.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

use pagewire_protocol::compress::Compressor;
use pagewire_protocol::frame::{FrameKind, HEADER_BYTES};
use pagewire_protocol::handover::{Handover, Record, RecordKind};
use pagewire_protocol::page::Place;
use pagewire_protocol::trace::TraceParser;
use pagewire_protocol::words::differ;
use pagewire_test_support::fuzz::{TARGETS, fill, first_touches, hand_over, serve, take_over};
use pagewire_test_support::host::Host;
use pagewire_test_support::image::{Image, Mix};
use pagewire_test_support::memory::ImageSink;
use pagewire_test_support::rng::Rng;
use pagewire_test_support::world::{World, WorldConfig};
use std::fs;
use std::path::{Path, PathBuf};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

fn inputs(target: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(corpus(target)).unwrap_or_else(|error| panic!("fuzz/corpus/{target}: {error}"));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn every_input_of_every_target_keeps_the_invariants() {
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        assert!(!inputs.is_empty(), "fuzz/corpus/{name} is empty");
        for path in inputs {
            eprintln!("{}", path.display());
            target(&fs::read(&path).unwrap());
        }
    }
}

/// The made sessions of guests that run get as far as they were made to.
#[test]
fn sessions_of_guests_that_run_reach_their_end() {
    let read = |target: &str, name: &str| fs::read(corpus(target).join(name)).unwrap();
    let kinds = |host: &Host| host.records.iter().map(|record| record.kind).collect::<Vec<_>>();
    for (name, told_to_run, records) in [
        ("whole", 1, &[RecordKind::Gone][..]),
        ("twice", 1, &[RecordKind::Gone]),
        ("gone-first", 1, &[RecordKind::Started]),
        ("silent", 0, &[]),
        ("asked", 0, &[RecordKind::Rejected]),
        ("image-root", 0, &[]),
    ] {
        let host = take_over(&read("live_receiver_session", name));
        assert_eq!((host.told_to_run, kinds(&host).as_slice()), (told_to_run, records), "{name}");
    }
    for (name, told_to_run, records) in [
        ("whole", 0, &[RecordKind::Gone][..]),
        ("twice", 0, &[RecordKind::Gone]),
        ("rejected", 1, &[RecordKind::Returned]),
        ("reject-first", 1, &[RecordKind::Returned]),
        ("started-first", 0, &[RecordKind::Gone]),
        ("done", 1, &[RecordKind::Returned]),
    ] {
        let host = hand_over(&read("live_sender_session", name));
        assert_eq!((host.told_to_run, kinds(&host).as_slice()), (told_to_run, records), "{name}");
    }
}

/// So do those that fill a guest.
#[test]
fn sessions_that_fill_a_guest_reach_their_end() {
    let read = |target: &str, name: &str| fs::read(corpus(target).join(name)).unwrap();
    for (name, expected) in [
        ("whole", (0, true)),
        ("twice", (0, true)),
        ("held", (0, true)),
        ("references", (0, true)),
        ("flawed", (0, true)),
        ("asked", (0, true)),
        ("gone-first", (28, false)),
        ("lost", (18, false)),
    ] {
        assert_eq!(fill(&read("fill_receiver_session", name)), expected, "{name}");
    }
    for (name, expected) in [
        ("whole", (true, true)),
        ("faults", (true, true)),
        ("ahead", (true, true)),
        ("terms", (true, true)),
        ("holds", (true, true)),
        ("early", (false, false)),
        ("other-root", (false, false)),
        ("bitmap", (false, false)),
    ] {
        assert_eq!(serve(&read("fill_sender_session", name)), expected, "{name}");
    }
}

/// Inputs of the session targets with bytes changed, cut out, repeated and taken from others, by seed: what a fuzzer
/// without coverage would find. The long run has more.
#[test]
fn mutated_sessions_keep_the_invariants() {
    let seeds: u64 = std::env::var("PAGEWIRE_SEEDS").map_or(300, |seeds| seeds.parse().unwrap());
    for (name, target) in TARGETS.iter().filter(|(name, _)| name.ends_with("_session")) {
        let known: Vec<Vec<u8>> = inputs(name).iter().map(|path| fs::read(path).unwrap()).collect();
        for seed in 0..seeds {
            let mut rng = Rng::new(seed ^ 0xf022);
            let mut input = known[rng.below(known.len() as u64) as usize].clone();
            for _ in 0..rng.between(1, 6) {
                let at = rng.below(input.len() as u64 + 1) as usize;
                let end = (at + rng.below(12) as usize).min(input.len());
                match rng.below(4) {
                    0 => input[at..end].iter_mut().for_each(|byte| *byte = rng.word() as u8),
                    1 => drop(input.drain(at..end)),
                    2 => drop(input.splice(at..at, input[at..end].to_vec())),
                    _ => {
                        let other = &known[rng.below(known.len() as u64) as usize];
                        let from = rng.below(other.len() as u64) as usize;
                        input.splice(at..end, other[from..].iter().copied());
                    }
                }
            }
            if std::panic::catch_unwind(|| target(&input)).is_err() {
                panic!("{name}, seed {seed}: {input:?}");
            }
        }
    }
}

#[test]
fn every_target_has_its_entry_for_libfuzzer() {
    for (name, _) in TARGETS {
        let entry = corpus("..").join("fuzz_targets").join(format!("{name}.rs"));
        assert!(entry.exists(), "{}", entry.display());
    }
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    digits.chunks(2).map(|pair| u8::try_from(pair[0] * 16 + pair[1]).unwrap()).collect()
}

fn keep(target: &str, name: &str, bytes: &[u8]) {
    fs::create_dir_all(corpus(target)).unwrap();
    fs::write(corpus(target).join(name), bytes).unwrap();
}

fn record_vectors() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../protocol/vectors");
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let bytes = hex(text.split("\n\n").next().unwrap());
        keep("frame", &format!("vector-{name}"), &[&[bytes[4]], &bytes[HEADER_BYTES..]].concat());
        keep("framing", &format!("vector-{name}"), &[&[3], bytes.as_slice()].concat());
        if bytes[4] == FrameKind::PAGES.0 {
            keep("pages", &format!("vector-{name}"), &bytes[HEADER_BYTES..]);
        }
    }
}

fn record_sessions() {
    for seed in 0..4 {
        let mut rng = Rng::new(seed);
        let image = Image::random(12, Mix::MEMORY, &mut rng);
        let mut base = image.clone();
        base.touch(50, Mix::MEMORY, &mut rng);
        let sink = if seed % 2 == 0 { ImageSink::empty(&image) } else { ImageSink::holding(base) };
        let mut config = WorldConfig::new(seed);
        config.record = true;
        let outcome = World::new(&image, &sink, config).run();
        for way in [true, false] {
            let frames: Vec<&Vec<u8>> =
                outcome.recording.iter().filter(|(to, _)| *to == way).map(|(_, bytes)| bytes).collect();
            let stream = frames.iter().flat_map(|bytes| bytes.iter().copied());
            keep("framing", &format!("session-{seed}-{way}"), &[200].into_iter().chain(stream).collect::<Vec<u8>>());
            for (at, bytes) in frames.iter().enumerate().filter(|(_, bytes)| bytes[4] == FrameKind::PAGES.0) {
                keep("pages", &format!("session-{seed}-{at}"), &bytes[HEADER_BYTES..]);
            }
        }
    }
}

/// The golden manifest as it is and as a body to be sealed, and bodies that come near a limit.
fn record_manifests() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../store/vectors/manifest.txt");
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(": ")).take_while(|(at, _)| *at != "1000");
    let header: Vec<u8> = lines.flat_map(|(_, digits)| hex(digits)).collect();
    let body = header[16..16 + usize::from(header[12])].to_vec();
    keep("manifest", "vector", &[&[0], header.as_slice()].concat());
    keep("manifest", "sealed", &[&[1], body.as_slice()].concat());
    keep("manifest", "cut", &[&[1], &body[..body.len() - 1]].concat());
    // Name, kind, number of regions, install size: one byte of each.
    for (name, at) in [("name", 72), ("kind", 112), ("regions", 113), ("install-size", 130), ("pages", 127)] {
        let mut wrong = body.clone();
        wrong[at] ^= 0x40;
        keep("manifest", name, &[&[1], wrong.as_slice()].concat());
    }
}

/// First touches as they are and to be sealed, and such with one field wrong.
fn record_touches() {
    let places: Vec<Place> = [5, 0, 4031, 77].into_iter().map(Place).collect();
    let whole = first_touches(&places);
    let bare = [&[63], &whole[..whole.len() - 32]].concat();
    keep("touches", "whole", &[&[64], whole.as_slice()].concat());
    keep("touches", "cut", &[&[64], &whole[..whole.len() - 1]].concat());
    keep("touches", "sealed", &bare);
    // Version, how many, of which visit, a page that is none, and one that is there twice.
    for (name, at, flip) in [("version", 9, 1), ("places", 13, 1), ("visit", 17, 1), ("page", 35, 1), ("twice", 33, 5)]
    {
        let mut wrong = bare.clone();
        wrong[at] ^= flip;
        keep("touches", name, &wrong);
    }
}

/// A record of each kind as it is and as a body to be checked, and one with a byte wrong in each field.
fn record_records() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../protocol/vectors/ready.txt");
    let ready = hex(fs::read_to_string(path).unwrap().split("\n\n").next().unwrap());
    let handover = Handover::decode(&ready[HEADER_BYTES..]).unwrap();
    for kind in RecordKind::ALL {
        let bytes = Record { kind, handover }.encode();
        keep("record", &format!("{kind:?}").to_lowercase(), &[&[0], bytes.as_slice()].concat());
        keep("record", &format!("{kind:?}-checked").to_lowercase(), &[&[1], &bytes[..160]].concat());
    }
    let body = Record { kind: RecordKind::Handed, handover }.encode();
    for (name, at) in [("magic", 0), ("version", 8), ("kind", 10), ("reserved", 11), ("arbiter", 152), ("tail", 159)] {
        let mut wrong = body[..160].to_vec();
        wrong[at] ^= 0x40;
        keep("record", name, &[&[1], wrong.as_slice()].concat());
    }
}

/// The golden trace as it is and with parts that are checked here, and ones with a byte wrong in each field.
fn record_traces() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../pagewire/vectors/trace.txt");
    let whole = hex(&fs::read_to_string(path).unwrap());
    keep("trace", "vector", &[&[0], whole.as_slice()].concat());
    keep("trace", "cut", &[&[0], &whole[..whole.len() - 1]].concat());
    let (mut parser, mut rest, mut bare) = (TraceParser::default(), whole.as_slice(), vec![1]);
    for at in 0.. {
        let (part, behind) = rest.split_at(parser.wants());
        bare.extend(&part[..part.len() - if at % 2 == 1 { 8 } else { 0 }]);
        parser.part(part).unwrap();
        rest = behind;
        if rest.is_empty() {
            break;
        }
    }
    keep("trace", "checked", &bare);
    // Its header is 32 bytes without the check; the first record is by one run.
    for (name, at) in [
        ("magic", 0),
        ("version", 8),
        ("regions", 10),
        ("page-size", 12),
        ("region", 21),
        ("install-size", 25),
        ("time", 39),
        ("kind", 40),
        ("form", 41),
        ("length", 44),
        ("gap", 48),
        ("run", 52),
    ] {
        let mut wrong = bare.clone();
        wrong[1 + at] ^= 0x40;
        keep("trace", name, &wrong);
    }
}

fn record_operations() {
    let mut compressed = Vec::new();
    let text = [7u8; 8192];
    assert!(Compressor::new().unwrap().compress(&text, 1, &mut compressed));
    keep("decompress", "two-pages", &[&[1], compressed.as_slice()].concat());
    let old: Vec<u8> = (0..8192).map(|at| (at / 8) as u8).collect();
    let mut new = old.clone();
    new[4090..4110].fill(9);
    let mut content = Vec::new();
    assert!(differ(new.as_chunks().0.iter(), &old, 100, &mut content));
    assert!(Compressor::new().unwrap().compress_words(new.as_chunks().0.iter(), &old, &mut compressed));
    keep("decompress", "words", &[&[17], compressed.as_slice()].concat());
    keep("decompress", "words-of-more-pages", &[&[18], compressed.as_slice()].concat());
    keep("decompress", "words-bare", &[&[33], content.as_slice()].concat());
    keep("decompress", "words-cut", &[&[33], &content[..content.len() - 1]].concat());
    content[3] = 1;
    keep("decompress", "words-fewer-than-bits", &[&[33], content.as_slice()].concat());
    // A receiver that is told everything in two frames, the round, the root; a sender that is acknowledged and done.
    let mut whole = vec![0u8, 13, 0, 0, 0, 9];
    whole.extend([0; 11]);
    whole.extend([13, 0, 1, 0, 17]);
    whole.extend([0; 19]);
    let mut twice = whole.clone();
    whole.extend([10, 0, 0, 0, 11, 0, 0, 5, 0, 12]);
    keep("receiver_session", "whole", &whole);
    // The same, and the pages of the second frame again in round 1, which the root closes.
    twice.extend([10, 0, 0, 0, 13, 0, 65, 0, 17]);
    twice.extend([0; 19]);
    twice.extend([10, 0, 0, 64, 11, 0, 64, 5, 0, 12]);
    keep("receiver_session", "rounds", &twice);
    keep("receiver_session", "base", &[1, 5, 0, 13, 0, 0, 0, 200, 0, 0, 5, 0]);
    keep("sender_session", "whole", &[0x20, 5, 0, 10, 0, 0, 0, 9, 0, 0]);
    keep(
        "sender_session",
        "held",
        &[1, 10, 18, 255, 8, 0, 0, 0, 8, 1, 0, 0, 5, 0, 10, 0, 1, 0, 0, 1, 0, 5, 0, 9, 0, 0],
    );
}

/// Sessions of guests that run, as operations: to the end, with words that come too early, twice or are about something
/// else, a receiver that rejects, and a guest that cannot be paused.
fn record_live_operations() {
    // Of each region all pages in one frame, every byte zero: pages that are what they are.
    let pages = |region: u8, count: u8| [vec![14, region, 0, count - 1], vec![0; usize::from(count) + 1]].concat();
    let bring = [pages(0, 10), pages(1, 18), vec![10, 0, 0], vec![12, 0, 12, 0, 12, 0], vec![11, 0, 5, 0]].concat();
    let (commit, gone) = ([13, 1, 0], [13, 4, 0]);
    let receiver = |name: &str, tail: &[u8]| {
        keep("live_receiver_session", name, &[&[0], bring.as_slice(), tail, &[5, 0]].concat());
    };
    receiver("whole", &[commit, gone].concat());
    receiver("twice", &[commit, commit, gone, gone].concat());
    receiver("gone-first", &[gone, commit].concat());
    receiver("other-root", &[13, 1, 205, 9, 13, 1, 0]);
    receiver("silent", &[1, 0, 255, 1, 0, 255]);
    keep("live_receiver_session", "asked", &[0x20, 13, 1, 0, 5, 0, 13, 1, 0, 13, 4, 0]);
    keep("live_receiver_session", "image-root", &[&[0], &bring[..bring.len() - 3], &[1, 5, 0]].concat());
    keep("live_receiver_session", "blob-cut", &[0, 12, 250, 12, 0, 11, 0]);
    // Stated, acknowledged, paused, stated, acknowledged.
    let (step, ack) = ([5, 0], [13, 0, 0]);
    let state = [&step[..], &ack, &step, &[11, 0], &step, &ack, &step].concat();
    let sender = |name: &str, tail: &[u8]| {
        keep("live_sender_session", name, &[&[0], state.as_slice(), tail, &step].concat());
    };
    sender("whole", &[10, 0, 0, 10, 2, 0]);
    sender("twice", &[10, 0, 0, 10, 0, 0, 10, 2, 0, 10, 2, 0]);
    sender("rejected", &[10, 0, 0, 10, 3, 0]);
    sender("reject-first", &[10, 3, 0, 10, 0, 0]);
    sender("started-first", &[10, 2, 0, 10, 0, 0, 10, 2, 0, 10, 3, 0]);
    sender("other-root", &[10, 0, 205, 9]);
    sender("done", &[9, 0]);
    keep("live_sender_session", "not-paused", &[&[0], &step[..], &ack, &step, &[11, 250]].concat());
    keep("live_sender_session", "lost", &[&[0], &step[..], &ack, &step, &[6, 0]].concat());
}

/// Sessions that fill a guest, as operations: to the end, with pages that come twice, wrong or too early, requests, a DONE
/// that comes too early, and terms that are said by the input.
fn record_fill_operations() {
    let pages = |lane: u8, region: u8, count: u8| {
        [vec![14, lane, region, 0, count - 1], vec![0; usize::from(count) + 1]].concat()
    };
    let all = [pages(0, 0, 10), pages(0, 1, 18)].concat();
    let receiver = |name: &str, parts: &[&[u8]]| keep("fill_receiver_session", name, &parts.concat());
    receiver("whole", &[&[0], &all, &[5, 0, 10, 0, 0, 12]]);
    receiver("twice", &[&[0], &pages(1, 0, 10), &all, &[5, 0, 10, 0, 0, 12]]);
    receiver("held", &[&[1, 11, 0, 3, 5, 0], &all, &[5, 0, 12]]);
    receiver("references", &[&[1, 14, 0, 0, 2, 1, 160, 1, 160, 2, 0, 5, 0], &all, &[5, 0, 10, 0, 0, 12]]);
    receiver("flawed", &[&[0, 14, 1, 0, 2, 0, 240, 3, 0, 5, 0], &all, &[5, 0, 12]]);
    receiver("asked", &[&[0xc0, 9, 0, 12, 4, 0, 8, 1, 0, 8, 9, 0, 5, 0], &all, &[5, 0, 10, 0, 0, 12]]);
    receiver("gone-first", &[&[0, 10, 0, 0], &all, &[5, 0, 12]]);
    receiver("lost", &[&[0], &pages(0, 0, 10), &[6, 1]]);
    let sender = |name: &str, parts: &[&[u8]]| keep("fill_sender_session", name, &parts.concat());
    sender("whole", &[&[0, 5, 0, 10, 0, 0, 14]]);
    sender("faults", &[&[0, 11, 0, 2, 0, 3, 1, 1, 16, 2, 4, 0, 5, 0, 10, 0, 0, 14]]);
    sender("ahead", &[&[0, 11, 1, 1, 0, 2, 4, 5, 0, 13, 1, 0, 2, 1, 5, 0, 10, 0, 0, 14]]);
    sender("terms", &[&[0xa0, 8, 0, 250, 0, 9, 0, 0, 5, 0, 10, 0, 0, 14]]);
    sender("holds", &[&[0xa0, 8, 0, 250, 1, 9, 0, 0, 5, 0, 13, 1, 0, 0, 10, 5, 0, 10, 0, 0, 14]]);
    sender("early", &[&[0, 10, 0, 0, 14]]);
    sender("other-root", &[&[0, 5, 0, 10, 1, 0]]);
    sender("bitmap", &[&[0xa0, 8, 0, 250, 0, 9, 0, 201]]);
}

#[test]
fn made_seeds_can_be_made_again() {
    if std::env::var_os("PAGEWIRE_RECORD").is_some() {
        record_vectors();
        record_sessions();
        record_manifests();
        record_records();
        record_traces();
        record_touches();
        record_operations();
        record_live_operations();
        record_fill_operations();
    }
}
