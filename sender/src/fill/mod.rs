//! Post-copy at the sender: the guest runs at the receiver, and what was left behind follows.
//!
//! A live session that ends in post-copy leaves a [`Remainder`]: the memory, the digests of all pages as they were
//! stated, and the pages that the receiver lacks. A [`FillEngine`] brings them in a session of its own. The first such
//! session and every later one, after a connection broke, are the same: the receiver says what it lacks, the sender
//! brings that. The memory may be given up when a session has ended in [`FillEvent::Filled`], and no sooner.

mod ahead;
mod engine;
mod serving;

pub use engine::{FillConfig, FillEngine, FillEvent};

use crate::memory::GuestMemory;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::PageHasher;
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::handover::Handover;
use pagewire_protocol::limits::SUBTREE_PAGES;
use pagewire_protocol::page::{Layout, RegionId};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::tree::{DigestTree, Manifest, image_root};
use std::io;

/// What of a guest is still to be brought to where it runs.
#[derive(Debug)]
pub struct Remainder<M> {
    pub(crate) memory: M,
    pub(crate) hasher: PageHasher,
    /// The digests of the whole image, but of pages that are not read yet.
    pub(crate) trees: Vec<DigestTree>,
    /// The pages that were left behind.
    pub(crate) absent: PageBitmap,
    /// Those of them that have gone out in a session before; `None` if nobody knows.
    pub(crate) gone: Option<PageBitmap>,
    /// How the guest left.
    pub(crate) handover: Handover,
}

impl<M: GuestMemory> Remainder<M> {
    /// What is left to bring when all that is known of the hand-over is its record: any page may be lacking. Reads and
    /// digests all of `memory`, which is as it was when the guest left.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn recover(mut memory: M, domain_key: &[u8; 32], handover: Handover) -> io::Result<Self> {
        let hasher = PageHasher::new(&DedupDomain::new(domain_key));
        let layout = memory.layout().clone();
        let mut trees = Vec::new();
        let (mut buffer, mut digests) = (PageBuffer::default(), Vec::new());
        for (number, region) in (0..).zip(layout.regions()) {
            let mut tree = DigestTree::new(&hasher, region.pages());
            for first in (0..region.pages()).step_by(SUBTREE_PAGES) {
                let count = region.pages().saturating_sub(first).min(SUBTREE_PAGES as u64);
                buffer
                    .resize(usize::try_from(count).unwrap_or(0).saturating_mul(pagewire_protocol::limits::PAGE_BYTES));
                memory.read(RegionId(number), first, &mut buffer)?;
                digests.clear();
                hasher.digest_nonzero(buffer.as_chunks().0, &mut digests);
                (first..).zip(&digests).for_each(|(page, digest)| tree.set(page, *digest));
            }
            trees.push(tree);
        }
        Ok(Self { memory, hasher, trees, absent: PageBitmap::full(layout.pages()), gone: None, handover })
    }

    /// How the guest left.
    pub fn handover(&self) -> &Handover {
        &self.handover
    }

    /// Pages that were left behind.
    pub fn pages(&self) -> u64 {
        self.absent.count()
    }

    /// What the image is, when all that was left behind has gone.
    pub fn into_manifest(mut self) -> Manifest {
        let layout = self.layout().clone();
        let root = image_root(self.hasher.domain(), &layout, &mut self.trees);
        Manifest { root, layout, trees: self.trees }
    }

    pub(crate) fn layout(&self) -> &Layout {
        self.memory.layout()
    }
}
