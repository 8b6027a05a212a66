//! Whatever is changed at rest is a miss or is found, and no wrong digest leads to a root (A07, C14, C39).

use super::*;
use crate::manifest::BLOCK;
use crate::sample::{Guest, Home, is_whole};
use crate::{Store, StoreOptions};
use std::fs;

/// A home with one visit of forty pages, and what its files hold.
fn kept() -> (Home, Guest, VisitHead, Vec<u8>) {
    let home = Home::new(None);
    let guest = Guest::new(1, 1, 40);
    let head = guest.keep(&home.store);
    let manifest = fs::read(home.path(&head, "manifest")).unwrap();
    (home, guest, head, manifest)
}

/// Whether a manifest of these bytes is of no use, one way or another.
fn is_a_miss(home: &Home, guest: &Guest, head: &VisitHead, bytes: &[u8]) -> bool {
    fs::write(home.path(head, "manifest"), bytes).unwrap();
    let Some(visit) = home.visit(head) else { return true };
    visit.trees(&guest.hasher()).is_err() || visit.present().is_err()
}

#[test]
fn one_bit_flipped_at_each_of_a_thousand_places_of_a_manifest_is_a_miss() {
    let (home, guest, head, manifest) = kept();
    assert!(!is_a_miss(&home, &guest, &head, &manifest));
    for at in 0..1000 {
        let bit = at * manifest.len() * 8 / 1000 + at % 8;
        let mut bytes = manifest.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(is_a_miss(&home, &guest, &head, &bytes), "bit {bit}");
        let seen = home.store.verify().unwrap();
        assert!(matches!(seen.findings[..], [Finding { fault: Fault::Manifest(_), .. }]), "bit {bit}");
    }
}

#[test]
fn a_manifest_cut_grown_zeroed_or_foreign_is_a_miss() {
    let (home, guest, head, manifest) = kept();
    for len in (0..manifest.len()).step_by(97).chain([BLOCK, 2 * BLOCK, manifest.len() - 1]) {
        assert!(is_a_miss(&home, &guest, &head, &manifest[..len]), "{len}");
    }
    let zeroed = |range: std::ops::Range<usize>| {
        let mut bytes = manifest.clone();
        bytes[range].fill(0);
        bytes
    };
    let parts = [0..8, 0..BLOCK, BLOCK..2 * BLOCK, 2 * BLOCK..manifest.len(), 0..manifest.len()];
    for bytes in parts.into_iter().map(zeroed).chain([[manifest.as_slice(), &[0]].concat(), vec![0x5a; 20_000]]) {
        assert!(is_a_miss(&home, &guest, &head, &bytes));
    }
    assert!(!is_a_miss(&home, &guest, &head, &manifest));
}

#[test]
fn swapped_manifests_are_misses() {
    let (home, guest, head, manifest) = kept();
    let other = Guest::new(1, 2, 40).keep(&home.store);
    let elsewhere = Guest::new(2, 2, 40).keep(&home.store);
    for foreign in [&other, &elsewhere] {
        let bytes = fs::read(home.path(foreign, "manifest")).unwrap();
        assert!(is_a_miss(&home, &guest, &head, &bytes));
    }
    fs::write(home.path(&other, "manifest"), &manifest).unwrap();
    assert!(home.visit(&other).is_none());
}

