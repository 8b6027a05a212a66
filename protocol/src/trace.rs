//! What a guest wrote while it was sent, kept for simulations: the bytes of `docs/TRACE.md`, judged piece by piece.
//!
//! Owns the encoding and nothing that reads or writes: [`TraceParser`] says how many bytes it wants next, never more than
//! a bitmap of the image takes, and turns them into a record or an error. A record has one encoding.

use crate::bitmap::PageBitmap;
use crate::coding::{Reader, Writer};
use crate::digest::trace_check;
use crate::error::DecodeError;
use crate::limits::{PAGE_BYTES, REGIONS_MAX};
use crate::page::{InstallSize, Layout, Region};
use crate::time::Span;
use alloc::vec::Vec;
use core::ops::Range;

// Bounds of traces are no peer's concern: they stand here and in docs/TRACE.md, not with those of SPEC 9.1.
/// Pages of an image whose writes are traced (1 TiB): a record takes at most 32 MiB.
pub const TRACE_PAGES_MAX: u64 = 1 << 28;
/// Bytes of a trace that is written: what comes then is not kept. The bitmap of 64 GiB (2 MiB) each second fits for
/// half an hour.
pub const TRACE_BYTES_MAX: u64 = 1 << 32;
/// Records of a trace that may wait for the disk; with more of them the trace ends, for no guest waits for it.
pub const TRACE_RECORDS_WAITING_MAX: usize = 16;

const MAGIC: [u8; 8] = *b"pwtrace\0";
const VERSION: u16 = 1;
/// Bytes of the header before its regions, of a region, and of a record before its pages.
const FIXED_BYTES: usize = 16;
const REGION_BYTES: usize = 16;
const HEAD_BYTES: usize = 16;
const CHECK_BYTES: usize = 8;
/// Bytes of a run: the gap before it and its length.
const RUN_BYTES: u64 = 8;

/// How it is known what the guest wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A harvest told: written since the harvest before.
    Harvest,
    /// A round read all of memory: other bytes than in the round before.
    Compare,
}

impl Seen {
    const fn number(self) -> u8 {
        match self {
            Self::Harvest => 1,
            Self::Compare => 2,
        }
    }
}

/// One look at what the guest wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRecord {
    /// Since round 0 began.
    pub at: Span,
    /// How it is known.
    pub seen: Seen,
    /// The pages, by their places in the image.
    pub pages: PageBitmap,
}

/// The bytes that a trace of an image begins with.
///
/// # Errors
/// It has more than [`TRACE_PAGES_MAX`] pages.
pub fn encode_header(layout: &Layout) -> Result<Vec<u8>, DecodeError> {
    check_pages(layout)?;
    let mut out = Vec::new();
    let regions = u16::try_from(layout.regions().len()).unwrap_or(u16::MAX);
    let mut writer = Writer(&mut out);
    writer.bytes(&MAGIC).u16(VERSION).u16(regions).u32(u32::try_from(PAGE_BYTES).unwrap_or(u32::MAX));
    for region in layout.regions() {
        writer.u64(region.bytes).u32(region.install_size.bytes()).u32(0);
    }
    let check = trace_check(&out, &[]);
    out.extend_from_slice(&check);
    Ok(out)
}

fn check_pages(layout: &Layout) -> Result<(), DecodeError> {
    if layout.pages() > TRACE_PAGES_MAX {
        return Err(DecodeError::limit("pages", layout.pages(), TRACE_PAGES_MAX));
    }
    Ok(())
}

/// Whether runs take no more bytes than the bitmap.
fn is_by_runs(pages: &PageBitmap) -> bool {
    let most = pages.len().div_ceil(8) / RUN_BYTES;
    let more = usize::try_from(most).unwrap_or(usize::MAX);
    pages.runs(0..pages.len()).nth(more).is_none()
}

impl TraceRecord {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let by_runs = is_by_runs(&self.pages);
        if by_runs {
            let mut end = 0u64;
            let short = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
            for run in self.pages.runs(0..self.pages.len()) {
                let (gap, count) = (run.start.saturating_sub(end), run.end.saturating_sub(run.start));
                Writer(&mut body).u32(short(gap)).u32(short(count));
                end = run.end;
            }
        } else {
            body = self.pages.bytes();
        }
        let mut out = Vec::new();
        let mut writer = Writer(&mut out);
        writer.u64(self.at.as_nanos()).u8(self.seen.number()).u8(if by_runs { 1 } else { 2 }).u16(0);
        writer.u32(u32::try_from(body.len()).unwrap_or(u32::MAX)).bytes(&body);
        let check = trace_check(&out, &[]);
        out.extend_from_slice(&check);
        out
    }
}

