//! How a visit comes to be kept: beside its name, synced, then renamed.
//!
//! The image is in place and durable before the manifest, whose renaming makes the visit one. The store's lock is held
//! while the drafts are made and while they are renamed, not while pages are copied; drafts are locked all the time, so
//! nobody takes them for leftovers. An image may be written to before and while it is copied: every page is digested as
//! it is kept, and one that is not what its manifest says is left out.

use crate::dir::{Draft, Folder};
use crate::error::StoreError;
use crate::manifest::{BLOCK, Manifest, VisitId, VisitKind};
use crate::verify::wrong_pages;
use crate::visit::{VisitHead, image_name, manifest_name, read_pages};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::domain::LineageId;
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::limits::{PAGE_BYTES, SUBTREE_PAGES};
use pagewire_protocol::page::{Layout, RegionId};
use pagewire_protocol::tree::DigestTree;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes that are read, or written, at once.
const PIECE_BYTES: usize = 1 << 20;
const PIECE_PAGES: u64 = (PIECE_BYTES / PAGE_BYTES) as u64;

/// A guest, and the key of the domain in which its pages are matched: its own, or a named one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Lineage {
    /// Which guest.
    pub id: LineageId,
    /// The domain's key. It must reach nobody but peers that are authorised for it.
    pub key: [u8; 32],
}

impl Lineage {
    /// The lineage of a guest that nobody has kept yet, in a domain of its own.
    ///
    /// # Errors
    /// The operating system has no random bytes.
    pub fn random() -> io::Result<Self> {
        Ok(Self { id: LineageId(random()?), key: random()? })
    }
}

impl std::fmt::Debug for Lineage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lineage").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What is to be kept of an image.
#[derive(Clone, Debug)]
pub struct Keep<'a> {
    /// Whose it is.
    pub lineage: Lineage,
    /// What the guest is called.
    pub name: ImageName,
    /// The session that brought or took it.
    pub session: [u8; 16],
    /// How it comes to be kept.
    pub kind: VisitKind,
    /// Its regions.
    pub layout: &'a Layout,
    /// Its root: of the trees that are kept with it.
    pub root: Digest,
}

/// Reads whole pages of a region from a page on; what lies behind the region's end is zeros.
pub type ReadPages<'a> = &'a mut dyn FnMut(RegionId, u64, &mut [u8]) -> io::Result<()>;

/// Where the pages are.
pub enum KeepImage<'a> {
    /// In a file, all regions in a row. Where the file system can, blocks are shared and nothing is copied.
    File(&'a File),
    /// Wherever this reads them from; up to 1 MiB is asked for at once, in order, zero pages are not.
    Pages(ReadPages<'a>),
}

/// What was kept.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The visit.
    pub head: VisitHead,
    /// Pages that it lacks because they were written to before they were copied.
    pub changed: u64,
}

/// What the pages of an image must be to be kept.
#[derive(Clone, Copy)]
pub(crate) struct Claim<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) trees: &'a [DigestTree],
    pub(crate) hasher: &'a PageHasher,
}

impl std::fmt::Debug for KeepImage<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::File(_) => "File",
            Self::Pages(_) => "Pages",
        })
    }
}

/// `N` random bytes.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0usize;
    while let Some(space) = bytes.get_mut(filled..).filter(|space| !space.is_empty()) {
        let count = rustix::rand::getrandom(space, rustix::rand::GetRandomFlags::empty())?;
        filled = filled.saturating_add(count);
    }
    Ok(bytes)
}

/// Calls `each` for every run of at most `max` kept pages of one region that are not zero: region, first page, count.
pub(crate) fn each_run<E>(
    layout: &Layout,
    trees: &[DigestTree],
    present: &PageBitmap,
    max: u64,
    mut each: impl FnMut(RegionId, u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut start = 0u64;
    for (index, tree) in (0u16..).zip(trees.iter().take(layout.regions().len())) {
        let end = start.saturating_add(tree.pages());
        for run in present.runs(start..end) {
            let mut pages = run.start.saturating_sub(start)..run.end.saturating_sub(start);
            while let Some(found) = next_run(tree, pages.clone(), max) {
                each(RegionId(index), found.start, found.end.saturating_sub(found.start))?;
                pages.start = found.end;
            }
        }
        start = end;
    }
    Ok(())
}

/// The first run of pages in `pages` that are not zero.
fn next_run(tree: &DigestTree, pages: Range<u64>, max: u64) -> Option<Range<u64>> {
    let mut page = pages.start;
    while page < pages.end && tree.is_zero(page) {
        let subtree = page / SUBTREE_PAGES as u64;
        page = if tree.is_zero_subtree(subtree) { tree.subtree_pages(subtree).end } else { page.saturating_add(1) };
    }
    let first = page.min(pages.end);
    let end = pages.end.min(first.saturating_add(max));
    page = first;
    while page < end && !tree.is_zero(page) {
        page = page.saturating_add(1);
    }
    (page > first).then_some(first..page)
}

/// Writes whatever comes in pieces in order, neighbouring ones at once.
struct Pieces<'a> {
    draft: &'a Draft,
    offset: u64,
    bytes: Vec<u8>,
}

