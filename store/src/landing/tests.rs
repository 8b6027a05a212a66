//! Each test makes a folder of its own and looks at it as another process would.

use super::*;
use std::fs as disk;
use std::io::Write;

const SIZE: usize = 300_000;

fn noise(seed: u8) -> Vec<u8> {
    (0..SIZE as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect()
}

fn start(dir: &Path, inplace: bool, fresh: bool) -> Result<Landing, LandingError> {
    Landing::start(dir, "vm".as_ref(), SIZE as u64, LandingOptions { inplace, fresh })
}

fn scan(landing: &mut Landing) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(landing.base_len()).unwrap()];
    for (at, part) in bytes.chunks_mut(70_000).enumerate() {
        landing.read_base(at as u64 * 70_000, part).unwrap();
    }
    bytes
}

fn leftovers(dir: &Path) -> Vec<String> {
    let names = |dir: &Path| {
        disk::read_dir(dir)
            .map_or(vec![], |entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect())
    };
    let mut all = names(dir);
    all.extend(names(&dir.join(WORK)));
    all.sort();
    all
}

#[test]
fn a_new_file_appears_only_when_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut landing = start(dir.path(), false, false).unwrap();
    assert_eq!((landing.base_len(), landing.starts_zero()), (0, true));
    landing.write(100, b"abc").unwrap();
    assert!(!dir.path().join("vm").exists());
    landing.finish().unwrap();
    let bytes = disk::read(dir.path().join("vm")).unwrap();
    assert_eq!((bytes.len(), &bytes[99..104]), (SIZE, &b"\0abc\0"[..]));
    drop(landing);
    assert_eq!(leftovers(dir.path()), ["vm"]);
}

#[test]
fn the_old_file_stays_until_the_new_one_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm");
    disk::write(&path, noise(1)).unwrap();
    let mut landing = start(dir.path(), false, false).unwrap();
    assert_eq!(scan(&mut landing), noise(1));
    landing.write(5, b"new").unwrap();
    landing.zero(4096, 4096).unwrap();
    assert_eq!(disk::read(&path).unwrap(), noise(1));
    landing.finish().unwrap();
    let mut expected = noise(1);
    expected[5..8].copy_from_slice(b"new");
    expected[4096..8192].fill(0);
    assert_eq!(disk::read(&path).unwrap(), expected);
}

#[test]
fn in_place_the_old_file_is_the_partial_until_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm");
    disk::write(&path, noise(1)).unwrap();
    let mut landing = start(dir.path(), true, false).unwrap();
    landing.write(0, b"new").unwrap();
    drop(landing);
    assert_eq!(leftovers(dir.path()), [".pagewire", "vm.partial"]);
    let mut landing = start(dir.path(), true, false).unwrap();
    assert_eq!(&scan(&mut landing)[..3], b"new");
    landing.finish().unwrap();
    drop(landing);
    assert_eq!(leftovers(dir.path()), ["vm"]);
}

#[test]
fn an_old_file_that_was_only_looked_at_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    disk::write(dir.path().join("vm"), noise(1)).unwrap();
    let mut landing = start(dir.path(), true, false).unwrap();
    scan(&mut landing);
    drop(landing);
    assert_eq!(leftovers(dir.path()), ["vm"]);
}

/// A guest that has moved away left no file of its name, only what is kept elsewhere.
#[test]
fn a_partial_over_a_base_that_is_kept_elsewhere_resumes_from_both() {
    let dir = tempfile::tempdir().unwrap();
    let mut kept = tempfile::tempfile().unwrap();
    kept.write_all(&noise(1)).unwrap();
    let over = || {
        let (name, options) = ("vm".as_ref(), LandingOptions::default());
        Landing::start_over(dir.path(), name, SIZE as u64, kept.try_clone().unwrap(), options).unwrap()
    };
    let mut landing = over();
    assert!(landing.is_over());
    landing.read_base(0, &mut vec![0; 100_000]).unwrap();
    landing.write(10, b"new").unwrap();
    drop(landing);
    let mut landing = over();
    let mut expected = noise(1);
    expected[10..13].copy_from_slice(b"new");
    assert!(!landing.is_over() && !landing.base_stays());
    assert_eq!(scan(&mut landing), expected);
}

#[test]
fn a_partial_that_was_copied_half_way_resumes_from_both() {
    let dir = tempfile::tempdir().unwrap();
    disk::write(dir.path().join("vm"), noise(1)).unwrap();
    let mut landing = start(dir.path(), false, false).unwrap();
    let reflinked = landing.old.is_none();
    landing.read_base(0, &mut vec![0; 100_000]).unwrap();
    landing.write(10, b"new").unwrap();
    drop(landing);
    let mut landing = start(dir.path(), false, false).unwrap();
    assert_eq!(landing.copied, if reflinked { SIZE as u64 } else { 100_000 });
    let mut expected = noise(1);
    expected[10..13].copy_from_slice(b"new");
    assert_eq!(scan(&mut landing), expected);
    landing.finish().unwrap();
    assert_eq!(disk::read(dir.path().join("vm")).unwrap(), expected);
}

