//! Whether what is kept is what was put there, and what to do if not.
//!
//! Verifying reads everything and changes nothing. Repairing drops what is damaged and no more: a visit with some wrong
//! pages loses those from its present bitmap, one whose digests do not lead to its root goes altogether.

use crate::dir::{Folder, try_lock};
use crate::error::StoreError;
use crate::evict::{Removed, remove};
use crate::keep::Writing;
use crate::store::{Role, Store, domain_id, role, sweep};
use crate::touches::{self, touches_name};
use crate::visit::{Visit, VisitHead, image_name, manifest_name, next_data, open, read_pages};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{PageBytes, PageHasher};
use pagewire_protocol::domain::DomainId;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, PageNumber, RegionId};
use pagewire_protocol::tree::DigestTree;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::path::PathBuf;

/// Pages that are read and hashed at once.
const PIECE_PAGES: u64 = 256;

/// What is wrong with something in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// Somebody else put it there. It is never followed and never used.
    Planted(&'static str),
    /// It has a name that the store gives to nothing.
    Stranger,
    /// A folder that others can reach, or no folder at all.
    Folder(String),
    /// The manifest is not what was written: the whole visit is of no use.
    Manifest(String),
    /// The image is of another length: none of its pages is used.
    ImageLength,
    /// What its guest touched first is not what was written.
    Touches(String),
    /// Pages that do not have the digests of the manifest.
    Pages {
        /// How many.
        wrong: u64,
        /// Of how many that are kept.
        kept: u64,
        /// The first of them.
        first: (RegionId, PageNumber),
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Planted(what) => write!(f, "is {what}, which the store did not put there"),
            Self::Stranger => f.write_str("is no name that a store gives"),
            Self::Folder(why) => f.write_str(why),
            Self::Manifest(why) | Self::Touches(why) => write!(f, "is damaged: {why}"),
            Self::ImageLength => f.write_str("does not have the length of its visit's image"),
            Self::Pages { wrong, kept, first: (region, page) } => {
                write!(
                    f,
                    "{wrong} of {kept} pages are not what was kept, the first is {} of region {}",
                    page.0, region.0
                )
            }
        }
    }
}

/// What was done about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repaired {
    /// Nothing yet: only looked at, in use by somebody, or not the store's to remove.
    Left,
    /// The name, or the visit, was removed.
    Removed,
    /// The visit lost its wrong pages, and keeps the others.
    PagesDropped,
}

/// One thing that is wrong.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Where.
    pub path: PathBuf,
    /// The visit, if its manifest can be read.
    pub visit: Option<VisitHead>,
    /// What.
    pub fault: Fault,
    /// What was done.
    pub repaired: Repaired,
}

/// What a look at everything found.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Verified {
    /// Visits looked at.
    pub visits: u64,
    /// Pages read and hashed.
    pub pages: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

impl Verified {
    fn found(&mut self, folder: &Folder, name: &OsStr, visit: Option<&VisitHead>, fault: Fault, repaired: Repaired) {
        let path = folder.path().join(name);
        self.findings.push(Finding { path, visit: visit.cloned(), fault, repaired });
    }
}

impl Store {
    /// Reads and re-hashes everything that is kept. Changes nothing.
    ///
    /// # Errors
    /// The store itself cannot be read; what is wrong inside is in the answer.
    pub fn verify(&self) -> Result<Verified, StoreError> {
        self.look(false)
    }

    /// As [`verify`](Self::verify), and drops what is damaged and not in use; what is undamaged stays.
    ///
    /// # Errors
    /// The operating system refused; what was repaired until then stays so.
    pub fn repair(&self) -> Result<Verified, StoreError> {
        self.look(true)
    }