impl Pieces<'_> {
    fn push(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let next = self.offset.saturating_add(self.bytes.len() as u64);
        if offset != next || self.bytes.len() >= PIECE_BYTES {
            self.flush()?;
            self.offset = offset;
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        if !self.bytes.is_empty() {
            self.draft.write(self.offset, &self.bytes)?;
            self.bytes.clear();
        }
        Ok(())
    }
}

/// Files on their way into the store. Dropped before the end they go away.
pub(crate) struct Writing<'a> {
    folder: &'a Folder,
    id: VisitId,
    manifest: Draft,
    image: Option<Draft>,
    done: bool,
}

/// A file before it has its name.
fn draft_name(name: OsString) -> OsString {
    let mut name = name;
    name.push(".new");
    name
}

impl<'a> Writing<'a> {
    /// Makes the drafts. The store's lock must be held.
    pub(crate) fn begin(folder: &'a Folder, id: VisitId, with_image: bool) -> Result<Self, StoreError> {
        let manifest = folder.create(&draft_name(manifest_name(id)))?;
        let mut writing = Self { folder, id, manifest, image: None, done: false };
        if with_image {
            writing.image = Some(folder.create(&draft_name(image_name(id)))?);
        }
        Ok(writing)
    }

    /// Writes and syncs the image. Pages that are not what they are claimed to be leave `present`; says how many.
    pub(crate) fn image(
        &self,
        from: KeepImage<'_>,
        claim: Claim<'_>,
        present: &mut PageBitmap,
    ) -> Result<u64, StoreError> {
        let Some(draft) = &self.image else { return Ok(0) };
        let Claim { layout, trees, hasher } = claim;
        let of_length = |file: &File| file.metadata().is_ok_and(|info| info.len() == layout.bytes());
        let mut cloned = false;
        let changed = match from {
            KeepImage::File(file) if of_length(file) && draft.clone_from(file) => {
                cloned = true;
                // STORE 3.2: a clone changes no more, but it was taken after the digests.
                wrong_pages(draft.file(), layout, hasher, trees, present)
            }
            KeepImage::File(file) => {
                let read = |region, first, bytes: &mut [u8]| read_pages(file, layout, region, first, bytes);
                copy(draft, claim, present, read)?
            }
            KeepImage::Pages(read) => copy(draft, claim, present, read)?,
        };
        changed.runs(0..changed.len()).for_each(|run| {
            present.remove_range(run);
        });
        if cloned {
            punch_absent(draft, layout, present)?;
        }
        draft.set_len(layout.bytes())?;
        draft.sync()?;
        Ok(changed.count())
    }

    /// Writes digests and bitmap, and syncs them: what is left is one block.
    pub(crate) fn digests(&self, manifest: &Manifest, trees: &[DigestTree], present: &[u8]) -> Result<(), StoreError> {
        self.manifest.set_len(manifest.file_len())?;
        self.manifest.write(BLOCK as u64, present)?;
        let mut pieces = Pieces { draft: &self.manifest, offset: 0, bytes: Vec::with_capacity(PIECE_BYTES) };
        let (mut start, mut room) = (0u64, [[0; 32]; SUBTREE_PAGES]);
        for tree in trees {
            for index in 0..tree.subtrees() {
                let Some(leaves) = tree.leaves(index, &mut room) else { continue };
                let pages = tree.subtree_pages(index);
                let count = usize::try_from(pages.end.saturating_sub(pages.start)).unwrap_or(0);
                let offset = manifest.digest_offset(start.saturating_add(pages.start));
                pieces.push(offset, leaves.get(..count).unwrap_or(leaves).as_flattened())?;
            }
            start = start.saturating_add(tree.pages());
        }
        pieces.flush()?;
        self.manifest.sync()
    }

