//! Where an image that arrives lands: over the file of its name, or over what the store has of its guest.

use crate::reuse::{Reuse, claimed, warning};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageBytes, PageHasher};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::frame::Open;
use pagewire_protocol::page::Layout;
use pagewire_protocol::tree::DigestTree;
use pagewire_receiver::memory::FileSink;
use pagewire_receiver::{Agreed, OtherPages};
use pagewire_store::{DomainPages, Landing, LandingError, LandingOptions, Lineage, StoreError, Visit};
use std::ffi::OsStr;
use std::path::Path;

/// Where an offered image lands, and what both sides know of the base.
pub(crate) struct Ground {
    pub(crate) landing: Landing,
    pub(crate) agreed: Option<Agreed>,
    pub(crate) others: Option<Box<dyn OtherPages>>,
}

impl Ground {
    /// Without a store: over the file of that name.
    pub(crate) fn plain(landing: Landing) -> Self {
        Self { landing, agreed: None, others: None }
    }

    /// Over what the store has of the guest, where that helps. Trouble with the store is told in `warnings`.
    pub(crate) fn of(
        reuse: &Reuse,
        dir: &Path,
        open: &Open,
        options: LandingOptions,
        seed: u64,
        warnings: &mut Vec<String>,
    ) -> Result<Self, LandingError> {
        let (name, len) = (OsStr::new(open.name.as_str()), open.layout.bytes());
        let Some(lineage) = claimed(open).filter(|_| !options.fresh) else {
            return Landing::start(dir, name, len, options).map(Self::plain);
        };
        let others = Others::of(reuse, &lineage, seed, warnings);
        for head in reuse.visits(&lineage, &open.layout).into_iter().filter(|head| head.pages_kept) {
            let known = open.known.iter().position(|root| *root == head.root);
            let found = match reuse.store.open_visit(&head) {
                Ok(Some(visit)) => Known::of(visit, known, &lineage),
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            let found = match found {
                Ok(found) => found,
                Err(error) => {
                    warnings.push(warning("a visit is not used", &error));
                    continue;
                }
            };
            if let Some((landing, agreed)) = found.land(dir, name, len, options, reuse.trust)? {
                return Ok(Self { landing, agreed, others });
            }
        }
        Landing::start(dir, name, len, options).map(|landing| Self { landing, agreed: None, others })
    }

    /// As the receiver's driver takes it.
    pub(crate) fn landed(self, layout: Layout) -> pagewire_receiver::driver::Landed<FileSink> {
        let Self { landing, agreed, others } = self;
        pagewire_receiver::driver::Landed { sink: FileSink::new(landing, layout), agreed, others }
    }
}

/// A visit whose manifest was read, or that the sender does not know.
struct Known {
    visit: Visit,
    manifest: Option<(u8, Vec<DigestTree>, PageBitmap)>,
}

impl Known {
    /// Reads the manifest, if the sender knows it too.
    ///
    /// # Errors
    /// It cannot be read. One that is damaged is dropped: it would be a miss again, and is of no use to anybody.
    fn of(visit: Visit, known: Option<usize>, lineage: &Lineage) -> Result<Self, StoreError> {
        let Some(known) = known.and_then(|at| u8::try_from(at).ok()) else {
            return Ok(Self { visit, manifest: None });
        };
        let hasher = PageHasher::new(&DedupDomain::new(&lineage.key));
        match visit.trees(&hasher).and_then(|trees| Ok((trees, visit.present()?))) {
            Ok((trees, kept)) => {
                visit.touch();
                Ok(Self { visit, manifest: Some((known, trees, kept)) })
            }
            Err(error) => {
                if matches!(error, StoreError::Damaged { .. }) {
                    visit.reject()?;
                }
                Err(error)
            }
        }
    }

    /// Lands on the visit's image, or over it; `None` where it is of no use.
    fn land(
        mut self,
        dir: &Path,
        name: &OsStr,
        len: u64,
        options: LandingOptions,
        trusted: bool,
    ) -> Result<Option<(Landing, Option<Agreed>)>, LandingError> {
        let layout = self.visit.head().layout.clone();
        let agreed = |landing: &Landing, manifest: Option<(u8, Vec<DigestTree>, PageBitmap)>| {
            let manifest = manifest.filter(|_| landing.is_over());
            manifest.map(|(known, trees, kept)| Agreed { known, layout, trees, kept, trusted })
        };
        if options.inplace {
            let visit = &mut self.visit;
            let taken = Landing::start_on(dir, name, len, |folder, partial| {
                matches!(visit.consume(folder, partial), Ok(Some(_)))
            })?;
            if let Some(landing) = taken {
                let agreed = agreed(&landing, self.manifest);
                return Ok(Some((landing, agreed)));
            }
        }
        if self.manifest.is_none() && dir.join(name).exists() {
            // Nobody knows which of the two is closer: the file of that name is where people expect it.
            return Ok(None);
        }
        let Some(image) = self.visit.image().and_then(|image| image.try_clone().ok()) else { return Ok(None) };
        let landing = Landing::start_over(dir, name, len, image, options)?;
        let agreed = agreed(&landing, self.manifest);
        Ok(Some((landing, agreed)))
    }
}

/// Pages of other guests of a named domain.
#[derive(Debug)]
struct Others(DomainPages);

impl Others {
    /// All that the store has in the guest's domain, if this host names the same one.
    fn of(reuse: &Reuse, lineage: &Lineage, seed: u64, warnings: &mut Vec<String>) -> Option<Box<dyn OtherPages>> {
        reuse.domain.as_ref().filter(|domain| DedupDomain::named_key(domain) == lineage.key)?;
        match DomainPages::new(&reuse.store, &lineage.key, seed) {
            Ok(pages) => (!pages.is_empty()).then(|| Box::new(Self(pages)) as Box<dyn OtherPages>),
            Err(error) => {
                warnings.push(warning("pages of other guests are not used", &error));
                None
            }
        }
    }
}

impl OtherPages for Others {
    fn fetch(&mut self, digest: &Digest, page: &mut PageBytes) -> bool {
        self.0.find(digest).is_some_and(|found| self.0.read(found, page).is_ok())
    }
}
