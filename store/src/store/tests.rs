//! What a store keeps it gives back, to whoever shares it, and nothing else.

use crate::sample::{Guest, Home, Sharing, is_whole};
use crate::{Keep, KeepImage, Lineage, Store, StoreError, StoreOptions, VisitHead, VisitId, VisitKind};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::page::{Layout, Place, Region, RegionId};
use pagewire_protocol::tree::DigestTree;
use proptest::prelude::*;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

#[test]
fn gives_back_what_it_kept_from_a_file_or_from_memory() {
    let home = Home::new(None);
    for from_file in [false, true] {
        let guest = Guest::new(1, 7, 2000);
        let head = if from_file {
            home.store.keep(&guest.order(), &guest.trees(), None, Some(KeepImage::File(&guest.file()))).unwrap().head
        } else {
            guest.keep(&home.store)
        };
        let visit = home.visit(&head).unwrap();
        assert!(is_whole(&visit, &guest.lineage.key));
        assert_eq!(
            visit.trees(&guest.hasher()).unwrap().iter_mut().map(|tree| tree.root()).collect::<Vec<_>>(),
            guest.trees().iter_mut().map(|tree| tree.root()).collect::<Vec<_>>()
        );
        assert_eq!(fs::read(home.path(&head, "img")).unwrap(), guest.bytes, "a plain image file");
        assert_eq!((head.kind, head.root, head.pages_kept), (VisitKind::Departed, guest.root(), true));
        assert_eq!(visit.present().unwrap(), PageBitmap::full(guest.layout.pages()));
        for place in [0, 1, 5, 1999] {
            let (region, page) = guest.layout.locate(Place(place));
            assert_eq!(visit.digest(Place(place)).unwrap(), guest.trees()[usize::from(region.0)].leaf(page.0));
        }
        assert_eq!(home.store.visits(&guest.lineage.key).first().map(|head| head.id), Some(head.id));
    }
    assert_eq!(home.store.visits(&[1; 32]).iter().map(|head| head.superseded).collect::<Vec<_>>(), [false, true]);
    assert!(home.store.visits(&[9; 32]).is_empty());
    let reopened = Store::open(home.store.path(), StoreOptions::default()).unwrap();
    assert_eq!(reopened.heads().unwrap().len(), 2);
    assert_eq!(home.files().len(), 4);
}

#[test]
fn pages_that_are_zero_or_not_worth_keeping_are_holes() {
    let home = Home::new(None);
    let guest = Guest::new(1, 7, 4096);
    let mut present = PageBitmap::new(guest.layout.pages());
    present.insert_range(0..200);
    for image in [Some(KeepImage::File(&guest.file())), None] {
        let kept = image.is_some();
        let head = home.store.keep(&guest.order(), &guest.trees(), Some(&present), image).unwrap().head;
        let visit = home.visit(&head).unwrap();
        assert_eq!((visit.present().unwrap() == present, visit.image().is_some(), head.pages_kept), (true, kept, kept));
        assert!(is_whole(&visit, &guest.lineage.key), "all digests are there, and the pages that were worth it");
        let blocks = fs::metadata(home.path(&head, "img")).map_or(0, |info| info.blocks());
        assert!(blocks <= 210 * 8, "{blocks}");
        assert!(head.bytes_on_disk >= blocks * 512);
    }
    let empty =
        Guest { layout: Layout::new(vec![Region { bytes: 1 << 34, ..guest.layout.regions()[0] }]).unwrap(), ..guest };
    let trees = [pagewire_protocol::tree::DigestTree::new(&empty.hasher(), 1 << 22)];
    let root = pagewire_protocol::tree::image_root(&empty.domain(), &empty.layout, &mut trees.clone());
    let mut nothing = |_: RegionId, _: u64, _: &mut [u8]| panic!("zero pages are not asked for");
    let order = empty.order_with(root);
    let head = home.store.keep(&order, &trees, None, Some(KeepImage::Pages(&mut nothing))).unwrap().head;
    assert!(head.bytes_on_disk < 1 << 20, "16 GiB of zeros take {} bytes", head.bytes_on_disk);
    assert!(home.visit(&head).unwrap().trees(&empty.hasher()).is_ok());
}

