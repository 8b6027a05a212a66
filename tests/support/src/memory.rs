//! Guest memory and guest sinks in memory, with the faults that real ones have.
//!
//! A sink's state outlives the engine that writes to it: what a broken session left is the base of the next one.

use crate::image::Image;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, RegionId};
use pagewire_receiver::GuestSink;
use pagewire_sender::GuestMemory;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// What goes wrong at the sender.
#[derive(Clone, Copy, Debug, Default)]
pub struct SourceFaults {
    /// Reads before the first that fails.
    pub fail_read_after: Option<u64>,
    /// After so many reads a page gets other bytes: (reads, region, page).
    pub change_after: Option<(u64, usize, u64)>,
    /// What was read is said to be of no single moment.
    pub unsteady: bool,
}

/// An image that is sent.
#[derive(Debug)]
pub struct ImageMemory {
    image: Image,
    layout: Layout,
    faults: SourceFaults,
    reads: u64,
}

impl ImageMemory {
    /// The memory of `image`.
    pub fn new(image: Image, faults: SourceFaults) -> Self {
        Self { layout: image.layout(), image, faults, reads: 0 }
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::other(what.to_owned())
}

fn fails(count: u64, after: Option<u64>) -> bool {
    after.is_some_and(|after| count > after)
}

impl GuestMemory for ImageMemory {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.reads += 1;
        if fails(self.reads, self.faults.fail_read_after) {
            return Err(broken("the disk is broken"));
        }
        if let Some((after, region, page)) = self.faults.change_after.filter(|&(after, ..)| self.reads > after) {
            self.faults.change_after = None;
            self.image.page_mut(region, page)[..8].copy_from_slice(&after.wrapping_add(77).to_le_bytes());
        }
        let start = first as usize * PAGE_BYTES;
        bytes.copy_from_slice(&self.image.bytes[usize::from(region.0)][start..start + bytes.len()]);
        Ok(())
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        if self.faults.unsteady { Err(broken("changed while it was read")) } else { Ok(()) }
    }
}

/// What goes wrong at the receiver.
#[derive(Clone, Copy, Debug, Default)]
pub struct SinkFaults {
    /// Reads, of the base and others, before the first that fails.
    pub fail_read_after: Option<u64>,
    /// Writes before the first that fails.
    pub fail_write_after: Option<u64>,
    /// The image cannot be made to last.
    pub fail_finish: bool,
    /// When all of the base has been read, these pages of a region lose a bit: (region, every n-th page).
    pub rot: Option<(usize, u64)>,
}

/// Where an image lands.
#[derive(Debug)]
pub struct SinkState {
    /// What is there now.
    pub image: Image,
    /// How many first pages of each region are worth a look.
    pub base_pages: Vec<u64>,
    /// Everything beyond the base is zero.
    pub starts_zero: bool,
    /// Bytes have been made to last.
    pub finished: bool,
    /// Pages installed, pages cleared.
    pub written: (u64, u64),
    faults: SinkFaults,
    reads: u64,
    writes: u64,
    scanned: u64,
}

/// A sink that shares its state with whoever looks at it afterwards.
#[derive(Clone, Debug)]
pub struct ImageSink(Arc<Mutex<SinkState>>);

impl ImageSink {
    /// A sink that holds `base`, of which the first `base_pages` of each region are worth a look.
    pub fn new(base: Image, base_pages: Vec<u64>, starts_zero: bool, faults: SinkFaults) -> Self {
        let state = SinkState {
            image: base,
            base_pages,
            starts_zero,
            finished: false,
            written: (0, 0),
            faults,
            reads: 0,
            writes: 0,
            scanned: 0,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// A sink that holds nothing and begins as zeros.
    pub fn empty(like: &Image) -> Self {
        Self::new(Image::zeros(like.regions.clone()), vec![0; like.regions.len()], true, SinkFaults::default())
    }

    /// A sink that holds all of `base`.
    pub fn holding(base: Image) -> Self {
        let pages = base.regions.iter().map(pagewire_protocol::page::Region::pages).collect();
        Self::new(base, pages, true, SinkFaults::default())
    }

    /// The state.
    pub fn state(&self) -> MutexGuard<'_, SinkState> {
        self.0.lock().unwrap()
    }
}

impl SinkState {
    fn bytes(&mut self, region: RegionId, first: u64, len: usize) -> &mut [u8] {
        &mut self.image.bytes[usize::from(region.0)][first as usize * PAGE_BYTES..][..len]
    }

    fn check_read(&mut self) -> io::Result<()> {
        self.reads += 1;
        if fails(self.reads, self.faults.fail_read_after) { Err(broken("cannot read")) } else { Ok(()) }
    }

    fn check_write(&mut self) -> io::Result<()> {
        assert!(!self.finished, "written after it was made to last");
        self.writes += 1;
        if fails(self.writes, self.faults.fail_write_after) { Err(broken("no space left")) } else { Ok(()) }
    }

    fn rot(&mut self) {
        let whole: u64 = self.base_pages.iter().sum();
        let Some((region, every)) = self.faults.rot.filter(|_| self.scanned >= whole) else { return };
        self.faults.rot = None;
        for page in (0..self.base_pages[region]).step_by(every.max(1) as usize) {
            self.image.page_mut(region, page)[0] ^= 1;
        }
    }
}

impl GuestSink for ImageSink {
    fn base_pages(&self, region: RegionId) -> u64 {
        self.state().base_pages[usize::from(region.0)]
    }

    fn starts_zero(&self) -> bool {
        self.state().starts_zero
    }

    fn read_base(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut state = self.state();
        state.check_read()?;
        bytes.copy_from_slice(state.bytes(region, first, bytes.len()));
        state.scanned += (bytes.len() / PAGE_BYTES) as u64;
        state.rot();
        Ok(())
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut state = self.state();
        state.check_read()?;
        bytes.copy_from_slice(state.bytes(region, first, bytes.len()));
        Ok(())
    }

    fn install(&mut self, region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        state.check_write()?;
        assert!(!bytes.is_empty() && bytes.len().is_multiple_of(PAGE_BYTES), "whole pages are installed");
        state.bytes(region, first, bytes.len()).copy_from_slice(bytes);
        state.written.0 += (bytes.len() / PAGE_BYTES) as u64;
        let end = state.image.regions[usize::from(region.0)].bytes as usize;
        let beyond = state.image.bytes[usize::from(region.0)].get(end..).unwrap_or_default();
        assert!(beyond.iter().all(|&byte| byte == 0), "bytes beyond the end of a region were installed");
        Ok(())
    }

    fn zero(&mut self, region: RegionId, first: u64, count: u64) -> io::Result<()> {
        let mut state = self.state();
        state.check_write()?;
        state.bytes(region, first, count as usize * PAGE_BYTES).fill(0);
        state.written.1 += count;
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        let mut state = self.state();
        if state.faults.fail_finish {
            return Err(broken("cannot be synced"));
        }
        state.finished = true;
        Ok(())
    }
}
