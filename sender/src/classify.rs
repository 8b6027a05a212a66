//! Which way each page of a batch is stated. Looks at digests only; the bytes were read and digested before.
//!
//! In order: zero, then announced (where the receiver may hold it), then a reference to bytes already sent, else
//! inline. A page whose bytes go inline becomes what later duplicates refer to.

use crate::lanes::Lanes;
use pagewire_protocol::batch::{batch_digest, counts};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::challenge::{Challenge, PageProof};
use pagewire_protocol::digest::{Digest, PageBytes, PageHasher};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::frame::{EntryKind, LaneId, Run};
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, PageRange, Place};
use pagewire_protocol::page_buffer::PageBuffer;
use pagewire_protocol::session::Payload;
use pagewire_protocol::tree::DigestTree;
use pagewire_store::DigestIndex;

/// Pages that the index has room for from the start (4 GiB of them); it grows beyond, and a sparse image needs less.
const INDEX_START_MAX: usize = 1 << 20;

/// Which bytes have gone to the receiver, and when.
#[derive(Debug)]
pub(crate) struct SentPages {
    /// Places whose bytes went inline.
    inline: PageBitmap,
    /// For each group, the number on its lane of the last frame that carried bytes of it.
    last_frame: Vec<u64>,
    index: Option<DigestIndex>,
    /// Most pages are expected to go: room for them is made at once.
    many: bool,
}

impl SentPages {
    /// Nothing sent yet; with a `seed` duplicates are found.
    pub(crate) fn new(layout: &Layout, seed: Option<u64>, many: bool) -> Self {
        let last = layout.regions().len().saturating_sub(1);
        let region = pagewire_protocol::page::RegionId(u16::try_from(last).unwrap_or(u16::MAX));
        let pages = layout.region(region).map_or(0, |region| region.pages());
        let groups = usize::try_from(layout.group(region, pages).saturating_add(1)).unwrap_or(0);
        Self {
            inline: PageBitmap::new(layout.pages()),
            last_frame: vec![0; groups],
            index: seed.map(DigestIndex::new),
            many,
        }
    }

    /// Called with digests that are asked for next.
    pub(crate) fn fetch(&self, digests: &[Digest]) {
        if let Some(index) = &self.index {
            index.fetch(digests);
        }
    }

    /// Whether the content `digest` has gone so that a frame on `lane` may refer to it; if not, it goes at `place` now.
    pub(crate) fn has_gone(
        &mut self,
        digest: &Digest,
        place: Place,
        lane: LaneId,
        frame: (&Layout, &[DigestTree], &Lanes),
    ) -> bool {
        let (layout, trees, lanes) = frame;
        let of = |place: Place| {
            let (region, page) = layout.locate(place);
            trees.get(usize::from(region.0)).map(|tree| tree.leaf(page.0)).unwrap_or_default()
        };
        let pages = usize::try_from(layout.pages()).unwrap_or(usize::MAX).min(INDEX_START_MAX);
        let known = self.index.as_mut().and_then(|index| {
            if self.many && index.is_empty() {
                index.reserve(pages, of);
            }
            index.insert(digest, place, of)
        });
        if let Some(known) =
            known.filter(|&known| known != place).filter(|known| self.inline.contains(u64::from(known.0)))
        {
            let (region, page) = layout.locate(known);
            let group = layout.group(region, page.0);
            let home = lanes.lane_of(group);
            let frame = usize::try_from(group).ok().and_then(|group| self.last_frame.get(group)).copied().unwrap_or(0);
            if home == lane || frame < lanes.acked(home) {
                return true;
            }
        }
        self.inline.insert(u64::from(place.0));
        let (region, page) = layout.locate(place);
        let group = usize::try_from(layout.group(region, page.0)).unwrap_or(usize::MAX);
        if let Some(last) = self.last_frame.get_mut(group) {
            *last = lanes.planned(lane);
        }
        false
    }
}

