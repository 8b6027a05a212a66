//! The Merkle tree over the page digests of one region.
//!
//! Leaves are page digests; every node covers 256 children, so a lowest node covers 1 MiB. A tree begins as the tree of
//! an all-zero region: zero subtrees are precomputed, so a sparse terabyte costs 56 bytes a MiB. Where the others lie is
//! `leaves`. Changing one only marks its lowest node; nodes are hashed when somebody asks, batch by batch while leaves are
//! hot.

use crate::batch::{BatchHasher, counts};
use crate::blobs::Blobs;
use crate::digest::{CV_BYTES, Digest, PageHasher, SubtreeBytes};
use crate::domain::DedupDomain;
use crate::frame::Run;
pub use crate::leaves::{KeptLeaves, Leaves};
use crate::leaves::{Leaf, Slot, Slots, ZERO_LEAF};
use crate::limits::SUBTREE_PAGES;
use crate::page::Layout;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Lowest nodes that are hashed at once: 256 KiB of digests.
const SUBTREES_AT_ONCE: usize = 32;

/// Stored in place of the digest of the zero page, and of a node not computed. No page has it, short of a broken BLAKE3.
const UNSET: Digest = Digest(ZERO_LEAF);
/// Stored in place of the digest of an absent page, which is 32 zero bytes. No page has it either.
const ABSENT: Digest = Digest([0xFF; CV_BYTES]);

/// The digests of one region's pages and the nodes above them.
#[derive(Clone, Debug)]
pub struct DigestTree {
    hasher: PageHasher,
    zero: Digest,
    pages: u64,
    slots: Slots,
    nodes: Vec<Digest>,
    /// The lowest node over zero pages alone, once one was asked for.
    zero_node: Option<Digest>,
    /// The lowest node over absent pages alone, and what is stored below it: one for all.
    absent: Option<(Arc<Leaves>, Digest)>,
}

impl DigestTree {
    /// The tree of a region of `pages` zero pages.
    pub fn new(hasher: &PageHasher, pages: u64) -> Self {
        let subtrees = usize::try_from(pages.div_ceil(SUBTREE_PAGES as u64)).unwrap_or(usize::MAX);
        Self {
            hasher: hasher.clone(),
            zero: hasher.zero(),
            pages,
            slots: Slots::new(subtrees),
            nodes: vec![UNSET; subtrees],
            zero_node: None,
            absent: None,
        }
    }

    /// The same digests for a region of `pages` pages: what is cut off is gone, what is added is zero.
    pub fn resized(self, hasher: &PageHasher, pages: u64) -> Self {
        if pages == self.pages {
            return self;
        }
        let mut resized = Self::new(hasher, pages);
        for index in 0..self.subtrees().min(resized.subtrees()) {
            let mut room = [ZERO_LEAF; SUBTREE_PAGES];
            self.leaves(index, &mut room).into_iter().for_each(|leaves| resized.set_leaves(index, leaves));
        }
        resized
    }

    /// Pages of the region.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The digest of `page`; that of the zero page for one beyond the end.
    pub fn leaf(&self, page: u64) -> Digest {
        let (subtree, at) = split(page);
        self.shown(self.slots.leaf(subtree, at))
    }

    /// The digest that is stored so.
    fn shown(&self, stored: Leaf) -> Digest {
        match Digest(stored) {
            UNSET => self.zero,
            ABSENT => Digest([0; CV_BYTES]),
            digest => digest,
        }
    }

    /// Whether `page` is known to be zero.
    pub fn is_zero(&self, page: u64) -> bool {
        self.leaf(page) == self.zero
    }

    /// Sets the digest of `page`, 32 zero bytes for an absent one. A page beyond the end is ignored.
    pub fn set(&mut self, page: u64, digest: Digest) {
        let (subtree, at) = split(page);
        let stored = match digest {
            zero if zero == self.zero => UNSET,
            UNSET => ABSENT,
            digest => digest,
        };
        if page >= self.pages || self.slots.leaf(subtree, at) == stored.0 {
            return;
        }
        if let (Some(node), Ok(at)) = (self.nodes.get_mut(subtree), u8::try_from(at)) {
            *node = UNSET;
            self.slots.set(subtree, at, stored.0);
        }
    }

