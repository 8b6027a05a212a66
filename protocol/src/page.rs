//! Pages, regions and the arithmetic between them. Addresses are computed here and nowhere else.
//!
//! A page is 4 KiB everywhere: it is what is digested, stated and counted. What a region installs at once is its
//! install size, a whole number of pages. A region's last page may be short; it is digested as if padded with zeros.
//! Numbers from a peer become these types through checked constructors; once they exist they are inside their region.

use crate::error::DecodeError;
use crate::limits::{BATCH_PAGES_MAX, IMAGE_PAGES_MAX, PAGE_BYTES, REGIONS_MAX, SUBTREE_PAGES};
use alloc::vec::Vec;
use core::ops::Range;

const PAGE_BYTES_U32: u32 = 4096;
const _: () = assert!(PAGE_BYTES == PAGE_BYTES_U32 as usize);

/// Pages of a group: what a frame with references or inline pages never crosses, and what selects the lane.
pub const GROUP_PAGES: u64 = BATCH_PAGES_MAX as u64;

/// The index of a region in its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u16);

/// The index of a page in its region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNumber(pub u64);

/// The index of a page in its image, over all regions in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(pub u32);

/// Neighbouring pages of one region, at least one, all inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The region.
    pub region: RegionId,
    /// The first page.
    pub first: PageNumber,
    /// How many pages.
    pub count: u32,
}

impl PageRange {
    /// The page numbers of the range.
    pub fn numbers(&self) -> core::ops::Range<u64> {
        self.first.0..self.first.0.saturating_add(u64::from(self.count))
    }
}

/// How many bytes a region installs at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InstallSize(u32);

impl InstallSize {
    /// 4 KiB, one page.
    pub const KIB_4: Self = Self(4096);
    /// 64 KiB.
    pub const KIB_64: Self = Self(64 * 1024);
    /// 2 MiB, a huge page.
    pub const MIB_2: Self = Self(2 * 1024 * 1024);
    /// All of them.
    pub const ALL: [Self; 3] = [Self::KIB_4, Self::KIB_64, Self::MIB_2];

    /// The install size of `bytes` bytes, if it is one.
    pub fn from_bytes(bytes: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|size| size.0 == bytes)
    }

    /// Bytes installed at once.
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// Pages installed at once: 1, 16 or 512.
    pub const fn pages(self) -> u32 {
        self.0 / PAGE_BYTES_U32
    }
}

/// A contiguous range of guest memory with one install size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// Its length in bytes; may be zero, may end inside a page.
    pub bytes: u64,
    /// What is installed at once.
    pub install_size: InstallSize,
}

impl Region {
    /// Pages of the region, the last possibly short.
    pub const fn pages(&self) -> u64 {
        self.bytes.div_ceil(PAGE_BYTES as u64)
    }

    /// Lowest nodes of the region's digest tree.
    pub const fn subtrees(&self) -> u64 {
        self.pages().div_ceil(SUBTREE_PAGES as u64)
    }

    /// Bytes of the region from page `first` on, at most `pages` pages.
    pub const fn bytes_of(&self, first: u64, pages: u64) -> u64 {
        let start = first.saturating_mul(PAGE_BYTES as u64);
        let want = pages.saturating_mul(PAGE_BYTES as u64);
        let left = self.bytes.saturating_sub(start);
        if left < want { left } else { want }
    }
}

/// The regions of one image, and where each begins among its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<Region>,
    starts: Vec<u32>,
    pages: u32,
}

impl Layout {
    /// Checks the regions of an image against the limits.
    ///
    /// # Errors
    /// No region, more than [`REGIONS_MAX`], or more than [`IMAGE_PAGES_MAX`] pages.
    pub fn new(regions: Vec<Region>) -> Result<Self, DecodeError> {
        if regions.is_empty() || regions.len() > REGIONS_MAX {
            return Err(DecodeError::limit("regions", regions.len() as u64, REGIONS_MAX as u64));
        }
        let mut starts = Vec::with_capacity(regions.len());
        let mut pages: u64 = 0;
        for region in &regions {
            let start = u32::try_from(pages).unwrap_or(u32::MAX);
            starts.push(start);
            pages = pages.saturating_add(region.pages());
            if pages > IMAGE_PAGES_MAX {
                return Err(DecodeError::limit("image pages", pages, IMAGE_PAGES_MAX));
            }
        }
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        Ok(Self { regions, starts, pages })
    }

    /// The regions in order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// A region by id, if the image has it.
    pub fn region(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(usize::from(id.0))
    }