/// What a large visit's digests would take in memory a host may first have to find.
#[test]
fn digests_are_read_where_they_lie() {
    let home = Home::new(None);
    let mut guest = Guest::new(1, 7, 20_000);
    // A hole in the manifest, which is no digest that a mapping should bring in.
    guest.bytes[10 << 20..20 << 20].fill(0);
    let head = guest.keep(&home.store);
    let manifest = home.path(&head, "manifest");
    let blocks = fs::metadata(&manifest).unwrap().blocks();
    let lies_in_file = |address: usize| {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let of_file = maps.lines().filter(|line| line.contains(manifest.to_str().unwrap()));
        let mut ranges = of_file.filter_map(|line| line.split_once(' ')?.0.split_once('-'));
        let number = |hex: &str| usize::from_str_radix(hex, 16).unwrap();
        ranges.any(|(start, end)| (number(start)..number(end)).contains(&address))
    };
    let mut trees = home.visit(&head).unwrap().trees(&guest.hasher()).unwrap();
    let address = |tree: &DigestTree, index| tree.leaves(index, &mut [[0; 32]; 256]).unwrap().as_ptr().addr();
    assert!(trees[0].is_zero_subtree(15) && [3, 9, 20, 40].iter().all(|&at| lies_in_file(address(&trees[0], at))));
    assert_eq!(fs::metadata(&manifest).unwrap().blocks(), blocks);
    fs::remove_file(&manifest).unwrap();
    let (pages, kept) = (trees[0].pages(), guest.trees());
    assert!((0..pages).all(|page| trees[0].leaf(page) == kept[0].leaf(page)), "whatever becomes of its name");
    trees[0].set(3 * 256 + 1, guest.hasher().zero());
    let changed = address(&trees[0], 3);
    assert!(!lies_in_file(changed), "nothing writes to a manifest");
    drop(trees);
    assert!(!fs::read_to_string("/proc/self/maps").unwrap().contains(manifest.to_str().unwrap()));
}

/// C14: whoever keeps an image of a guest that runs keeps no page under another page's digest.
#[test]
fn pages_written_to_before_they_were_copied_are_left_out() {
    let sharing = Sharing::mount();
    let shared = sharing.as_ref().map(|sharing| tempfile::tempdir_in(sharing.path()).unwrap());
    for (shares, dir) in [(false, Some(tempfile::tempdir().unwrap())), (true, shared)] {
        let Some(home) = dir.map(|dir| Home::below(dir, None)) else { continue };
        let guest = Guest::new(1, 7, 2000);
        // Pages that had bytes, a page of zeros, the first of a region and the last, which is short.
        let written = [1, 2, 3, 400, 601, 1331, 1333, 1999];
        let mut bytes = guest.bytes.clone();
        for place in written {
            let (region, page) = guest.layout.locate(Place(place));
            bytes[guest.layout.file_offset(region, page.0) as usize + 9] ^= 0x40;
        }
        assert!(guest.trees()[0].is_zero(400) && guest.layout.locate(Place(1333)).0 == RegionId(1));
        let path = home.dir.path().join("image");
        fs::write(&path, &bytes).unwrap();
        let image = File::open(&path).unwrap();
        let kept = home.store.keep(&guest.order(), &guest.trees(), None, Some(KeepImage::File(&image))).unwrap();
        let visit = home.visit(&kept.head).unwrap();
        let mut present = PageBitmap::full(guest.layout.pages());
        // Pages of zeros are not even read where pages are copied: what is kept of them is right.
        let cloned = kept.changed == 8;
        assert!(cloned || (!shares && kept.changed == 7), "{} pages", kept.changed);
        written.iter().filter(|&&place| cloned || place != 400).for_each(|&place| {
            present.remove(u64::from(place));
        });
        assert!(visit.present().unwrap() == present, "shares blocks: {shares}");
        assert!(is_whole(&visit, &guest.lineage.key));
        for place in written {
            let (region, page) = guest.layout.locate(Place(place));
            let mut bytes = [1; 4096];
            visit.read(region, page.0, &mut bytes).unwrap();
            assert_eq!(bytes, [0; 4096], "nothing of what was written stays");
        }
    }
}

#[test]
fn keeps_nothing_that_contradicts_itself() {
    let home = Home::new(None);
    let (guest, other) = (Guest::new(1, 1, 100), Guest::new(1, 1, 99));
    let wrong = home.store.keep(&guest.order(), &other.trees(), None, None);
    assert!(matches!(wrong, Err(StoreError::Misuse(_))));
    let wrong = guest.try_keep(&home.store, Some(&PageBitmap::new(3)));
    assert!(matches!(wrong, Err(StoreError::Misuse(_))));
    let short = tempfile::tempfile().unwrap();
    let wrong = home.store.keep(&guest.order(), &guest.trees(), None, Some(KeepImage::File(&short)));
    assert!(matches!(wrong, Err(StoreError::Io { .. })), "{wrong:?}");
    let head = guest.keep(&home.store);
    assert_eq!(home.files().len(), 2, "what failed left nothing");
    let foreign = Guest::new(2, 1, 100);
    assert!(matches!(home.visit(&head).unwrap().trees(&foreign.hasher()), Err(StoreError::Misuse(_))));
}

