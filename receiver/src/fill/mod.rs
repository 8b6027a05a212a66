//! Post-copy at the receiver: the guest runs here, and what it lacks follows.
//!
//! A live session that ends in post-copy leaves an [`Incomplete`] guest: its memory and the pages that are not there. A
//! [`FillEngine`] takes them in a session of its own; when that breaks, the next one goes on with what is lacking then.
//! A page is installed once: what comes a second time is dropped, because the guest may have written to it.

mod engine;
mod filling;
mod touches;

pub use engine::{FillEngine, FillEvent, FillTerms};
pub(crate) use touches::Touches;

use crate::page_map::PageMap;
use crate::report::FillCounts;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::PageHasher;
use pagewire_protocol::frame::Open;
use pagewire_protocol::handover::Handover;
use pagewire_protocol::page::{Layout, Place};
use pagewire_protocol::tree::Manifest;

/// A guest that runs here and lacks pages.
#[derive(Debug)]
pub struct Incomplete<S> {
    pub(crate) sink: S,
    pub(crate) map: PageMap,
    pub(crate) hasher: PageHasher,
    /// The pages that were absent when it started.
    pub(crate) left: PageBitmap,
    /// Those of them that are not there yet.
    pub(crate) lacking: PageBitmap,
    /// What it may be brought from here can be read: the base as it was.
    pub(crate) holds: bool,
    pub(crate) handover: Handover,
    /// How it was offered.
    pub(crate) open: Open,
    pub(crate) counts: FillCounts,
    pub(crate) touches: Touches,
}

impl<S> Incomplete<S> {
    /// How the guest came.
    pub fn handover(&self) -> &Handover {
        &self.handover
    }

    /// How it was offered when it came.
    pub fn open(&self) -> &Open {
        &self.open
    }

    /// The regions of its memory.
    pub fn layout(&self) -> &Layout {
        self.map.layout()
    }

    /// How many pages it lacks.
    pub fn pages(&self) -> u64 {
        self.lacking.count()
    }

    /// What was done so far, in all sessions.
    pub fn counts(&self) -> FillCounts {
        self.counts
    }

    /// The pages that it touched before they had come, by their places in the image and in that order, behind those that
    /// it was expected to touch; each once.
    pub fn first_touches(&self) -> &[Place] {
        self.touches.order()
    }

    /// Its memory, for whoever looks at what it touches while no session fills it.
    pub fn sink(&mut self) -> &mut S {
        &mut self.sink
    }

    /// How it was offered, and what its image was when it came; `None` as long as pages are lacking.
    pub fn into_manifest(mut self) -> Option<(Open, Manifest)> {
        let root = (self.pages() == 0).then(|| self.map.root(&self.hasher))?;
        let (layout, trees) = self.map.into_parts();
        Some((self.open, Manifest { root, layout, trees }))
    }
}
