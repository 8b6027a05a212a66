//! PAGES: the statement of neighbouring pages of one region in one round, and the proof of it.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..4 | round | |
//! | 4..6 | region | |
//! | 6 | codec | 0 none, 1 zstd, 2 delta; 0 unless there is an inline page |
//! | 7 | reserved | zero |
//! | 8..16 | first | the first page |
//! | 16..20 | count | pages covered, 1 to 16384, of which at most 512 reference, inline or shifted |
//! | 20..22 | runs | 1 to 1025 |
//! | 22..24 | reserved | zero |
//! | 24..56 | digest | the batch digest: over the digests of all pages covered, resolved as meant |
//! | 56..64 | shift | i64: how many pages further in the base the old bytes of a page lie; zero unless used |
//! | 64.. | runs | 4 bytes each: entry kind u8 (1 zero, 2 base, 3 reference, 4 inline, 5 shifted, 6 skipped), reserved u8, count u16 |
//! | .. | references | 32 bytes for each reference page, in page order |
//! | .. | padding | zeros, only before a payload, so that it begins a multiple of 64 bytes from the frame's first |
//! | .. | payload | the inline pages in page order, 4096 bytes each, under the codec |

use crate::coding::{Reader, Writer};
use crate::digest::Digest;
use crate::error::DecodeError;
use crate::frame::{Codec, EntryKind, HEADER_BYTES, Run};
use crate::limits::{BATCH_PAGES_MAX, COVER_PAGES_MAX, PAGE_BYTES, RUNS_MAX};
use alloc::vec::Vec;

/// Bytes of the fixed part.
const HEAD_BYTES: usize = 64;
/// What a payload's place in the frame is a multiple of: a cache line, so that pages are hashed where they arrived.
const PAYLOAD_ALIGN: usize = 64;
const PADDING: [u8; PAYLOAD_ALIGN] = [0; PAYLOAD_ALIGN];

/// Bytes of a body before its padding.
fn fields(runs: usize, references: usize) -> usize {
    HEAD_BYTES.saturating_add(runs.saturating_mul(4)).saturating_add(references.saturating_mul(32))
}

/// Padding behind that many bytes of a body.
fn padding(fields: usize) -> usize {
    let before = HEADER_BYTES.saturating_add(fields);
    before.next_multiple_of(PAYLOAD_ALIGN).saturating_sub(before)
}

/// The fixed part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagesHead {
    /// The round.
    pub round: u32,
    /// The region.
    pub region: u16,
    /// How the payload is encoded.
    pub codec: Codec,
    /// The first page.
    pub first: u64,
    /// Pages covered.
    pub count: u32,
    /// The batch digest.
    pub digest: Digest,
    /// How many pages further in the base lie the old bytes of a page that is shifted, or inline under
    /// [`Codec::DELTA`]; zero if there is none.
    pub shift: i64,
}

impl PagesHead {
    /// Appends everything before the payload: fixed part, runs, references, padding.
    pub fn encode(&self, runs: &[Run], references: &[Digest], out: &mut Vec<u8>) {
        let count = u16::try_from(runs.len()).unwrap_or(u16::MAX);
        let mut writer = Writer(out);
        writer.u32(self.round).u16(self.region).u8(self.codec.0).u8(0);
        writer.u64(self.first).u32(self.count).u16(count).u16(0).bytes(&self.digest.0);
        writer.u64(self.shift.cast_unsigned());
        for run in runs {
            writer.u8(run.kind.0).u8(0).u16(run.count);
        }
        for reference in references {
            writer.bytes(&reference.0);
        }
        if runs.iter().any(|run| run.kind == EntryKind::INLINE) {
            writer.bytes(PADDING.get(..padding(fields(runs.len(), references.len()))).unwrap_or_default());
        }
    }
}

/// A judged PAGES frame that borrows the receive buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Pages<'a> {
    /// The fixed part.
    pub head: PagesHead,
    runs: &'a [[u8; 4]],
    references: &'a [[u8; 32]],
    inline: usize,
    /// The inline pages under the codec.
    pub payload: &'a [u8],
}

