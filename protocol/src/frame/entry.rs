//! The words of a PAGES frame: how its payload is encoded, and in which ways its pages are stated.
//!
//! Values are those of SPEC 5.3 and 5.5. Only `pages.rs` makes one from a byte, after it has judged it.

use crate::digest::Digest;

/// How the payload is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Codec(pub(super) u8);

impl Codec {
    /// As it is.
    pub const NONE: Self = Self(0);
    /// One zstd frame.
    pub const ZSTD: Self = Self(1);
    /// One zstd frame whose prefix is the old bytes of the pages: what they have in common with them costs nothing.
    pub const DELTA: Self = Self(2);
    /// The bits of HELLO for all of them.
    pub const ALL_BITS: u32 = 0b111;

    /// The bit of HELLO.
    pub const fn bit(self) -> u32 {
        1 << self.0
    }
}

/// What stands in a batch digest for a page that is skipped.
pub const SKIPPED_DIGEST: Digest = Digest([0; 32]);

/// The ways to state a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntryKind(pub(super) u8);

impl EntryKind {
    /// All bytes zero.
    pub const ZERO: Self = Self(1);
    /// As in the base at the same page.
    pub const BASE: Self = Self(2);
    /// Whatever has this digest.
    pub const REFERENCE: Self = Self(3);
    /// The bytes come along.
    pub const INLINE: Self = Self(4);
    /// As in the base, as many pages further as the frame's shift says.
    pub const SHIFTED: Self = Self(5);
    /// Not stated by this frame: the page stays what it was. In a batch digest it counts as [`SKIPPED_DIGEST`].
    pub const SKIPPED: Self = Self(6);
}

/// Neighbouring pages stated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How.
    pub kind: EntryKind,
    /// How many.
    pub count: u16,
}
