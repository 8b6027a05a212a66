//! One visit: an image that was left on this host, with its manifest.
//!
//! An open visit holds a shared lock on its manifest, so nobody evicts it. Digests are read as they are asked for. What
//! a manifest says is a claim: [`Visit::trees`] proves the digests against the root, pages are for whoever uses them.

use crate::dir::{Folder, Found, allocated, try_lock, unlock};
use crate::error::StoreError;
use crate::manifest::{BLOCK, DIGEST_BYTES, Manifest, ManifestError, VisitId, VisitKind};
use crate::mapped::{Mapped, MappedDigests};
use crate::touches::touches_name;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageHasher, page_digest};
use pagewire_protocol::domain::{DomainId, LineageId};
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::limits::{PAGE_BYTES, SUBTREE_PAGES};
use pagewire_protocol::page::{Layout, Place, RegionId};
use pagewire_protocol::tree::{DigestTree, Leaves, image_root};
use rustix::fs::{SeekFrom, Stat, Timespec, Timestamps, UTIME_NOW, fstat, futimens, seek};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

/// Lowest nodes whose digests are taken at once: 256 KiB of them, which stay in a core's cache until they are hashed.
const PIECE_SUBTREES: u64 = 32;
const SUBTREE_DIGEST_BYTES: usize = SUBTREE_PAGES * 32;

/// The files of a visit by what they are for.
pub(crate) fn manifest_name(id: VisitId) -> OsString {
    format!("{id}.manifest").into()
}

/// The image beside a manifest.
pub(crate) fn image_name(id: VisitId) -> OsString {
    format!("{id}.img").into()
}

/// A manifest that left the index.
pub(crate) fn gone_name(id: VisitId) -> OsString {
    format!("{id}.manifest.gone").into()
}

/// What is known of a visit without opening it.
#[derive(Clone, Debug)]
pub struct VisitHead {
    /// The visit.
    pub id: VisitId,
    /// Its dedup domain.
    pub domain: DomainId,
    /// Its guest.
    pub lineage: LineageId,
    /// What the guest was called.
    pub name: ImageName,
    /// The session that brought or took it.
    pub session: [u8; 16],
    /// How it came to be kept.
    pub kind: VisitKind,
    /// When, in seconds since 1970.
    pub created: u64,
    /// Its number in the order in which this store came to keep its domain's visits.
    pub sequence: u64,
    /// Its regions.
    pub layout: Layout,
    /// The root of its image.
    pub root: Digest,
    /// Whether its pages are kept, or only its digests.
    pub pages_kept: bool,
    /// Bytes that its files take on disk.
    pub bytes_on_disk: u64,
    /// When it was last used, since 1970.
    pub last_used: Duration,
    /// Whether the store has a newer visit of the same guest.
    pub superseded: bool,
}

impl VisitHead {
    fn new(manifest: &Manifest, domain: DomainId, info: &Stat, image: Option<&Stat>) -> Self {
        let seconds = u64::try_from(info.st_mtime).unwrap_or(0);
        let nanos = u32::try_from(info.st_mtime_nsec).unwrap_or(0);
        Self {
            id: manifest.id,
            domain,
            lineage: manifest.lineage,
            name: manifest.name.clone(),
            session: manifest.session,
            kind: manifest.kind,
            created: manifest.created,
            sequence: manifest.sequence,
            layout: manifest.layout.clone(),
            root: manifest.root,
            pages_kept: image.is_some(),
            bytes_on_disk: allocated(info).saturating_add(image.map_or(0, allocated)),
            last_used: Duration::new(seconds, nanos),
            superseded: false,
        }
    }
}

/// A manifest that was judged, its file, and the image beside it.
pub(crate) struct Opened {
    pub(crate) manifest: Manifest,
    pub(crate) head: VisitHead,
    pub(crate) file: File,
    pub(crate) image: Option<File>,
}

