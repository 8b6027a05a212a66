//! C38, C13: a run of the store cut before every single change, and with every single change refused.
//!
//! A recorder sees each change before it is made. Replayed up to any point, a store opens, everything it lists is
//! whole, and nothing else is left, also when the power went and took along what was not synced. A visit that was
//! reported as kept is there in every such world.

use crate::dir::{Change, Watch};
use crate::sample::{Guest, Home, is_whole};
use crate::{Store, StoreError, StoreOptions, VisitId};
use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// A change, kept.
#[derive(Clone, Debug)]
enum Step {
    MakeFolder(PathBuf),
    RemoveFolder(PathBuf),
    SyncFolder(PathBuf),
    Create(PathBuf),
    SetLen(PathBuf, u64),
    Write(PathBuf, u64, Vec<u8>),
    Punch(PathBuf, u64, u64),
    Sync(PathBuf),
    Rename(PathBuf, PathBuf),
    /// Left the store, by whichever way.
    Gone(PathBuf),
    /// The store said that this visit is kept.
    Kept(VisitId),
    /// From here on it may go.
    MayGo(VisitId),
}

#[derive(Debug, Default)]
struct Recorder {
    steps: Mutex<Vec<Step>>,
    /// Which change is refused, and how.
    refuse: Option<(usize, io::ErrorKind)>,
}

impl Recorder {
    fn note(&self, step: Step) {
        self.steps.lock().unwrap().push(step);
    }
}

impl Watch for Recorder {
    fn before(&self, change: &Change<'_>) -> io::Result<()> {
        let own = Path::to_path_buf;
        let step = match change {
            // Blocks that are shared show in no log: the store has to copy here.
            Change::Clone => return Err(io::ErrorKind::Unsupported.into()),
            Change::MakeFolder(path) => Step::MakeFolder(own(path)),
            Change::RemoveFolder(path) => Step::RemoveFolder(own(path)),
            Change::SyncFolder(path) => Step::SyncFolder(own(path)),
            Change::Create(path) => Step::Create(own(path)),
            Change::SetLen(path, len) => Step::SetLen(own(path), *len),
            Change::Write(path, offset, bytes) => Step::Write(own(path), *offset, bytes.to_vec()),
            Change::Punch(path, offset, len) => Step::Punch(own(path), *offset, *len),
            Change::Sync(path) => Step::Sync(own(path)),
            Change::Rename(from, to) => Step::Rename(own(from), own(to)),
            Change::RenameOut(path) | Change::Unlink(path) => Step::Gone(own(path)),
        };
        let at = self.steps.lock().unwrap().len();
        self.note(step);
        self.refuse.filter(|(refused, _)| *refused == at).map_or(Ok(()), |(_, kind)| Err(kind.into()))
    }
}

/// Everything that changes a store, once: keep, evict, supersede, repair, consume, reject, remove.
fn run(home: &Path, recorder: &Arc<Recorder>) -> Result<(), StoreError> {
    let measured = 70 << 12;
    let options = StoreOptions { budget: Some(measured), existing: false };
    let store = Store::open_watched(&home.join("store"), options, Some(Arc::clone(recorder) as Arc<dyn Watch>))?;
    let kept = |guest: &Guest| {
        let head = guest.try_keep(&store, None)?;
        recorder.note(Step::Kept(head.id));
        Ok::<_, StoreError>(head)
    };
    let may_go = |id| recorder.note(Step::MayGo(id));
    let first = kept(&Guest::new(1, 1, 30))?;
    let other = kept(&Guest::new(2, 1, 20))?;
    // The third visit of a guest is one too many for the budget.
    may_go(first.id);
    let second = kept(&Guest::new(1, 2, 30))?;
    let third = kept(&Guest::new(1, 3, 30))?;
    may_go(second.id);
    let image = home.join(format!("store/domains/{}/{}.img", third.domain, third.id));
    File::options().write(true).open(image).and_then(|image| image.write_all_at(&[0xee], 4096)).unwrap();
    store.repair()?;
    may_go(other.id);
    let mut visit = store.open_visit(&other)?.unwrap();
    let taken = visit.consume(File::open(home).unwrap().as_fd(), "taken".as_ref())?;
    assert!(taken.is_some());
    may_go(third.id);
    store.open_visit(&third)?.unwrap().reject()?;
    let last = kept(&Guest::new(1, 4, 10))?;
    may_go(last.id);
    store.remove(last.id)?;
    Ok(())
}

