//! PAGES: the statement of neighbouring pages of one region in one round, and the proof of it.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..4 | round | |
//! | 4..6 | region | |
//! | 6 | codec | 0 none, 1 zstd, 2 prefix, 3 words; 0 unless there is an inline page |
//! | 7 | flags | bit 0: every reference has a proof; the others zero |
//! | 8..16 | first | the first page |
//! | 16..20 | count | pages covered, 1 to 16384, of which at most 512 reference, inline or shifted |
//! | 20..22 | runs | 1 to 1025 |
//! | 22..24 | reserved | zero |
//! | 24..56 | digest | the batch digest (SPEC 3.6): of all pages covered, resolved as meant |
//! | 56..64 | shift | i64: how many pages further in the base the old bytes of a page lie; zero unless used |
//! | 64.. | runs | 4 bytes each: entry kind u8 (1 zero, 2 base, 3 reference, 4 inline, 5 shifted, 6 skipped, 7 absent), reserved u8, count u16 |
//! | .. | references | 32 bytes for each reference page, in page order |
//! | .. | proofs | 16 bytes for each reference page, in page order, with flag bit 0 |
//! | .. | padding | zeros, only before a payload, so that it begins a multiple of 64 bytes from the frame's first |
//! | .. | payload | the inline pages in page order, 4096 bytes each, under the codec |

use crate::challenge::PageProof;
use crate::coding::{Reader, Writer};
use crate::digest::Digest;
use crate::error::DecodeError;
use crate::frame::entry::{bounded, check_payload, reserved, tally};
use crate::frame::{Codec, EntryKind, HEADER_BYTES, Run};
use crate::limits::{COVER_PAGES_MAX, RUNS_MAX};
use alloc::vec::Vec;

/// Bytes of the fixed part.
const HEAD_BYTES: usize = 64;
/// Bytes of a proof.
const PROOF_BYTES: usize = 16;
/// The flag that says that there are proofs.
const WITH_PROOFS: u8 = 1;
/// What a payload's place in the frame is a multiple of: a cache line, so that pages are hashed where they arrived.
const PAYLOAD_ALIGN: usize = 64;
const PADDING: [u8; PAYLOAD_ALIGN] = [0; PAYLOAD_ALIGN];

/// Bytes of a body before its padding.
fn fields(runs: usize, references: usize, proofs: usize) -> usize {
    let lists = runs.saturating_mul(4).saturating_add(references.saturating_mul(32));
    HEAD_BYTES.saturating_add(lists).saturating_add(proofs.saturating_mul(PROOF_BYTES))
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
    /// How many pages further in the base lie the old bytes of a page that is shifted, or inline under a delta codec;
    /// zero if there is none.
    pub shift: i64,
}

impl PagesHead {
    /// Appends everything before the payload: fixed part, runs, references, their proofs if there are any, padding.
    pub fn encode(&self, runs: &[Run], references: &[Digest], proofs: &[PageProof], out: &mut Vec<u8>) {
        let count = u16::try_from(runs.len()).unwrap_or(u16::MAX);
        let mut writer = Writer(out);
        writer.u32(self.round).u16(self.region).u8(self.codec.0).u8(if proofs.is_empty() { 0 } else { WITH_PROOFS });
        writer.u64(self.first).u32(self.count).u16(count).u16(0).bytes(&self.digest.0);
        writer.u64(self.shift.cast_unsigned());
        for run in runs {
            writer.bytes(&run.encode());
        }
        for reference in references {
            writer.bytes(&reference.0);
        }
        for proof in proofs {
            writer.bytes(&proof.0);
        }
        if runs.iter().any(|run| run.kind == EntryKind::INLINE) {
            writer
                .bytes(PADDING.get(..padding(fields(runs.len(), references.len(), proofs.len()))).unwrap_or_default());
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
    proofs: &'a [[u8; PROOF_BYTES]],
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
            value @ 0..=3 => Codec(value),
            value => return Err(DecodeError::Unknown { field: "codec", value: u64::from(value) }),
        };
        let flags = reader.u8("flags")?;
        reserved(u16::from(flags & !WITH_PROOFS))?;
        let (first, count) = (reader.u64("first")?, reader.u32("count")?);
        bounded("count (from 1)", u64::from(count), u64::from(COVER_PAGES_MAX))?;
        let run_count = reader.u16("run count")?;
        reserved(reader.u16("reserved")?)?;
        bounded("runs (from 1)", u64::from(run_count), RUNS_MAX as u64)?;
        let digest = Digest(reader.array("digest")?);
        let shift = reader.u64("shift")?.cast_signed();
        let runs = reader.bytes("runs", usize::from(run_count).saturating_mul(4))?.as_chunks().0;
        let (references, inline, shifted) = tally(runs, count)?;
        if shift != 0 && shifted == 0 && !codec.is_delta() {
            return Err(DecodeError::Unknown { field: "shift that nothing uses", value: shift.cast_unsigned() });
        }
        let references = reader.bytes("references", references.saturating_mul(32))?.as_chunks().0;
        if flags & WITH_PROOFS != 0 && references.is_empty() {
            return Err(DecodeError::Unknown { field: "proofs of no reference", value: u64::from(flags) });
        }
        let count_proofs = if flags & WITH_PROOFS != 0 { references.len() } else { 0 };
        let proofs = reader.bytes("proofs", count_proofs.saturating_mul(PROOF_BYTES))?.as_chunks().0;
        // SPEC 5.4
        if inline > 0 {
            let padding = reader.bytes("padding", padding(fields(runs.len(), references.len(), proofs.len())))?;
            padding.iter().try_for_each(|&byte| reserved(u16::from(byte)))?;
        }
        let payload = reader.rest();
        check_payload(codec, inline, payload.len())?;
        let head = PagesHead { round, region, codec, first, count, digest, shift };
        Ok(Self { head, runs, references, proofs, inline, payload })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let runs: Vec<Run> = self.runs().collect();
        let references: Vec<Digest> = self.references().collect();
        let proofs: Vec<PageProof> = self.proofs().collect();
        self.head.encode(&runs, &references, &proofs, out);
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

    /// The proofs of the referenced pages in page order, or none.
    pub fn proofs(&self) -> impl Iterator<Item = PageProof> + '_ {
        self.proofs.iter().copied().map(PageProof)
    }

    /// How many pages come inline.
    pub fn inline_pages(&self) -> usize {
        self.inline
    }
}