impl SentPages {
    /// The page at `place` is stated anew: its content before, `old`, is not counted on any more. Called when the tree
    /// has its new digest or is about to.
    pub(crate) fn retire(&mut self, old: &Digest, place: Place) {
        if let Some(index) = &mut self.index {
            index.remove(old, place);
        }
        self.inline.remove(u64::from(place.0));
    }
}

/// The entries of one batch under construction.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    pub(crate) runs: Vec<Run>,
    /// The digests of those pages whose digests count in that of the batch.
    digests: Vec<Digest>,
    pub(crate) references: Vec<Digest>,
    /// Their proofs, if the receiver asks for them.
    pub(crate) proofs: Vec<PageProof>,
    pub(crate) shifted: u32,
    pub(crate) inline: u32,
    pub(crate) payload: Payload,
}

impl Entries {
    /// Entries over the pages of `buffer`.
    pub(crate) fn over(buffer: PageBuffer) -> Self {
        Self { payload: Payload { buffer, ranges: Vec::new() }, ..Self::default() }
    }

    /// States the next pages in a way that needs nothing else.
    pub(crate) fn push_many(&mut self, kind: EntryKind, count: u64) {
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        match self.runs.last_mut() {
            Some(run) if run.kind == kind => run.count = run.count.saturating_add(count),
            _ if count > 0 => self.runs.push(Run { kind, count }),
            _ => {}
        }
    }

    /// States the next page, which is the `at`-th of the buffer.
    pub(crate) fn push(&mut self, kind: EntryKind, at: usize, digest: Digest) {
        match self.runs.last_mut() {
            Some(run) if run.kind == kind => run.count = run.count.saturating_add(1),
            _ => self.runs.push(Run { kind, count: 1 }),
        }
        // Base pages are stated one by one over an agreed base alone.
        if counts(kind, true) {
            self.digests.push(digest);
        }
        match kind {
            EntryKind::REFERENCE => self.references.push(digest),
            EntryKind::INLINE => {
                self.inline = self.inline.saturating_add(1);
                let start = at.saturating_mul(PAGE_BYTES);
                let end = start.saturating_add(PAGE_BYTES);
                match self.payload.ranges.last_mut() {
                    Some(range) if range.end == start => range.end = end,
                    _ => self.payload.ranges.push(start..end),
                }
            }
            EntryKind::SHIFTED => self.shifted = self.shifted.saturating_add(1),
            _ => {}
        }
    }
}

impl Entries {
    /// The batch digest, from page `first`; whether the base is agreed is told with the domain.
    pub(crate) fn digest(&self, domain: (&DedupDomain, bool), first: u64) -> Digest {
        batch_digest(domain, first, self.runs.iter().copied(), &self.digests)
    }

    /// Adds the proofs of all pages that are not zero: they are announced.
    pub(crate) fn prove(&mut self, challenge: &Challenge, hasher: &PageHasher, digests: &[Digest]) {
        let pages: &[PageBytes] = self.payload.buffer.as_chunks().0;
        let announced = pages.iter().zip(digests).filter(|(_, digest)| **digest != hasher.zero());
        challenge.prove_pages(hasher, announced.map(|(page, _)| page), |proof| self.proofs.push(proof));
    }
}

/// Neighbouring pages that need no look: a run of zero and base pages that grows until something else comes.
#[derive(Debug)]
pub(crate) struct Cover {
    pub(crate) range: PageRange,
    pub(crate) runs: Vec<Run>,
}

impl Cover {
    /// Adds pages behind the run; false if it is full, lies elsewhere or has too many changes of kind.
    pub(crate) fn extend(&mut self, range: PageRange, runs: &[Run], pages_max: u32, runs_max: usize) -> bool {
        let continues = range.region == self.range.region && range.first.0 == self.range.numbers().end;
        let count = self.range.count.saturating_add(range.count);
        if !continues || count > pages_max || self.runs.len().saturating_add(runs.len()) > runs_max {
            return false;
        }
        self.range.count = count;
        for run in runs {
            match self.runs.last_mut() {
                Some(last) if last.kind == run.kind => last.count = last.count.saturating_add(run.count),
                _ => self.runs.push(*run),
            }
        }
        true
    }
}
