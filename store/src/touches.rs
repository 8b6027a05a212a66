//! What a guest touched first when it ran before its memory was there, kept beside its visit. `docs/STORE.md` is the
//! authority.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..8 | magic | `PWTOUCH` and a zero byte |
//! | 8..12 | version | 1 |
//! | 12..16 | n | how many places, at most 2^20 |
//! | 16..32 | visit | the visit's id |
//! | 32..32+4n | places | `u32` each, each once, below the pages of the image |
//! | ..+32 | seal | of all before it, keyed by the visit's domain |
//!
//! It is a wish and no more: who believes a wrong one brings pages in an order that is of no use. So a damaged one is one
//! that is not there.

use crate::dir::{Folder, Found, try_lock};
use crate::error::StoreError;
use crate::evict;
use crate::manifest::VisitId;
use crate::store::{Store, heads};
use crate::visit::{VisitHead, manifest_name};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::coding::{Reader, Writer};
use pagewire_protocol::digest::Digest;
use pagewire_protocol::domain::{DedupDomain, LineageId};
use pagewire_protocol::error::DecodeError;
use pagewire_protocol::limits::FIRST_TOUCHES_MAX;
use pagewire_protocol::page::{Layout, Place};
use std::ffi::OsString;
use std::io::Read;
use thiserror::Error;

/// What such a file begins with.
pub const MAGIC: [u8; 8] = *b"PWTOUCH\0";
/// The only version there is.
pub const VERSION: u32 = 1;
const FIXED: usize = 32;
const SEAL: usize = 32;
/// Bytes of the longest.
pub const BYTES_MAX: usize = FIXED + 4 * FIRST_TOUCHES_MAX + SEAL;

/// Why bytes are not what a visit's guest touched first.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TouchesError {
    /// Another kind of file.
    #[error("not the first touches of a guest")]
    Magic,
    /// Written by a program that knows more.
    #[error("version {0} is not known here")]
    Version(u32),
    /// Cut, too long, or more places than there may be.
    #[error(transparent)]
    Length(#[from] DecodeError),
    /// They are another visit's.
    #[error("they are another visit's")]
    Foreign,
    /// Not what was written.
    #[error("the seal does not fit")]
    Seal,
    /// A place that is no page of the image, or is there twice.
    #[error("place {0} is no page of the image, or is there twice")]
    Place(u32),
}

/// The bytes of a guest's first touches; what is beyond the most that may be kept is left out.
pub fn encode(visit: VisitId, domain: &DedupDomain, touches: &[Place]) -> Vec<u8> {
    let touches = touches.get(..FIRST_TOUCHES_MAX).unwrap_or(touches);
    let mut bytes = Vec::with_capacity(FIXED + 4 * touches.len() + SEAL);
    let count = u32::try_from(touches.len()).unwrap_or(u32::MAX);
    let mut writer = Writer(&mut bytes);
    writer.bytes(&MAGIC).u32(VERSION).u32(count).bytes(&visit.0);
    touches.iter().for_each(|place| _ = writer.u32(place.0));
    let seal = domain.seal(&[b"touches", &bytes]);
    bytes.extend_from_slice(&seal.0);
    bytes
}

// STORE 6.2
/// Judges the bytes of a visit's first touches: places of an image of so many pages, each once.
///
/// # Errors
/// They are not what was written for this visit.
pub fn decode(bytes: &[u8], visit: VisitId, domain: &DedupDomain, pages: u64) -> Result<Vec<Place>, TouchesError> {
    let mut reader = Reader::new(bytes);
    if reader.array("magic")? != MAGIC {
        return Err(TouchesError::Magic);
    }
    let version = reader.u32("version")?;
    if version != VERSION {
        return Err(TouchesError::Version(version));
    }
    let claimed = reader.u32("places")?;
    let count = usize::try_from(claimed).unwrap_or(usize::MAX);
    if count > FIRST_TOUCHES_MAX {
        return Err(DecodeError::limit("places", u64::from(claimed), FIRST_TOUCHES_MAX as u64).into());
    }
    if reader.array("visit")? != visit.0 {
        return Err(TouchesError::Foreign);
    }
    let places = reader.bytes("places", count.saturating_mul(4))?;
    let seal: [u8; SEAL] = reader.array("seal")?;
    let sealed = bytes.get(..FIXED.saturating_add(places.len())).unwrap_or_default();
    if !reader.rest().is_empty() || domain.seal(&[b"touches", sealed]) != Digest(seal) {
        return Err(TouchesError::Seal);
    }
    let mut seen = PageBitmap::new(pages);
    let places = places.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    places.map(|place| once(&mut seen, place)).collect()
}

