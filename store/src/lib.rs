//! Images on one host, for both roles: today's receiver sends tomorrow.
//!
//! It owns where a digest lies ([`DigestIndex`]) and how an image file comes to be ([`Landing`]): a file under its
//! final name is always whole. It never talks to a peer, and no name reaches it that `protocol` has not judged.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests choose their numbers"))]

mod index;
mod landing;
mod moved;
mod tags;

pub use index::DigestIndex;
pub use landing::{Landing, LandingError, LandingOptions};
pub use moved::MovedPages;
pub use tags::TagIndex;