    fn look(&self, repair: bool) -> Result<Verified, StoreError> {
        let mut seen = Verified::default();
        for name in self.domains.names()? {
            let Some(domain) = domain_id(&name) else {
                seen.found(&self.domains, &name, None, Fault::Stranger, Repaired::Left);
                continue;
            };
            match self.folder(domain) {
                Ok(Some(folder)) => self.look_into(&folder, domain, repair, &mut seen)?,
                Ok(None) => {}
                Err(StoreError::Refused { why, .. }) => {
                    seen.found(&self.domains, &name, None, Fault::Folder(why.to_owned()), Repaired::Left);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(seen)
    }

    fn look_into(
        &self,
        folder: &Folder,
        domain: DomainId,
        repair: bool,
        seen: &mut Verified,
    ) -> Result<(), StoreError> {
        for name in folder.names()? {
            let Some((id, part)) = role(&name) else {
                seen.found(folder, &name, None, Fault::Stranger, Repaired::Left);
                continue;
            };
            if let Some(what) = folder.planted(&name) {
                let lock = repair.then(|| self.root.lock(false)).transpose()?;
                let removed = lock.is_some() && folder.unlink(&name).is_ok();
                let repaired = if removed { Repaired::Removed } else { Repaired::Left };
                seen.found(folder, &name, None, Fault::Planted(what), repaired);
            } else if part == Role::Manifest {
                self.look_at(folder, domain, id, repair, seen)?;
            }
        }
        if repair {
            let _lock = self.root.lock(false)?;
            sweep(folder)?;
        }
        Ok(())
    }

    fn look_at(
        &self,
        folder: &Folder,
        domain: DomainId,
        id: crate::VisitId,
        repair: bool,
        seen: &mut Verified,
    ) -> Result<(), StoreError> {
        let lock = self.root.lock(true)?;
        let opened = match open(folder, domain, id) {
            Ok(Some(opened)) => opened,
            // Evicted since its name was read.
            Ok(None) => return Ok(()),
            Err(StoreError::Damaged { why, .. }) => {
                drop(lock);
                let repaired = self.drop_visit(folder, id, repair)?;
                seen.found(folder, &manifest_name(id), None, Fault::Manifest(why), repaired);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let head = opened.head.clone();
        let own = self.folder(domain)?;
        let Some(visit) = own.and_then(|own| Visit::new(self.root.clone(), own, opened)) else { return Ok(()) };
        drop(lock);
        seen.visits = seen.visits.saturating_add(1);
        let image = image_name(id);
        if !head.pages_kept && folder.planted(&image).is_none() && folder.open(&image, false)?.file().is_some() {
            let repaired = if repair { self.drop_image(folder, &visit)? } else { Repaired::Left };
            seen.found(folder, &image, Some(&head), Fault::ImageLength, repaired);
        }
        self.look_at_touches(folder, &visit, repair, seen)?;
        let hasher = PageHasher::new(&visit.manifest().domain());
        match visit.trees(&hasher).and_then(|trees| Ok((trees, visit.present()?))) {
            Ok((trees, present)) => self.look_at_pages(visit, &hasher, &trees, present, repair, seen),
            Err(StoreError::Damaged { why, .. }) => {
                drop(visit);
                let repaired = self.drop_visit(folder, id, repair)?;
                seen.found(folder, &manifest_name(id), Some(&head), Fault::Manifest(why), repaired);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn look_at_touches(
        &self,
        folder: &Folder,
        visit: &Visit,
        repair: bool,
        seen: &mut Verified,
    ) -> Result<(), StoreError> {
        let (head, name) = (visit.head(), touches_name(visit.head().id));
        match touches::read(folder, head, &visit.manifest().domain()) {
            // What was planted is found by its name.
            Err(StoreError::Damaged { why, .. }) if folder.planted(&name).is_none() => {
                let _lock = repair.then(|| self.root.lock(false)).transpose()?;
                let removed = repair && folder.unlink(&name).is_ok();
                let repaired = if removed { Repaired::Removed } else { Repaired::Left };
                seen.found(folder, &name, Some(head), Fault::Touches(why), repaired);
                Ok(())
            }
            Ok(_) | Err(StoreError::Damaged { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn look_at_pages(
        &self,
        visit: Visit,
        hasher: &PageHasher,
        trees: &[DigestTree],
        mut present: PageBitmap,
        repair: bool,
        seen: &mut Verified,
    ) -> Result<(), StoreError> {
        let Some(image) = visit.image() else { return Ok(()) };
        let kept = present.count();
        seen.pages = seen.pages.saturating_add(kept);
        let wrong = wrong_pages(image, &visit.head().layout, hasher, trees, &present);
        let all = 0..present.len();
        let Some(first) = wrong.runs(all.clone()).next() else { return Ok(()) };
        let head = visit.head().clone();
        let place = u32::try_from(first.start).unwrap_or(u32::MAX);
        let fault = Fault::Pages {
            wrong: wrong.count(),
            kept,
            first: head.layout.locate(pagewire_protocol::page::Place(place)),
        };
        for page in wrong.runs(all).flatten() {
            present.remove(page);
        }
        let repaired = if repair { self.rewrite(&visit, &present)? } else { Repaired::Left };
        seen.found(visit.folder(), &image_name(head.id), Some(&head), fault, repaired);
        Ok(())
    }

    /// Removes a damaged visit unless somebody has it open.
    fn drop_visit(&self, folder: &Folder, id: crate::VisitId, repair: bool) -> Result<Repaired, StoreError> {
        if !repair {
            return Ok(Repaired::Left);
        }
        let _lock = self.root.lock(false)?;
        let removed = remove(folder, id)?;
        Ok(if removed == Removed::Yes { Repaired::Removed } else { Repaired::Left })
    }

    fn drop_image(&self, folder: &Folder, visit: &Visit) -> Result<Repaired, StoreError> {
        let _lock = self.root.lock(false)?;
        let alone = try_lock(visit.file(), false);
        try_lock(visit.file(), true);
        if !alone {
            return Ok(Repaired::Left);
        }
        folder.unlink(&image_name(visit.head().id))?;
        Ok(Repaired::Removed)
    }

    /// Writes a visit's manifest anew, with another present bitmap, and renames it over the old one.
    fn rewrite(&self, visit: &Visit, present: &PageBitmap) -> Result<Repaired, StoreError> {
        let bitmap = present.bytes();
        let mut manifest = visit.manifest().clone();
        manifest.present = manifest.seal_present(&bitmap);
        let lock = self.root.lock(false)?;
        // Until the end nobody else opens it: they miss.
        if !try_lock(visit.file(), false) || !visit.is_linked()? {
            return Ok(Repaired::Left);
        }
        let writing = Writing::begin(visit.folder(), manifest.id, false)?;
        drop(lock);
        writing.same_digests(&manifest, visit.file(), &bitmap)?;
        let _lock = self.root.lock(false)?;
        if !visit.is_linked()? {
            return Ok(Repaired::Left);
        }
        writing.commit(&manifest)?;
        Ok(Repaired::PagesDropped)
    }
}

/// The kept pages of an image, by place, that do not have their digests or cannot be read.
pub(crate) fn wrong_pages(
    image: &File,
    layout: &Layout,
    hasher: &PageHasher,
    trees: &[DigestTree],
    present: &PageBitmap,
) -> PageBitmap {
    let mut wrong = PageBitmap::new(present.len());
    let mut start = 0u64;
    let mut bytes: Vec<PageBytes> = Vec::new();
    for (index, tree) in (0u16..).zip(trees) {
        let end = start.saturating_add(tree.pages());
        for run in present.runs(start..end) {
            let mut first = run.start.saturating_sub(start);
            let last = run.end.saturating_sub(start);
            while first < last {
                let count = last.saturating_sub(first).min(PIECE_PAGES);
                let piece = PieceOf { image, layout, hasher, tree, region: RegionId(index), start };
                piece.judge(first, count, &mut bytes, &mut wrong);
                first = first.saturating_add(count);
            }
        }
        start = end;
    }
    wrong
}

struct PieceOf<'a> {
    image: &'a File,
    layout: &'a Layout,
    hasher: &'a PageHasher,
    tree: &'a DigestTree,
    region: RegionId,
    start: u64,
}

impl PieceOf<'_> {
    fn judge(&self, first: u64, count: u64, bytes: &mut Vec<PageBytes>, wrong: &mut PageBitmap) {
        let pages = first..first.saturating_add(count);
        if self.is_hole(first, count) && pages.clone().all(|page| self.tree.is_zero(page)) {
            return;
        }
        bytes.resize(usize::try_from(count).unwrap_or(usize::MAX), [0; PAGE_BYTES]);
        if read_pages(self.image, self.layout, self.region, first, bytes.as_flattened_mut()).is_err() {
            // One unreadable page must not take its neighbours along.
            if count == 1 {
                wrong.insert(self.start.saturating_add(first));
            } else {
                pages.for_each(|page| self.judge(page, 1, bytes, wrong));
            }
            return;
        }
        let mut digests = Vec::with_capacity(bytes.len());
        // STORE 3.3
        self.hasher.digest_nonzero(bytes, &mut digests);
        for (page, digest) in pages.zip(digests) {
            if self.tree.leaf(page) != digest {
                wrong.insert(self.start.saturating_add(page));
            }
        }
    }

    fn is_hole(&self, first: u64, count: u64) -> bool {
        let offset = self.layout.file_offset(self.region, first);
        let bytes = self.layout.region(self.region).map_or(0, |region| region.bytes_of(first, count));
        next_data(self.image, offset) >= offset.saturating_add(bytes)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.fault)
    }
}

#[cfg(test)]
mod tests;
