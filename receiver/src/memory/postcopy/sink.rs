//! Post-copy memory as the place where received pages go.

use super::{PostcopyError, PostcopyMemory, SMALL, failed, lock, size};
use crate::memory::GuestSink;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::RegionId;
use pagewire_protocol::time::Time;
use std::io;
use std::sync::{Arc, PoisonError};

/// Memory of this process while a guest arrives in it: plain memory until it is armed, and each page once from then on.
///
/// Once it is armed, pages come in whole install units, and who waited for them is not told by this way: see
/// [`PostcopyMemory::install`].
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
        let pages = first..first.saturating_add((bytes.len() / PAGE_BYTES) as u64);
        if self.0.is_armed() && pages.clone().any(|page| !self.0.is_present(region, page)) {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "pages that are absent cannot be read"));
        }
        self.0.read(region, first.saturating_mul(SMALL), bytes)
    }

    fn install(&mut self, region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()> {
        if self.0.is_armed() {
            self.0.install(region, first, bytes, Time::ZERO)?;
        } else {
            self.0.write(region, first, bytes)?;
        }
        Ok(())
    }

    fn zero(&mut self, region: RegionId, first: u64, count: u64) -> io::Result<()> {
        if self.0.is_armed() {
            self.0.install_zeros(region, first, count, Time::ZERO)?;
            return Ok(());
        }
        for page in first..first.saturating_add(count) {
            self.0.write(region, page, &[0; PAGE_BYTES])?;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        drop(lock(&self.0.reader));
        Ok(())
    }
}
