//! Guest memory that is mapped into this process, with writes found by the kernel.
//!
//! userfaultfd write-protection in its asynchronous form traces the first write to each page, and PAGEMAP_SCAN harvests:
//! no thread, no signal and no handler is in the guest's way. Traces lie in the page tables of this process. So writes by
//! vCPUs, by threads and by system calls through *these* mappings are found, and private memory that is thrown away.
//! Writes through another mapping of the same file, by a device in a process of its own for instance, are not, nor are
//! holes that are punched into it: who makes those says so in [`marks`](MappedMemory::marks).

use super::bitmap::DirtyBitmap;
use super::raw::{MappedRegion, WriteWatch};
use super::{GuestMemory, Tracking};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, RegionId};
use std::io;

/// Mapped regions, and the watch over them while it is on.
#[derive(Debug)]
pub struct MappedMemory {
    regions: Vec<MappedRegion>,
    layout: Layout,
    watch: Option<WriteWatch>,
    /// What is dirty beside the kernel's traces: put back, left by an earlier watch, or marked by the embedder.
    marks: DirtyBitmap,
}

impl MappedMemory {
    /// The memory of these regions, in their order.
    ///
    /// # Errors
    /// No image can have these regions.
    pub fn new(regions: Vec<MappedRegion>) -> io::Result<Self> {
        let layout = Layout::new(regions.iter().map(MappedRegion::region).collect());
        let layout = layout.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
        Ok(Self { regions, marks: DirtyBitmap::new(&layout), layout, watch: None })
    }

    /// A handle to mark pages with that were written where the kernel does not see it from here.
    pub fn marks(&self) -> DirtyBitmap {
        self.marks.clone()
    }

    /// Takes all traces of `watch`. After an error everything is marked, as some may be lost.
    fn take(&self, watch: &WriteWatch, dirty: &mut PageBitmap) -> io::Result<()> {
        for (region, id) in self.regions.iter().zip(0..) {
            let addresses = region.addresses();
            let place = |address: u64| {
                let page = address.saturating_sub(addresses.start) / PAGE_BYTES as u64;
                u64::from(self.layout.place(RegionId(id), 0).0).saturating_add(page)
            };
            watch
                .take(&addresses, |run| {
                    dirty.insert_range(place(run.start)..place(run.end));
                })
                .inspect_err(|_| self.marks.mark_all())?;
        }
        Ok(())
    }
}

impl GuestMemory for MappedMemory {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let known = self.regions.get(usize::from(region.0));
        known.ok_or_else(|| io::Error::other(format!("there is no region {}", region.0)))?.read(first, bytes)
    }

    fn tracking(&self) -> Tracking {
        Tracking::Dirty
    }

    fn start_tracking(&mut self) -> io::Result<()> {
        if self.watch.is_none() {
            let ranges: Vec<_> = self.regions.iter().map(MappedRegion::addresses).collect();
            self.watch = Some(WriteWatch::start(&ranges)?);
        }
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        let watch = self.watch.as_ref().ok_or_else(|| io::Error::other("writes are not watched"))?;
        self.take(watch, dirty)?;
        self.marks.take(dirty);
        Ok(())
    }

    fn put_back(&mut self, dirty: &PageBitmap) {
        self.marks.put_back(dirty);
    }

    fn stop_tracking(&mut self) {
        let Some(watch) = self.watch.take() else { return };
        let mut dirty = PageBitmap::new(self.layout.pages());
        // An error has marked everything, which is what there is to do about it.
        let _ = self.take(&watch, &mut dirty);
        self.marks.put_back(&dirty);
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Mapping;
    use pagewire_protocol::page::InstallSize;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    /// Two regions, the first with a page of six bytes at its end.
    fn memory() -> Option<(MappedMemory, Vec<Arc<Mapping>>)> {
        let mappings = vec![Mapping::private(3 * PAGE_BYTES + 6).unwrap(), Mapping::shared(4 * PAGE_BYTES).unwrap()];
        let mappings: Vec<_> = mappings.into_iter().map(Arc::new).collect();
        let regions = mappings.iter().map(|mapping| MappedRegion::of(mapping.clone(), InstallSize::KIB_4));
        let mut memory = MappedMemory::new(regions.collect()).unwrap();
        let skip = |error| writeln!(io::stderr(), "SKIPPED: mapped memory that is watched: {error}").unwrap();
        memory.start_tracking().map_err(skip).ok()?;
        Some((memory, mappings))
    }

    fn write(mapping: &Mapping, page: usize) {
        mapping.byte(page * PAGE_BYTES).unwrap().fetch_add(1, Ordering::Relaxed);
    }

    fn harvested(memory: &mut MappedMemory) -> Vec<u64> {
        let mut dirty = PageBitmap::new(memory.layout().pages());
        memory.harvest(&mut dirty).unwrap();
        dirty.runs(0..u64::MAX).flatten().collect()
    }

    #[test]
    fn harvests_places_of_all_regions() {
        let Some((mut memory, mappings)) = memory() else { return };
        [(0, 0), (0, 3), (1, 0), (1, 2)].iter().for_each(|&(region, page)| write(&mappings[region], page));
        memory.marks().mark(7..8);
        assert_eq!(harvested(&mut memory), [0, 3, 4, 6, 7]);
        assert_eq!(harvested(&mut memory), []);
        let mut bytes = vec![9; PAGE_BYTES];
        memory.read(RegionId(0), 3, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[1]), (1, 0));
        assert!(memory.read(RegionId(2), 0, &mut bytes).is_err());
    }

    #[test]
    fn a_harvest_that_fails_leaves_every_page_dirty() {
        let Some((mut memory, mappings)) = memory() else { return };
        write(&mappings[0], 1);
        memory.watch.as_mut().unwrap().pagemap = File::open("/dev/null").unwrap();
        let mut dirty = PageBitmap::new(8);
        assert!(memory.harvest(&mut dirty).unwrap_err().to_string().contains("PAGEMAP_SCAN"));
        memory.watch.as_mut().unwrap().pagemap = File::open("/proc/self/pagemap").unwrap();
        assert_eq!(harvested(&mut memory), (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn what_was_dirty_when_tracking_stopped_is_so_when_it_starts_again() {
        let Some((mut memory, mappings)) = memory() else { return };
        write(&mappings[0], 1);
        let mut dirty = PageBitmap::new(8);
        memory.harvest(&mut dirty).unwrap();
        memory.put_back(&dirty);
        write(&mappings[1], 3);
        memory.stop_tracking();
        assert!(memory.harvest(&mut dirty).is_err(), "nobody watches");
        memory.start_tracking().unwrap();
        assert_eq!(harvested(&mut memory), [1, 7]);
    }

    #[test]
    fn untouched_pages_of_a_memory_file_stay_unused_when_they_are_read() {
        let Some((mut memory, mappings)) = memory() else { return };
        memory.read(RegionId(1), 0, &mut vec![0; 4 * PAGE_BYTES]).unwrap();
        assert_eq!(mappings[1].file().unwrap().metadata().unwrap().blocks(), 0);
    }
}
