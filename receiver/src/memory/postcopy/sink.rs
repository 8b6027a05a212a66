//! Post-copy memory as the place where received pages go.

use super::{PostcopyError, PostcopyMemory, SMALL, failed, size};
use crate::memory::GuestSink;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::RegionId;
use pagewire_protocol::time::Time;
use std::io;
use std::sync::{Arc, PoisonError};

/// Memory of this process while a guest arrives in it: plain memory until it is armed, and each page once from then on.
///
/// Once it is armed, who waited for pages is not told by this way: see [`PostcopyMemory::install_pages`].
#[derive(Clone, Debug)]
pub struct PostcopySink(Arc<PostcopyMemory>);

impl PostcopySink {
    /// The guest arrives in `memory`.
    pub fn new(memory: Arc<PostcopyMemory>) -> Self {
        Self(memory)
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
        !self.0.is_armed()
    }

    fn read_base(&mut self, _region: RegionId, _first: u64, _bytes: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        if !self.0.is_armed() {
            return self.0.read(region, first.saturating_mul(SMALL), bytes);
        }
        for (page, bytes) in (first..).zip(bytes.chunks_mut(PAGE_BYTES)) {
            if self.0.is_present(region, page) {
                self.0.read(region, page.saturating_mul(SMALL), bytes)?;
            } else if !self.0.read_staged(region, page, bytes) {
                return Err(io::Error::new(io::ErrorKind::WouldBlock, "pages that are absent cannot be read"));
            }
        }
        Ok(())
    }

    fn install(&mut self, region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()> {
        if self.0.is_armed() {
            self.0.install_pages(region, first, bytes, Time::ZERO)?;
        } else {
            self.0.write(region, first, bytes)?;
        }
        Ok(())
    }

    fn zero(&mut self, region: RegionId, first: u64, count: u64) -> io::Result<()> {
        if self.0.is_armed() {
            self.0.zero_pages(region, first, count, Time::ZERO)?;
            return Ok(());
        }
        for page in first..first.saturating_add(count) {
            self.0.write(region, page, &[0; PAGE_BYTES])?;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}
