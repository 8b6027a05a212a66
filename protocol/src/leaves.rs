//! The digests below the lowest nodes of a tree: where they lie, and how they change.
//!
//! Those of zero pages lie nowhere. Others lie here, or where they are kept, in a mapped file for instance: from there
//! they are copied only where many of a node's digests change. What few change is noted beside.

use crate::digest::CV_BYTES;
use crate::limits::SUBTREE_PAGES;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

/// The digests below a lowest node as they are stored: 32 zero bytes for that of a zero page.
pub type Leaves = [Leaf; SUBTREE_PAGES];

/// A digest as it is stored.
pub(crate) type Leaf = [u8; CV_BYTES];

/// Digests of a region that lie outside of its tree, and do not change.
pub trait KeptLeaves: core::fmt::Debug + Send + Sync {
    /// Those below lowest node `index` as they are stored; `None` if they are not kept in one piece.
    fn leaves(&self, index: u64) -> Option<&Leaves>;
}

/// Stored for a zero page.
pub(crate) const ZERO_LEAF: Leaf = [0; CV_BYTES];
/// Digests of a lowest node that may change before all of them are copied: 1 KiB of 8. A guest that changes one page in a
/// hundred changes two or three of 256.
const NEWS_MAX: usize = 32;

/// Where the digests below a lowest node are.
#[derive(Clone, Debug)]
pub(crate) enum Slot {
    /// They are of zero pages.
    Zero,
    /// Here.
    Own(Arc<Leaves>),
    /// Where they are kept, except those that have changed since, by their places.
    Kept(Vec<(u8, Leaf)>),
}

impl Slot {
    /// A copy of `leaves`, made once: an array by value would go by way of the stack.
    pub(crate) fn copy(leaves: &Leaves) -> Self {
        Arc::<[Leaf]>::from(leaves.as_slice()).try_into().map_or(Self::Zero, Self::Own)
    }
}

/// The slots of a tree.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    kept: Option<Arc<dyn KeptLeaves>>,
}

impl Slots {
    /// `count` slots of zero pages.
    pub(crate) fn new(count: usize) -> Self {
        Self { slots: vec![Slot::Zero; count], kept: None }
    }

    /// Where digests are kept; the first call counts.
    pub(crate) fn keep(&mut self, kept: Arc<dyn KeptLeaves>) {
        self.kept.get_or_insert(kept);
    }

    /// What is kept for a slot, whatever the slot has.
    pub(crate) fn kept(&self, subtree: usize) -> Option<&Leaves> {
        self.kept.as_ref()?.leaves(subtree as u64)
    }

    pub(crate) fn is_zero(&self, subtree: usize) -> bool {
        matches!(self.slots.get(subtree), None | Some(Slot::Zero))
    }

    /// The digests of a slot and what has changed of them since, by their places; `None` if all are of zero pages.
    pub(crate) fn stored(&self, subtree: usize) -> Option<(&Leaves, &[(u8, Leaf)])> {
        match self.slots.get(subtree)? {
            Slot::Zero => None,
            Slot::Own(leaves) => Some((leaves, &[])),
            Slot::Kept(news) => Some((self.kept(subtree)?, news)),
        }
    }

    /// The digests of a slot as they are, put together in `room` where they are not in one piece.
    pub(crate) fn get<'a>(&'a self, subtree: usize, room: &'a mut Leaves) -> Option<&'a Leaves> {
        let (leaves, news) = self.stored(subtree)?;
        if news.is_empty() {
            return Some(leaves);
        }
        room.copy_from_slice(leaves);
        for (place, leaf) in news {
            room.get_mut(usize::from(*place)).into_iter().for_each(|slot| *slot = *leaf);
        }
        Some(room)
    }

    /// One digest.
    pub(crate) fn leaf(&self, subtree: usize, at: usize) -> Leaf {
        let Some((leaves, news)) = self.stored(subtree) else { return ZERO_LEAF };
        let new = news.iter().find(|(place, _)| usize::from(*place) == at).map(|(_, leaf)| leaf);
        new.or_else(|| leaves.get(at)).copied().unwrap_or(ZERO_LEAF)
    }

    /// Replaces what a slot has.
    pub(crate) fn put(&mut self, subtree: usize, slot: Slot) {
        if let Some(place) = self.slots.get_mut(subtree) {
            *place = slot;
        }
    }

    /// Changes one digest.
    pub(crate) fn set(&mut self, subtree: usize, at: u8, leaf: Leaf) {
        if let Some(Slot::Kept(news)) = self.slots.get_mut(subtree) {
            if let Some((_, new)) = news.iter_mut().find(|(place, _)| *place == at) {
                *new = leaf;
                return;
            }
            if news.len() < NEWS_MAX {
                news.push((at, leaf));
                return;
            }
        }
        if !matches!(self.slots.get(subtree), Some(Slot::Own(_))) {
            let mut room = [ZERO_LEAF; SUBTREE_PAGES];
            let own = self.get(subtree, &mut room).map(Slot::copy);
            self.put(subtree, own.unwrap_or_else(|| Slot::copy(&[ZERO_LEAF; SUBTREE_PAGES])));
        }
        if let Some(Slot::Own(leaves)) = self.slots.get_mut(subtree) {
            Arc::make_mut(leaves).get_mut(usize::from(at)).into_iter().for_each(|place| *place = leaf);
        }
    }
}
