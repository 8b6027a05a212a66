//! Where the pages of a guest are in the address space of the process that runs it.
//!
//! Addresses become places in regions here and nowhere else. The table of a process that hands its memory over is
//! hostile input until [`Places::judge`] took it; what that process does to its mappings later moves and cuts the table.

use pagewire_protocol::error::DecodeError;
use pagewire_protocol::limits::{PAGE_BYTES, REGIONS_MAX};
use pagewire_protocol::page::{InstallSize, Layout, Region, RegionId};
use std::ops::Range;
use thiserror::Error;

/// Addresses of programs end here on every machine: 57 bits of them.
const ADDRESS_MAX: u64 = 1 << 57;
/// Pieces that the table can be cut into: a process that moves and unmaps parts of its guest's memory makes two of one.
/// 16 for each region there may be; faults outside of those that are kept are reported, not answered.
const SEGMENTS_MAX: usize = 16 * REGIONS_MAX;

/// A region of another process's memory, as that process says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandedRegion {
    /// Where it begins in that process.
    pub address: u64,
    /// Its bytes.
    pub bytes: u64,
    /// Bytes of its pages: 4 KiB, or 2 MiB of hugetlbfs.
    pub page_bytes: u64,
}

/// What is wrong with a table of regions.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TableError {
    /// No region, or too many regions or pages.
    #[error("the table of regions: {0}")]
    Size(#[from] DecodeError),
    /// Pages of a size that cannot be served.
    #[error("region {region}: pages of {bytes} bytes, where 4096 and 2097152 can be served")]
    PageSize {
        /// Its index in the table.
        region: usize,
        /// The size that was said.
        bytes: u64,
    },
    /// No bytes, or no whole pages.
    #[error("region {region}: {bytes} bytes at {address:#x} are no whole pages")]
    Misaligned {
        /// Its index in the table.
        region: usize,
        /// Its address.
        address: u64,
        /// Its length.
        bytes: u64,
    },
    /// An end beyond all addresses.
    #[error("region {region}: {bytes} bytes at {address:#x} end beyond all addresses")]
    Overflow {
        /// Its index in the table.
        region: usize,
        /// Its address.
        address: u64,
        /// Its length.
        bytes: u64,
    },
    /// Bytes that are in two regions.
    #[error("two regions overlap at {address:#x}")]
    Overlap {
        /// The first address that is in both.
        address: u64,
    },
}

/// Neighbouring addresses of one region.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    addresses: Range<u64>,
    region: RegionId,
    offset: u64,
}

/// Bytes of a region that are neighbours in the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) region: RegionId,
    /// Where they begin in the region.
    pub(super) offset: u64,
    /// Where they begin in the process.
    pub(super) address: u64,
    pub(super) bytes: u64,
}

/// The table, in the order of addresses.
#[derive(Clone, Debug)]
pub(super) struct Places(Vec<Segment>);

/// What changed of the table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// What was there.
    pub(super) taken: Vec<Piece>,
    /// What is not found any more, as the table is full.
    pub(super) lost: Vec<Piece>,
}

impl Places {
    /// Judges a table, and gives the layout that it means.
    pub(super) fn judge(table: &[HandedRegion]) -> Result<(Layout, Self), TableError> {
        if table.is_empty() || table.len() > REGIONS_MAX {
            return Err(DecodeError::limit("regions", table.len() as u64, REGIONS_MAX as u64).into());
        }
        let mut regions = Vec::with_capacity(table.len());
        let mut segments = Vec::with_capacity(table.len());
        for ((region, handed), id) in table.iter().enumerate().zip(0..) {
            let &HandedRegion { address, bytes, page_bytes } = handed;
            let install_size = match page_bytes {
                0x1000 => InstallSize::KIB_4,
                0x20_0000 => InstallSize::MIB_2,
                bytes => return Err(TableError::PageSize { region, bytes }),
            };
            if bytes == 0 || !bytes.is_multiple_of(page_bytes) || !address.is_multiple_of(page_bytes) {
                return Err(TableError::Misaligned { region, address, bytes });
            }
            let end = address.checked_add(bytes).filter(|end| *end <= ADDRESS_MAX);
            let end = end.ok_or(TableError::Overflow { region, address, bytes })?;
            regions.push(Region { bytes, install_size });
            segments.push(Segment { addresses: address..end, region: RegionId(id), offset: 0 });
        }
        let places = Self::new(segments);
        let mut neighbours = places.0.iter().zip(places.0.iter().skip(1));
        if let Some((_, next)) = neighbours.find(|(one, next)| next.addresses.start < one.addresses.end) {
            return Err(TableError::Overlap { address: next.addresses.start });
        }
        Ok((Layout::new(regions)?, places))
    }