/// Opens and judges a visit of `folder`; `None` if it is not there.
pub(crate) fn open(folder: &Folder, domain: DomainId, id: VisitId) -> Result<Option<Opened>, StoreError> {
    let name = manifest_name(id);
    let path = folder.path().join(&name);
    let (file, info) = match folder.open(&name, false)? {
        Found::Nothing => return Ok(None),
        Found::Planted(what) => return Err(StoreError::Damaged { path, why: format!("it is {what}") }),
        Found::File(file, info) => (file, info),
    };
    let damaged = |error: ManifestError| StoreError::Damaged { path: path.clone(), why: error.to_string() };
    let len = u64::try_from(info.st_size).unwrap_or(0);
    if len < BLOCK as u64 {
        return Err(damaged(ManifestError::Length { found: len, expected: BLOCK as u64 }));
    }
    let mut block = [0; BLOCK];
    file.read_exact_at(&mut block, 0).map_err(|error| folder.io(&name, "cannot be read", error))?;
    let manifest = Manifest::decode(&block, len).map_err(damaged)?;
    if manifest.id != id || manifest.domain().id() != domain {
        return Err(damaged(ManifestError::Foreign));
    }
    // An image of another length is not this visit's: its digests are kept, its pages are not.
    let whole = |(_, info): &(File, Stat)| u64::try_from(info.st_size) == Ok(manifest.layout.bytes());
    let image = folder.open(&image_name(id), false)?.file().filter(whole);
    let head = VisitHead::new(&manifest, domain, &info, image.as_ref().map(|(_, info)| info));
    Ok(Some(Opened { manifest, head, file, image: image.map(|(file, _)| file) }))
}

/// An open visit. Until it is dropped nobody evicts it.
#[derive(Debug)]
pub struct Visit {
    root: Arc<Folder>,
    folder: Folder,
    manifest: Manifest,
    head: VisitHead,
    zero: Digest,
    file: File,
    image: Option<File>,
}

impl Visit {
    /// Must be called while the store's lock is held, shared at least.
    pub(crate) fn new(root: Arc<Folder>, folder: Folder, opened: Opened) -> Option<Self> {
        let Opened { manifest, head, file, image } = opened;
        let zero = page_digest(&manifest.domain(), &[0; PAGE_BYTES]);
        try_lock(&file, true).then(|| Self { root, folder, manifest, head, zero, file, image })
    }

    /// What is known of it.
    pub fn head(&self) -> &VisitHead {
        &self.head
    }

    /// The key of its dedup domain. It must reach nobody but peers that are authorised for it.
    pub fn key(&self) -> &[u8; 32] {
        &self.manifest.key
    }

    fn io(&self, what: &'static str, error: io::Error) -> StoreError {
        self.folder.io(&manifest_name(self.head.id), what, error)
    }

    pub(crate) fn damaged(&self, why: impl Into<String>) -> StoreError {
        StoreError::Damaged { path: self.folder.path().join(manifest_name(self.head.id)), why: why.into() }
    }

    /// All its digests, proven against its root. They stay in the file, mapped, where they can.
    ///
    /// # Errors
    /// They cannot be read, or do not lead to the root: then the visit is of no use and should be
    /// [rejected](Self::reject). `hasher` must be of the visit's domain.
    pub fn trees(&self, hasher: &PageHasher) -> Result<Vec<DigestTree>, StoreError> {
        if hasher.domain().id() != self.head.domain {
            return Err(StoreError::Misuse("a visit is read with a hasher of another dedup domain"));
        }
        let mut trees = Vec::new();
        let mut start = 0u64;
        let mapped = Mapped::new(&self.file).ok().map(Arc::new);
        for region in self.head.layout.regions() {
            let mut tree = DigestTree::new(hasher, region.pages());
            self.load(&mut tree, start, mapped.as_ref()).map_err(|error| self.io("cannot be read", error))?;
            start = start.saturating_add(region.pages());
            trees.push(tree);
        }
        // STORE 2.5
        if image_root(hasher.domain(), &self.head.layout, &mut trees) != self.head.root {
            return Err(self.damaged("its digests do not lead to its root"));
        }
        Ok(trees)
    }

