//! Where an image that arrives lands: in a file or in memory, and over what the store has of its guest where that helps.

use crate::reuse::{Reuse, claimed, warning};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageBytes, PageHasher};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::frame::Open;
use pagewire_protocol::page::Layout;
use pagewire_protocol::tree::DigestTree;
use pagewire_receiver::driver::Landed;
use pagewire_receiver::memory::{Beside, GuestRam};
use pagewire_receiver::{Agreed, OtherPages};
use pagewire_store::{DomainPages, Landing, LandingError, LandingOptions, Lineage, StoreError, Visit};
use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::path::Path;

/// Where an offered image lands, and what both sides know of the base.
pub(crate) struct Ground<P> {
    place: P,
    agreed: Option<Agreed>,
    others: Option<Box<dyn OtherPages>>,
}

impl<P> Ground<P> {
    /// Without a store.
    pub(crate) fn plain(place: P) -> Self {
        Self { place, agreed: None, others: None }
    }

    /// As the receiver's driver takes it.
    pub(crate) fn landed<S>(self, sink: impl FnOnce(P) -> S) -> Landed<S> {
        let Self { place, agreed, others } = self;
        Landed { sink: sink(place), agreed, others }
    }
}

/// A search for what the store has of an offered image. Trouble with the store is told in `warnings`.
pub(crate) struct Search<'a> {
    pub(crate) reuse: &'a Reuse,
    pub(crate) open: &'a Open,
    /// The seed for the index of other guests' pages.
    pub(crate) seed: u64,
    pub(crate) warnings: &'a mut Vec<String>,
}

impl Search<'_> {
    /// The ground for a file.
    pub(crate) fn in_folder(self, dir: &Path, options: LandingOptions) -> Result<Ground<Landing>, LandingError> {
        let (name, len) = (OsStr::new(self.open.name.as_str()), self.open.layout.bytes());
        let on = |known: Known, _: &mut Vec<String>| known.land(dir, name, len, options);
        self.over(on, || Landing::start(dir, name, len, options))
    }

    /// The ground in memory.
    pub(crate) fn in_memory(self) -> io::Result<Ground<GuestRam>> {
        let layout = &self.open.layout;
        let on = |known: Known, warnings: &mut Vec<String>| {
            let Known { visit, manifest, trusted } = known;
            let of = visit.head().layout.clone();
            match GuestRam::over(layout.clone(), visit) {
                Ok(ram) => Ok(Some((ram, manifest.map(|manifest| manifest.agreed(of, trusted))))),
                Err(error) => {
                    warnings.push(warning("a visit is not mapped", &error));
                    Ok(None)
                }
            }
        };
        self.over(on, || GuestRam::new(layout.clone()))
    }

    /// What can be read beside memory that the guest runs in before all of it is there.
    pub(crate) fn beside(self) -> Ground<Option<Beside>> {
        let layout = &self.open.layout;
        let on = |known: Known, _: &mut Vec<String>| {
            let Known { visit, manifest, trusted } = known;
            let of = visit.head().layout.clone();
            let beside = Beside::new(layout, visit);
            let agreed = manifest.map(|manifest| manifest.agreed(of, trusted));
            Ok::<_, Infallible>(beside.map(|beside| (Some(beside), agreed)))
        };
        let Ok(ground) = self.over(on, || Ok(None));
        ground
    }

    /// Over the newest visit that `on` can build on, else on a plain place.
    fn over<P, E>(
        self,
        mut on: impl FnMut(Known, &mut Vec<String>) -> Result<Option<(P, Option<Agreed>)>, E>,
        plain: impl FnOnce() -> Result<P, E>,
    ) -> Result<Ground<P>, E> {
        let Self { reuse, open, seed, warnings } = self;
        let Some(lineage) = claimed(open) else { return plain().map(Ground::plain) };
        let others = Others::of(reuse, &lineage, seed, warnings);
        for head in reuse.visits(&lineage, &open.layout).into_iter().filter(|head| head.pages_kept) {
            let known = open.known.iter().position(|root| *root == head.root);
            let found = match reuse.store.open_visit(&head) {
                Ok(Some(visit)) => Known::of(visit, known, &lineage, reuse.trust),
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            match found {
                Ok(found) => {
                    if let Some((place, agreed)) = on(found, warnings)? {
                        return Ok(Ground { place, agreed, others });
                    }
                }
                Err(error) => warnings.push(warning("a visit is not used", &error)),
            }
        }
        Ok(Ground { place: plain()?, agreed: None, others })
    }
}

/// The manifest of a visit that the sender knows too.
struct Manifest {
    known: u8,
    trees: Vec<DigestTree>,
    kept: PageBitmap,
}

impl Manifest {
    fn agreed(self, layout: Layout, trusted: bool) -> Agreed {
        let Self { known, trees, kept } = self;
        Agreed { known, layout, trees, kept, trusted }
    }
}

/// A visit whose manifest was read, or that the sender does not know.
struct Known {
    visit: Visit,
    manifest: Option<Manifest>,
    trusted: bool,
}

impl Known {
    /// Reads the manifest, if the sender knows it too.
    ///
    /// # Errors
    /// It cannot be read. One that is damaged is dropped: it would be a miss again, and is of no use to anybody.
    fn of(visit: Visit, known: Option<usize>, lineage: &Lineage, trusted: bool) -> Result<Self, StoreError> {
        let Some(known) = known.and_then(|at| u8::try_from(at).ok()) else {
            return Ok(Self { visit, manifest: None, trusted });
        };
        let hasher = PageHasher::new(&DedupDomain::new(&lineage.key));
        match visit.trees(&hasher).and_then(|trees| Ok((trees, visit.present()?))) {
            Ok((trees, kept)) => {
                visit.touch();
                Ok(Self { visit, manifest: Some(Manifest { known, trees, kept }), trusted })
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
    ) -> Result<Option<(Landing, Option<Agreed>)>, LandingError> {
        let (layout, trusted) = (self.visit.head().layout.clone(), self.trusted);
        let agreed = |landing: &Landing, manifest: Option<Manifest>| {
            manifest.filter(|_| landing.is_over()).map(|manifest| manifest.agreed(layout, trusted))
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
