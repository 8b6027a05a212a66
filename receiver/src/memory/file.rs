//! A file as guest memory: all regions in a row, holes where pages are zero.

use super::GuestSink;
use pagewire_protocol::error::chain;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, RegionId};
use pagewire_store::Landing;
use std::io;

/// An image file that lands.
#[derive(Debug)]
pub struct FileSink {
    landing: Landing,
    layout: Layout,
    starts: Vec<u64>,
}

impl FileSink {
    /// The regions of `layout` in a row in the file of `landing`.
    pub fn new(landing: Landing, layout: Layout) -> Self {
        let mut next = 0u64;
        let starts = layout.regions().iter().map(|region| {
            let start = next;
            next = next.saturating_add(region.bytes);
            start
        });
        let starts = starts.collect();
        Self { landing, layout, starts }
    }

    /// Where pages of a region lie in the file: offset and bytes, the last page cut at the region's end.
    fn span(&self, region: RegionId, first: u64, pages: u64) -> (u64, usize) {
        let start = self.starts.get(usize::from(region.0)).copied().unwrap_or(u64::MAX);
        let bytes = self.layout.region(region).map_or(0, |region| region.bytes_of(first, pages));
        let offset = start.saturating_add(first.saturating_mul(PAGE_BYTES as u64));
        (offset, usize::try_from(bytes).unwrap_or(usize::MAX))
    }

    /// The bytes of `buffer` that the file has, and those beyond its end, which read as zeros.
    fn cut(buffer: &mut [u8], bytes: usize) -> &mut [u8] {
        let (real, padding) = buffer.split_at_mut(bytes.min(buffer.len()));
        padding.fill(0);
        real
    }
}

impl GuestSink for FileSink {
    fn base_pages(&self, region: RegionId) -> u64 {
        let (start, _) = self.span(region, 0, 0);
        let bytes = self.layout.region(region).map_or(0, |region| region.bytes);
        self.landing.base_len().saturating_sub(start).min(bytes).div_ceil(PAGE_BYTES as u64)
    }

    fn starts_zero(&self) -> bool {
        self.landing.starts_zero()
    }

    fn read_base(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (offset, len) = self.span(region, first, (bytes.len() / PAGE_BYTES) as u64);
        let held = usize::try_from(self.landing.base_len().saturating_sub(offset)).unwrap_or(usize::MAX);
        self.landing.read_base(offset, Self::cut(bytes, len.min(held)))
    }

    fn base_stays(&self) -> bool {
        self.landing.base_stays()
    }

    fn base_in_place(&self) -> bool {
        self.landing.base_in_place()
    }

    fn read_old(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (offset, len) = self.span(region, first, (bytes.len() / PAGE_BYTES) as u64);
        let held = usize::try_from(self.landing.base_len().saturating_sub(offset)).unwrap_or(usize::MAX);
        self.landing.read_old(offset, Self::cut(bytes, len.min(held)))
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (offset, len) = self.span(region, first, (bytes.len() / PAGE_BYTES) as u64);
        self.landing.read(offset, Self::cut(bytes, len))
    }

    fn install(&mut self, region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()> {
        let (offset, len) = self.span(region, first, (bytes.len() / PAGE_BYTES) as u64);
        self.landing.write(offset, bytes.get(..len).unwrap_or(bytes))
    }

    fn zero(&mut self, region: RegionId, first: u64, count: u64) -> io::Result<()> {
        let (offset, len) = self.span(region, first, count);
        self.landing.zero(offset, len as u64)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.landing.finish().map_err(|error| io::Error::other(chain(&error)))
    }
}
