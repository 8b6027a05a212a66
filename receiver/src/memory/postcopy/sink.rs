//! Post-copy memory as the place where received pages go.

use super::{FaultTimes, PostcopyError, PostcopyMemory, SMALL, failed, size};
use crate::memory::GuestSink;
use crate::memory::uffd::FaultsOf;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::RegionId;
use pagewire_protocol::time::Time;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, PoisonError};

/// Tells the time, counted from any moment.
pub type Clock = Box<dyn Fn() -> Time + Send>;

/// Memory of this process while a guest arrives in it: plain memory until it is armed, and each page once from then on.
///
/// How long threads waited for pages is counted here.
pub struct PostcopySink {
    memory: Arc<PostcopyMemory>,
    faults_of: FaultsOf,
    clock: Clock,
    times: FaultTimes,
}

impl std::fmt::Debug for PostcopySink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostcopySink").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl PostcopySink {
    /// The guest arrives in `memory`, and `faults_of` may touch what is absent. `clock` says how long they wait.
    pub fn new(memory: Arc<PostcopyMemory>, faults_of: FaultsOf, clock: Clock) -> Self {
        Self { memory, faults_of, clock, times: FaultTimes::default() }
    }

    fn now(&self) -> Time {
        (self.clock)()
    }
}

impl PostcopyMemory {
    /// Writes to plain memory: a page may come as often as it likes.
    fn write(&self, region: RegionId, first: u64, bytes: &[u8]) -> Result<(), PostcopyError> {
        if self.is_armed() {
            return Err(PostcopyError::Misuse("armed memory takes each page once"));
        }
        let own = self.own.as_ref().ok_or(PostcopyError::Misuse("memory of another process is never plain"))?;
        let mut mappings = own.mappings.write().unwrap_or_else(PoisonError::into_inner);
        let mapping = mappings.get_mut(usize::from(region.0)).ok_or(PostcopyError::Misuse("no such region"))?;
        mapping.write(size(first.saturating_mul(SMALL)), bytes).map_err(failed("pages cannot be written"))
    }
}

impl GuestSink for PostcopySink {
    fn base_pages(&self, _region: RegionId) -> u64 {
        0
    }

    fn starts_zero(&self) -> bool {
        !self.memory.is_armed()
    }

    fn read_base(&mut self, _region: RegionId, _first: u64, _bytes: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        if !self.memory.is_armed() {
            return self.memory.read(region, first.saturating_mul(SMALL), bytes);
        }
        for (page, bytes) in (first..).zip(bytes.chunks_mut(PAGE_BYTES)) {
            if self.memory.is_present(region, page) {
                self.memory.read(region, page.saturating_mul(SMALL), bytes)?;
            } else if !self.memory.read_staged(region, page, bytes) {
                return Err(io::Error::new(io::ErrorKind::WouldBlock, "pages that are absent cannot be read"));
            }
        }
        Ok(())
    }

    fn install(&mut self, region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()> {
        if self.memory.is_armed() {
            let installed = self.memory.install_pages(region, first, bytes, self.now())?;
            self.times.add_served(&installed.served);
        } else {
            self.memory.write(region, first, bytes)?;
        }
        Ok(())
    }

    fn zero(&mut self, region: RegionId, first: u64, count: u64) -> io::Result<()> {
        if self.memory.is_armed() {
            let installed = self.memory.zero_pages(region, first, count, self.now())?;
            self.times.add_served(&installed.served);
            return Ok(());
        }
        for page in first..first.saturating_add(count) {
            self.memory.write(region, page, &[0; PAGE_BYTES])?;
        }
        Ok(())
    }

    fn can_wait(&self) -> bool {
        true
    }

    fn arm(&mut self, absent: &PageBitmap) -> io::Result<()> {
        self.memory.arm(absent, self.faults_of)?;
        Ok(())
    }

    fn touches(&self) -> Option<BorrowedFd<'_>> {
        self.memory.is_armed().then(|| self.memory.as_fd())
    }

    fn gather(&mut self, touched: &mut Vec<(RegionId, u64)>) -> io::Result<()> {
        let mut more = self.memory.is_armed();
        while more {
            let gathered = self.memory.gather(self.now())?;
            self.times.add_served(&gathered.served);
            more = gathered.more;
        }
        touched.extend(std::iter::from_fn(|| self.memory.next_fault()).map(|fault| (fault.region, fault.page)));
        Ok(())
    }

    fn fault_times(&self) -> Option<FaultTimes> {
        Some(self.times.clone())
    }

    fn renew_touches(&mut self) {
        self.memory.renew_faults();
    }

    fn finish(&mut self) -> io::Result<()> {
        if self.memory.is_armed() && self.memory.absent_pages() == 0 {
            self.memory.finish()?;
        }
        Ok(())
    }
}