    /// Copies all digests of another manifest of the same layout.
    pub(crate) fn same_digests(&self, manifest: &Manifest, from: &File, present: &[u8]) -> Result<(), StoreError> {
        self.manifest.set_len(manifest.file_len())?;
        self.manifest.write(BLOCK as u64, present)?;
        let mut offset = manifest.digest_offset(0);
        let mut bytes = vec![0; PIECE_BYTES];
        loop {
            offset = crate::visit::next_data(from, offset);
            let left = usize::try_from(manifest.file_len().saturating_sub(offset)).unwrap_or(usize::MAX);
            let Some(piece) = bytes.get_mut(..left.min(PIECE_BYTES)).filter(|piece| !piece.is_empty()) else { break };
            from.read_exact_at(piece, offset).map_err(|error| self.manifest.io("cannot be copied", error))?;
            self.manifest.write(offset, piece)?;
            offset = offset.saturating_add(PIECE_BYTES as u64);
        }
        self.manifest.sync()
    }

    /// Writes the header and renames: from here on the visit is one. The store's lock must be held.
    pub(crate) fn commit(mut self, manifest: &Manifest) -> Result<(), StoreError> {
        self.manifest.write(0, &manifest.encode())?;
        self.manifest.sync()?;
        if self.image.is_some() {
            self.folder.rename(&draft_name(image_name(self.id)), &image_name(self.id))?;
            self.folder.sync()?;
        }
        // STORE 4.3
        self.folder.rename(&draft_name(manifest_name(self.id)), &manifest_name(self.id))?;
        self.done = true;
        let synced = self.folder.sync();
        // A process that forks right now has the file open, too: closing alone would leave it locked until that is gone.
        self.manifest.unlock();
        self.image.iter().for_each(Draft::unlock);
        synced
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // What stays behind all the same is removed when the store is opened next.
        let _ = self.folder.unlink(&draft_name(manifest_name(self.id)));
        if self.image.is_some() {
            let _ = self.folder.unlink(&draft_name(image_name(self.id)));
            let _ = self.folder.unlink(&image_name(self.id));
        }
    }
}

/// Copies kept pages that are what they are claimed to be, and returns the others by their places; what is zero or not
/// copied stays a hole.
fn copy(
    draft: &Draft,
    claim: Claim<'_>,
    present: &PageBitmap,
    mut read: impl FnMut(RegionId, u64, &mut [u8]) -> io::Result<()>,
) -> Result<PageBitmap, StoreError> {
    let Claim { layout, trees, hasher } = claim;
    draft.set_len(layout.bytes())?;
    let (mut bytes, mut digests) = (vec![0; PIECE_BYTES], Vec::new());
    let mut changed = PageBitmap::new(present.len());
    each_run(layout, trees, present, PIECE_PAGES, |region, first, count| {
        let len = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
        let piece = bytes.get_mut(..len).unwrap_or_default();
        read(region, first, piece).map_err(|error| draft.io("its pages cannot be read", error))?;
        // STORE 3.2
        digests.clear();
        hasher.digest_nonzero(piece.as_chunks().0, &mut digests);
        let tree = trees.get(usize::from(region.0));
        let differs = |(page, digest): &(u64, &Digest)| tree.is_none_or(|tree| tree.leaf(*page) != **digest);
        let others = (first..).zip(&digests).filter(differs).map(|(page, _)| page);
        let mut next = first;
        for page in others.chain([first.saturating_add(count)]) {
            let real = layout.region(region).map_or(0, |of| of.bytes_of(next, page.saturating_sub(next)));
            let start = usize::try_from(next.saturating_sub(first)).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
            let end = start.saturating_add(usize::try_from(real).unwrap_or(usize::MAX));
            if let Some(run) = piece.get(start..end).filter(|run| !run.is_empty()) {
                draft.write(layout.file_offset(region, next), run)?;
            }
            if page < first.saturating_add(count) {
                changed.insert(u64::from(layout.place(region, page).0));
            }
            next = page.saturating_add(1);
        }
        Ok(())
    })?;
    Ok(changed)
}

/// Gives a clone holes where pages are not kept.
fn punch_absent(draft: &Draft, layout: &Layout, present: &PageBitmap) -> Result<(), StoreError> {
    let mut start = 0u64;
    for (index, region) in (0u16..).zip(layout.regions()) {
        let end = start.saturating_add(region.pages());
        let mut next = start;
        let kept = present.runs(start..end).chain(std::iter::once(end..end));
        for run in kept {
            let (first, count) = (next.saturating_sub(start), run.start.saturating_sub(next));
            if count > 0 {
                draft.punch(layout.file_offset(RegionId(index), first), region.bytes_of(first, count))?;
            }
            next = run.end;
        }
        start = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