#[test]
fn parts_of_the_base_that_are_replaced_need_not_be_read() {
    let dir = tempfile::tempdir().unwrap();
    disk::write(dir.path().join("vm"), noise(1)).unwrap();
    let mut landing = start(dir.path(), false, false).unwrap();
    let mut part = vec![0; 50_000];
    // The front, something in the middle, and the end are only written.
    landing.read_base(50_000, &mut part).unwrap();
    assert_eq!(part, noise(1)[50_000..100_000]);
    landing.write(0, &[7; 50_000]).unwrap();
    landing.read_base(200_000, &mut part).unwrap();
    assert_eq!(part, noise(1)[200_000..250_000]);
    landing.write(100_000, &[8; 100_000]).unwrap();
    landing.write(250_000, &[9; 50_000]).unwrap();
    landing.read_old(100_000, &mut part).unwrap();
    assert_eq!(part, noise(1)[100_000..150_000]);
    landing.finish().unwrap();
    let mut expected = noise(1);
    expected[..50_000].fill(7);
    expected[100_000..200_000].fill(8);
    expected[250_000..].fill(9);
    assert_eq!(disk::read(dir.path().join("vm")).unwrap(), expected);
}

#[test]
fn fresh_takes_nothing_but_may_reuse_the_old_files_space() {
    let dir = tempfile::tempdir().unwrap();
    disk::write(dir.path().join("vm"), noise(1)).unwrap();
    let landing = start(dir.path(), true, true).unwrap();
    assert_eq!((landing.base_len(), landing.starts_zero()), (0, false));
    drop(landing);
    let mut landing = start(dir.path(), false, true).unwrap();
    assert_eq!((landing.base_len(), landing.starts_zero()), (0, true));
    landing.finish().unwrap();
    assert_eq!(disk::read(dir.path().join("vm")).unwrap(), vec![0; SIZE]);
}

#[test]
fn a_shorter_or_longer_old_file_gets_the_new_length() {
    for old in [10, SIZE + 5000] {
        for inplace in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            disk::write(dir.path().join("vm"), vec![7; old]).unwrap();
            let mut landing = start(dir.path(), inplace, false).unwrap();
            assert_eq!(landing.base_len(), old.min(SIZE) as u64);
            scan(&mut landing);
            landing.finish().unwrap();
            let mut expected = vec![7; old.min(SIZE)];
            expected.resize(SIZE, 0);
            assert_eq!(disk::read(dir.path().join("vm")).unwrap(), expected);
        }
    }
}

#[test]
fn rejects_directories_links_and_a_second_session() {
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    disk::write(&victim, b"mine").unwrap();
    std::os::unix::fs::symlink(&victim, dir.path().join("vm")).unwrap();
    assert!(start(dir.path(), true, false).unwrap_err().to_string().contains("a symbolic link"));
    disk::remove_file(dir.path().join("vm")).unwrap();
    disk::create_dir(dir.path().join("vm")).unwrap();
    assert!(start(dir.path(), false, false).unwrap_err().to_string().contains("a directory"));
    disk::remove_dir(dir.path().join("vm")).unwrap();
    disk::write(dir.path().join("vm"), noise(1)).unwrap();
    for (first, second) in [(false, true), (true, false), (true, true), (false, false)] {
        let one = start(dir.path(), first, false).unwrap();
        assert!(matches!(start(dir.path(), second, false), Err(LandingError::Busy { .. })));
        drop(one);
    }
    assert_eq!(disk::read(&victim).unwrap(), b"mine");
}

#[test]
fn rejects_a_work_folder_that_others_control() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), dir.path().join(WORK)).unwrap();
    assert!(matches!(start(dir.path(), false, false), Err(LandingError::WorkFolder { .. })));
    disk::remove_file(dir.path().join(WORK)).unwrap();
    disk::create_dir(dir.path().join(WORK)).unwrap();
    disk::set_permissions(dir.path().join(WORK), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    assert!(matches!(start(dir.path(), false, false), Err(LandingError::WorkFolder { .. })));
    assert_eq!(leftovers(elsewhere.path()), [""; 0]);
}

#[test]
fn a_partial_that_is_a_link_is_refused_and_its_target_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    disk::write(&victim, b"mine").unwrap();
    disk::create_dir(dir.path().join(WORK)).unwrap();
    disk::set_permissions(dir.path().join(WORK), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    std::os::unix::fs::symlink(&victim, dir.path().join(WORK).join("vm.partial")).unwrap();
    assert!(start(dir.path(), false, false).is_err());
    assert_eq!(disk::read(&victim).unwrap(), b"mine");
}

#[test]
fn fills_a_given_file_without_replacing_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ram");
    assert!(Landing::into_file(&path, SIZE as u64, false).is_err(), "it must exist");
    disk::write(&path, noise(1)).unwrap();
    assert!(matches!(Landing::into_file(&path, 5, false), Err(LandingError::Size { .. })));
    let held = File::open(&path).unwrap();
    let mut landing = Landing::into_file(&path, SIZE as u64, false).unwrap();
    landing.write(0, b"new").unwrap();
    landing.finish().unwrap();
    let mut bytes = [0; 3];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"new");
}

#[test]
fn landings_in_one_folder_start_while_others_come_to_their_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let dropped = |name: &str| {
        for _ in 0..2000 {
            Landing::start(path, name.as_ref(), 1, LandingOptions::default()).unwrap();
        }
    };
    let taken = |name: &str| {
        for _ in 0..2000 {
            let take = |folder: BorrowedFd<'_>, partial: &OsStr| {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
                fs::openat(folder, partial, flags, Mode::RUSR | Mode::WUSR).is_ok()
            };
            let landing = Landing::start_on(path, name.as_ref(), 1, take).unwrap();
            drop(landing.expect("a folder that was gone is made again"));
            disk::remove_file(path.join(WORK).join(partial_name(name.as_ref()))).unwrap();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| dropped("a"));
        scope.spawn(|| dropped("b"));
        scope.spawn(|| taken("c"));
        scope.spawn(|| taken("d"));
    });
    drop(start(path, false, false).unwrap());
    assert_eq!(leftovers(path), [""; 0]);
}