#[test]
fn finds_the_lineage_that_a_name_had_last() {
    let home = Home::new(None);
    let name = |name| ImageName::new(name).unwrap();
    assert_eq!(home.store.lineage_named(&name("vm.img")).unwrap(), None);
    for who in [3, 2] {
        Guest::new(who, 1, 10).keep(&home.store);
    }
    let guest = Guest::new(5, 1, 10);
    let order = Keep { name: name("other"), ..guest.order() };
    home.store.keep(&order, &guest.trees(), None, None).unwrap();
    assert_eq!(home.store.lineage_named(&name("other")).unwrap(), Some(guest.lineage));
    // Made in the same second in two domains: one of the two, whole.
    let found = home.store.lineage_named(&name("vm.img")).unwrap().unwrap();
    assert_eq!(found.id, LineageId([found.key[0]; 16]));
    assert!(!format!("{found:?}").contains("key"), "a key reaches no log");
    assert_ne!(Lineage::random().unwrap(), Lineage::random().unwrap());
}

#[test]
fn a_consumed_visit_is_out_of_the_store_before_anybody_writes_to_it() {
    let home = Home::new(None);
    let guest = Guest::new(1, 1, 100);
    let head = guest.keep(&home.store);
    let into = File::open(home.dir.path()).unwrap();
    fs::write(home.dir.path().join("taken"), b"").unwrap();
    let mut visit = home.visit(&head).unwrap();
    assert!(visit.consume(into.as_fd(), "taken".as_ref()).is_err(), "never over anything");
    assert!(is_whole(&visit, &guest.lineage.key) && home.visit(&head).is_some(), "the visit is intact");
    let image = visit.consume(into.as_fd(), "vm".as_ref()).unwrap().unwrap();
    assert!(visit.image().is_none() && visit.trees(&guest.hasher()).is_ok());
    assert!(home.visit(&head).is_none() && home.store.heads().unwrap().is_empty() && home.files().is_empty());
    image.write_all_at(b"new", 0).unwrap();
    assert_eq!(&fs::read(home.dir.path().join("vm")).unwrap()[..3], b"new");
    assert!(visit.consume(into.as_fd(), "again".as_ref()).unwrap().is_none());
}

#[test]
fn consuming_a_visit_that_somebody_has_open_leaves_it_intact() {
    let home = Home::new(None);
    let guest = Guest::new(1, 1, 100);
    let head = guest.keep(&home.store);
    let other = Store::open(home.store.path(), StoreOptions::default()).unwrap();
    let reader = other.open_visit(&head).unwrap().unwrap();
    let mut visit = home.visit(&head).unwrap();
    let into = File::open(home.dir.path()).unwrap();
    assert!(visit.consume(into.as_fd(), "vm".as_ref()).unwrap().is_none());
    assert!(is_whole(&reader, &guest.lineage.key) && is_whole(&visit, &guest.lineage.key));
    drop(reader);
    // The attempt did not cost the first one its own lock.
    assert_eq!(other.remove(head.id).unwrap(), crate::Removed::Busy);
    let elsewhere = File::open("/proc").unwrap();
    assert!(visit.consume(elsewhere.as_fd(), "vm".as_ref()).unwrap().is_none(), "another file system");
    assert!(visit.consume(into.as_fd(), "vm".as_ref()).unwrap().is_some());
}

#[test]
fn a_rejected_visit_is_gone_for_all() {
    let home = Home::new(None);
    let guest = Guest::new(1, 1, 100);
    let head = guest.keep(&home.store);
    let mut reader = home.visit(&head).unwrap();
    home.visit(&head).unwrap().reject().unwrap();
    assert!(home.visit(&head).is_none() && home.files().is_empty());
    assert!(is_whole(&reader, &guest.lineage.key), "who has it open reads on");
    let into = File::open(home.dir.path()).unwrap();
    assert!(reader.consume(into.as_fd(), "vm".as_ref()).unwrap().is_none());
    reader.reject().unwrap();
}