/// A record whose pages are still to come.
#[derive(Clone, Copy, Debug)]
struct Head {
    at: Span,
    seen: Seen,
    by_runs: bool,
    bytes: usize,
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
enum Next {
    Fixed,
    Regions(usize),
    Head,
    Pages(Head),
}

/// Reads a trace, whose bytes others bring.
#[derive(Debug)]
pub struct TraceParser {
    next: Next,
    /// What the check of the part that is read covers besides it.
    before: Vec<u8>,
    layout: Option<Layout>,
    at: Span,
}

impl Default for TraceParser {
    fn default() -> Self {
        Self { next: Next::Fixed, before: Vec::new(), layout: None, at: Span::ZERO }
    }
}

impl TraceParser {
    /// How many bytes [`part`](Self::part) wants: at most those of a bitmap of the image, and a check.
    pub fn wants(&self) -> usize {
        match self.next {
            Next::Fixed => FIXED_BYTES,
            Next::Regions(count) => count.saturating_mul(REGION_BYTES).saturating_add(CHECK_BYTES),
            Next::Head => HEAD_BYTES,
            Next::Pages(head) => head.bytes.saturating_add(CHECK_BYTES),
        }
    }

    /// Whether a trace may end here: no session says in its trace that it is over.
    pub fn may_end(&self) -> bool {
        matches!(self.next, Next::Head)
    }

    /// The image, once the header is read.
    pub fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    /// Takes the bytes that it wants; returns a record if they end one. After an error it is of no more use.
    ///
    /// # Errors
    /// They are not what a trace has here.
    pub fn part(&mut self, bytes: &[u8]) -> Result<Option<TraceRecord>, DecodeError> {
        let mut reader = Reader::new(bytes);
        match self.next {
            Next::Fixed => self.next = Next::Regions(fixed(&mut reader)?),
            Next::Head => self.next = Next::Pages(self.head(&mut reader)?),
            Next::Regions(count) => {
                self.check(&mut reader.clone(), self.wants())?;
                let layout = Layout::new((0..count).map(|_| region(&mut reader)).collect::<Result<_, _>>()?)?;
                check_pages(&layout)?;
                (self.layout, self.next) = (Some(layout), Next::Head);
                return Ok(None);
            }
            Next::Pages(Head { at, seen, by_runs, bytes: length }) => {
                self.check(&mut reader.clone(), self.wants())?;
                let pages = self.pages(reader.bytes("pages", length)?, by_runs)?;
                (self.at, self.next) = (at, Next::Head);
                return Ok(Some(TraceRecord { at, seen, pages }));
            }
        }
        reader.end()?;
        self.before = bytes.to_vec();
        Ok(None)
    }

    fn check(&self, reader: &mut Reader<'_>, wanted: usize) -> Result<(), DecodeError> {
        let covered = reader.bytes("part", wanted.saturating_sub(CHECK_BYTES))?;
        let found = reader.array::<CHECK_BYTES>("check")?;
        reader.clone().end()?;
        let expected = trace_check(&self.before, covered);
        same("check", u64::from_le_bytes(found), u64::from_le_bytes(expected))
    }

    fn image_pages(&self) -> u64 {
        self.layout.as_ref().map_or(0, Layout::pages)
    }

    fn head(&self, reader: &mut Reader<'_>) -> Result<Head, DecodeError> {
        let at = Span::from_nanos(reader.u64("time")?);
        if at < self.at {
            return Err(DecodeError::Mismatch { field: "time", value: at.as_nanos(), expected: self.at.as_nanos() });
        }
        let seen = match reader.u8("kind")? {
            1 => Seen::Harvest,
            2 => Seen::Compare,
            value => return Err(DecodeError::Unknown { field: "kind", value: value.into() }),
        };
        let by_runs = match reader.u8("form")? {
            1 => true,
            2 => false,
            value => return Err(DecodeError::Unknown { field: "form", value: value.into() }),
        };
        same("reserved", reader.u16("reserved")?.into(), 0)?;
        let (length, most) = (u64::from(reader.u32("length")?), self.image_pages().div_ceil(8));
        if length > most {
            return Err(DecodeError::limit("length", length, most));
        }
        Ok(Head { at, seen, by_runs, bytes: usize::try_from(length).unwrap_or(usize::MAX) })
    }