    /// Sets `pages` absent. Whole lowest nodes of them cost next to nothing: nobody shall wait for that.
    // SPEC 13.2
    pub fn set_absent(&mut self, pages: Range<u64>) {
        let mut page = pages.start;
        while page < pages.end.min(self.pages) {
            let subtree = page / SUBTREE_PAGES as u64;
            let all = self.subtree_pages(subtree);
            let is_whole = all.end.saturating_sub(all.start) == SUBTREE_PAGES as u64;
            if !is_whole || page != all.start || pages.end < all.end {
                self.set(page, UNSET);
                page = page.saturating_add(1);
                continue;
            }
            let (leaves, digest) = self.absent.get_or_insert_with(|| {
                let shown = core::iter::repeat_n([0; CV_BYTES].as_slice(), SUBTREE_PAGES);
                (Arc::new([ABSENT.0; SUBTREE_PAGES]), self.hasher.domain().subtree.hash(shown))
            });
            let (own, node) = (Slot::Own(Arc::clone(leaves)), *digest);
            self.slots.put(at(subtree), own);
            self.set_node(subtree, node);
            page = all.end;
        }
    }

    /// The stored digests below lowest node `index`, thirty-two zero bytes for a zero page; `None` if all are zero. They
    /// are put together in `room` where they are not in one piece.
    pub fn leaves<'a>(&'a self, index: u64, room: &'a mut Leaves) -> Option<&'a Leaves> {
        self.slots.get(at(index), room)
    }

    /// Whether all pages below lowest node `index` are known to be zero, at a glance: a `false` may be wrong.
    pub fn is_zero_subtree(&self, index: u64) -> bool {
        self.slots.is_zero(at(index))
    }

    /// Takes all digests below lowest node `index` as [`leaves`](Self::leaves) gives them; those beyond the end of the
    /// region must be zero bytes, and so are made to be.
    pub fn set_leaves(&mut self, index: u64, digests: &Leaves) {
        let slot = self.slot_of(index, digests, || Slot::copy(digests));
        self.set_slot(index, slot);
    }

    /// From now on [`adopt`](Self::adopt) finds digests in `kept`; called once, before that.
    pub fn keep(&mut self, kept: Arc<dyn KeptLeaves>) {
        self.slots.keep(kept);
    }

    /// As [`set_leaves`](Self::set_leaves), of the digests that are [kept](Self::keep): they are not copied, unless they
    /// are not such as a tree stores. Says whether there are any.
    pub fn adopt(&mut self, index: u64) -> bool {
        let Some(digests) = self.slots.kept(at(index)) else { return false };
        let slot = self.slot_of(index, digests, || Slot::Kept(Vec::new()));
        self.set_slot(index, slot);
        true
    }

    /// What is stored for `digests`: `as_they_are`, unless they are all zero or have to be changed for that.
    fn slot_of(&self, index: u64, digests: &Leaves, as_they_are: impl FnOnce() -> Slot) -> Slot {
        let pages = self.subtree_pages(index);
        let count = usize::try_from(pages.end.saturating_sub(pages.start)).unwrap_or(0);
        let (used, beyond) = digests.split_at(count.min(SUBTREE_PAGES));
        if used.iter().all(|digest| *digest == UNSET.0) {
            return Slot::Zero;
        }
        if !used.contains(&self.zero.0) && beyond.iter().all(|digest| *digest == UNSET.0) {
            return as_they_are();
        }
        let mut leaves = *digests;
        leaves.iter_mut().filter(|digest| **digest == self.zero.0).for_each(|digest| *digest = UNSET.0);
        leaves.iter_mut().skip(count).for_each(|digest| *digest = UNSET.0);
        Slot::Own(Arc::new(leaves))
    }

    fn set_slot(&mut self, index: u64, slot: Slot) {
        self.slots.put(at(index), slot);
        self.set_node(index, UNSET);
    }