/// A file: as it is, and as it was when it was synced.
#[derive(Clone, Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
}

/// What of a run is on disk after the power went.
#[derive(Clone, Copy, Debug)]
enum World {
    /// Everything: only the process died.
    Killed,
    /// Bytes that were not synced are zeros.
    Zeroed,
    /// Files have the lengths and bytes that were synced.
    Unsynced,
    /// And folders the names that were synced.
    NamesLost,
}

#[derive(Default)]
struct Disk {
    folders: Vec<PathBuf>,
    inodes: Vec<Inode>,
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
}

impl Disk {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::MakeFolder(path) => self.folders.push(path.clone()),
            Step::RemoveFolder(path) => {
                if !self.names.keys().any(|name| name.starts_with(path)) {
                    self.folders.retain(|folder| folder != path);
                }
            }
            Step::SyncFolder(path) => {
                self.durable_names.retain(|name, _| name.parent() != Some(path));
                let inside = self.names.iter().filter(|(name, _)| name.parent() == Some(path));
                self.durable_names.extend(inside.map(|(name, inode)| (name.clone(), *inode)));
            }
            Step::Create(path) => {
                self.names.insert(path.clone(), self.inodes.len());
                self.inodes.push(Inode::default());
            }
            Step::SetLen(path, len) => self.inode(path).now.resize(*len as usize, 0),
            Step::Write(path, offset, bytes) => {
                let (start, inode) = (*offset as usize, self.inode(path));
                let len = inode.now.len().max(start + bytes.len());
                inode.now.resize(len, 0);
                inode.now[start..start + bytes.len()].copy_from_slice(bytes);
            }
            Step::Punch(path, offset, len) => {
                self.inode(path).now[*offset as usize..(*offset + *len) as usize].fill(0);
            }
            Step::Sync(path) => {
                let inode = self.inode(path);
                inode.durable = inode.now.clone();
            }
            Step::Rename(from, to) => {
                let inode = self.names.remove(from).unwrap();
                self.names.insert(to.clone(), inode);
            }
            Step::Gone(path) => drop(self.names.remove(path)),
            Step::Kept(_) | Step::MayGo(_) => {}
        }
    }

    fn inode(&mut self, path: &Path) -> &mut Inode {
        &mut self.inodes[self.names[path]]
    }

    /// Makes this disk's files below `to`, which stands for `from`.
    fn write(&self, world: World, from: &Path, to: &Path) {
        let folder = |path: &Path| DirBuilder::new().mode(0o700).recursive(true).create(path).unwrap();
        folder(to);
        let there = |path: &Path| to.join(path.strip_prefix(from).unwrap());
        self.folders.iter().for_each(|path| folder(&there(path)));
        let names = if matches!(world, World::NamesLost) { &self.durable_names } else { &self.names };
        for (name, inode) in names.iter().filter(|(name, _)| name.parent().is_some_and(|dir| there(dir).exists())) {
            let inode = &self.inodes[*inode];
            let mut bytes = if matches!(world, World::Killed) { inode.now.clone() } else { inode.durable.clone() };
            if matches!(world, World::Zeroed) {
                bytes.resize(inode.now.len(), 0);
            }
            let file = File::options().write(true).create_new(true).mode(0o600).open(there(name)).unwrap();
            file.write_all_at(&bytes, 0).unwrap();
        }
    }
}