fn once(seen: &mut PageBitmap, place: u32) -> Result<Place, TouchesError> {
    let is_new = u64::from(place) < seen.len() && seen.insert(u64::from(place));
    is_new.then_some(Place(place)).ok_or(TouchesError::Place(place))
}

/// The file beside a manifest.
pub(crate) fn touches_name(id: VisitId) -> OsString {
    format!("{id}.touches").into()
}

/// What is in the file of a visit, if it is what was written.
pub(crate) fn read(folder: &Folder, head: &VisitHead, domain: &DedupDomain) -> Result<Vec<Place>, StoreError> {
    let name = touches_name(head.id);
    let damaged = |why: String| StoreError::Damaged { path: folder.path().join(&name), why };
    let file = match folder.open(&name, false)? {
        Found::Nothing => return Ok(Vec::new()),
        Found::Planted(what) => return Err(damaged(format!("it is {what}"))),
        Found::File(file, _) => file,
    };
    let mut bytes = Vec::new();
    let read = file.take(BYTES_MAX as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| folder.io(&name, "cannot be read", error))?;
    decode(&bytes, head.id, domain, head.layout.pages()).map_err(|error| damaged(error.to_string()))
}

impl Store {
    /// Keeps what the guest of a visit touched first, in place of what was kept before; nothing leaves that as it is. Of
    /// very many the first are kept. Then evicts what is over the domain's budget, and keeps none if the visit alone is.
    ///
    /// # Errors
    /// The operating system refused; what was kept before is there still.
    pub fn keep_touches(&self, visit: &VisitHead, touches: &[Place]) -> Result<(), StoreError> {
        let Some(folder) = self.folder(visit.domain)?.filter(|_| !touches.is_empty()) else { return Ok(()) };
        let Some(opened) = self.open_visit(visit)? else { return Ok(()) };
        let bytes = encode(visit.id, &DedupDomain::new(opened.key()), touches);
        let (name, mut aside) = (touches_name(visit.id), touches_name(visit.id));
        aside.push(".new");
        let lock = self.root.lock(false)?;
        // Whoever writes one holds it locked: this is a leftover, or another's on its way.
        if let Some((file, _)) = folder.open(&aside, false)?.file() {
            if !try_lock(&file, false) {
                return Ok(());
            }
            folder.unlink(&aside)?;
        }
        let draft = folder.create(&aside)?;
        drop(lock);
        let written = draft.write(0, &bytes).and_then(|()| draft.sync());
        let _lock = self.root.lock(false)?;
        // STORE 6.3
        let is_there = matches!(folder.open(&manifest_name(visit.id), false)?, Found::File(..));
        let kept = written.and_then(|()| if is_there { folder.rename(&aside, &name) } else { folder.unlink(&aside) });
        let kept = kept.and_then(|()| folder.sync());
        draft.unlock();
        if kept.is_err() {
            // What stays behind all the same is removed when the store is opened next.
            let _ = folder.unlink(&aside);
        } else if let Some(budget) = self.budget {
            // STORE 6.4; they are kept: what could not go today goes when the next one comes.
            let _ = evict::to_budget(&folder, visit.domain, budget, Some(visit.id));
        }
        kept
    }

    /// What a guest touched first when it last ran on this host before all of it was there, by places of an image of this
    /// layout; nothing if that is not known of any visit, or damaged.
    pub fn first_touches(&self, key: &[u8; 32], guest: LineageId, layout: &Layout) -> Vec<Place> {
        let domain = DedupDomain::new(key);
        let Ok(Some(folder)) = self.folder(domain.id()) else { return Vec::new() };
        let visits = heads(&folder, domain.id()).into_iter();
        let its = visits.filter(|head| head.lineage == guest && head.layout == *layout);
        its.map(|head| read(&folder, &head, &domain).unwrap_or_default())
            .find(|touches| !touches.is_empty())
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
