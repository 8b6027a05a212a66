//! Guest memory and guest sinks in memory, with the faults that real ones have.
//!
//! A sink's state outlives the engine that writes to it: what a broken session left is the base of the next one.

use crate::image::Image;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageBytes, PageHasher, page_digest};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::frame::Open;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, Place, RegionId, common_pages};
use pagewire_protocol::tree::DigestTree;
use pagewire_receiver::{Agreed, GuestSink, OtherPages};
use pagewire_sender::{Base, GuestMemory};
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
    /// Pages that are known not to have changed since an image that a session brought.
    pub unchanged: Option<(Digest, [u8; 16], PageBitmap)>,
}

impl ImageMemory {
    /// The memory of `image`.
    pub fn new(image: Image, faults: SourceFaults) -> Self {
        Self { layout: image.layout(), image, faults, reads: 0, unchanged: None }
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

    fn unchanged_since(&mut self, root: &Digest, session: &[u8; 16]) -> Option<PageBitmap> {
        self.unchanged.take_if(|(of, by, _)| (&*of, &*by) == (root, session)).map(|(.., pages)| pages)
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        if self.faults.unsteady { Err(broken("changed while it was read")) } else { Ok(()) }
    }
}

/// An earlier image that the sending host knows.
#[derive(Clone, Debug)]
pub struct ImageBase {
    /// Its manifest is that of this image.
    pub image: Image,
    /// Its regions.
    pub layout: Layout,
    /// The domain that its digests belong to.
    pub key: [u8; 32],
    /// The session that brought it.
    pub session: [u8; 16],
    /// Its bytes, which may not be what the manifest says.
    pub bytes: Option<Image>,
    /// Its manifest cannot be read when it is needed.
    pub lost: bool,
}

impl ImageBase {
    /// All of `image`.
    pub fn whole(image: &Image, key: [u8; 32]) -> Self {
        Self {
            image: image.clone(),
            layout: image.layout(),
            key,
            session: [7; 16],
            bytes: Some(image.clone()),
            lost: false,
        }
    }
}

impl Base for ImageBase {
    fn root(&self) -> Digest {
        self.image.root(&self.key)
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn session(&self) -> [u8; 16] {
        self.session
    }

    fn trees(&mut self, hasher: &PageHasher) -> io::Result<Vec<DigestTree>> {
        if self.lost { Err(broken("no manifest")) } else { Ok(self.image.trees(hasher)) }
    }

    fn has_pages(&self) -> bool {
        self.bytes.is_some()
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let image = self.bytes.as_ref().ok_or_else(|| broken("no bytes"))?;
        let start = first as usize * PAGE_BYTES;
        bytes.copy_from_slice(&image.bytes[usize::from(region.0)][start..start + bytes.len()]);
        Ok(())
    }
}

/// Another guest of the domain of a key, whose pages the receiver keeps.
#[derive(Clone, Debug)]
pub struct Neighbour {
    /// Its pages.
    pub image: Image,
    /// The domain's key.
    pub key: [u8; 32],
    /// They are not what they were.
    pub rotten: bool,
}

impl OtherPages for Neighbour {
    fn fetch(&mut self, digest: &Digest, page: &mut PageBytes) -> bool {
        let domain = DedupDomain::new(&self.key);
        let whole = |at: &u64| page_digest(&domain, self.image.page(0, *at).first_chunk().unwrap()) == *digest;
        let Some(at) = (0..self.image.regions[0].pages()).find(whole) else { return false };
        page.copy_from_slice(self.image.page(0, at));
        page[5] ^= u8::from(self.rotten);
        true
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
    /// What it is said to hold: a manifest of this image, in the domain of this key.
    pub manifest: Option<(Image, [u8; 32])>,
    /// The base as it was, if it can be read until the end.
    pub old: Option<Image>,
    /// Unchanged pages are not read.
    pub trusted: bool,
    /// A guest may run in it while pages are absent.
    pub waits: bool,
    /// The pages that are absent, from the moment that its guest may run.
    pub absent: Option<PageBitmap>,
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
            manifest: None,
            old: None,
            trusted: false,
            waits: false,
            absent: None,
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

    /// A sink that holds `base`, whatever that is, under a manifest that says `image`.
    pub fn claiming(image: &Image, key: [u8; 32], base: Image, stays: bool) -> Self {
        let sink = Self::holding(base.clone());
        {
            let common = common_pages(&image.layout(), &base.layout()).unwrap_or_default();
            sink.state().base_pages = common;
            let mut state = sink.state();
            state.manifest = Some((image.clone(), key));
            state.old = stays.then_some(base);
        }
        sink
    }

    /// The root that is agreed on, if the sender knows it.
    pub fn agreed(&self, open: &Open) -> Option<Agreed> {
        let state = self.state();
        let (image, key) = state.manifest.as_ref().filter(|(_, key)| *key == open.domain_key)?;
        let root = image.root(key);
        let known = open.known.iter().position(|known| *known == root)?;
        let mut kept = PageBitmap::new(image.pages());
        kept.insert_range(0..image.pages());
        let trees = image.trees(&PageHasher::new(&DedupDomain::new(key)));
        Some(Agreed { known: known as u8, layout: image.layout(), trees, kept, trusted: state.trusted })
    }

    /// The state.
    pub fn state(&self) -> MutexGuard<'_, SinkState> {
        self.0.lock().unwrap()
    }
}

impl SinkState {
    /// From now on it can, or cannot, be made to last.
    pub fn fail_finish(&mut self, fails: bool) {
        self.faults.fail_finish = fails;
    }

