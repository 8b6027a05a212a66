//! Memory of this process that a guest arrives in: a visit that is kept, mapped copy-on-write, and zeros elsewhere.
//!
//! Pages that did not change are never copied: they stay the page cache's, shared with everybody who maps the visit.
//! What is written is private, so the visit stays as it is. It is held open for as long as it is mapped, and whoever
//! holds it keeps others from consuming it; its file belongs to the store, in whose folders nobody else writes, so
//! nothing changes or cuts it under the guest.

use super::GuestSink;
use super::mapping::Mapping;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::is_zero;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, RegionId, common_pages};
use pagewire_store::Visit;
use rustix::fs::{SeekFrom, seek};
use rustix::param::page_size;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Holes of a visit's image that are not mapped are at least this long: zeros then take neither page cache nor disk.
const HOLE_BYTES_MIN: u64 = 2 << 20;
/// Zeros that arrive are given back to the system from this length on; neighbouring ones become one mapping. Shorter
/// ones are written.
const CLEAR_BYTES_MIN: u64 = 256 << 10;
/// Parts of a visit that are mapped, and parts that are cleared: a process has 65,530 mappings, of which each costs two
/// at most.
const MAPPED_PARTS_MAX: u64 = 8192;
/// Bytes that are copied at once.
const PIECE_BYTES: usize = 1 << 20;

/// A region of a guest in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Where it begins, at a page of the system; it stays there until the [`GuestRam`] is dropped.
    pub start: NonNull<u8>,
    /// Its bytes.
    pub bytes: u64,
}

/// A guest's memory in this process. Readable and writable, private to it, and unmapped when dropped: whoever was given
/// the addresses must be done with them by then.
#[derive(Debug)]
pub struct GuestRam {
    layout: Layout,
    regions: Vec<Mapping>,
    /// Pages, by their places, that are the visit's until somebody writes to them.
    mapped: PageBitmap,
    /// How often long runs of zeros may still be given back to the system.
    clears: u64,
    /// First pages of each region that the visit has.
    held: Vec<u64>,
    /// Dropped after the mappings: until then nobody may change the image.
    base: Option<Box<Visit>>,
}