#[test]
fn files_and_folders_are_closed_to_others() {
    let home = Home::new(None);
    let head = Guest::new(1, 1, 100).keep(&home.store);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(home.store.path()), 0o700);
    assert_eq!(mode(&home.store.path().join("domains")), 0o700);
    assert_eq!(mode(home.path(&head, "img").parent().unwrap()), 0o700);
    for file in [home.path(&head, "img"), home.path(&head, "manifest"), home.store.path().join("lock")] {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
}

#[test]
fn an_existing_store_can_be_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let existing = StoreOptions { budget: None, existing: true };
    assert!(matches!(Store::open(&path, existing), Err(StoreError::Io { .. })));
    assert!(!path.exists());
    Store::open(&path, StoreOptions::default()).unwrap();
    Store::open(&path, existing).unwrap();
}

/// Four threads with a handle each, on one store: what is listed is whole, and nothing is lost.
#[test]
fn many_handles_share_one_store() {
    let home = Home::new(None);
    let work = |who: u8| {
        let store = Store::open(home.store.path(), StoreOptions { budget: Some(400 << 10), existing: false }).unwrap();
        let into = File::open(home.dir.path()).unwrap();
        for round in 0..12u8 {
            let guest = Guest::new(who % 2 + 1, round, 60);
            guest.keep(&store);
            for head in store.heads().unwrap() {
                let Some(mut visit) = store.open_visit(&head).unwrap() else { continue };
                assert!(is_whole(&visit, &{ *visit.key() }));
                if round % 4 == who {
                    visit.consume(into.as_fd(), format!("{who}-{round}-{}", head.id).as_ref()).unwrap();
                }
            }
            store.prune().unwrap();
            Store::open(home.store.path(), StoreOptions::default()).unwrap();
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|who| drop(scope.spawn(move || work(who)))));
    assert!(home.store.verify().unwrap().findings.is_empty());
    let heads = home.store.heads().unwrap();
    let files = heads.iter().map(|head| 1 + usize::from(head.pages_kept)).sum::<usize>();
    assert_eq!(home.files().len(), files, "no leftovers");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// The slow twin is a list of what was kept.
    #[test]
    fn agrees_with_a_list(ops in proptest::collection::vec((0u8..6, 1u8..4, any::<u8>(), 1u64..40), 1..24)) {
        let mut home = Home::new(None);
        let mut twin: Vec<(u8, VisitId, Guest, PageBitmap)> = Vec::new();
        for (op, who, seed, pages) in ops {
            match op {
                0..4 => {
                    let guest = Guest::new(who, seed, pages);
                    let mut present = PageBitmap::new(guest.layout.pages());
                    present.insert_range(0..u64::from(seed) % 40);
                    let head = guest.try_keep(&home.store, Some(&present)).unwrap();
                    twin.insert(0, (who, head.id, guest, present));
                }
                4 if !twin.is_empty() => {
                    let (_, id, ..) = twin.remove(usize::from(seed) % twin.len());
                    prop_assert_eq!(home.store.remove(id).unwrap(), crate::Removed::Yes);
                    prop_assert_eq!(home.store.remove(id).unwrap(), crate::Removed::Unknown);
                }
                _ => home.store = Store::open(home.store.path(), StoreOptions::default()).unwrap(),
            }
            for who in 1..4 {
                let heads: Vec<VisitHead> = home.store.visits(&[who; 32]);
                let ids: Vec<VisitId> = heads.iter().map(|head| head.id).collect();
                let expected: Vec<VisitId> = twin.iter().filter(|it| it.0 == who).map(|it| it.1).collect();
                prop_assert_eq!(ids, expected);
            }
        }
        for (who, id, guest, present) in &twin {
            let head = home.store.visits(&[*who; 32]).into_iter().find(|head| head.id == *id).unwrap();
            let visit = home.visit(&head).unwrap();
            prop_assert!(is_whole(&visit, &guest.lineage.key));
            prop_assert_eq!(&visit.present().unwrap(), present);
            prop_assert_eq!((head.root, &head.layout, head.lineage), (guest.root(), &guest.layout, guest.lineage.id));
            let _ = visit.digest(Place(0)).unwrap();
        }
    }
}

#[test]
fn of_two_guests_with_one_name_the_one_kept_last_is_meant_within_a_second_too() {
    let home = Home::new(None);
    for who in [9, 1, 5, 2] {
        Guest::new(who, 7, 40).keep(&home.store);
        let name = home.store.heads().unwrap()[0].name.clone();
        assert_eq!(home.store.lineage_named(&name).unwrap().map(|lineage| lineage.id), Some(LineageId([who; 16])));
        // Longer than a tick of the clock that files are stamped with.
        std::thread::sleep(std::time::Duration::from_millis(15));
    }
}