    fn bytes(&mut self, region: RegionId, first: u64, len: usize) -> &mut [u8] {
        &mut self.image.bytes[usize::from(region.0)][first as usize * PAGE_BYTES..][..len]
    }

    fn check_read(&mut self) -> io::Result<()> {
        self.reads += 1;
        if fails(self.reads, self.faults.fail_read_after) { Err(broken("cannot read")) } else { Ok(()) }
    }

    /// Pages come to a guest that runs: each of them once, and only where it is absent.
    fn arrive(&mut self, region: RegionId, first: u64, count: u64) {
        let layout = self.image.layout();
        let Some(absent) = self.absent.as_mut() else { return };
        let install = u64::from(layout.region(region).unwrap().install_size.pages());
        let ends_whole =
            (first + count).is_multiple_of(install) || first + count == layout.region(region).unwrap().pages();
        assert!(first.is_multiple_of(install) && ends_whole, "part of an install page is installed");
        let start = u64::from(layout.place(region, first).0);
        let came = absent.remove_range(start..start + count);
        assert_eq!(came, count, "installed over what the guest has: {count} pages from {first} of region {}", region.0);
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

    fn base_stays(&self) -> bool {
        self.state().old.is_some()
    }

    fn base_in_place(&self) -> bool {
        true
    }

    fn read_old(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut state = self.state();
        state.check_read()?;
        let old = state.old.as_ref().ok_or_else(|| broken("the base does not stay"))?;
        bytes.copy_from_slice(&old.bytes[usize::from(region.0)][first as usize * PAGE_BYTES..][..bytes.len()]);
        Ok(())
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut state = self.state();
        state.check_read()?;
        assert!(state.absent.is_none(), "memory of a guest that runs is not as it came");
        bytes.copy_from_slice(state.bytes(region, first, bytes.len()));
        Ok(())
    }

    fn can_wait(&self) -> bool {
        self.state().waits
    }

    fn arm(&mut self, absent: &PageBitmap) -> io::Result<()> {
        let mut state = self.state();
        assert!(state.waits && state.absent.is_none(), "armed once, and only where guests can wait");
        let layout = state.image.layout();
        for place in absent.runs(0..layout.pages()).flatten() {
            // What was there is thrown away, and nobody may take it for what should be there.
            let (region, page) = layout.locate(Place(place as u32));
            let used = state.image.regions[usize::from(region.0)].bytes_of(page.0, 1) as usize;
            state.bytes(region, page.0, used).fill(0xde);
        }
        state.absent = Some(absent.clone());
        Ok(())
    }

    fn install(&mut self, region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        state.check_write()?;
        assert!(!bytes.is_empty() && bytes.len().is_multiple_of(PAGE_BYTES), "whole pages are installed");
        state.arrive(region, first, (bytes.len() / PAGE_BYTES) as u64);
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
        state.arrive(region, first, count);
        state.bytes(region, first, count as usize * PAGE_BYTES).fill(0);
        state.written.1 += count;
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        let mut state = self.state();
        if state.faults.fail_finish {
            return Err(broken("cannot be synced"));
        }
        state.finished = state.absent.as_ref().is_none_or(|absent| absent.count() == 0);
        Ok(())
    }
}
