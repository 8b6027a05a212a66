//! Memory reuse: what the facade keeps of images in a store, and how a session builds on what was kept.
//!
//! Trouble with the store never fails a transfer: it becomes a warning of the report, and the session goes on without.

use crate::report::Report;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::domain::{DedupDomain, LineageId};
use pagewire_protocol::error::chain;
use pagewire_protocol::frame::{ImageName, Open};
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, Place, RegionId, common_pages};
use pagewire_protocol::tree::{DigestTree, Manifest};
use pagewire_receiver::memory::GuestRam;
use pagewire_sender::Base;
use pagewire_store::{Keep, KeepImage, Kept, Lineage, Removed, Store, StoreError, Visit, VisitHead, VisitKind};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// What of an image stays on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepWhat {
    /// Nothing.
    Nothing,
    /// The digests of its pages.
    Manifest,
    /// The digests and the pages.
    Visit,
}

/// A store, and how transfers use it.
#[derive(Clone, Debug)]
pub struct Reuse {
    /// The store of this host.
    pub store: Store,
    /// What stays; by default the pages of what leaves, and the manifest of what arrives.
    pub keep: Option<KeepWhat>,
    /// Do not read unchanged pages of a base to see whether they are what its manifest says. The report counts them.
    pub trust: bool,
    /// Match the pages of all guests of the domain of this name, instead of each with itself alone.
    pub domain: Option<String>,
}

impl Reuse {
    /// The defaults, with `store`.
    pub fn new(store: Store) -> Self {
        Self { store, keep: None, trust: false, domain: None }
    }

    /// The guest that is called `name` here, or a new one.
    fn lineage(&self, name: &ImageName) -> Result<Lineage, StoreError> {
        let known = self.store.lineage_named(name);
        let Some(domain) = &self.domain else {
            let known = known?;
            return known.map_or_else(|| Lineage::random().map_err(no_entropy), Ok);
        };
        let key = DedupDomain::named_key(domain);
        match known? {
            Some(known) if known.key == key => Ok(known),
            _ => Ok(Lineage { key, ..Lineage::random().map_err(no_entropy)? }),
        }
    }

    /// The visits of a guest that an image of this layout can be built on, newest first.
    pub(crate) fn visits(&self, lineage: &Lineage, layout: &Layout) -> Vec<VisitHead> {
        let mut visits = self.store.visits(&lineage.key);
        visits.retain(|head| head.lineage == lineage.id && common_pages(&head.layout, layout).is_some());
        visits
    }

    /// What a guest touched first when it last ran here before all of it had come.
    pub(crate) fn first_touches(&self, lineage: &Lineage, layout: &Layout) -> Vec<Place> {
        self.store.first_touches(&lineage.key, lineage.id, layout)
    }

    /// Keeps an image, of its pages those that `worth` names (all without one), and removes the visits that it
    /// supersedes. What its guest touches first is kept with it: these `touches`, or what was known of an earlier time.
    /// Whether it was kept; what did not go as it should is in the report.
    fn keep(
        &self,
        keep: &Keep<'_>,
        manifest: &Manifest,
        (worth, touches): (Option<&PageBitmap>, &[Place]),
        image: Option<Image<'_>>,
        report: &mut Report,
    ) -> bool {
        // Before the visits go that it is kept with.
        let known = if touches.is_empty() { self.first_touches(&keep.lineage, keep.layout) } else { Vec::new() };
        let Kept { head, changed } = match self.put(keep, manifest, worth, image) {
            Ok(kept) => kept,
            Err(error) => {
                report.warn("the image was not kept", &error);
                return false;
            }
        };
        report.reuse.unkept = changed;
        // Before anything else is written: on a full disk this is room.
        if let Err(error) = self.supersede(&keep.lineage, &head) {
            report.warn("what an image supersedes was not removed", &error);
        }
        let touches = if touches.is_empty() { &known } else { touches };
        if let Err(error) = self.store.keep_touches(&head, touches) {
            report.warn("what the guest touched first was not kept", &error);
        }
        true
    }

