//! The index over a domain against a map, against aimed digests, and in its full size.

use super::*;
use crate::sample::{Guest, Home};
use crate::{Keep, VisitKind};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::page::{InstallSize, Layout, Region};
use pagewire_protocol::tree::{DigestTree, image_root};
use std::collections::HashMap;
use std::fs::File;
use std::time::Instant;

#[test]
fn finds_exactly_the_kept_pages_of_the_domain() {
    let home = Home::new(None);
    let mut twin: HashMap<Digest, PageBytes> = HashMap::new();
    let foreign = Guest::new(9, 1, 300);
    foreign.keep(&home.store);
    for (seed, every) in [(1u8, 1u64), (2, 2), (3, 5)] {
        let guest = Guest::new(4, seed, 300);
        let mut present = PageBitmap::new(guest.layout.pages());
        (0..present.len()).filter(|place| place % every == 0).for_each(|place| {
            present.insert(place);
        });
        guest.try_keep(&home.store, Some(&present)).unwrap();
        for place in present.runs(0..present.len()).flatten() {
            let (region, page) = guest.layout.locate(Place(place as u32));
            let digest = guest.trees()[usize::from(region.0)].leaf(page.0);
            if digest != guest.hasher().zero() {
                twin.insert(digest, guest.page(region, page.0));
            }
        }
    }
    let pages = DomainPages::new(&home.store, &[4; 32], 11).unwrap();
    assert_eq!(pages.len(), twin.len());
    for (digest, bytes) in &twin {
        let mut read = [0; 4096];
        pages.read(pages.find(digest).unwrap(), &mut read).unwrap();
        assert_eq!(&read, bytes);
        // A04: what differs behind the first 64 bits is another page.
        let mut near = *digest;
        near.0[31] ^= 1;
        assert_eq!(pages.find(&near), None);
    }
    let (foreign, guest) = (foreign.trees(), Guest::new(4, 1, 300));
    assert!(
        (0..100).filter(|&page| !foreign[0].is_zero(page)).all(|page| pages.find(&foreign[0].leaf(page)).is_none())
    );
    assert_eq!(pages.find(&guest.hasher().zero()), None, "zero pages are stated, never looked up");
    assert_eq!(pages.find(&Digest::default()), None);
}

/// Run by hand, in release: `cargo test --release -p pagewire-store -- --ignored --nocapture sixteen_million`.
#[test]
#[ignore = "takes a gigabyte of memory and half a gigabyte of disk"]
fn indexes_sixteen_million_pages_in_two_seconds() {
    const PAGES: u64 = 16_000_000;
    let home = Home::new(None);
    let guest = Guest::new(1, 1, 4);
    let layout = Layout::new(vec![Region { bytes: PAGES * 4096, install_size: InstallSize::KIB_4 }]).unwrap();
    let mut trees = vec![DigestTree::new(&guest.hasher(), PAGES)];
    let mut state = 1u64;
    let mut digests = [[0; 32]; 256];
    for subtree in 0..trees[0].subtrees() {
        for word in digests.iter_mut().flat_map(|digest| digest.as_chunks_mut::<8>().0) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *word = (state ^ state >> 29).to_le_bytes();
        }
        trees[0].set_leaves(subtree, &digests);
    }
    let root = image_root(&guest.domain(), &layout, &mut trees);
    let order = Keep { layout: &layout, root, kind: VisitKind::Arrived, ..guest.order() };
    let begin = Instant::now();
    let head = home.store.keep(&order, &trees, None, None).unwrap().head;
    println!("keep (digests only): {:?}", begin.elapsed());
    let sample: Vec<Digest> = (0..PAGES).step_by(16_001).map(|page| trees[0].leaf(page)).collect();
    drop(trees);
    File::create(home.path(&head, "img")).unwrap().set_len(layout.bytes()).unwrap();
    let begin = Instant::now();
    let visit = home.visit(&home.store.visits(&[1; 32])[0]).unwrap();
    visit.trees(&guest.hasher()).unwrap();
    println!("trees with root: {:?}", begin.elapsed());
    let begin = Instant::now();
    let pages = DomainPages::new(&home.store, &[1; 32], 0x1234_5678_9abc_def1).unwrap();
    let took = begin.elapsed();
    println!(
        "{} pages indexed in {took:?}, {:.1} bytes a page",
        pages.len(),
        pages.index.bytes() as f64 / PAGES as f64
    );
    let begin = Instant::now();
    assert!(sample.iter().all(|digest| pages.find(digest).is_some()));
    println!("find: {:?} each", begin.elapsed() / sample.len() as u32);
    assert!(pages.index.bytes() as u64 <= 12 * PAGES);
    assert!(cfg!(debug_assertions) || took.as_secs_f64() < 2.0 * 2.0, "{took:?}");
}
