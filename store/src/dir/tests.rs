//! Nothing that somebody planted is followed, written through or removed with what it leads to (A08, A09).

use crate::sample::{Guest, Home, is_whole};
use crate::{Repaired, Store, StoreError, StoreOptions};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, mknodat, renameat_with};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

const KINDS: [&str; 5] = ["symlink to a file", "symlink to a folder", "hard link", "folder", "pipe"];

/// Somebody's file and folder, which must stay as they are.
struct Victim {
    dir: PathBuf,
    file: PathBuf,
}

impl Victim {
    fn new(home: &Path) -> Self {
        let dir = home.join("victim");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        let file = dir.join("precious");
        fs::write(&file, b"precious").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        Self { dir, file }
    }

    fn plant(&self, kind: &str, at: &Path) {
        match kind {
            "symlink to a file" => symlink(&self.file, at).unwrap(),
            "symlink to a folder" => symlink(&self.dir, at).unwrap(),
            "hard link" => fs::hard_link(&self.file, at).unwrap(),
            "folder" => fs::create_dir(at).unwrap(),
            _ => mknodat(CWD, at, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap(),
        }
    }

    fn is_untouched(&self) -> bool {
        let names: Vec<_> = fs::read_dir(&self.dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names == ["precious"] && fs::read(&self.file).unwrap() == b"precious"
    }
}

fn refused(result: Result<Store, StoreError>) -> String {
    match result {
        Err(StoreError::Refused { path, why }) => format!("{}: {why}", path.display()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn nothing_planted_in_a_domain_is_followed() {
    for kind in KINDS {
        for suffix in ["manifest", "img", "manifest.new", "img.new", "manifest.gone"] {
            let home = Home::new(None);
            let victim = Victim::new(home.dir.path());
            let (guest, bystander) = (Guest::new(1, 1, 30), Guest::new(1, 2, 40));
            let head = guest.keep(&home.store);
            let whole = bystander.keep(&home.store);
            let at = home.path(&head, suffix);
            let _ = fs::remove_file(&at);
            victim.plant(kind, &at);
            let store = Store::open(home.store.path(), StoreOptions { budget: Some(1 << 30), existing: true }).unwrap();
            assert!(fs::symlink_metadata(&at).is_ok(), "{kind} as {suffix} is left where it is");
            let visit = store.open_visit(&head).unwrap();
            assert_eq!(visit.is_some(), suffix != "manifest", "{kind} as {suffix}");
            assert!(
                visit.is_none_or(|visit| is_whole(&visit, &[1; 32]) && visit.image().is_some() == (suffix != "img"))
            );
            let seen = store.verify().unwrap();
            assert!(seen.findings.iter().any(|finding| finding.path == at), "{kind} as {suffix}: {:?}", seen.findings);
            bystander.keep(&store);
            let repaired = store.repair().unwrap();
            let done = repaired.findings.iter().find(|finding| finding.path == at).unwrap().repaired;
            assert_eq!(done, if kind == "folder" { Repaired::Left } else { Repaired::Removed });
            store.remove(head.id).unwrap();
            store.prune().unwrap();
            assert!(victim.is_untouched(), "{kind} as {suffix}");
            assert!(store.open_visit(&whole).unwrap().is_none_or(|visit| is_whole(&visit, &[1; 32])));
        }
    }
}

#[test]
fn a_planted_folder_lock_or_store_is_refused() {
    for kind in KINDS {
        for name in ["lock", "domains", ""] {
            let home = Home::new(None);
            let victim = Victim::new(home.dir.path());
            let at: PathBuf = home.store.path().join(name).components().collect();
            fs::rename(&at, home.dir.path().join("aside")).unwrap();
            if kind == "folder" && name != "lock" {
                continue;
            }
            victim.plant(kind, &at);
            let said = refused(Store::open(home.store.path(), StoreOptions::default()));
            assert!(said.contains(at.to_str().unwrap()), "{said}");
            if name.is_empty() {
                refused(Store::open(&home.store.path().join(""), StoreOptions::default()));
            }
            assert!(victim.is_untouched());
        }
        let home = Home::new(None);
        let victim = Victim::new(home.dir.path());
        let guest = Guest::new(1, 1, 30);
        let at = home.store.path().join("domains").join(guest.domain().id().to_string());
        victim.plant(kind, &at);
        // The planted folder is one that others can look into.
        assert!(matches!(guest.try_keep(&home.store, None), Err(StoreError::Refused { .. })), "{kind}");
        assert!(home.store.visits(&guest.lineage.key).is_empty() && victim.is_untouched());
        assert_eq!(home.store.verify().unwrap().findings.len(), 1);
    }
}

#[test]
fn others_access_and_others_files_are_refused() {
    for mode in [0o750, 0o701, 0o777, 0o710] {
        let home = Home::new(None);
        fs::set_permissions(home.store.path(), fs::Permissions::from_mode(mode)).unwrap();
        let said = refused(Store::open(home.store.path(), StoreOptions::default()));
        assert!(said.contains("chmod 700"), "{said}");
    }
    let home = Home::new(None);
    let head = Guest::new(1, 1, 30).keep(&home.store);
    fs::set_permissions(home.path(&head, "manifest"), fs::Permissions::from_mode(0o620)).unwrap();
    assert!(home.visit(&head).is_none() && home.store.visits(&[1; 32]).is_empty());
    assert_eq!(home.store.verify().unwrap().findings.len(), 1);
    if std::os::unix::fs::chown(home.path(&head, "img"), Some(1), None).is_err() {
        println!("SKIPPED: giving files away needs root");
        return;
    }
    fs::set_permissions(home.path(&head, "manifest"), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(!home.store.visits(&[1; 32])[0].pages_kept, "another user's image");
    std::os::unix::fs::chown(home.store.path(), Some(1), None).unwrap();
    assert!(refused(Store::open(home.store.path(), StoreOptions::default())).contains("another user"));
}

/// Somebody swaps a folder for a symbolic link and back, as fast as they can, while the store works.
#[test]
fn a_folder_that_flips_leads_nowhere_else() {
    for flipped in ["", "domains", "domains/DOMAIN"] {
        let home = Home::new(None);
        let victim = Victim::new(home.dir.path());
        let guest = Guest::new(1, 1, 12);
        guest.keep(&home.store);
        let name = flipped.replace("DOMAIN", &guest.domain().id().to_string());
        let at: PathBuf = home.store.path().join(name).components().collect();
        let decoy = home.dir.path().join("decoy");
        symlink(&victim.dir, &decoy).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    renameat_with(CWD, &at, CWD, &decoy, RenameFlags::EXCHANGE).unwrap();
                }
            });
            let mut kept = 0;
            for _ in 0..300 {
                // Success or an error, never elsewhere.
                kept += u32::from(guest.try_keep(&home.store, None).is_ok());
                if let Ok(store) = Store::open(home.store.path(), StoreOptions::default()) {
                    let heads = store.heads().unwrap_or_default();
                    for head in heads.iter().skip(2) {
                        let visit = store.open_visit(head).unwrap_or_default();
                        assert!(visit.is_none_or(|visit| is_whole(&visit, &[1; 32])));
                        let _ = store.remove(head.id);
                    }
                }
            }
            done.store(true, Ordering::Relaxed);
            assert!(kept > 0, "{flipped}: something is kept now and then");
        });
        assert!(victim.is_untouched(), "{flipped}");
    }
}