    /// Pages of the image.
    pub fn pages(&self) -> u64 {
        u64::from(self.pages)
    }

    /// Bytes of the image.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().fold(0, |sum, region| sum.saturating_add(region.bytes))
    }

    /// Where a page begins in a plain image file: all regions in a row, each as long as its bytes.
    pub fn file_offset(&self, region: RegionId, page: u64) -> u64 {
        let before = self.regions.iter().take(usize::from(region.0));
        let start = before.fold(0u64, |sum, region| sum.saturating_add(region.bytes));
        start.saturating_add(page.saturating_mul(PAGE_BYTES as u64))
    }

    /// The place of a page that lies in the image; anything else saturates and finds nothing.
    pub fn place(&self, region: RegionId, page: u64) -> Place {
        let start = self.starts.get(usize::from(region.0)).copied().unwrap_or(u32::MAX);
        Place(start.saturating_add(u32::try_from(page).unwrap_or(u32::MAX)))
    }

    /// The region and page number of a place.
    pub fn locate(&self, place: Place) -> (RegionId, PageNumber) {
        let index = self.starts.partition_point(|&start| start <= place.0).saturating_sub(1);
        let start = self.starts.get(index).copied().unwrap_or(0);
        let region = RegionId(u16::try_from(index).unwrap_or(u16::MAX));
        (region, PageNumber(u64::from(place.0.saturating_sub(start))))
    }

    /// The index of the 2 MiB group that holds a page, over all regions in order. It selects the page's lane.
    pub fn group(&self, region: RegionId, page: u64) -> u64 {
        let before = self.regions.iter().take(usize::from(region.0));
        let groups = before.fold(0u64, |sum, region| sum.saturating_add(region.pages().div_ceil(GROUP_PAGES)));
        groups.saturating_add(page / GROUP_PAGES)
    }

    /// A range that lies inside its region and covers whole install pages.
    ///
    /// # Errors
    /// An unknown region, no page, pages outside the region, or a border inside an install page.
    pub fn range(&self, region: u16, first: u64, count: u32) -> Result<PageRange, DecodeError> {
        let id = RegionId(region);
        let Some(known) = self.region(id) else {
            return Err(DecodeError::limit("region", u64::from(region), self.regions.len() as u64));
        };
        // SPEC 6.1
        let end = first.checked_add(u64::from(count));
        let Some(end) = end.filter(|&end| count > 0 && end <= known.pages()) else {
            return Err(DecodeError::OutsideRegion { region, first, count, pages: known.pages() });
        };
        let step = u64::from(known.install_size.pages());
        if !first.is_multiple_of(step) || (!end.is_multiple_of(step) && end != known.pages()) {
            return Err(DecodeError::Unaligned { region, first, count, step });
        }
        Ok(PageRange { region: id, first: PageNumber(first), count })
    }
}

/// How many first pages of each region an image of `base` and one of `image` have both, if the one can be the base of
/// the other: all regions are alike, or there is only one and its length differs.
// SPEC 4.20
pub fn common_pages(base: &Layout, image: &Layout) -> Option<Vec<u64>> {
    let alike = base == image;
    let (ours, theirs) = (base.regions(), image.regions());
    let grown = match (ours, theirs) {
        ([one], [other]) => one.install_size == other.install_size,
        _ => false,
    };
    (alike || grown).then(|| ours.iter().zip(theirs).map(|(one, other)| one.pages().min(other.pages())).collect())
}

/// `run` moved by `shift` pages, as far as it lies in the first `held` pages of its region then.
// SPEC 5.14
pub fn shifted(run: Range<u64>, shift: i64, held: u64) -> Range<u64> {
    let at = |page: u64| {
        let moved = i128::from(page).saturating_add(i128::from(shift));
        u64::try_from(moved.clamp(0, i128::from(held))).unwrap_or(0)
    };
    at(run.start)..at(run.end)
}