    fn put(
        &self,
        keep: &Keep<'_>,
        manifest: &Manifest,
        worth: Option<&PageBitmap>,
        image: Option<Image<'_>>,
    ) -> Result<Kept, StoreError> {
        let store = |image| self.store.keep(keep, &manifest.trees, worth, image);
        match image {
            None => store(None),
            Some(Image::File(path)) => {
                let file = File::open(path).map_err(|source| unreadable(path, source))?;
                store(Some(KeepImage::File(&file)))
            }
            Some(Image::Memory(ram)) => store(Some(KeepImage::Pages(&mut |region, first, bytes| {
                let ram = ram.lock().unwrap_or_else(PoisonError::into_inner);
                ram.read(region, first.saturating_mul(PAGE_BYTES as u64), bytes)
            }))),
        }
    }

    /// Removes the visits that one supersedes.
    fn supersede(&self, lineage: &Lineage, head: &VisitHead) -> Result<(), StoreError> {
        let older = self.store.visits(&lineage.key).into_iter();
        // A page that was changed on another host is of no further use, unless nothing newer has any pages.
        let older = older.filter(|old| old.lineage == head.lineage && old.sequence < head.sequence);
        for old in older.filter(|old| head.pages_kept || !old.pages_kept) {
            // What another session has open stays until the next time.
            let _: Removed = self.store.remove(old.id)?;
        }
        Ok(())
    }
}

fn no_entropy(source: io::Error) -> StoreError {
    StoreError::Io { path: "random numbers".into(), what: "cannot be had", source }
}

fn unreadable(path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { path: path.to_path_buf(), what: "cannot be read to be kept", source }
}

/// Where the bytes of an image are.
#[derive(Clone, Copy)]
pub(crate) enum Image<'a> {
    File(&'a Path),
    Memory(&'a Mutex<GuestRam>),
}

/// A visit as the sender knows it.
#[derive(Debug)]
struct VisitBase {
    visit: Visit,
    /// Which pages are kept, once the digests were asked for.
    present: Option<PageBitmap>,
}

impl Base for VisitBase {
    fn root(&self) -> Digest {
        self.visit.head().root
    }

    fn layout(&self) -> &Layout {
        &self.visit.head().layout
    }

    fn session(&self) -> [u8; 16] {
        self.visit.head().session
    }

    fn trees(&mut self, hasher: &PageHasher) -> io::Result<Vec<DigestTree>> {
        self.visit.touch();
        let failed = |error: StoreError| io::Error::other(chain(&error));
        self.present = Some(self.visit.present().map_err(failed)?);
        self.visit.trees(hasher).map_err(failed)
    }

    fn has_pages(&self) -> bool {
        self.visit.image().is_some()
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let start = u64::from(self.layout().place(region, first).0);
        let pages = start..start.saturating_add((bytes.len() / PAGE_BYTES) as u64);
        if self.present.as_ref().is_some_and(|present| present.gaps(pages).next().is_some()) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.visit.read(region, first, bytes)
    }
}

/// What a sending session starts with.
#[derive(Debug)]
pub(crate) struct Departure {
    pub(crate) lineage: Lineage,
    pub(crate) bases: Vec<Box<dyn Base>>,
}

impl Departure {
    /// A session without a store.
    pub(crate) fn unknown() -> Self {
        Self { lineage: Lineage { id: LineageId([0; 16]), key: [0; 32] }, bases: Vec::new() }
    }

    /// What is known here of the guest `name`; whatever cannot be read is a warning.
    pub(crate) fn of(reuse: &Reuse, name: &ImageName, layout: &Layout, report: &mut Report) -> Self {
        let lineage = match reuse.lineage(name) {
            Ok(lineage) => lineage,
            Err(error) => {
                report.warn("the store is not used", &error);
                return Self::unknown();
            }
        };
        let visits = reuse.visits(&lineage, layout).into_iter();
        let mut bases: Vec<Box<dyn Base>> = Vec::new();
        for head in visits {
            match reuse.store.open_visit(&head) {
                Ok(visit) => {
                    bases.extend(visit.map(|visit| Box::new(VisitBase { visit, present: None }) as Box<dyn Base>))
                }
                Err(error) => report.warn("a visit is not used", &error),
            }
        }
        Self { lineage, bases }
    }
}

/// What left this host, and what became of it.
pub(crate) struct Departed<'a> {
    /// What it is called.
    pub(crate) name: &'a ImageName,
    /// By which session it left.
    pub(crate) session: [u8; 16],
    /// Its digests.
    pub(crate) manifest: &'a Manifest,
    /// Where its pages are, if they are in a file.
    pub(crate) source: Option<&'a Path>,
    /// Pages that its guest wrote all the time: when it comes back they will be others.
    pub(crate) hot: Option<&'a PageBitmap>,
}

