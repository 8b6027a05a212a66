//! Looks at an image: what is zero, double, unchanged or found elsewhere, and what a transfer would cost.

use crate::entropy::random;
use crate::error::{Error, ErrorKind};
use pagewire_protocol::compress::Compressor;
use pagewire_protocol::digest::{Digest, PageHasher, is_zero};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::limits::{PAGE_BYTES, SUBTREE_BYTES, SUBTREE_PAGES};
use pagewire_protocol::page::{InstallSize, Place, RegionId};
use pagewire_protocol::tree::DigestTree;
use pagewire_sender::GuestMemory;
use pagewire_sender::memory::FileMemory;
use pagewire_store::DigestIndex;
use serde::Serialize;
use std::path::Path;

/// One batch of so many is compressed to estimate all.
const SAMPLE_EVERY: u64 = 8;

/// What an image consists of, in pages of 4 KiB; each page is counted once, the first that fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Inspection {
    /// Bytes of the image.
    pub bytes_total: u64,
    /// Pages of the image.
    pub pages_total: u64,
    /// All bytes zero.
    pub zero: u64,
    /// The same in the other image at the same place.
    pub unchanged: u64,
    /// In the other image at another place.
    pub elsewhere: u64,
    /// A second or later copy within this image.
    pub duplicate: u64,
    /// None of these: bytes that would travel.
    pub distinct: u64,
    /// Bytes of the distinct pages.
    pub raw_bytes: u64,
    /// The same at zstd level 1, estimated from one MiB in eight.
    pub compressed_bytes: u64,
}

struct Known {
    tree: DigestTree,
    index: DigestIndex,
}

/// Looks at the image `path`, compared with `against` if given.
///
/// # Errors
/// One of them cannot be read.
pub fn inspect(path: &Path, against: Option<&Path>) -> Result<Inspection, Error> {
    look(path, against).map_err(ErrorKind::at_sender)
}

fn look(path: &Path, against: Option<&Path>) -> Result<Inspection, ErrorKind> {
    let hasher = PageHasher::new(&DedupDomain::public());
    let seed = u64::from_le_bytes(random()?);
    let base = against.map(|against| learn(against, &hasher, seed)).transpose()?;
    let mut own: Option<Known> = None;
    let mut seen = Inspection::default();
    let mut sample = Sample::new()?;
    scan(path, &hasher, |layout_pages, first, bytes, digests| {
        let own = own.get_or_insert_with(|| Known {
            tree: DigestTree::new(&hasher, layout_pages),
            index: DigestIndex::new(seed),
        });
        let mut distinct = Vec::new();
        for ((page, &digest), bytes) in (first..).zip(digests).zip(bytes.as_chunks::<PAGE_BYTES>().0) {
            own.tree.set(page, digest);
            let count = if digest == hasher.zero() {
                &mut seen.zero
            } else if base.as_ref().is_some_and(|base| page < base.tree.pages() && base.tree.leaf(page) == digest) {
                &mut seen.unchanged
            } else if base
                .as_ref()
                .is_some_and(|base| base.index.find(&digest, |place| base.tree.leaf(u64::from(place.0))).is_some())
            {
                &mut seen.elsewhere
            } else if own.index.insert(&digest, place(page), |place| own.tree.leaf(u64::from(place.0))).is_some() {
                &mut seen.duplicate
            } else {
                distinct.extend_from_slice(bytes);
                &mut seen.distinct
            };
            *count = count.saturating_add(1);
        }
        sample.add(&distinct);
    })
    .map(|bytes| seen.bytes_total = bytes)?;
    seen.pages_total = seen.bytes_total.div_ceil(PAGE_BYTES as u64);
    seen.raw_bytes = seen.distinct.saturating_mul(PAGE_BYTES as u64);
    seen.compressed_bytes = sample.estimate(seen.raw_bytes);
    Ok(seen)
}

fn learn(path: &Path, hasher: &PageHasher, seed: u64) -> Result<Known, ErrorKind> {
    let mut known: Option<Known> = None;
    scan(path, hasher, |pages, first, _, digests| {
        let known =
            known.get_or_insert_with(|| Known { tree: DigestTree::new(hasher, pages), index: DigestIndex::new(seed) });
        for (page, &digest) in (first..).zip(digests) {
            known.tree.set(page, digest);
            if digest != hasher.zero() {
                known.index.insert(&digest, place(page), |place| known.tree.leaf(u64::from(place.0)));
            }
        }
    })?;
    Ok(known.unwrap_or_else(|| Known { tree: DigestTree::new(hasher, 0), index: DigestIndex::new(seed) }))
}

fn place(page: u64) -> Place {
    Place(u32::try_from(page).unwrap_or(u32::MAX))
}

/// Reads a file MiB by MiB: pages of the image, first page, bytes, digests. Returns the bytes of the image.
fn scan(path: &Path, hasher: &PageHasher, mut each: impl FnMut(u64, u64, &[u8], &[Digest])) -> Result<u64, ErrorKind> {
    let failed = |source| ErrorKind::Source { path: path.to_path_buf(), source };
    let mut memory = FileMemory::open(path, InstallSize::KIB_4).map_err(failed)?;
    let (pages, bytes) = (memory.layout().pages(), memory.layout().bytes());
    let mut buffer = vec![0; SUBTREE_BYTES];
    let mut first = 0;
    while first < pages {
        let count = usize::try_from(pages.saturating_sub(first)).unwrap_or(usize::MAX).min(SUBTREE_PAGES);
        let part = buffer.get_mut(..count.saturating_mul(PAGE_BYTES)).unwrap_or_default();
        memory.read(RegionId(0), first, part).map_err(failed)?;
        let mut digests = Vec::with_capacity(count);
        if is_zero(part) {
            digests.resize(count, hasher.zero());
        } else {
            hasher.digest_pages(part.as_chunks().0, |digest| digests.push(digest));
        }
        each(pages, first, part, &digests);
        first = first.saturating_add(count as u64);
    }
    memory.check_unchanged().map_err(failed)?;
    Ok(bytes)
}

/// Estimates how far pages compress.
struct Sample {
    compressor: Compressor,
    parts: u64,
    raw: u64,
    compressed: u64,
}

impl Sample {
    fn new() -> Result<Self, ErrorKind> {
        let compressor = Compressor::new().map_err(|source| ErrorKind::Local { what: "zstd cannot start", source })?;
        Ok(Self { compressor, parts: 0, raw: 0, compressed: 0 })
    }

    fn add(&mut self, pages: &[u8]) {
        if pages.is_empty() {
            return;
        }
        self.parts = self.parts.saturating_add(1);
        if self.parts % SAMPLE_EVERY != 1 {
            return;
        }
        let mut out = Vec::new();
        let smaller = self.compressor.compress(pages, 1, &mut out);
        self.raw = self.raw.saturating_add(pages.len() as u64);
        self.compressed = self.compressed.saturating_add(if smaller { out.len() } else { pages.len() } as u64);
    }

    fn estimate(&self, raw: u64) -> u64 {
        let estimate = u128::from(raw).saturating_mul(u128::from(self.compressed)) / u128::from(self.raw.max(1));
        u64::try_from(estimate).unwrap_or(u64::MAX)
    }
}