/// C39: an old manifest with newer pages, or the other way round, costs misses and nothing else.
#[test]
fn pages_of_another_time_are_found_one_by_one() {
    let (home, guest, head, _) = kept();
    let newer = Guest::new(1, 2, 40);
    fs::write(home.path(&head, "img"), &newer.bytes).unwrap();
    let differ = (0..40).filter(|&place| {
        let (region, page) = guest.layout.locate(pagewire_protocol::page::Place(place));
        guest.page(region, page.0) != newer.page(region, page.0)
    });
    let differ = differ.count() as u64;
    let seen = home.store.verify().unwrap();
    let [Finding { fault: Fault::Pages { wrong, kept: 40, .. }, .. }] = seen.findings[..] else { panic!("{seen:?}") };
    assert!(wrong == differ && differ > 0 && differ < 40);
    assert!(!is_whole(&home.visit(&head).unwrap(), &[1; 32]), "and whoever uses them finds them");
    assert_eq!(home.store.repair().unwrap().findings[0].repaired, Repaired::PagesDropped);
    let visit = home.visit(&head).unwrap();
    assert!(is_whole(&visit, &[1; 32]));
    assert_eq!(visit.present().unwrap().count(), 40 - differ);
    assert_eq!(visit.head().sequence, head.sequence);
    assert!(home.store.verify().unwrap().findings.is_empty());
}

#[test]
fn every_flipped_bit_of_an_image_is_found_where_it_is() {
    let (home, guest, head, _) = kept();
    let path = home.path(&head, "img");
    for at in 0..1000usize {
        let place = at % 40;
        let (region, page) = guest.layout.locate(pagewire_protocol::page::Place(place as u32));
        let len = guest.layout.region(region).unwrap().bytes_of(page.0, 1) as usize;
        let byte = guest.layout.file_offset(region, page.0) as usize + at * 37 % len;
        let mut bytes = guest.bytes.clone();
        bytes[byte] ^= 1 << (at % 8);
        fs::write(&path, &bytes).unwrap();
        let seen = home.store.verify().unwrap();
        let [Finding { fault: Fault::Pages { wrong: 1, first, .. }, .. }] = seen.findings[..] else {
            panic!("{seen:?}")
        };
        assert_eq!(first, (region, page));
    }
}

#[test]
fn an_image_of_another_length_is_not_used() {
    let (home, guest, head, _) = kept();
    for len in [0, 1, guest.bytes.len() - 1] {
        fs::write(home.path(&head, "img"), &guest.bytes[..len]).unwrap();
        let visit = home.visit(&head).unwrap();
        assert!(visit.image().is_none() && visit.trees(&guest.hasher()).is_ok());
        assert_eq!(home.store.verify().unwrap().findings[0].fault, Fault::ImageLength);
    }
    assert_eq!(home.store.repair().unwrap().findings[0].repaired, Repaired::Removed);
    assert!(home.store.verify().unwrap().findings.is_empty());
    assert!(!home.path(&head, "img").exists() && home.visit(&head).is_some(), "its digests are still good");
}

#[test]
fn repair_drops_what_is_damaged_and_keeps_what_is_not() {
    let (home, guest, head, manifest) = kept();
    let (good, busy) = (Guest::new(1, 2, 50).keep(&home.store), Guest::new(1, 3, 50).keep(&home.store));
    let mut bytes = manifest.clone();
    bytes[2 * BLOCK + 40] ^= 1;
    fs::write(home.path(&head, "manifest"), &bytes).unwrap();
    let mut pages = fs::read(home.path(&busy, "img")).unwrap();
    pages[4096 + 5] ^= 1;
    fs::write(home.path(&busy, "img"), &pages).unwrap();
    fs::write(home.path(&good, "manifest").with_file_name("notes.txt"), b"?").unwrap();
    let reader = home.visit(&busy).unwrap();
    let seen = home.store.repair().unwrap();
    let done: Vec<Repaired> = seen.findings.iter().map(|finding| finding.repaired).collect();
    assert_eq!(seen.findings.len(), 3);
    assert!(done.contains(&Repaired::Removed) && done.iter().filter(|it| **it == Repaired::Left).count() == 2);
    assert!(home.visit(&head).is_none() && !home.path(&head, "img").exists());
    assert!(is_whole(&home.visit(&good).unwrap(), &[1; 32]));
    drop(reader);
    let seen = Store::open(home.store.path(), StoreOptions::default()).unwrap().repair().unwrap();
    assert!(seen.findings.iter().any(|finding| finding.repaired == Repaired::PagesDropped), "nobody uses it now");
    let _ = guest;
}