    /// Regions of this process, which do not overlap: where each begins, and its bytes in whole pages.
    pub(super) fn of_own(regions: impl Iterator<Item = (u64, u64)>) -> Self {
        let segment = |(region, (address, bytes)): (RegionId, (u64, u64))| Segment {
            addresses: address..address.saturating_add(bytes),
            region,
            offset: 0,
        };
        Self::new((0..).map(RegionId).zip(regions).map(segment).collect())
    }

    fn new(mut segments: Vec<Segment>) -> Self {
        segments.retain(|segment| !segment.addresses.is_empty());
        segments.sort_by_key(|segment| segment.addresses.start);
        Self(segments)
    }

    /// The region and the place in it of an address.
    pub(super) fn find(&self, address: u64) -> Option<(RegionId, u64)> {
        let after = self.0.partition_point(|segment| segment.addresses.start <= address);
        let segment = self.0.get(after.checked_sub(1)?)?;
        let inside = segment.addresses.contains(&address);
        inside.then(|| (segment.region, segment.offset_of(address)))
    }

    /// All of it.
    pub(super) fn all(&self) -> impl Iterator<Item = Piece> {
        self.0.iter().map(|segment| segment.cut(&segment.addresses))
    }

    /// Where bytes of a region are. What is unmapped is not among them.
    pub(super) fn pieces(&self, region: RegionId, bytes: Range<u64>) -> impl Iterator<Item = Piece> {
        let of_region = self.0.iter().filter(move |segment| segment.region == region);
        of_region.filter_map(move |segment| {
            let end = segment.offset.saturating_add(segment.bytes());
            let (start, end) = (bytes.start.max(segment.offset), bytes.end.min(end));
            let address = |offset: u64| segment.addresses.start.saturating_add(offset.saturating_sub(segment.offset));
            (start < end).then(|| segment.cut(&(address(start)..address(end))))
        })
    }

    /// What lies at addresses.
    pub(super) fn at(&self, addresses: &Range<u64>) -> Vec<Piece> {
        let cut = |segment: &Segment| {
            let (start, end) = (segment.addresses.start.max(addresses.start), segment.addresses.end.min(addresses.end));
            (start < end).then(|| segment.cut(&(start..end)))
        };
        self.0.iter().filter_map(cut).collect()
    }

    /// Takes addresses out.
    pub(super) fn take(&mut self, addresses: &Range<u64>) -> Taken {
        let mut out = Taken { taken: self.at(addresses), lost: Vec::new() };
        if out.taken.is_empty() {
            return out;
        }
        let segments = std::mem::take(&mut self.0);
        for segment in segments {
            let Range { start, end } = segment.addresses;
            for rest in [start..end.min(addresses.start), start.max(addresses.end)..end] {
                if rest.start < rest.end {
                    self.put(segment.cut(&rest), &mut out.lost);
                }
            }
        }
        out
    }

