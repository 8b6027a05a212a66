//! Post-copy memory as the place where received pages go.

use super::{FaultTimes, PostcopyError, PostcopyMemory, SMALL, failed, size};
use crate::memory::uffd::FaultsOf;
use crate::memory::{Beside, GuestSink};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::is_zero;
use pagewire_protocol::error::chain;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::RegionId;
use pagewire_protocol::time::Time;
use pagewire_store::Landing;
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
    base: Option<Beside>,
    landing: Option<Landing>,
}

impl std::fmt::Debug for PostcopySink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostcopySink").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl PostcopySink {
    /// The guest arrives in `memory`, and `faults_of` may touch what is absent. `clock` says how long they wait.
    pub fn new(memory: Arc<PostcopyMemory>, faults_of: FaultsOf, clock: Clock) -> Self {
        Self { memory, faults_of, clock, times: FaultTimes::default(), base: None, landing: None }
    }

    /// The same over what is kept of the guest: it is what the memory begins as, and can be read until all has come.
    #[must_use]
    pub fn over(self, base: Option<Beside>) -> Self {
        Self { base, ..self }
    }

    /// The memory is the file of `landing`, which gets its name when all has come.
    #[must_use]
    pub fn landing(self, landing: Landing) -> Self {
        Self { landing: Some(landing), ..self }
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
    fn base_pages(&self, region: RegionId) -> u64 {
        self.base.as_ref().map_or(0, |base| base.pages(region))
    }

    fn starts_zero(&self) -> bool {
        !self.memory.is_armed()
    }

    fn read_base(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let base = self.base.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        base.read_or_zero(region, first, bytes);
        // It becomes part of the image, which begins as zeros that take no memory.
        for (page, bytes) in (first..).zip(bytes.chunks(PAGE_BYTES)).filter(|(_, bytes)| !is_zero(bytes)) {
            self.memory.write(region, page, bytes)?;
        }
        Ok(())
    }

    fn base_stays(&self) -> bool {
        self.base.is_some()
    }

    fn read_old(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.base.as_ref().ok_or(io::ErrorKind::Unsupported)?.read(region, first, bytes)
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
        if self.memory.is_armed() {
            if self.memory.absent_pages() > 0 {
                return Ok(());
            }
            self.memory.finish()?;
        }
        if let Some(landing) = &mut self.landing {
            landing.finish().map_err(|error| io::Error::other(chain(&error)))?;
            self.landing = None;
        }
        Ok(())
    }
}
