//! What a store keeps it gives back, to whoever shares it, and nothing else.

use crate::sample::{Guest, Home, is_whole};
use crate::visit::gone_name;
use crate::{KeepImage, Removed, Store, StoreError, StoreOptions, VisitHead, VisitKind};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::page::{Place, RegionId};
use proptest::prelude::*;
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

#[test]
fn gives_back_what_it_kept_from_a_file_or_from_memory() {
    let home = Home::new(None);
    for from_file in [false, true] {
        let guest = Guest::new(1, 7, 2000);
        let head = if from_file {
            let image = Some(KeepImage::File(&guest.file()));
            home.store.keep(&guest.order(), &guest.trees(), None, image.map(|it| it)).unwrap()
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
