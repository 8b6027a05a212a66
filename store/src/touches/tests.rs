//! What is kept is given back, what is not what was kept is nothing, and nothing is left of it.

use super::*;
use crate::sample::{Guest, Home};
use crate::verify::{Fault, Repaired};
use crate::{Removed, StoreOptions};
use proptest::prelude::*;
use std::fs;

fn places(numbers: &[u32]) -> Vec<Place> {
    numbers.iter().copied().map(Place).collect()
}

fn of(home: &Home, guest: &Guest) -> Vec<Place> {
    home.store.first_touches(&guest.lineage.key, guest.lineage.id, &guest.layout)
}

#[test]
fn gives_back_the_newest_that_was_kept_of_a_guest() {
    let home = Home::new(None);
    let (guest, other) = (Guest::new(1, 7, 200), Guest::new(2, 7, 200));
    let head = guest.keep(&home.store);
    assert_eq!(of(&home, &guest), []);
    home.store.keep_touches(&head, &places(&[7, 3, 199, 0])).unwrap();
    assert_eq!((of(&home, &guest), of(&home, &other)), (places(&[7, 3, 199, 0]), vec![]));
    home.store.keep_touches(&head, &[]).unwrap();
    home.store.keep_touches(&head, &places(&[5, 6])).unwrap();
    let newer = guest.keep(&home.store);
    assert_eq!(of(&home, &guest), places(&[5, 6]), "of the last visit that has any");
    home.store.keep_touches(&newer, &places(&[9])).unwrap();
    assert_eq!(of(&home, &guest), places(&[9]));
    let reopened = Store::open(home.store.path(), StoreOptions::default()).unwrap();
    assert_eq!(reopened.first_touches(&guest.lineage.key, guest.lineage.id, &guest.layout), places(&[9]));
    assert!(reopened.verify().unwrap().findings.is_empty());
    assert!(reopened.first_touches(&guest.lineage.key, guest.lineage.id, &Guest::new(1, 7, 300).layout).is_empty());
    assert_eq!(home.store.remove(newer.id).unwrap(), Removed::Yes);
    assert_eq!(home.store.remove(head.id).unwrap(), Removed::Yes);
    assert!(home.files().is_empty(), "{:?}", home.files());
    home.store.keep_touches(&head, &places(&[1])).unwrap();
    assert!(home.files().is_empty(), "of a visit that is gone nothing is kept");
}

#[test]
fn of_very_many_the_first_are_kept() {
    let domain = DedupDomain::public();
    let all: Vec<Place> = (0..FIRST_TOUCHES_MAX as u32 + 7).map(Place).collect();
    let bytes = encode(VisitId([1; 16]), &domain, &all);
    assert_eq!(bytes.len(), BYTES_MAX);
    let kept = decode(&bytes, VisitId([1; 16]), &domain, 1 << 30).unwrap();
    assert_eq!(kept, all[..FIRST_TOUCHES_MAX]);
}

/// What was cut, changed or planted is nothing, is named, and goes when it is repaired; what a crash left goes as well.
#[test]
fn what_is_not_what_was_kept_is_nothing_and_can_be_dropped() {
    let home = Home::new(None);
    let guest = Guest::new(1, 7, 200);
    let head = guest.keep(&home.store);
    home.store.keep_touches(&head, &places(&[7, 3, 199, 0])).unwrap();
    let path = home.path(&head, "touches");
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        for wrong in [&changed[..], &whole[..at]] {
            fs::write(&path, wrong).unwrap();
            assert_eq!(of(&home, &guest), [], "byte {at}");
        }
    }
    fs::write(&path, [whole.as_slice(), &[0]].concat()).unwrap();
    assert_eq!(of(&home, &guest), []);
    let found = home.store.verify().unwrap().findings;
    assert!(matches!(found.as_slice(), [finding] if matches!(finding.fault, Fault::Touches(_))), "{found:?}");
    let found = home.store.repair().unwrap().findings;
    assert!(matches!(found.as_slice(), [finding] if finding.repaired == Repaired::Removed), "{found:?}");
    assert!(!path.exists() && home.store.repair().unwrap().findings.is_empty());
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert_eq!(of(&home, &guest), []);
    let found = home.store.repair().unwrap().findings;
    assert!(matches!(found.as_slice(), [finding] if matches!(finding.fault, Fault::Planted(_))), "{found:?}");
    // A draft that nobody holds, and what belongs to no visit.
    fs::write(home.path(&head, "touches.new"), &whole).unwrap();
    home.store.keep_touches(&head, &places(&[4])).unwrap();
    assert_eq!(of(&home, &guest), places(&[4]));
    fs::write(home.path(&head, "touches.new"), &whole).unwrap();
    fs::remove_file(home.path(&head, "manifest")).unwrap();
    Store::open(home.store.path(), StoreOptions::default()).unwrap();
    assert!(home.files().is_empty(), "{:?}", home.files());
}

proptest! {
    /// Sealed or not, what decodes is legal, and is encoded to the same bytes.
    #[test]
    fn whatever_decodes_is_legal(
        numbers in prop::collection::vec(prop_oneof![0u32..64, any::<u32>()], 0..20),
        pages in 0u64..64,
    ) {
        let (visit, domain) = (VisitId([9; 16]), DedupDomain::new(&[4; 32]));
        let bytes = encode(visit, &domain, &places(&numbers));
        let mut unique = numbers.clone();
        unique.sort_unstable();
        unique.dedup();
        let is_legal = unique.len() == numbers.len() && numbers.iter().all(|place| u64::from(*place) < pages);
        let decoded = decode(&bytes, visit, &domain, pages);
        prop_assert_eq!(decoded.is_ok(), is_legal);
        prop_assert!(decoded.is_err() || decoded == Ok(places(&numbers)));
        prop_assert_eq!(decode(&bytes, VisitId([8; 16]), &domain, pages), Err(TouchesError::Foreign));
        prop_assert!(decode(&bytes, visit, &DedupDomain::new(&[5; 32]), pages).is_err());
    }
}