/// Opens what is left, and looks at all of it.
fn judge(home: &Home, must: &[VisitId], what: &str) {
    let heads = home.store.heads().unwrap();
    for head in &heads {
        let visit = home.visit(head).unwrap_or_else(|| panic!("{what}: {head:?} cannot be opened"));
        assert!(is_whole(&visit, visit.key()), "{what}: {head:?}");
    }
    let files: usize = heads.iter().map(|head| 1 + usize::from(head.pages_kept)).sum();
    assert_eq!(home.files().len(), files, "{what}: leftovers {:?}", home.files());
    for id in must {
        assert!(heads.iter().any(|head| head.id == *id), "{what}: {id} was kept and is lost");
    }
}

fn reopened(dir: tempfile::TempDir, what: &str) -> Home {
    let store = Store::open(&dir.path().join("store"), StoreOptions::default());
    Home { store: store.unwrap_or_else(|error| panic!("{what}: {error}")), dir }
}

#[test]
fn cut_anywhere_a_store_opens_and_what_it_lists_is_whole() {
    let home = tempfile::tempdir().unwrap();
    let recorder = Arc::new(Recorder::default());
    run(home.path(), &recorder).unwrap();
    let steps = recorder.steps.lock().unwrap().clone();
    assert!(steps.len() > 80, "{}", steps.len());
    let mut disk = Disk::default();
    let mut must: Vec<VisitId> = Vec::new();
    for cut in 0..=steps.len() {
        for world in [World::Killed, World::Zeroed, World::Unsynced, World::NamesLost] {
            let dir = tempfile::tempdir().unwrap();
            disk.write(world, &home.path().join("store"), &dir.path().join("store"));
            let what = format!("{world:?} before step {cut}, {:?}", steps.get(cut).map(std::mem::discriminant));
            judge(&reopened(dir, &what), &must, &what);
        }
        let Some(step) = steps.get(cut) else { break };
        disk.apply(step);
        match step {
            Step::Kept(id) => must.push(*id),
            Step::MayGo(gone) => must.retain(|id| id != gone),
            _ => {}
        }
    }
}

#[test]
fn refused_anywhere_a_store_says_so_and_goes_on() {
    let home = tempfile::tempdir().unwrap();
    let recorder = Arc::new(Recorder::default());
    run(home.path(), &recorder).unwrap();
    let changes = recorder.steps.lock().unwrap().len();
    let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::ReadOnlyFilesystem, io::ErrorKind::Other];
    for at in 0..changes {
        let dir = tempfile::tempdir().unwrap();
        let refuse = Some((at, kinds[at % kinds.len()]));
        let recorder = Arc::new(Recorder { refuse, ..Recorder::default() });
        let what = match run(dir.path(), &recorder) {
            Ok(()) => format!("change {at} refused and got over"),
            Err(error @ StoreError::Io { .. }) => format!("change {at} refused: {error}"),
            Err(error) => panic!("change {at}: {error}"),
        };
        let home = reopened(dir, &what);
        // The run damages a page, and may have been refused before it repaired that.
        home.store.repair().unwrap();
        judge(&home, &[], &what);
    }
}

#[test]
fn what_a_crash_left_stays_while_its_writer_lives() {
    let home = Home::new(None);
    let folder = home.store.domains.make_folder("00112233445566778899aabbccddeeff").unwrap();
    let writing = super::Writing::begin(&folder, VisitId([1; 16]), true).unwrap();
    assert_eq!(home.files().len(), 2);
    let again = Store::open(home.store.path(), StoreOptions::default()).unwrap();
    assert_eq!(home.files().len(), 2, "its writer lives");
    drop(writing);
    assert_eq!(home.files().len(), 0, "and takes along what it did not finish");
    let left = |name: &str| home.store.path().join("domains/00112233445566778899aabbccddeeff").join(name);
    let id = VisitId([2; 16]);
    for name in
        [format!("{id}.manifest.new"), format!("{id}.img.new"), format!("{id}.img"), format!("{id}.manifest.gone")]
    {
        File::options().write(true).create_new(true).mode(0o600).open(left(&name)).unwrap();
    }
    drop((again, Store::open(home.store.path(), StoreOptions::default()).unwrap()));
    assert_eq!(home.files().len(), 0, "nobody's");
}
