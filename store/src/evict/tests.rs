//! What goes first, what never goes, and that one domain's budget is its own.

use super::*;
use crate::sample::{Guest, Home};
use crate::{Store, StoreOptions};
use pagewire_protocol::page::Place;

/// A home with a budget of so many visits of sixty pages each, and a half.
fn home(visits: u64) -> Home {
    let measure = Home::new(None);
    let bytes = Guest::new(1, 0, 60).keep(&measure.store).bytes_on_disk;
    Home::new(Some(bytes * visits + bytes / 2))
}

fn other_lineage(who: u8, lineage: u8, seed: u8) -> Guest {
    let mut guest = Guest::new(who, seed, 60);
    guest.lineage.id.0 = [lineage; 16];
    guest
}

fn ids(home: &Home, who: u8) -> Vec<VisitId> {
    home.store.visits(&[who; 32]).iter().map(|head| head.id).collect()
}

#[test]
fn superseded_visits_go_first_oldest_first() {
    let home = home(3);
    let alone = other_lineage(1, 7, 1).keep(&home.store);
    let old = Guest::new(1, 1, 60).keep(&home.store);
    let newer = Guest::new(1, 2, 60).keep(&home.store);
    let newest = Guest::new(1, 3, 60).keep(&home.store);
    assert_eq!(ids(&home, 1), [newest.id, newer.id, alone.id], "the oldest of all stays, nobody superseded it");
    home.visit(&newer).unwrap().touch();
    let last = Guest::new(1, 4, 60).keep(&home.store);
    assert_eq!(ids(&home, 1), [last.id, newest.id, alone.id], "having been used helps a superseded visit nothing");
    assert_eq!(home.store.remove(old.id).unwrap(), Removed::Unknown);
}

#[test]
fn then_goes_what_was_used_longest_ago() {
    let home = home(3);
    let heads: Vec<VisitHead> = (1..4).map(|lineage| other_lineage(1, lineage, lineage).keep(&home.store)).collect();
    home.visit(&heads[0]).unwrap().touch();
    let last = other_lineage(1, 4, 4).keep(&home.store);
    assert_eq!(ids(&home, 1), [last.id, heads[2].id, heads[0].id]);
}

#[test]
fn what_is_open_stays_and_what_was_just_kept_stays() {
    let home = home(1);
    let first = Guest::new(1, 1, 60).keep(&home.store);
    let reader = home.visit(&first).unwrap();
    let second = Guest::new(1, 2, 60).keep(&home.store);
    assert_eq!(ids(&home, 1), [second.id, first.id], "over the budget, but in use");
    drop(reader);
    let third = Guest::new(1, 3, 60).keep(&home.store);
    assert_eq!(ids(&home, 1), [third.id]);
    let big = Guest::new(1, 4, 600).keep(&home.store);
    assert!(!big.pages_kept && ids(&home, 1).first() == Some(&big.id), "its digests stay, its pages are too many");
    assert!(big.bytes_on_disk > 0 && home.visit(&big).unwrap().trees(&Guest::new(1, 4, 600).hasher()).is_ok());
}

/// STORE 6.4: they come when their visit was kept, and may be what is too much.
#[test]
fn first_touches_evict_others_and_go_before_the_pages_of_their_own_visit() {
    let touched = |pages: u32| (0..pages).map(Place).collect::<Vec<_>>();
    // Half a visit is 130 KiB and more; so many touches are 256 KiB.
    let many = touched(64 << 10);
    let home = home(2);
    let first = other_lineage(1, 1, 1).keep(&home.store);
    let second = other_lineage(1, 2, 2).keep(&home.store);
    assert_eq!(ids(&home, 1), [second.id, first.id]);
    home.store.keep_touches(&second, &touched(2)).unwrap();
    assert_eq!(ids(&home, 1), [second.id, first.id], "there is room for a few");
    home.store.keep_touches(&second, &many).unwrap();
    assert_eq!(ids(&home, 1), [second.id]);
    assert!(home.path(&second, "touches").exists() && home.path(&second, "img").exists());
    let alone = self::home(1);
    let head = other_lineage(1, 1, 1).keep(&alone.store);
    alone.store.keep_touches(&head, &many).unwrap();
    assert!(!alone.path(&head, "touches").exists() && alone.path(&head, "img").exists(), "pages are worth more");
    let tight = Store::open(alone.store.path(), StoreOptions { budget: Some(1), existing: true }).unwrap();
    tight.keep_touches(&head, &touched(2)).unwrap();
    assert!(!alone.path(&head, "touches").exists() && !alone.path(&head, "img").exists());
    assert_eq!(ids(&alone, 1), [head.id]);
}

#[test]
fn a_domain_is_evicted_for_its_own_bytes_only() {
    let home = home(2);
    let quiet = [Guest::new(2, 1, 60).keep(&home.store).id, Guest::new(2, 2, 60).keep(&home.store).id];
    for seed in 0..6 {
        Guest::new(1, seed, 60).keep(&home.store);
    }
    assert_eq!((ids(&home, 1).len(), ids(&home, 2)), (2, vec![quiet[1], quiet[0]]));
}

#[test]
fn damaged_visits_go_before_all_others() {
    let home = home(2);
    let first = other_lineage(1, 1, 1).keep(&home.store);
    let second = other_lineage(1, 2, 2).keep(&home.store);
    std::fs::write(home.path(&second, "manifest"), b"not a manifest").unwrap();
    let third = other_lineage(1, 3, 3).keep(&home.store);
    assert_eq!(ids(&home, 1), [third.id, first.id]);
    assert!(!home.path(&second, "img").exists());
}

#[test]
fn pruning_leaves_the_newest_visit_of_each_guest_and_no_empty_folder() {
    let home = Home::new(None);
    for (lineage, seed) in [(1, 1), (2, 2), (1, 3)] {
        other_lineage(1, lineage, seed).keep(&home.store);
    }
    let lonely = Guest::new(2, 1, 60).keep(&home.store);
    assert_eq!(home.store.prune().unwrap().len(), 1);
    assert_eq!(ids(&home, 1).len(), 2);
    let tight = Store::open(home.store.path(), StoreOptions { budget: Some(1), existing: true }).unwrap();
    let reader = home.visit(&lonely).unwrap();
    assert_eq!((tight.prune().unwrap().len(), tight.heads().unwrap().len()), (2, 1));
    assert_eq!(tight.remove(lonely.id).unwrap(), Removed::Busy);
    drop(reader);
    assert_eq!(tight.remove(lonely.id).unwrap(), Removed::Yes);
    assert_eq!(std::fs::read_dir(home.store.path().join("domains")).unwrap().count(), 0);
}

#[test]
fn a_visit_that_only_a_child_still_has_open_is_not_in_use() {
    let home = home(1);
    let first = Guest::new(1, 1, 60).keep(&home.store);
    let reader = home.visit(&first).unwrap();
    let childs = reader.file().try_clone().unwrap();
    drop(reader);
    let second = Guest::new(1, 2, 60).keep(&home.store);
    assert_eq!(ids(&home, 1), [second.id]);
    drop(childs);
}