impl GuestRam {
    /// Zeros.
    ///
    /// # Errors
    /// The system has not so much memory.
    pub fn new(layout: Layout) -> io::Result<Self> {
        let bytes = |bytes: u64| usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory);
        let regions = layout.regions().iter().map(|region| Mapping::new(bytes(region.bytes)?));
        let regions = regions.collect::<io::Result<_>>()?;
        let (mapped, held) = (PageBitmap::new(layout.pages()), vec![0; layout.regions().len()]);
        Ok(Self { layout, regions, mapped, clears: MAPPED_PARTS_MAX, held, base: None })
    }

    /// A visit that keeps its pages, copy-on-write, and zeros beyond it. Nothing of it is verified.
    ///
    /// # Errors
    /// The image has no pages in common with the layout, or cannot be mapped or read.
    pub fn over(layout: Layout, visit: Visit) -> io::Result<Self> {
        let mut ram = Self::new(layout)?;
        let unfit = || io::Error::new(io::ErrorKind::InvalidInput, "the visit is not of this image, or keeps no pages");
        ram.held = common_pages(&visit.head().layout, &ram.layout).ok_or_else(unfit)?;
        let image = visit.image().ok_or_else(unfit)?;
        for region in (0..).map(RegionId).take(ram.held.len()) {
            ram.lay(region, &visit, image)?;
        }
        ram.base = Some(Box::new(visit));
        Ok(ram)
    }

    /// The regions, in order.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> {
        let mappings = self.regions.iter().zip(self.layout.regions());
        mappings.map(|(mapping, region)| RamRegion { start: mapping.start(), bytes: region.bytes })
    }

    /// The regions as the sender has them.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Copies bytes out of a region. What somebody writes to them meanwhile may or may not be among them.
    ///
    /// # Errors
    /// They are not all inside the region.
    pub fn read(&self, region: RegionId, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.mapping(region)?.read(place(offset)?, bytes)
    }

    /// Copies bytes into a region.
    ///
    /// # Errors
    /// They are not all inside the region.
    pub fn write(&mut self, region: RegionId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.mapping_mut(region)?.write(place(offset)?, bytes)
    }

    fn mapping(&self, region: RegionId) -> io::Result<&Mapping> {
        self.regions.get(usize::from(region.0)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn mapping_mut(&mut self, region: RegionId) -> io::Result<&mut Mapping> {
        self.regions.get_mut(usize::from(region.0)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Maps what of a region lies in whole pages of this system, and copies the rest.
    fn lay(&mut self, region: RegionId, visit: &Visit, image: &File) -> io::Result<()> {
        let held = self.held.get(usize::from(region.0)).copied().unwrap_or(0);
        let bytes = |layout: &Layout| layout.region(region).map_or(0, |region| region.bytes_of(0, held));
        let bytes = bytes(&self.layout).min(bytes(&visit.head().layout));
        let (from, page) = (visit.head().layout.file_offset(region, 0), page_size() as u64);
        let whole = if from.is_multiple_of(page) { bytes.saturating_sub(bytes % page) } else { 0 };
        for part in data_parts(image, from..from.saturating_add(whole), least_hole(&self.layout)) {
            let (offset, len) = (part.start.saturating_sub(from), part.end.saturating_sub(part.start));
            self.mapping_mut(region)?.lay(place(offset)?, place(len)?, image, part.start)?;
            let first = u64::from(self.layout.place(region, offset / PAGE_BYTES as u64).0);
            self.mapped.insert_range(first..first.saturating_add(len / PAGE_BYTES as u64));
        }
        let mut piece = vec![0; PIECE_BYTES];
        for offset in (whole..bytes).step_by(PIECE_BYTES) {
            let len = usize::try_from(bytes.saturating_sub(offset)).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let piece = piece.get_mut(..len.next_multiple_of(PAGE_BYTES)).unwrap_or_default();
            visit.read(region, offset / PAGE_BYTES as u64, piece)?;
            let piece = piece.get(..len).unwrap_or_default();
            if !is_zero(piece) {
                self.mapping_mut(region)?.write(place(offset)?, piece)?;
            }
        }
        Ok(())
    }

    /// Reads pages that are still the visit's from its file, where a disk that fails is no signal. A page that it cannot
    /// give back becomes zeros.
    fn read_mapped(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        if self.read_visit(region, first, bytes).is_ok() {
            return Ok(());
        }
        for (page, bytes) in (first..).zip(bytes.chunks_mut(PAGE_BYTES)) {
            if self.read_visit(region, page, bytes).is_err() {
                bytes.fill(0);
                self.clear(region, page, 1)?;
            }
        }
        Ok(())
    }

    fn read_visit(&self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.base.as_ref().ok_or(io::ErrorKind::Unsupported)?.read(region, first, bytes)
    }

    fn clear(&mut self, region: RegionId, first: u64, count: u64) -> io::Result<()> {
        let bytes = |pages: u64| place(pages.saturating_mul(PAGE_BYTES as u64));
        self.mapping_mut(region)?.clear(bytes(first)?, bytes(count)?)?;
        let start = u64::from(self.layout.place(region, first).0);
        self.mapped.remove_range(start..start.saturating_add(count));
        Ok(())
    }
}

fn place(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Holes shorter than this are mapped with what is around them, so that there are no more parts than may be.
fn least_hole(layout: &Layout) -> u64 {
    HOLE_BYTES_MIN.max(layout.bytes() / MAPPED_PARTS_MAX)
}

/// The parts of a file's `range` that are no holes, in whole pages of this system.
fn data_parts(file: &File, range: Range<u64>, least_hole: u64) -> Vec<Range<u64>> {
    let page = page_size() as u64;
    let mut parts: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let (start, end) = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => (start, seek(file, SeekFrom::Hole(start)).unwrap_or(range.end)),
            Err(rustix::io::Errno::NXIO) => break,
            // A file system without holes.
            Err(_) => (at, range.end),
        };
        let start = start.saturating_sub(start % page).max(range.start).min(range.end);
        let end = end.checked_next_multiple_of(page).unwrap_or(u64::MAX).min(range.end);
        match parts.last_mut() {
            Some(last) if start.saturating_sub(last.end) < least_hole => last.end = last.end.max(end),
            _ if start < end => parts.push(start..end),
            _ => {}
        }
        at = end.max(at.saturating_add(1));
    }
    parts
}

/// A guest's memory while it arrives. Whoever shares it takes it when the sink is gone.
#[derive(Debug)]
pub struct RamSink(Arc<Mutex<GuestRam>>);

impl RamSink {
    /// The guest arrives in `ram`.
    pub fn new(ram: Arc<Mutex<GuestRam>>) -> Self {
        Self(ram)
    }

    fn ram(&self) -> MutexGuard<'_, GuestRam> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestSink for RamSink {
    fn base_pages(&self, region: RegionId) -> u64 {
        self.ram().held.get(usize::from(region.0)).copied().unwrap_or(0)
    }

    fn starts_zero(&self) -> bool {
        true
    }

    fn read_base(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut ram = self.ram();
        let start = u64::from(ram.layout.place(region, first).0);
        let end = start.saturating_add((bytes.len() / PAGE_BYTES) as u64);
        let mapped: Vec<Range<u64>> = ram.mapped.runs(start..end).collect();
        let gaps: Vec<Range<u64>> = ram.mapped.gaps(start..end).collect();
        for (run, is_mapped) in
            mapped.into_iter().map(|run| (run, true)).chain(gaps.into_iter().map(|run| (run, false)))
        {
            let at = |page: u64| place(page.saturating_sub(start).saturating_mul(PAGE_BYTES as u64));
            let bytes = bytes.get_mut(at(run.start)?..at(run.end)?).unwrap_or_default();
            let page = first.saturating_add(run.start.saturating_sub(start));
            if is_mapped {
                ram.read_mapped(region, page, bytes)?;
            } else {
                ram.read(region, page.saturating_mul(PAGE_BYTES as u64), bytes)?;
            }
        }
        Ok(())
    }

    fn base_stays(&self) -> bool {
        self.ram().base.is_some()
    }

    fn base_in_place(&self) -> bool {
        true
    }

    fn read_old(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.ram().read_visit(region, first, bytes)
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.ram().read(region, first.saturating_mul(PAGE_BYTES as u64), bytes)
    }

    fn install(&mut self, region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()> {
        self.ram().write(region, first.saturating_mul(PAGE_BYTES as u64), bytes)
    }

    fn zero(&mut self, region: RegionId, first: u64, count: u64) -> io::Result<()> {
        let mut ram = self.ram();
        let (offset, bytes) = (first.saturating_mul(PAGE_BYTES as u64), count.saturating_mul(PAGE_BYTES as u64));
        let whole = (offset | bytes).is_multiple_of(page_size() as u64);
        if bytes >= CLEAR_BYTES_MIN && whole && ram.clears > 0 {
            ram.clears = ram.clears.saturating_sub(1);
            return ram.clear(region, first, count);
        }
        for page in first..first.saturating_add(count) {
            ram.write(region, page.saturating_mul(PAGE_BYTES as u64), &[0; PAGE_BYTES])?;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::digest::{PageHasher, page_digest};
    use pagewire_protocol::domain::{DedupDomain, LineageId};
    use pagewire_protocol::frame::ImageName;
    use pagewire_protocol::page::{InstallSize, Region};
    use pagewire_protocol::tree::{DigestTree, image_root};
    use pagewire_store::{Keep, KeepImage, Lineage, Store, StoreOptions, VisitKind};
    use std::os::unix::fs::FileExt;

    #[test]
    fn parts_are_whole_pages_and_leave_out_long_holes_alone() {
        let page = page_size() as u64;
        let file = tempfile::tempfile().unwrap();
        file.set_len(200 * page).unwrap();
        for at in [3, 4, 8, 100] {
            file.write_all_at(&[1], at * page + 5).unwrap();
        }
        let pages = |range: Range<u64>, hole: u64| {
            let parts = data_parts(&file, range.start * page..range.end * page, hole * page);
            parts.into_iter().map(|part| part.start / page..part.end / page).collect::<Vec<_>>()
        };
        assert_eq!(pages(0..200, 1), [3..5, 8..9, 100..101]);
        assert_eq!(pages(0..200, 4), [3..9, 100..101]);
        assert_eq!(pages(4..9, 1), [4..5, 8..9]);
        assert!(pages(9..100, 1).is_empty() && pages(7..7, 1).is_empty());
    }

    /// What a disk does that fails, as far as a test can: the image is cut behind the store's back.
    #[test]
    fn pages_that_the_disk_cannot_give_back_become_zeros_and_no_signal() {
        const PAGES: u64 = 600;
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
        let hasher = PageHasher::new(&DedupDomain::new(&[1; 32]));
        let region = Region { bytes: PAGES * PAGE_BYTES as u64, install_size: InstallSize::KIB_4 };
        let layout = Layout::new(vec![region]).unwrap();
        let mut trees = [DigestTree::new(&hasher, PAGES)];
        (0..PAGES).for_each(|page| trees[0].set(page, page_digest(hasher.domain(), &[7; PAGE_BYTES])));
        let lineage = Lineage { id: LineageId([1; 16]), key: [1; 32] };
        let (name, root) = (ImageName::new("vm").unwrap(), image_root(hasher.domain(), &layout, &mut trees));
        let keep = Keep { lineage, name, session: [1; 16], kind: VisitKind::Arrived, layout: &layout, root };
        let mut fill = |_: RegionId, _: u64, bytes: &mut [u8]| {
            bytes.fill(7);
            Ok(())
        };
        let head = store.keep(&keep, &trees, None, Some(KeepImage::Pages(&mut fill))).unwrap().head;
        let ram = GuestRam::over(layout.clone(), store.open_visit(&head).unwrap().unwrap()).unwrap();
        let image = dir.path().join(format!("store/domains/{}/{}.img", head.domain, head.id));
        let cut = 300;
        File::options().write(true).open(image).unwrap().set_len(cut * PAGE_BYTES as u64).unwrap();
        let mut sink = RamSink::new(Arc::new(Mutex::new(ram)));
        let mut bytes = vec![9; PAGES as usize * PAGE_BYTES];
        sink.read_base(RegionId(0), 0, &mut bytes).unwrap();
        let (whole, lost) = bytes.split_at(cut as usize * PAGE_BYTES);
        assert!(whole.iter().all(|byte| *byte == 7) && is_zero(lost));
        let mut now = vec![9; bytes.len()];
        sink.read(RegionId(0), 0, &mut now).unwrap();
        assert!(now == bytes, "memory has what was read");
        sink.install(RegionId(0), cut + 5, &[8; PAGE_BYTES]).unwrap();
    }
}