    /// Takes the digests of a region whose first page is the image's page `start`.
    fn load(&self, tree: &mut DigestTree, start: u64, mapped: Option<&Arc<Mapped>>) -> io::Result<()> {
        let base = self.manifest.digest_offset(start);
        let first = usize::try_from(base).unwrap_or(usize::MAX);
        mapped.into_iter().for_each(|file| tree.keep(Arc::new(MappedDigests { file: Arc::clone(file), first })));
        let mut subtree = 0;
        while subtree < tree.subtrees() {
            // Holes are digests of zero pages, which a tree has from the start.
            let offset = base.saturating_add(tree.subtree_pages(subtree).start.saturating_mul(DIGEST_BYTES));
            let skipped = next_data(&self.file, offset).saturating_sub(offset) / SUBTREE_DIGEST_BYTES as u64;
            if skipped > 0 {
                subtree = subtree.saturating_add(skipped);
                continue;
            }
            // Up to the next hole: it is not read from the mapping, as on a tmpfs it would be filled.
            let hole = seek(&self.file, SeekFrom::Hole(offset)).unwrap_or(offset);
            let whole = hole.saturating_sub(offset) / SUBTREE_DIGEST_BYTES as u64;
            let end = subtree.saturating_add(whole.clamp(1, PIECE_SUBTREES)).min(tree.subtrees());
            let bytes = (end - subtree).saturating_mul(SUBTREE_DIGEST_BYTES as u64);
            let is_mapped = whole > 0 && mapped.is_some_and(|file| file.populate(offset, bytes).is_ok());
            for index in subtree..end {
                if !is_mapped || !tree.adopt(index) {
                    self.read_subtree(tree, index, base)?;
                }
            }
            // While they are in a core's cache.
            tree.hash_subtrees(subtree..end);
            subtree = end;
        }
        Ok(())
    }

    /// Reads the digests below a lowest node of the region whose digests begin at `base`.
    fn read_subtree(&self, tree: &mut DigestTree, index: u64, base: u64) -> io::Result<()> {
        let pages = tree.subtree_pages(index);
        let mut digests: Leaves = [[0; 32]; SUBTREE_PAGES];
        let count = usize::try_from(pages.end.saturating_sub(pages.start)).unwrap_or(0);
        let used = digests.get_mut(..count).unwrap_or_default().as_flattened_mut();
        self.file.read_exact_at(used, base.saturating_add(pages.start.saturating_mul(DIGEST_BYTES)))?;
        tree.set_leaves(index, &digests);
        Ok(())
    }