    /// Appends the digests of `pages`, which must lie in the region.
    pub fn copy_to(&self, pages: Range<u64>, out: &mut Vec<Digest>) {
        let mut page = pages.start;
        while page < pages.end {
            let (subtree, at) = split(page);
            let border = (page / SUBTREE_PAGES as u64).saturating_add(1).saturating_mul(SUBTREE_PAGES as u64);
            let next = pages.end.min(border);
            let count = usize::try_from(next.saturating_sub(page)).unwrap_or(0);
            match self.slots.stored(subtree) {
                Some((leaves, news)) => {
                    let start = out.len();
                    out.extend(leaves.iter().skip(at).take(count).map(|leaf| self.shown(*leaf)));
                    for (place, leaf) in news {
                        let slot = usize::from(*place).checked_sub(at).filter(|after| *after < count);
                        let slot = slot.and_then(|after| out.get_mut(start.saturating_add(after)));
                        slot.into_iter().for_each(|slot| *slot = self.shown(*leaf));
                    }
                }
                None => out.extend(core::iter::repeat_n(self.zero, count)),
            }
            page = next;
        }
    }

    /// Lowest nodes of the region: one for each started MiB.
    pub fn subtrees(&self) -> u64 {
        self.nodes.len() as u64
    }

    /// The pages below lowest node `index`.
    pub fn subtree_pages(&self, index: u64) -> Range<u64> {
        let first = index.saturating_mul(SUBTREE_PAGES as u64).min(self.pages);
        first..first.saturating_add(SUBTREE_PAGES as u64).min(self.pages)
    }

    /// The digest of lowest node `index`.
    pub fn subtree(&mut self, index: u64) -> Digest {
        let known = self.nodes.get(at(index)).copied().unwrap_or(UNSET);
        if known != UNSET {
            return known;
        }
        self.hash_subtrees(index..index.saturating_add(1));
        self.nodes.get(at(index)).copied().unwrap_or(UNSET)
    }

    /// Hashes those of these lowest nodes that are not known, many at once.
    pub fn hash_subtrees(&mut self, subtrees: Range<u64>) {
        let stale = |index: &u64| self.nodes.get(at(*index)).is_some_and(|node| *node == UNSET);
        let stale = subtrees.filter(stale).collect();
        self.hash_nodes(stale);
    }

    /// Hashes these lowest nodes.
    fn hash_nodes(&mut self, mut stale: Vec<u64>) {
        stale.retain(|&index| !self.is_known_zero(index));
        let mut rooms = Vec::new();
        for batch in stale.chunks(SUBTREES_AT_ONCE) {
            let found = self.hash_batch(batch, &mut rooms);
            found.into_iter().for_each(|(index, node)| self.set_node(index, node));
        }
    }

