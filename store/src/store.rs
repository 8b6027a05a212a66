//! The visits of one host: which there are, how one is kept, found and opened.
//!
//! ```text
//! DIR/lock                              held for as long as names change
//! DIR/domains/DOMAIN/VISIT.manifest     what the visit is, and the digest of each page
//! DIR/domains/DOMAIN/VISIT.img          its pages, if they are kept: a plain image file with holes
//! DIR/domains/DOMAIN/VISIT.touches      what its guest touched first when it ran before all of it was there
//! ```
//!
//! Several processes may share one store. Whoever makes, renames or removes names holds the lock; a file under its
//! final name never changes, except that an image leaves with [`Visit::consume`]. Nothing here goes across domains but
//! what an operator asks for: [`Store::heads`] and [`Store::lineage_named`].

use crate::dir::{Folder, Watch, try_lock};
use crate::error::StoreError;
use crate::evict;
use crate::keep::{Claim, Keep, KeepImage, Kept, Lineage, Writing, random};
use crate::manifest::{Manifest, VisitId};
use crate::visit::{Opened, Visit, VisitHead, open};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::domain::{DedupDomain, DomainId};
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::tree::DigestTree;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

const DOMAINS: &str = "domains";

/// How to open a store.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreOptions {
    /// Bytes on disk that one dedup domain may take; without it nothing is evicted.
    pub budget: Option<u64>,
    /// Fail if there is no store yet instead of making one.
    pub existing: bool,
}

/// The visits of one host. Cloning it costs nothing, and all clones are one store.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) root: Arc<Folder>,
    pub(crate) domains: Arc<Folder>,
    pub(crate) budget: Option<u64>,
}

