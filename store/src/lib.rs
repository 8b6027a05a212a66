//! Images on one host, for both roles: today's receiver sends tomorrow.
//!
//! It owns where a digest lies ([`DigestIndex`]), how an image file comes to be ([`Landing`]), and what stays of images
//! that were here ([`Store`]): a file under its final name is always whole. It never talks to a peer, and no name
//! reaches it that `protocol` has not judged.

#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests choose their numbers"))]

mod content;
mod dir;
mod error;
mod evict;
mod index;
mod keep;
mod landing;
pub mod manifest;
mod mapped;
mod moved;
#[cfg(test)]
mod sample;
mod store;
mod tags;
pub mod touches;
mod verify;
mod visit;

pub use content::{DomainPages, FoundPage};
pub use error::StoreError;
pub use evict::Removed;
pub use index::DigestIndex;
pub use keep::{Keep, KeepImage, Kept, Lineage, ReadPages};
pub use landing::{Landing, LandingError, LandingOptions};
pub use manifest::{VisitId, VisitKind};
pub use moved::MovedPages;
pub use store::{Store, StoreOptions};
pub use tags::TagIndex;
pub use verify::{Fault, Finding, Repaired, Verified};
pub use visit::{Visit, VisitHead};