    /// The digests of these lowest nodes, in any order. `rooms` is for digests that are not in one piece.
    fn hash_batch(&self, batch: &[u64], rooms: &mut Vec<Leaves>) -> Vec<(u64, Digest)> {
        let in_pieces = |index: &u64| self.slots.stored(at(*index)).is_some_and(|(_, news)| !news.is_empty());
        rooms.resize(if batch.iter().any(in_pieces) { batch.len() } else { 0 }, [ZERO_LEAF; SUBTREE_PAGES]);
        let (mut plain, mut found) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()));
        let rooms = rooms.iter_mut().map(Some).chain(core::iter::repeat_with(|| None));
        for (&index, room) in batch.iter().zip(rooms) {
            let leaves = match room {
                Some(room) => self.slots.get(at(index), room),
                None => self.slots.stored(at(index)).map(|(leaves, _)| leaves),
            };
            match leaves.and_then(|leaves| self.plain(index, leaves)) {
                Some(bytes) => plain.push((index, bytes)),
                None => found.push((index, self.hash_shown(index, leaves))),
            }
        }
        let bytes: Vec<&SubtreeBytes> = plain.iter().map(|(_, bytes)| *bytes).collect();
        let mut indices = plain.iter().map(|(index, _)| *index);
        self.hasher.digest_subtrees(&bytes, |digest| found.extend(indices.next().map(|index| (index, digest))));
        found
    }

    /// The bytes of `leaves`, if they are what a whole lowest node is hashed over: no page of it is zero or absent.
    fn plain<'a>(&self, index: u64, leaves: &'a Leaves) -> Option<&'a SubtreeBytes> {
        let pages = self.subtree_pages(index);
        // What begins like a value that stands for another is looked at like one.
        let stands_for_itself = |leaf: &Leaf| {
            let (head, _) = leaf.as_chunks::<8>();
            !matches!(head.first().copied().map(u64::from_ne_bytes), Some(0 | u64::MAX) | None)
        };
        let is_whole = pages.end.saturating_sub(pages.start) == SUBTREE_PAGES as u64;
        (is_whole && leaves.iter().all(stands_for_itself)).then(|| leaves.as_flattened().first_chunk()).flatten()
    }

    /// The digest of a lowest node over its digests as they are shown.
    fn hash_shown(&self, index: u64, leaves: Option<&Leaves>) -> Digest {
        let mut bytes: Leaves = [UNSET.0; SUBTREE_PAGES];
        let pages = self.subtree_pages(index);
        let count = usize::try_from(pages.end.saturating_sub(pages.start)).unwrap_or(SUBTREE_PAGES);
        let leaves = leaves.map_or(&[][..], |leaves| leaves.as_slice());
        let stored = leaves.iter().copied().chain(core::iter::repeat(UNSET.0));
        bytes.iter_mut().zip(stored).for_each(|(slot, leaf)| *slot = self.shown(leaf).0);
        self.hasher.domain().subtree.hash([bytes.get(..count).unwrap_or(&bytes).as_flattened()])
    }

    /// A whole lowest node over zero pages alone is the same everywhere: it is hashed once.
    fn is_known_zero(&mut self, index: u64) -> bool {
        let pages = self.subtree_pages(index);
        let is_whole = pages.end.saturating_sub(pages.start) == SUBTREE_PAGES as u64;
        if !is_whole || !self.is_zero_subtree(index) {
            return false;
        }
        let zero = *self.zero_node.get_or_insert_with(|| {
            let leaves = core::iter::repeat_n(self.zero.0.as_slice(), SUBTREE_PAGES);
            self.hasher.domain().subtree.hash(leaves)
        });
        self.set_node(index, zero);
        true
    }

    /// Hashes up to `most` of the lowest nodes that are not known; says how many. When there are none left,
    /// [`root`](Self::root) costs little, whatever the size of the region.
    pub fn hash_some(&mut self, most: u64) -> u64 {
        let nodes = self.nodes.iter().zip(0u64..).filter(|(node, _)| **node == UNSET).map(|(_, index)| index);
        let stale: Vec<u64> = nodes.take(usize::try_from(most).unwrap_or(usize::MAX)).collect();
        let found = stale.len() as u64;
        self.hash_nodes(stale);
        found
    }

    fn set_node(&mut self, index: u64, digest: Digest) {
        if let Some(node) = self.nodes.get_mut(at(index)) {
            *node = digest;
        }
    }

    /// The root over the whole region; for an empty region the node of no children.
    pub fn root(&mut self) -> Digest {
        self.hash_subtrees(0..self.subtrees());
        let mut level = self.nodes.clone();
        let mut height: u8 = 1;
        while level.len() > 1 {
            level = level
                .chunks(SUBTREE_PAGES)
                .map(|children| node_digest(self.hasher.domain(), height, children))
                .collect();
            height = height.saturating_add(1);
        }
        level.first().copied().unwrap_or_else(|| self.hasher.domain().subtree.hash([]))
    }

    /// The batch digest of `runs` from page `first`, whose pages are as they stand in the tree; `agreed` as of
    /// [`BatchHasher::new`].
    pub fn batch(&self, agreed: bool, first: u64, runs: &[Run]) -> Digest {
        let mut batch = BatchHasher::new(self.hasher.domain(), agreed);
        let (mut next, mut leaves) = (first, Vec::new());
        for &run in runs {
            let end = next.saturating_add(u64::from(run.count)).min(self.pages);
            leaves.clear();
            if counts(run.kind, agreed) {
                self.copy_to(next..end, &mut leaves);
            }
            batch.run(run, &leaves);
            next = end;
        }
        batch.finish(first)
    }
}

/// What is known of an image without its bytes: the digests of all its pages in order, and the root over them.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The root.
    pub root: Digest,
    /// The regions.
    pub layout: Layout,
    /// Their digests.
    pub trees: Vec<DigestTree>,
}

/// The root of an image: over its regions' sizes, install sizes and roots, in order.
pub fn image_root(domain: &DedupDomain, layout: &Layout, trees: &mut [DigestTree]) -> Digest {
    let mut bytes = Vec::new();
    for (region, tree) in layout.regions().iter().zip(trees) {
        bytes.extend_from_slice(&region.bytes.to_le_bytes());
        bytes.extend_from_slice(&region.install_size.bytes().to_le_bytes());
        bytes.extend_from_slice(&tree.root().0);
    }
    domain.root.hash([bytes.as_slice()])
}

