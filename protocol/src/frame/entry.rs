//! The words of a PAGES frame: how its payload is encoded, and in which ways its pages are stated.
//!
//! Values are those of SPEC 5.3 and 5.5. Only `pages.rs` makes one from a byte, after it was judged here.

use crate::error::DecodeError;
use crate::limits::{BATCH_PAGES_MAX, PAGE_BYTES};

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
    /// One zstd frame of the words in which the pages differ from their old bytes.
    pub const WORDS: Self = Self(3);
    /// The bits of HELLO for all of them.
    pub const ALL_BITS: u32 = 0b1111;

    /// The bit of HELLO.
    pub const fn bit(self) -> u32 {
        1 << self.0
    }

    /// Whether it rests on old bytes of the pages.
    pub fn is_delta(self) -> bool {
        self == Self::DELTA || self == Self::WORDS
    }
}

/// What stands where a page's digest would, for one that is skipped: no bytes have it.
pub const SKIPPED_DIGEST: Digest = Digest([0; 32]);

/// What stands in digests for a page that is absent when its guest is handed over: no bytes have it.
pub const ABSENT_DIGEST: Digest = Digest([0; 32]);

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
    /// Not stated by this frame: the page stays what it was.
    pub const SKIPPED: Self = Self(6);
    /// Comes when the guest runs at the receiver already. Its digest is [`ABSENT_DIGEST`] until then.
    pub const ABSENT: Self = Self(7);
}

/// Neighbouring pages stated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How.
    pub kind: EntryKind,
    /// How many.
    pub count: u16,
}

impl Run {
    /// As it stands in a frame.
    // SPEC 5.3
    pub(crate) fn encode(self) -> [u8; 4] {
        let [low, high] = self.count.to_le_bytes();
        [self.kind.0, 0, low, high]
    }
}

// SPEC 5.4
/// Counts reference and inline pages while it judges the runs.
pub(super) fn tally(runs: &[[u8; 4]], count: u32) -> Result<(usize, usize, usize), DecodeError> {
    let (mut covered, mut references, mut inline, mut shifted) = (0u64, 0usize, 0usize, 0usize);
    for &[kind, zero, low, high] in runs {
        let pages = u16::from_le_bytes([low, high]);
        reserved(u16::from(zero))?;
        bounded("run pages (from 1)", u64::from(pages), u64::from(u16::MAX))?;
        covered = covered.saturating_add(u64::from(pages));
        match EntryKind(kind) {
            EntryKind::ZERO | EntryKind::BASE | EntryKind::SKIPPED | EntryKind::ABSENT => {}
            EntryKind::REFERENCE => references = references.saturating_add(usize::from(pages)),
            EntryKind::INLINE => inline = inline.saturating_add(usize::from(pages)),
            EntryKind::SHIFTED => shifted = shifted.saturating_add(usize::from(pages)),
            EntryKind(value) => return Err(DecodeError::Unknown { field: "entry kind", value: u64::from(value) }),
        }
    }
    if covered != u64::from(count) {
        return Err(DecodeError::Mismatch { field: "pages in runs", value: covered, expected: u64::from(count) });
    }
    let looked_at = references.saturating_add(inline).saturating_add(shifted);
    if looked_at > BATCH_PAGES_MAX {
        return Err(DecodeError::limit(
            "reference, inline and shifted pages",
            looked_at as u64,
            BATCH_PAGES_MAX as u64,
        ));
    }
    Ok((references, inline, shifted))
}

// SPEC 5.5
/// A payload has the bytes of its inline pages, or fewer under a codec that shrinks them.
pub(super) fn check_payload(codec: Codec, inline: usize, length: usize) -> Result<(), DecodeError> {
    let raw = inline.saturating_mul(PAGE_BYTES);
    let fits = match codec {
        Codec::NONE => length == raw,
        _ => length > 0 && length < raw,
    };
    if fits {
        return Ok(());
    }
    Err(DecodeError::Mismatch { field: "payload bytes", value: length as u64, expected: raw as u64 })
}

// SPEC 1.5
/// What is reserved is zero.
pub(super) fn reserved(value: u16) -> Result<(), DecodeError> {
    if value == 0 {
        Ok(())
    } else {
        Err(DecodeError::Unknown { field: "reserved bytes of PAGES", value: u64::from(value) })
    }
}

/// A number from 1 to its limit.
pub(super) fn bounded(field: &'static str, value: u64, limit: u64) -> Result<(), DecodeError> {
    if value == 0 || value > limit { Err(DecodeError::limit(field, value, limit)) } else { Ok(()) }
}
