//! A visit that can be read as long as a guest is filled, beside the memory that the guest runs in.
//!
//! Nothing of it is trusted: whoever uses a page holds it against its digest. A page that cannot be read is one that is
//! not here; the sender has it still.

use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, RegionId, common_pages};
use pagewire_store::Visit;
use std::io;

/// A visit that keeps pages. Until it is dropped nobody evicts it.
#[derive(Debug)]
pub struct Beside {
    visit: Box<Visit>,
    layout: Layout,
    /// First pages of each region that it has.
    held: Vec<u64>,
}

impl Beside {
    /// A visit beside memory of this layout; `None` if it keeps no pages, or none that lie where the layout's do.
    pub fn new(layout: &Layout, visit: Visit) -> Option<Self> {
        visit.image()?;
        let held = common_pages(&visit.head().layout, layout)?;
        Some(Self { visit: Box::new(visit), layout: layout.clone(), held })
    }

    /// How many first pages of a region it has.
    pub fn pages(&self, region: RegionId) -> u64 {
        self.held.get(usize::from(region.0)).copied().unwrap_or(0)
    }

    /// Reads pages; what lies behind the region's end is zeros.
    ///
    /// # Errors
    /// They are not here any more, or their disk cannot give them back.
    pub fn read(&self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.visit.read(region, first, bytes)?;
        let pages = (bytes.len() / PAGE_BYTES) as u64;
        let real = self.layout.region(region).map_or(0, |region| region.bytes_of(first, pages));
        bytes.get_mut(usize::try_from(real).unwrap_or(usize::MAX)..).into_iter().for_each(|rest| rest.fill(0));
        Ok(())
    }

    /// As [`read`](Self::read); a page that cannot be read becomes zeros, and is found damaged where a manifest says
    /// otherwise.
    pub fn read_or_zero(&self, region: RegionId, first: u64, bytes: &mut [u8]) {
        if self.read(region, first, bytes).is_ok() {
            return;
        }
        for (page, bytes) in (first..).zip(bytes.chunks_mut(PAGE_BYTES)) {
            if self.read(region, page, bytes).is_err() {
                bytes.fill(0);
            }
        }
    }
}