// SPEC 12.4
/// The root of a live session: over the image root and all blobs, in order.
pub fn live_root(domain: &DedupDomain, image_root: Digest, blobs: &Blobs) -> Digest {
    let mut heads = Vec::new();
    for blob in blobs.iter() {
        let mut head = Vec::new();
        head.extend_from_slice(&(blob.name().as_str().len() as u64).to_le_bytes());
        head.extend_from_slice(blob.name().as_str().as_bytes());
        head.extend_from_slice(&blob.version().to_le_bytes());
        head.extend_from_slice(&(blob.bytes().len() as u64).to_le_bytes());
        heads.push(head);
    }
    let count = (heads.len() as u64).to_le_bytes();
    let parts = heads.iter().zip(blobs.iter()).flat_map(|(head, blob)| [head.as_slice(), blob.bytes()]);
    domain.live.hash([image_root.0.as_slice(), count.as_slice()].into_iter().chain(parts))
}

fn node_digest(domain: &DedupDomain, height: u8, children: &[Digest]) -> Digest {
    let mut bytes = [0; 32 * SUBTREE_PAGES];
    let (slots, _) = bytes.as_chunks_mut::<32>();
    for (slot, child) in slots.iter_mut().zip(children) {
        *slot = child.0;
    }
    let used = children.len().saturating_mul(32);
    domain.node.hash([&[height][..], bytes.get(..used).unwrap_or(&bytes)])
}

/// Where lowest node `index` is in a list of them.
fn at(index: u64) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