/// Fills `space` with the old bytes of `runs` of pages, one after the other: `read` brings those from a page on that lie in
/// the first `held` pages of the region, `shift` pages further; all others are zero.
///
/// # Errors
/// Those of `read`; `space` has anything in it then.
// SPEC 5.14
pub fn fill_old<E>(
    runs: impl Iterator<Item = Range<u64>>,
    (shift, held): (i64, u64),
    space: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let bytes = |pages: u64| usize::try_from(pages).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
    let mut rest = space;
    for run in runs {
        let pages = run.end.saturating_sub(run.start);
        let source = shifted(run.clone(), shift, held);
        // Before the region's first page there is nothing.
        let before = shift.min(0).unsigned_abs().saturating_sub(run.start).min(pages);
        let (space, behind) = rest.split_at_mut_checked(bytes(pages)).unwrap_or_default();
        let (front, space) = space.split_at_mut_checked(bytes(before)).unwrap_or_default();
        let (old, beyond) =
            space.split_at_mut_checked(bytes(source.end.saturating_sub(source.start))).unwrap_or_default();
        front.fill(0);
        beyond.fill(0);
        if !old.is_empty() {
            read(source.start, old)?;
        }
        rest = behind;
    }
    debug_assert!(rest.is_empty(), "space for these runs alone");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn layout() -> Layout {
        let small = Region { bytes: 10_000, install_size: InstallSize::KIB_4 };
        let big = Region { bytes: 3 << 20, install_size: InstallSize::MIB_2 };
        Layout::new(vec![small, big]).unwrap()
    }

    /// SPEC 5.14
    #[test]
    fn old_bytes_are_zero_where_the_base_has_none() {
        let page = |page: u64| u8::try_from(page + 1).unwrap();
        for (shift, held) in [
            (0, 9),
            (0, 8),
            (0, 4),
            (0, 2),
            (0, 0),
            (3, 9),
            (-2, 9),
            (-8, 9),
            (-2, 6),
            (1, 9),
            (-3, 9),
            (-3, 2),
            (-20, 9),
            (20, 9),
            (i64::MIN, 9),
        ] {
            let runs = [1..3u64, 5..6, 7..9];
            let mut space = vec![0xff; 5 * PAGE_BYTES];
            let read = |first: u64, space: &mut [u8]| {
                assert!(first + (space.len() / PAGE_BYTES) as u64 <= held && !space.is_empty());
                let pages = space.chunks_mut(PAGE_BYTES).zip(first..);
                pages.for_each(|(space, number)| space.fill(page(number)));
                Ok::<(), ()>(())
            };
            fill_old(runs.clone().into_iter(), (shift, held), &mut space, read).unwrap();
            for (number, bytes) in runs.into_iter().flatten().zip(space.chunks(PAGE_BYTES)) {
                let source = number.checked_add_signed(shift).filter(|source| *source < held);
                let expected = source.map_or(0, page);
                assert!(bytes.iter().all(|byte| *byte == expected), "page {number}, shift {shift} of {held}");
            }
        }
        let fails = |_: u64, _: &mut [u8]| Err(7);
        assert_eq!(fill_old(core::iter::once(1..3), (0, 9), &mut [0; 2 * PAGE_BYTES], fails), Err(7));
    }

    #[test]
    fn places_run_through_all_regions() {
        let layout = layout();
        assert_eq!(layout.pages(), 3 + 768);
        assert_eq!(layout.place(RegionId(1), 5), Place(8));
        assert_eq!(layout.locate(Place(8)), (RegionId(1), PageNumber(5)));
        assert_eq!(layout.locate(Place(2)), (RegionId(0), PageNumber(2)));
        assert_eq!(layout.file_offset(RegionId(0), 2), 8192);
        assert_eq!(layout.file_offset(RegionId(1), 1), 10_000 + 4096);
    }

    #[test]
    fn rejects_ranges_outside_or_unaligned() {
        let layout = layout();
        assert!(layout.range(0, 0, 3).is_ok());
        for (region, first, count) in [(0, 0, 0), (0, 3, 1), (0, 1, 3), (0, u64::MAX, 1), (0, 1 << 63, 2), (2, 0, 1)] {
            assert!(layout.range(region, first, count).is_err(), "{region} {first} {count}");
        }
        assert!(layout.range(1, 512, 256).is_ok(), "a short last install page");
        assert!(layout.range(1, 0, 256).is_err());
        assert!(layout.range(1, 1, 511).is_err());
    }

    #[test]
    fn rejects_images_over_their_limits() {
        let region = |bytes| Region { bytes, install_size: InstallSize::KIB_4 };
        assert!(Layout::new(vec![]).is_err());
        assert!(Layout::new(vec![region(1); REGIONS_MAX]).is_ok());
        assert!(Layout::new(vec![region(1); REGIONS_MAX + 1]).is_err());
        assert!(Layout::new(vec![region(IMAGE_PAGES_MAX * 4096)]).is_ok());
        assert!(Layout::new(vec![region(IMAGE_PAGES_MAX * 4096), region(1)]).is_err());
        assert!(Layout::new(vec![region(u64::MAX), region(u64::MAX)]).is_err());
    }
}