/// Keeps what left this host: its pages by default, where they are in a file, but for hot ones.
pub(crate) fn keep_departed(reuse: &Reuse, lineage: Lineage, departed: &Departed<'_>, report: &mut Report) {
    let Departed { name, session, manifest, source, hot } = *departed;
    let pages = match reuse.keep.unwrap_or(KeepWhat::Visit) {
        KeepWhat::Nothing => return,
        KeepWhat::Manifest => None,
        KeepWhat::Visit => source.map(Image::File),
    };
    let (kind, layout, root) = (VisitKind::Departed, &manifest.layout, manifest.root);
    let keep = Keep { lineage, name: name.clone(), session, kind, layout, root };
    let worth = hot.filter(|_| pages.is_some()).map(|hot| worth_keeping(manifest, hot));
    if reuse.keep(&keep, manifest, (worth.as_ref(), &[]), pages, report) {
        report.reuse.hot = worth.map_or(0, |worth| layout.pages().saturating_sub(worth.count()));
    }
}

/// All pages but the hot ones; a hot page that is zero takes no room.
fn worth_keeping(manifest: &Manifest, hot: &PageBitmap) -> PageBitmap {
    let layout = &manifest.layout;
    let mut worth = PageBitmap::full(layout.pages());
    for place in hot.runs(0..layout.pages()).flatten() {
        let (region, page) = layout.locate(Place(u32::try_from(place).unwrap_or(u32::MAX)));
        if manifest.trees.get(usize::from(region.0)).is_some_and(|tree| !tree.is_zero(page.0)) {
            worth.remove(place);
        }
    }
    worth
}

/// What came to this host.
#[derive(Clone, Copy)]
pub(crate) struct Came<'a> {
    /// How it was offered.
    pub(crate) open: &'a Open,
    /// Its digests, as it came.
    pub(crate) manifest: &'a Manifest,
    /// What its guest touched before that had come, in this order.
    pub(crate) touches: &'a [Place],
}

/// Keeps what arrived on this host: its manifest by default.
pub(crate) fn keep_arrived(reuse: &Reuse, came: &Came<'_>, image: Option<Image<'_>>, report: &mut Report) {
    let Came { open, manifest, touches } = *came;
    let pages = match reuse.keep.unwrap_or(KeepWhat::Manifest) {
        KeepWhat::Nothing => return,
        KeepWhat::Manifest => None,
        KeepWhat::Visit => image,
    };
    let Some(lineage) = claimed(open) else { return };
    let (kind, layout, root) = (VisitKind::Arrived, &manifest.layout, manifest.root);
    let keep = Keep { lineage, name: open.name.clone(), session: open.session, kind, layout, root };
    reuse.keep(&keep, manifest, (None, touches), pages, report);
}

/// Who the sender says the guest is; without a key of its own it says nothing.
pub(crate) fn claimed(open: &Open) -> Option<Lineage> {
    let lineage = Lineage { id: open.lineage, key: open.domain_key };
    (open.domain_key != [0; 32] && open.lineage.0 != [0; 16]).then_some(lineage)
}

impl Report {
    /// Something that did not go as it should and did no harm.
    pub(crate) fn warn(&mut self, what: &str, error: &dyn std::error::Error) {
        self.warnings.push(warning(what, error));
    }
}

/// What did not go as it should, in one line.
pub(crate) fn warning(what: &str, error: &dyn std::error::Error) -> String {
    format!("{what}: {}", chain(error))
}

#[cfg(test)]
mod tests;