    /// The digest of one page, not proven against the root.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn digest(&self, place: Place) -> io::Result<Digest> {
        let mut digest = Digest::default();
        self.file.read_exact_at(&mut digest.0, self.manifest.digest_offset(u64::from(place.0)))?;
        Ok(if digest == Digest::default() { self.zero } else { digest })
    }

    /// The digests from `place` on as they are stored: 32 zero bytes for the zero page.
    pub(crate) fn stored_digests(&self, place: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, self.manifest.digest_offset(place))
    }

    /// The first place at or after `place` whose digest may not be that of the zero page.
    pub(crate) fn next_stored(&self, place: u64) -> u64 {
        let offset = self.manifest.digest_offset(place);
        place.saturating_add(next_data(&self.file, offset).saturating_sub(offset) / DIGEST_BYTES)
    }

    /// Which pages are kept, by their places: a page that is not in here was not worth keeping, a zero page in here is
    /// a hole.
    ///
    /// # Errors
    /// It cannot be read, or is not what was written.
    pub fn present(&self) -> Result<PageBitmap, StoreError> {
        let (offset, _) = self.manifest.present_span();
        let len = self.manifest.digest_offset(0).saturating_sub(offset);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut bytes, offset).map_err(|error| self.io("cannot be read", error))?;
        self.manifest.decode_present(&bytes).map_err(|error| self.damaged(error.to_string()))
    }

    /// Its pages, all regions in a row; `None` if only its digests are kept.
    pub fn image(&self) -> Option<&File> {
        self.image.as_ref()
    }

    /// Reads pages as they are kept, which proves nothing; what lies behind the region's end is zeros.
    ///
    /// # Errors
    /// No pages are kept, or they cannot be read.
    pub fn read(&self, region: RegionId, first: u64, pages: &mut [u8]) -> io::Result<()> {
        let image = self.image.as_ref().ok_or(io::ErrorKind::NotFound)?;
        read_pages(image, &self.head.layout, region, first, pages)
    }

    /// Remembers that it was used just now. That it cannot be remembered is no reason to stop.
    pub fn touch(&self) {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let _ = futimens(&self.file, &Timestamps { last_access: now, last_modification: now });
    }

    /// Takes the image out of the store and makes it `name` in `into`, where nothing of that name may be. The visit
    /// leaves the store, durably, before that, so nobody resolves pages from an image that is written to.
    ///
    /// `None` leaves the visit as it is: somebody else has it open, it has no pages or is gone, or `into` is on
    /// another file system. Syncing `into` is the caller's.
    ///
    /// # Errors
    /// The operating system refused, `name` exists for instance; the visit stays.
    pub fn consume(&mut self, into: BorrowedFd<'_>, name: &OsStr) -> Result<Option<File>, StoreError> {
        let _lock = self.root.lock(false)?;
        let there = fstat(into).map_err(|errno| self.io("its destination cannot be examined", errno.into()))?;
        if Some(there.st_dev) != self.folder.device() {
            return Ok(None);
        }
        let taken = if try_lock(&self.file, false) { self.take_out(into, name) } else { Ok(None) };
        // Asking for the exclusive lock may have lost the shared one, and nobody else opens or evicts meanwhile.
        try_lock(&self.file, true);
        if matches!(taken, Ok(Some(_))) {
            self.image = None;
            self.head.pages_kept = false;
        }
        taken
    }

    fn take_out(&self, into: BorrowedFd<'_>, name: &OsStr) -> Result<Option<File>, StoreError> {
        let id = self.head.id;
        let (manifest, image, gone) = (manifest_name(id), image_name(id), gone_name(id));
        let writable = self.folder.open(&image, true)?.file();
        let Some((writable, _)) = writable.filter(|(file, _)| is_same(self.image.as_ref(), file)) else {
            return Ok(None);
        };
        if !self.is_linked()? {
            return Ok(None);
        }
        // STORE 4.5
        self.folder.rename(&manifest, &gone)?;
        let left = self.folder.sync().and_then(|()| {
            let renamed = self.folder.rename_out(&image, into, name);
            renamed.map_err(|error| self.folder.io(&image, "cannot be taken out of the store", error))
        });
        let Err(error) = left else {
            // The visit is taken already: a name left behind is removed when the store is opened next.
            let _ = (self.folder.unlink(&gone), self.folder.unlink(&touches_name(id)));
            return Ok(Some(writable));
        };
        self.folder.rename(&gone, &manifest)?;
        self.folder.sync()?;
        match error {
            // A mount of the same file system at another place, or one that cannot rename without replacing.
            StoreError::Io { source, .. } if is_elsewhere(&source) => Ok(None),
            error => Err(error),
        }
    }

    /// Whether its name still leads to it.
    pub(crate) fn is_linked(&self) -> Result<bool, StoreError> {
        let found = self.folder.open(&manifest_name(self.head.id), false)?.file();
        Ok(found.is_some_and(|(file, _)| is_same(Some(&self.file), &file)))
    }

    /// Drops a visit whose digests or pages turned out wrong, whoever else has it open: they miss, too.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn reject(self) -> Result<(), StoreError> {
        let _lock = self.root.lock(false)?;
        if self.is_linked()? {
            self.folder.unlink(&manifest_name(self.head.id))?;
            self.folder.sync()?;
            self.folder.unlink(&image_name(self.head.id))?;
            self.folder.unlink(&touches_name(self.head.id))?;
        }
        Ok(())
    }

    pub(crate) fn folder(&self) -> &Folder {
        &self.folder
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        // A process that forks right now has the file open, too: closing alone would leave it locked until that is gone.
        unlock(&self.file);
    }
}

fn is_elsewhere(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS))
}

fn is_same(known: Option<&File>, other: &File) -> bool {
    let identity = |file: &File| fstat(file).ok().map(|info| (info.st_dev, info.st_ino));
    known.and_then(identity).is_some_and(|known| identity(other) == Some(known))
}

/// Reads pages of an image file; what lies behind the region's end is zeros.
pub(crate) fn read_pages(
    image: &File,
    layout: &Layout,
    region: RegionId,
    first: u64,
    pages: &mut [u8],
) -> io::Result<()> {
    let count = (pages.len() / PAGE_BYTES) as u64;
    let bytes = layout.region(region).map_or(0, |region| region.bytes_of(first, count));
    let real = usize::try_from(bytes).unwrap_or(usize::MAX).min(pages.len());
    let (real, padding) = pages.split_at_mut(real);
    padding.fill(0);
    image.read_exact_at(real, layout.file_offset(region, first))
}

/// The first byte at or after `offset` that may be no hole.
pub(crate) fn next_data(file: &File, offset: u64) -> u64 {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data.max(offset),
        Err(Errno::NXIO) => u64::MAX,
        // A file system without holes.
        Err(_) => offset,
    }
}