impl Store {
    /// Opens the store in `dir`, makes it if there is none, and removes what a crash left in it.
    ///
    /// # Errors
    /// `dir` is a symbolic link, is not a folder, belongs to somebody else, or others have any access to it; or the
    /// operating system refuses.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        Self::open_watched(dir, options, None)
    }

    /// As [`open`](Self::open); `watch` sees every change before it is made.
    pub(crate) fn open_watched(
        dir: &Path,
        options: StoreOptions,
        watch: Option<Arc<dyn Watch>>,
    ) -> Result<Self, StoreError> {
        let root = Folder::open_root(dir, !options.existing, watch)?;
        let _lock = root.lock(false)?;
        let domains = root.make_folder(DOMAINS)?;
        for name in domains.names()? {
            // What is no folder of ours is not looked into; `verify` names it.
            if let Some(id) = domain_id(&name)
                && let Ok(Some(folder)) = domains.folder(&id.to_string())
            {
                sweep(&folder)?;
            }
        }
        Ok(Self { root: Arc::new(root), domains: Arc::new(domains), budget: options.budget })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.root.path()
    }

    /// The guest that was last kept as `name`, in whichever domain. For an operator's own command, never for a peer.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn lineage_named(&self, name: &ImageName) -> Result<Option<Lineage>, StoreError> {
        let named = self.heads()?.into_iter().filter(|head| head.name == *name);
        for head in by_age(named) {
            if let Some(visit) = self.open_visit(&head)? {
                return Ok(Some(Lineage { id: head.lineage, key: *visit.key() }));
            }
        }
        Ok(None)
    }

    /// The visits of the domain of `key`, newest first. What is damaged or cannot be read is a miss, never an error.
    pub fn visits(&self, key: &[u8; 32]) -> Vec<VisitHead> {
        let domain = DedupDomain::new(key).id();
        self.folder(domain).ok().flatten().map(|folder| heads(&folder, domain)).unwrap_or_default()
    }

    /// The visits of all domains, newest first in each. For an operator's own command, never for a peer.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn heads(&self) -> Result<Vec<VisitHead>, StoreError> {
        let mut all = Vec::new();
        for domain in self.domain_ids()? {
            if let Ok(Some(folder)) = self.folder(domain) {
                all.extend(heads(&folder, domain));
            }
        }
        Ok(all)
    }

    /// The ids of all visits, damaged ones too.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn ids(&self) -> Result<Vec<VisitId>, StoreError> {
        let mut ids = Vec::new();
        for domain in self.domain_ids()? {
            if let Ok(Some(folder)) = self.folder(domain) {
                let names = folder.names()?;
                let parts = names.iter().filter_map(|name| role(name));
                ids.extend(parts.filter(|(_, role)| *role == Role::Manifest).map(|(id, _)| id));
            }
        }
        Ok(ids)
    }

    /// Opens a visit; until it is dropped nobody evicts it. `None` if it is gone, damaged or being rewritten.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn open_visit(&self, head: &VisitHead) -> Result<Option<Visit>, StoreError> {
        let _lock = self.root.lock(true)?;
        let found = match self.folder(head.domain) {
            Ok(Some(folder)) => open(&folder, head.domain, head.id).map(|found| found.map(|opened| (folder, opened))),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        match found {
            Ok(Some((folder, opened))) => Ok(Visit::new(Arc::clone(&self.root), folder, opened)),
            Ok(None) | Err(StoreError::Damaged { .. } | StoreError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps a visit: the digests of `trees`, and the pages of `image` that `present` names (by places; `None`: all),
    /// then evicts what is over the domain's budget. Returns what is kept, without pages if they alone exceed it. A page
    /// that is not what its digest says is left out: the image may have been written to since.
    ///
    /// May take as long as the disk does; the store's lock is held only at the beginning and at the end.
    ///
    /// # Errors
    /// Trees or bitmap are not of the layout, pages cannot be read, or the operating system refused; then nothing new
    /// is kept.
    pub fn keep(
        &self,
        keep: &Keep<'_>,
        trees: &[DigestTree],
        present: Option<&PageBitmap>,
        image: Option<KeepImage<'_>>,
    ) -> Result<Kept, StoreError> {
        let layout = keep.layout;
        let pages = trees.iter().map(DigestTree::pages);
        if !layout.regions().iter().map(|region| region.pages()).eq(pages) {
            return Err(StoreError::Misuse("the trees of a visit are not of its layout"));
        }
        let mut present = present.cloned().unwrap_or_else(|| PageBitmap::full(layout.pages()));
        if present.len() != layout.pages() {
            return Err(StoreError::Misuse("the present bitmap of a visit is not of its layout"));
        }
        let mut manifest = self.manifest(keep)?;
        let hasher = PageHasher::new(&manifest.domain());
        let domain = hasher.domain().id();

        let lock = self.root.lock(false)?;
        let folder = self.domains.make_folder(&domain.to_string())?;
        let writing = Writing::begin(&folder, manifest.id, image.is_some())?;
        drop(lock);

        let claim = Claim { layout, trees, hasher: &hasher };
        let changed = image.map_or(Ok(0), |image| writing.image(image, claim, &mut present))?;
        let bitmap = present.bytes();
        manifest.present = manifest.seal_present(&bitmap);
        writing.digests(&manifest, trees, &bitmap)?;

        let _lock = self.root.lock(false)?;
        let newest = heads(&folder, domain).first().map_or(0, |head| head.sequence);
        manifest.sequence = newest.saturating_add(1);
        writing.commit(&manifest)?;
        if let Some(budget) = self.budget {
            // The visit is kept; what could not go today goes when the next one comes.
            let _ = evict::to_budget(&folder, domain, budget, Some(manifest.id));
        }
        let opened = open(&folder, domain, manifest.id)?;
        opened
            .map(|opened| Kept { head: opened.head, changed })
            .ok_or_else(|| folder.io(OsStr::new(""), "its newest visit went away", gone()))
    }

    fn manifest(&self, keep: &Keep<'_>) -> Result<Manifest, StoreError> {
        let id =
            random().map_err(|error| self.root.io(OsStr::new(""), "has no random bytes for a visit's id", error))?;
        Ok(Manifest {
            id: VisitId(id),
            key: keep.lineage.key,
            lineage: keep.lineage.id,
            name: keep.name.clone(),
            session: keep.session,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            sequence: 0,
            kind: keep.kind,
            layout: keep.layout.clone(),
            root: keep.root,
            present: Digest::default(),
        })
    }

    pub(crate) fn domain_ids(&self) -> Result<Vec<DomainId>, StoreError> {
        Ok(self.domains.names()?.iter().filter_map(|name| domain_id(name)).collect())
    }

    pub(crate) fn folder(&self, domain: DomainId) -> Result<Option<Folder>, StoreError> {
        self.domains.folder(&domain.to_string())
    }
}

fn gone() -> std::io::Error {
    std::io::ErrorKind::NotFound.into()
}

/// The domain that a folder is named after.
pub(crate) fn domain_id(name: &OsStr) -> Option<DomainId> {
    VisitId::parse(name.to_str()?).map(|id| DomainId(id.0))
}

/// What a name in a domain's folder is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Manifest,
    Image,
    Touches,
    /// A draft, or a manifest on its way out.
    Leftover,
}

/// The visit and the part of it that a name stands for; `None` for a name that the store never gives.
pub(crate) fn role(name: &OsStr) -> Option<(VisitId, Role)> {
    let (id, suffix) = name.to_str()?.split_once('.')?;
    let role = match suffix {
        "manifest" => Role::Manifest,
        "img" => Role::Image,
        "touches" => Role::Touches,
        "manifest.new" | "img.new" | "touches.new" | "manifest.gone" => Role::Leftover,
        _ => return None,
    };
    Some((VisitId::parse(id)?, role))
}

/// Removes what a crash left: drafts that nobody holds, and what lies beside no manifest. The lock must be held.
pub(crate) fn sweep(folder: &Folder) -> Result<(), StoreError> {
    let names = folder.names()?;
    let parts: Vec<(VisitId, Role)> = names.iter().filter_map(|name| role(name)).collect();
    let mut swept = false;
    for name in &names {
        let orphan = match role(name) {
            Some((_, Role::Leftover)) => true,
            Some((id, Role::Image | Role::Touches)) => !parts.contains(&(id, Role::Manifest)),
            _ => false,
        };
        if orphan
            && let Some((file, _)) = folder.open(name, false)?.file()
            && try_lock(&file, false)
        {
            folder.unlink(name)?;
            swept = true;
        }
    }
    if swept { folder.sync() } else { Ok(()) }
}

/// The visits of a folder that can be read, newest first.
pub(crate) fn heads(folder: &Folder, domain: DomainId) -> Vec<VisitHead> {
    let names = folder.names().unwrap_or_default();
    let manifests = names.iter().filter_map(|name| role(name)).filter(|(_, role)| *role == Role::Manifest);
    let opened = manifests.filter_map(|(id, _)| open(folder, domain, id).ok().flatten());
    let mut heads: Vec<VisitHead> = opened.map(|Opened { head, .. }| head).collect();
    heads.sort_by_key(|head| std::cmp::Reverse((head.sequence, head.created, head.id)));
    let mut seen = Vec::new();
    for head in &mut heads {
        head.superseded = seen.contains(&head.lineage);
        seen.push(head.lineage);
    }
    heads
}

/// Heads of several domains, whose sequences do not compare, newest first. Within a second the file's own time decides:
/// it is that of its writing, or of a later use.
fn by_age(heads: impl Iterator<Item = VisitHead>) -> Vec<VisitHead> {
    let mut heads: Vec<VisitHead> = heads.collect();
    heads.sort_by_key(|head| std::cmp::Reverse((head.created, head.last_used, head.sequence, head.id)));
    heads
}

#[cfg(test)]
mod tests;