fn split(page: u64) -> (usize, usize) {
    let subtree = usize::try_from(page / SUBTREE_PAGES as u64).unwrap_or(usize::MAX);
    (subtree, usize::try_from(page % SUBTREE_PAGES as u64).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::batch_digest;
    use crate::digest::page_digest;
    use crate::frame::EntryKind;
    use proptest::prelude::*;

    fn hasher() -> PageHasher {
        PageHasher::new(&DedupDomain::public())
    }

    /// Digests that are kept elsewhere.
    #[derive(Debug)]
    struct Shelf(Vec<Option<Leaves>>);

    impl KeptLeaves for Shelf {
        fn leaves(&self, index: u64) -> Option<&Leaves> {
            self.0.get(usize::try_from(index).ok()?)?.as_ref()
        }
    }

    /// What is kept need not be as a tree stores it.
    #[test]
    fn kept_digests_of_zero_pages_and_beyond_the_end_are_put_right() {
        let hasher = hasher();
        let (zero, other) = (hasher.zero(), page_digest(hasher.domain(), &[3; 4096]));
        let (mut written, mut long, none) = ([other.0; 256], [[0; 32]; 256], [[0; 32]; 256]);
        written[7] = zero.0;
        long[40] = other.0;
        let mut tree = DigestTree::new(&hasher, 2 * 256 + 10);
        assert!(!tree.adopt(0), "nothing is kept yet");
        tree.keep(Arc::new(Shelf(vec![Some(written), Some(none), Some(long)])));
        assert!((0..3).all(|index| tree.adopt(index)) && !tree.adopt(3));
        assert!(tree.is_zero(7) && tree.leaf(8) == other && tree.is_zero_subtree(1) && tree.is_zero_subtree(2));
        let mut twin = DigestTree::new(&hasher, 2 * 256 + 10);
        (0..256).filter(|page| *page != 7).for_each(|page| twin.set(page, other));
        assert_eq!(tree.root(), twin.root());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// The slow twin: a plain list of digests, hashed level by level from nothing.
        #[test]
        fn root_equals_a_tree_built_from_nothing(
            pages in 0u64..1500,
            changes in proptest::collection::vec((0u64..1500, 0u8..5, 0u64..900), 0..60),
        ) {
            let hasher = hasher();
            let mut tree = DigestTree::new(&hasher, pages);
            let mut twin = vec![hasher.zero(); pages as usize];
            for (step, (page, byte, count)) in changes.into_iter().enumerate() {
                if byte == 4 {
                    // SPEC 13.2
                    tree.set_absent(page..page + count);
                    twin.iter_mut().skip(page as usize).take(count as usize).for_each(|slot| *slot = Digest([0; 32]));
                    continue;
                }
                let digest = page_digest(hasher.domain(), &[byte; 4096]);
                tree.set(page, digest);
                if let Some(slot) = twin.get_mut(page as usize) { *slot = digest; }
                if step % 7 == 0 { tree.root(); }
                if step % 3 == 0 { tree.hash_some(2); }
            }
            let lowest = |leaves: &[Digest]| hasher.domain().subtree.hash(leaves.iter().map(|leaf| leaf.0.as_slice()));
            let mut level: Vec<Digest> = twin.chunks(256).map(lowest).collect();
            let mut height = 1;
            while level.len() > 1 {
                level = level.chunks(256).map(|children| node_digest(hasher.domain(), height, children)).collect();
                height += 1;
            }
            let expected = level.first().copied().unwrap_or_else(|| lowest(&[]));
            prop_assert_eq!(tree.root(), expected);
            prop_assert_eq!(tree.hash_some(u64::MAX), 0, "the root needs every node");
            let (mut loaded, mut room) = (DigestTree::new(&hasher, pages), [ZERO_LEAF; SUBTREE_PAGES]);
            for index in 0..tree.subtrees() {
                if let Some(leaves) = tree.leaves(index, &mut room) { loaded.set_leaves(index, leaves); }
            }
            prop_assert_eq!(loaded.root(), expected);
            let mut adopted = DigestTree::new(&hasher, pages);
            adopted.keep(Arc::new(Shelf((0..tree.subtrees()).map(|index| tree.leaves(index, &mut room).copied()).collect())));
            for index in 0..tree.subtrees() {
                prop_assert_eq!(adopted.adopt(index), tree.leaves(index, &mut room).is_some());
            }
            prop_assert_eq!(adopted.root(), expected);
            prop_assert!((0..pages).all(|page| adopted.leaf(page) == tree.leaf(page)));
            let digest = page_digest(hasher.domain(), &[9; 4096]);
            // Few changes of a lowest node, then more than are noted beside what is kept.
            for step in [300, 9, 4] {
                for page in (0..pages).step_by(step) {
                    for tree in [&mut adopted, &mut loaded] { tree.set(page, digest); }
                }
                prop_assert_eq!(adopted.clone().root(), loaded.root());
                prop_assert!((0..pages).all(|page| adopted.leaf(page) == loaded.leaf(page)));
                let range = pages / 5..pages - pages / 7;
                let [some, same] = [&adopted, &loaded].map(|tree| {
                    let mut digests = Vec::new();
                    tree.copy_to(range.clone(), &mut digests);
                    digests
                });
                prop_assert_eq!(some, same);
                let root = loaded.root();
                prop_assert_eq!(adopted.clone().resized(&hasher, pages + 1).resized(&hasher, pages).root(), root);
            }
            for page in 0..pages {
                for other in [&mut adopted, &mut loaded] { other.set(page, tree.leaf(page)); }
            }
            prop_assert_eq!((adopted.root(), loaded.root()), (expected, expected));
            let mut longer = loaded.resized(&hasher, pages + 700);
            prop_assert!((0..pages).all(|page| longer.leaf(page) == tree.leaf(page)));
            prop_assert_ne!(longer.root(), expected);
            prop_assert_eq!(longer.resized(&hasher, pages).root(), expected);
            let kinds = [EntryKind::BASE, EntryKind::ZERO, EntryKind::BASE];
            let mut parts = [pages / 3, pages / 2, 0];
            parts[2] = pages - parts[0] - parts[1];
            let runs = kinds.into_iter().zip(parts).filter(|(_, count)| *count > 0);
            let runs: Vec<Run> = runs.map(|(kind, count)| Run { kind, count: count as u16 }).collect();
            for agreed in [false, true] {
                let mut next = 0;
                let of_run = |run: &Run| { next += run.count as usize; (*run, next - run.count as usize..next) };
                let counted = runs.iter().map(of_run).filter(|(run, _)| counts(run.kind, agreed));
                let digests: Vec<Digest> = counted.flat_map(|(_, pages)| twin[pages].to_vec()).collect();
                let expected = batch_digest((hasher.domain(), agreed), 0, runs.clone(), &digests);
                prop_assert_eq!(tree.batch(agreed, 0, &runs), expected);
            }
        }
    }
}