impl<'a> Pages<'a> {
    /// Judges a body: every count agrees with every other and with the bytes there are.
    ///
    /// # Errors
    /// The first thing that does not.
    pub fn decode(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let (round, region) = (reader.u32("round")?, reader.u16("region")?);
        let codec = match reader.u8("codec")? {
            value @ 0..=2 => Codec(value),
            value => return Err(DecodeError::Unknown { field: "codec", value: u64::from(value) }),
        };
        reserved(u16::from(reader.u8("reserved")?))?;
        let (first, count) = (reader.u64("first")?, reader.u32("count")?);
        bounded("count (from 1)", u64::from(count), u64::from(COVER_PAGES_MAX))?;
        let run_count = reader.u16("run count")?;
        reserved(reader.u16("reserved")?)?;
        bounded("runs (from 1)", u64::from(run_count), RUNS_MAX as u64)?;
        let digest = Digest(reader.array("digest")?);
        let shift = reader.u64("shift")?.cast_signed();
        let runs = reader.bytes("runs", usize::from(run_count).saturating_mul(4))?.as_chunks().0;
        let (references, inline, shifted) = tally(runs, count)?;
        if shift != 0 && shifted == 0 && codec != Codec::DELTA {
            return Err(DecodeError::Unknown { field: "shift that nothing uses", value: shift.cast_unsigned() });
        }
        let references = reader.bytes("references", references.saturating_mul(32))?.as_chunks().0;
        // SPEC 5.4
        if inline > 0 {
            let padding = reader.bytes("padding", padding(fields(runs.len(), references.len())))?;
            padding.iter().try_for_each(|&byte| reserved(u16::from(byte)))?;
        }
        let payload = reader.rest();
        check_payload(codec, inline, payload.len())?;
        let head = PagesHead { round, region, codec, first, count, digest, shift };
        Ok(Self { head, runs, references, inline, payload })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let runs: Vec<Run> = self.runs().collect();
        let references: Vec<Digest> = self.references().collect();
        self.head.encode(&runs, &references, out);
        Writer(out).bytes(self.payload);
    }

    /// The runs in page order.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.runs
            .iter()
            .map(|&[kind, _, low, high]| Run { kind: EntryKind(kind), count: u16::from_le_bytes([low, high]) })
    }

    /// The referenced digests in page order.
    pub fn references(&self) -> impl Iterator<Item = Digest> + '_ {
        self.references.iter().copied().map(Digest)
    }

    /// How many pages come inline.
    pub fn inline_pages(&self) -> usize {
        self.inline
    }
}

// SPEC 5.4
/// Counts reference and inline pages while it judges the runs.
fn tally(runs: &[[u8; 4]], count: u32) -> Result<(usize, usize, usize), DecodeError> {
    let (mut covered, mut references, mut inline, mut shifted) = (0u64, 0usize, 0usize, 0usize);
    for &[kind, zero, low, high] in runs {
        let pages = u16::from_le_bytes([low, high]);
        reserved(u16::from(zero))?;
        bounded("run pages (from 1)", u64::from(pages), u64::from(u16::MAX))?;
        covered = covered.saturating_add(u64::from(pages));
        match EntryKind(kind) {
            EntryKind::ZERO | EntryKind::BASE | EntryKind::SKIPPED => {}
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
fn check_payload(codec: Codec, inline: usize, length: usize) -> Result<(), DecodeError> {
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
fn reserved(value: u16) -> Result<(), DecodeError> {
    if value == 0 {
        Ok(())
    } else {
        Err(DecodeError::Unknown { field: "reserved bytes of PAGES", value: u64::from(value) })
    }
}

fn bounded(field: &'static str, value: u64, limit: u64) -> Result<(), DecodeError> {
    if value == 0 || value > limit { Err(DecodeError::limit(field, value, limit)) } else { Ok(()) }
}