    fn pages(&self, bytes: &[u8], by_runs: bool) -> Result<PageBitmap, DecodeError> {
        let len = self.image_pages();
        let pages = if by_runs {
            let mut pages = PageBitmap::new(len);
            runs(bytes, len, |run| pages.insert_range(run))?;
            pages
        } else {
            let expected = len.div_ceil(8);
            let odd = DecodeError::Mismatch { field: "bitmap", value: bytes.len() as u64, expected };
            PageBitmap::from_bytes(len, bytes).ok_or(odd)?
        };
        // Of two forms the shorter is the one that counts: a trace has one encoding.
        same("form", if by_runs { 1 } else { 2 }, if is_by_runs(&pages) { 1 } else { 2 })?;
        Ok(pages)
    }
}

/// The runs of a record, which do not touch and lie below `len`.
fn runs(bytes: &[u8], len: u64, mut take: impl FnMut(Range<u64>) -> u64) -> Result<(), DecodeError> {
    let (mut reader, mut end) = (Reader::new(bytes), 0u64);
    let count = (bytes.len() as u64).div_ceil(RUN_BYTES);
    for at in 0..count {
        let (gap, pages) = (u64::from(reader.u32("gap")?), u64::from(reader.u32("run")?));
        if pages == 0 || (at > 0 && gap == 0) {
            return Err(DecodeError::Unknown { field: if pages == 0 { "run" } else { "gap" }, value: 0 });
        }
        let start = end.saturating_add(gap);
        end = start.saturating_add(pages);
        if end > len {
            return Err(DecodeError::limit("run", end, len));
        }
        take(start..end);
    }
    reader.end()
}

fn fixed(reader: &mut Reader<'_>) -> Result<usize, DecodeError> {
    same("magic", u64::from_le_bytes(reader.array("magic")?), u64::from_le_bytes(MAGIC))?;
    same("version", reader.u16("version")?.into(), VERSION.into())?;
    let regions = usize::from(reader.u16("regions")?);
    if regions > REGIONS_MAX {
        return Err(DecodeError::limit("regions", regions as u64, REGIONS_MAX as u64));
    }
    same("page size", reader.u32("page size")?.into(), PAGE_BYTES as u64)?;
    Ok(regions)
}

fn region(reader: &mut Reader<'_>) -> Result<Region, DecodeError> {
    let (bytes, install) = (reader.u64("region")?, reader.u32("install size")?);
    let unknown = DecodeError::Unknown { field: "install size", value: install.into() };
    let install_size = InstallSize::from_bytes(install).ok_or(unknown)?;
    same("reserved", reader.u32("reserved")?.into(), 0)?;
    Ok(Region { bytes, install_size })
}

fn same(field: &'static str, value: u64, expected: u64) -> Result<(), DecodeError> {
    if value == expected { Ok(()) } else { Err(DecodeError::Mismatch { field, value, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::{String, ToString};
    use alloc::{format, vec};
    use proptest::prelude::*;

    fn layout() -> Layout {
        let region = |bytes, install_size| Region { bytes, install_size };
        Layout::new(vec![region(1_000_000, InstallSize::KIB_4), region(2 << 20, InstallSize::KIB_64)]).unwrap()
    }

    fn record(at: u64, seen: Seen, ranges: &[Range<u64>]) -> TraceRecord {
        let mut pages = PageBitmap::new(layout().pages());
        ranges.iter().cloned().for_each(|range| {
            pages.insert_range(range);
        });
        TraceRecord { at: Span::from_nanos(at), seen, pages }
    }

    fn parse(mut bytes: &[u8]) -> Result<Vec<TraceRecord>, String> {
        let (mut parser, mut found) = (TraceParser::default(), Vec::new());
        while !(bytes.is_empty() && parser.may_end()) {
            let (part, rest) = bytes.split_at_checked(parser.wants()).ok_or("cut")?;
            found.extend(parser.part(part).map_err(|error| error.to_string())?);
            bytes = rest;
        }
        Ok(found)
    }

    /// A trace whose header or record was changed, with a check that fits.
    fn sealed(mut part: Vec<u8>) -> Vec<u8> {
        part.extend(trace_check(&part, &[]));
        part
    }

    fn unsealed(part: &[u8]) -> Vec<u8> {
        part[..part.len() - CHECK_BYTES].to_vec()
    }

    proptest! {
        #[test]
        fn records_come_back_as_they_were(looks in proptest::collection::vec((0u64..1 << 40, any::<bool>(), proptest::collection::vec((0u64..757, 1u64..60), 0..40)), 0..8)) {
            let mut at = 0;
            let records: Vec<TraceRecord> = looks.into_iter().map(|(later, harvest, runs)| {
                at += later;
                let runs: Vec<Range<u64>> = runs.into_iter().map(|(start, count)| start..start + count).collect();
                record(at, if harvest { Seen::Harvest } else { Seen::Compare }, &runs)
            }).collect();
            let mut bytes = encode_header(&layout()).unwrap();
            records.iter().for_each(|record| bytes.extend(record.encode()));
            prop_assert_eq!(parse(&bytes), Ok(records));
        }
    }

    #[test]
    fn takes_whichever_form_is_shorter() {
        let few = record(1, Seen::Harvest, &[3..5, 700..757]);
        assert_eq!(few.encode().len(), HEAD_BYTES + 16 + CHECK_BYTES);
        let ranges: Vec<Range<u64>> = (0..300).map(|at| 2 * at..2 * at + 1).collect();
        let many = record(1, Seen::Harvest, &ranges).encode();
        assert_eq!(many.len() as u64, (HEAD_BYTES + CHECK_BYTES) as u64 + layout().pages().div_ceil(8));
    }

    #[test]
    fn rejects_a_trace_cut_at_any_byte_but_between_records_and_one_changed_at_any() {
        let header = encode_header(&layout()).unwrap();
        let first = record(7, Seen::Harvest, &[1..4, 6..7]).encode();
        let whole = [header.clone(), first.clone(), record(9, Seen::Compare, &[9..10, 12..13]).encode()].concat();
        let ends = [header.len(), header.len() + first.len(), whole.len()];
        for cut in 0..whole.len() {
            assert_eq!(parse(&whole[..cut]).is_ok(), ends.contains(&cut), "{cut}");
            let mut wrong = whole.clone();
            wrong[cut] ^= 1;
            assert!(parse(&wrong).is_err(), "{cut}");
        }
        assert!(parse(&[whole.as_slice(), &[0]].concat()).is_err());
    }

    #[test]
    fn rejects_records_that_are_checked_and_wrong() {
        let header = encode_header(&layout()).unwrap();
        let good = unsealed(&record(7, Seen::Harvest, &[1..4, 6..7]).encode());
        let changes: [(usize, u8, &str); 8] = [
            (8, 3, "kind: 3"),
            (9, 3, "form: 3"),
            (9, 2, "bitmap: 16, expected"),
            (10, 1, "reserved: 1"),
            (HEAD_BYTES + 3, 1, "run: 16777220 > "),
            (HEAD_BYTES + 4, 0, "run: 0"),
            (HEAD_BYTES + 8, 0, "gap: 0"),
            (HEAD_BYTES + 15, 255, "run: "),
        ];
        for (at, value, why) in changes {
            let mut wrong = good.clone();
            wrong[at] = value;
            let error = parse(&[header.clone(), sealed(wrong)].concat()).unwrap_err();
            assert!(error.starts_with(why), "{error}, expected {why}");
        }
        let late = record(8, Seen::Harvest, &[]).encode();
        let back = [header.clone(), late, sealed(good.clone())].concat();
        assert!(parse(&back).unwrap_err().starts_with("time: 7"));
        let mut long = good[..12].to_vec();
        long.extend((layout().pages().div_ceil(8) as u32 + 1).to_le_bytes());
        assert!(parse(&[header.clone(), long].concat()).unwrap_err().starts_with("length: "));
        // A bitmap where runs would be shorter.
        let mut raw = good[..12].to_vec();
        raw[9] = 2;
        let bitmap = PageBitmap::new(layout().pages()).bytes();
        raw.extend((bitmap.len() as u32).to_le_bytes());
        raw.extend(bitmap);
        assert!(parse(&[header, sealed(raw)].concat()).unwrap_err().starts_with("form: 2, expected 1"));
    }

    #[test]
    fn rejects_headers_over_each_limit() {
        let good = unsealed(&encode_header(&layout()).unwrap());
        let changes: [(usize, u8, &str); 6] = [
            (0, 0, "magic"),
            (8, 2, "version: 2"),
            (10, 65, "regions: 65 > 64"),
            (13, 0x20, "page size: 8192"),
            (25, 0x11, "install size"),
            (28, 1, "reserved: 1"),
        ];
        for (at, value, why) in changes {
            let mut wrong = good.clone();
            wrong[at] = value;
            let error = parse(&sealed(wrong)).unwrap_err();
            assert!(error.starts_with(why), "{error}, expected {why}");
        }
        let bytes = TRACE_PAGES_MAX * PAGE_BYTES as u64;
        let of = |bytes| Layout::new(vec![Region { bytes, install_size: InstallSize::KIB_4 }]).unwrap();
        assert!(encode_header(&of(bytes)).is_ok());
        let why = format!("pages: {} > {TRACE_PAGES_MAX}", TRACE_PAGES_MAX + 1);
        assert_eq!(encode_header(&of(bytes + 1)).unwrap_err().to_string(), why);
        let mut large = unsealed(&encode_header(&of(bytes)).unwrap());
        large[FIXED_BYTES] = 1;
        assert_eq!(parse(&sealed(large)).unwrap_err(), why);
    }
}