    /// Moves what lies at `from` to other addresses; what of the guest's was there is unmapped. Gives what is not found
    /// any more.
    pub(super) fn remap(&mut self, from: u64, to: u64, bytes: u64) -> Vec<Piece> {
        let moved = self.take(&(from..from.saturating_add(bytes)));
        let over = self.take(&(to..to.saturating_add(bytes)));
        let mut gone = [moved.lost, over.lost, over.taken].concat();
        for piece in moved.taken {
            let address = to.saturating_add(piece.address.saturating_sub(from));
            self.put(Piece { address, ..piece }, &mut gone);
        }
        gone
    }

    fn put(&mut self, piece: Piece, lost: &mut Vec<Piece>) {
        if self.0.len() >= SEGMENTS_MAX {
            return lost.push(piece);
        }
        let addresses = piece.address..piece.address.saturating_add(piece.bytes);
        let at = self.0.partition_point(|segment| segment.addresses.start < addresses.start);
        self.0.insert(at, Segment { addresses, region: piece.region, offset: piece.offset });
    }
}

impl Segment {
    fn bytes(&self) -> u64 {
        self.addresses.end.saturating_sub(self.addresses.start)
    }

    fn offset_of(&self, address: u64) -> u64 {
        self.offset.saturating_add(address.saturating_sub(self.addresses.start))
    }

    fn cut(&self, addresses: &Range<u64>) -> Piece {
        let bytes = addresses.end.saturating_sub(addresses.start);
        Piece { region: self.region, offset: self.offset_of(addresses.start), address: addresses.start, bytes }
    }
}

