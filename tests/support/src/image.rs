//! Images: regions and their bytes, and the ways in which memory tends to look.
//!
//! Bytes are kept padded to whole pages; what lies beyond a region's end is zero, always.

use crate::rng::Rng;
use pagewire_protocol::digest::{Digest, PageHasher};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{InstallSize, Layout, Region};
use pagewire_protocol::tree::{DigestTree, image_root};
use std::collections::BTreeSet;

/// The memory of a guest at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Where what lies.
    pub regions: Vec<Region>,
    /// For each region its bytes, padded with zeros to whole pages.
    pub bytes: Vec<Vec<u8>>,
}

/// How the pages of a random image are mixed, in percent; what is left is random bytes.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Zero pages.
    pub zero: u64,
    /// Pages of a small pool: duplicates.
    pub pool: u64,
    /// Pages that zstd shrinks.
    pub text: u64,
}

impl Mix {
    /// A mix as memory has it.
    pub const MEMORY: Self = Self { zero: 30, pool: 20, text: 25 };
    /// Nothing but bytes that are met once.
    pub const NOISE: Self = Self { zero: 0, pool: 0, text: 0 };
}

impl Image {
    /// An image of zeros.
    pub fn zeros(regions: Vec<Region>) -> Self {
        let bytes = regions.iter().map(|region| vec![0; region.pages() as usize * PAGE_BYTES]).collect();
        Self { regions, bytes }
    }

    /// One region of `pages` 4 KiB pages with bytes of `mix`.
    pub fn random(pages: u64, mix: Mix, rng: &mut Rng) -> Self {
        let region = Region { bytes: pages * PAGE_BYTES as u64, install_size: InstallSize::KIB_4 };
        Self::filled(vec![region], mix, rng)
    }

    /// Regions with bytes of `mix`.
    pub fn filled(regions: Vec<Region>, mix: Mix, rng: &mut Rng) -> Self {
        let mut image = Self::zeros(regions);
        for region in 0..image.regions.len() {
            for page in 0..image.regions[region].pages() {
                image.rewrite(region, page, mix, rng);
            }
        }
        image
    }

    /// Gives a page new bytes of `mix`.
    pub fn rewrite(&mut self, region: usize, page: u64, mix: Mix, rng: &mut Rng) {
        let kind = rng.below(100);
        let used = self.regions[region].bytes_of(page, 1) as usize;
        let bytes = &mut self.page_mut(region, page)[..used];
        if kind < mix.zero {
            bytes.fill(0);
        } else if kind < mix.zero + mix.pool {
            Rng::new(rng.below(5)).fill(bytes);
        } else if kind < mix.zero + mix.pool + mix.text {
            let word = rng.word().to_le_bytes();
            bytes.iter_mut().zip(word.iter().cycle()).for_each(|(byte, &value)| *byte = value);
        } else {
            rng.fill(bytes);
        }
    }

    /// Changes about `percent` of all pages.
    pub fn touch(&mut self, percent: u64, mix: Mix, rng: &mut Rng) {
        for region in 0..self.regions.len() {
            for page in 0..self.regions[region].pages() {
                if rng.chance(percent) {
                    self.rewrite(region, page, mix, rng);
                }
            }
        }
    }

    /// The layout.
    pub fn layout(&self) -> Layout {
        Layout::new(self.regions.clone()).unwrap()
    }

    /// Pages of the image.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(Region::pages).sum()
    }

    /// The bytes of a page.
    pub fn page(&self, region: usize, page: u64) -> &[u8] {
        &self.bytes[region][page as usize * PAGE_BYTES..][..PAGE_BYTES]
    }

    /// The bytes of a page, to be changed.
    pub fn page_mut(&mut self, region: usize, page: u64) -> &mut [u8] {
        &mut self.bytes[region][page as usize * PAGE_BYTES..][..PAGE_BYTES]
    }

    /// How many different pages there are that are not zero.
    pub fn distinct(&self) -> u64 {
        let pages = self.bytes.iter().flat_map(|bytes| bytes.chunks(PAGE_BYTES));
        let pages: BTreeSet<&[u8]> = pages.filter(|page| page.iter().any(|&byte| byte != 0)).collect();
        pages.len() as u64
    }

    /// The trees of all regions.
    pub fn trees(&self, hasher: &PageHasher) -> Vec<DigestTree> {
        let regions = self.regions.iter().zip(&self.bytes);
        let tree = regions.map(|(region, bytes)| {
            let mut tree = DigestTree::new(hasher, region.pages());
            let mut page = 0;
            hasher.digest_pages(bytes.as_chunks::<PAGE_BYTES>().0, |digest| {
                tree.set(page, digest);
                page += 1;
            });
            tree
        });
        tree.collect()
    }

    /// The root in the domain of `key`.
    pub fn root(&self, key: &[u8; 32]) -> Digest {
        let hasher = PageHasher::new(&DedupDomain::new(key));
        image_root(hasher.domain(), &self.layout(), &mut self.trees(&hasher))
    }
}