/// Page numbers that bytes of a region touch.
pub(super) fn pages(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / PAGE_BYTES as u64..bytes.end.div_ceil(PAGE_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HUGE: u64 = 2 << 20;

    fn handed(address: u64, bytes: u64) -> HandedRegion {
        HandedRegion { address, bytes, page_bytes: 4096 }
    }

    #[test]
    fn a_table_becomes_a_layout() {
        let table = [
            handed(0x10_0000, 0x3000),
            HandedRegion { address: HUGE, bytes: 2 * HUGE, page_bytes: HUGE },
            handed(0x1000, 0x1000),
        ];
        let (layout, places) = Places::judge(&table).unwrap();
        let expected = [
            Region { bytes: 0x3000, install_size: InstallSize::KIB_4 },
            Region { bytes: 2 * HUGE, install_size: InstallSize::MIB_2 },
            Region { bytes: 0x1000, install_size: InstallSize::KIB_4 },
        ];
        assert_eq!(layout.regions(), expected);
        assert_eq!(places.find(0x10_2fff), Some((RegionId(0), 0x2fff)));
        assert_eq!(places.find(HUGE), Some((RegionId(1), 0)));
        assert_eq!(places.find(0x1000), Some((RegionId(2), 0)));
        for outside in [0, 0xfff, 0x2000, 0x10_3000, 3 * HUGE, u64::MAX] {
            assert_eq!(places.find(outside), None, "{outside:#x}");
        }
    }

    #[test]
    fn rejects_hostile_tables() {
        let error = |table: &[HandedRegion]| Places::judge(table).unwrap_err();
        assert!(matches!(error(&[]), TableError::Size(_)));
        let many: Vec<_> = (1..=REGIONS_MAX as u64 + 1).map(|at| handed(at * 4096, 4096)).collect();
        assert!(matches!(error(&many), TableError::Size(_)));
        assert!(Places::judge(&many[..REGIONS_MAX]).is_ok());
        assert!(matches!(error(&[handed(0x1000, 1 << 50)]), TableError::Size(_)), "more pages than an image has");
        for page_bytes in [0, 1, 512, 8192, 0x1_0000, 1 << 30, u64::MAX] {
            let region = HandedRegion { page_bytes, ..handed(HUGE, HUGE) };
            assert_eq!(error(&[region]), TableError::PageSize { region: 0, bytes: page_bytes });
        }
        for (address, bytes) in [(0x1000, 0), (0x1001, 0x1000), (0x1000, 0x1001), (0x1000, 1)] {
            assert_eq!(error(&[handed(address, bytes)]), TableError::Misaligned { region: 0, address, bytes });
        }
        let huge = HandedRegion { page_bytes: HUGE, ..handed(0x1000, HUGE) };
        assert!(matches!(error(&[huge]), TableError::Misaligned { .. }));
        for (address, bytes) in [(ADDRESS_MAX, 0x1000), (ADDRESS_MAX - 0x1000, 0x2000), (!0xfff, 0x1000), (0, !0xfff)] {
            assert_eq!(error(&[handed(address, bytes)]), TableError::Overflow { region: 0, address, bytes });
        }
        let overlaps = [handed(0x1000, 0x3000), handed(0x5000, 0x1000), handed(0x3000, 0x1000)];
        assert_eq!(error(&overlaps), TableError::Overlap { address: 0x3000 });
        assert_eq!(error(&[handed(0x1000, 0x1000); 2]), TableError::Overlap { address: 0x1000 });
    }

    #[test]
    fn a_process_that_cuts_its_memory_to_pieces_makes_no_more_than_are_allowed() {
        let (_, mut places) = Places::judge(&[handed(0x1000_0000, 16 << 20)]).unwrap();
        let mut known = 4096;
        for page in (0..4096).step_by(2) {
            let at = 0x1000_0000 + page * 4096;
            let Taken { taken, lost } = places.take(&(at..at + 4096));
            known -= taken.iter().chain(&lost).map(|piece| piece.bytes / 4096).sum::<u64>();
            assert_eq!(places.all().map(|piece| piece.bytes / 4096).sum::<u64>(), known, "what is lost is said");
        }
        assert!(places.0.len() <= SEGMENTS_MAX && places.0.len() > 16);
    }

    proptest! {
        /// Against a map from each page's address to its place.
        #[test]
        fn moves_and_cuts_like_a_map_of_pages(
            steps in prop::collection::vec((0u64..40, 0u64..40, 0u64..12, any::<bool>()), 0..12),
        ) {
            let table = [handed(4 * 4096, 8 * 4096), handed(16 * 4096, 8 * 4096)];
            let (_, mut places) = Places::judge(&table).unwrap();
            let mut twin: std::collections::BTreeMap<u64, (u16, u64)> = (0..8)
                .flat_map(|page| [(4 + page, (0, page)), (16 + page, (1, page))])
                .collect();
            for (from, to, count, remap) in steps {
                let moved: Vec<_> = (0..count).filter_map(|page| Some((page, twin.remove(&(from + page))?))).collect();
                if remap {
                    places.remap(from * 4096, to * 4096, count * 4096);
                    (0..count).for_each(|page| _ = twin.remove(&(to + page)));
                    twin.extend(moved.iter().map(|&(page, place)| (to + page, place)));
                } else {
                    let taken = places.take(&(from * 4096..(from + count) * 4096)).taken;
                    let bytes: u64 = taken.iter().map(|piece| piece.bytes).sum();
                    prop_assert_eq!(bytes, moved.len() as u64 * 4096);
                }
                for page in 0..60 {
                    let found = places.find(page * 4096 + 5).map(|(region, offset)| (region.0, offset / 4096));
                    prop_assert_eq!(found, twin.get(&page).copied(), "page {}", page);
                }
                for region in 0..2 {
                    let mut pages: Vec<_> = places
                        .pieces(RegionId(region), 4096..7 * 4096)
                        .flat_map(|piece| (0..piece.bytes / 4096).map(move |page| {
                            (piece.address / 4096 + page, piece.offset / 4096 + page)
                        }))
                        .collect();
                    pages.sort_unstable();
                    let expected: Vec<_> = twin
                        .iter()
                        .filter(|(_, place)| place.0 == region && (1..7).contains(&place.1))
                        .map(|(&address, place)| (address, place.1))
                        .collect();
                    prop_assert_eq!(pages, expected);
                }
            }
        }
    }
}
