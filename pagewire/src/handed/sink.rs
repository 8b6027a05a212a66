//! Memory that a hypervisor hands over, as the place where received pages go: once it has come, and each page once.

use super::message::Part;
use super::{Handed, Handing};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::RegionId;
use pagewire_protocol::time::Time;
use pagewire_receiver::GuestSink;
use pagewire_receiver::memory::{Beside, FaultTimes, Installed, PostcopyError, PostcopyMemory};
use rustix::io::Errno;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a session that brings pages waits for the memory to come: less than its sender waits for an answer.
const COME_SPAN_MAX: Duration = Duration::from_secs(5);
/// Descriptors of children of the hypervisor that are kept, so that they wait and see no zeros.
const CHILDREN_MAX: usize = 64;

/// Memory of a hypervisor. Nothing is stored before it has come.
#[derive(Debug)]
pub(crate) struct HandedSink {
    handing: Arc<Handing>,
    handed: Option<Handed>,
    armed: bool,
    began: Instant,
    times: FaultTimes,
    children: Vec<OwnedFd>,
    base: Option<Beside>,
}

impl HandedSink {
    /// `base` is what is kept of the guest, and is read from until all has come.
    pub(crate) fn new(handing: Arc<Handing>, base: Option<Beside>) -> Self {
        let (handed, armed, times, children) = Default::default();
        Self { handing, handed, armed, began: Instant::now(), times, children, base }
    }

    fn now(&self) -> Time {
        Time::from_nanos(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// The memory, for pages that have come.
    fn memory(&mut self) -> io::Result<Handed> {
        if !self.armed {
            let why =
                "this memory comes with the hypervisor, and holds nothing before: send the guest with --post-copy now";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        if self.handed.is_none() {
            self.handed = self.handing.within(COME_SPAN_MAX);
        }
        self.handed.clone().ok_or_else(|| {
            let why = format!("no hypervisor has handed its memory over at {} yet", self.handing.path.display());
            io::Error::new(io::ErrorKind::WouldBlock, why)
        })
    }

    /// Does `put` for each part of pages of the image that is in one region.
    fn put(
        &mut self,
        pages: Range<u64>,
        put: impl Fn(&PostcopyMemory, RegionId, Range<u64>, Range<u64>, Time) -> io::Result<Installed>,
    ) -> io::Result<()> {
        let Handed { memory, parts } = self.memory()?;
        for part in parts.iter() {
            let (start, end) = (pages.start.max(part.first), pages.end.min(part.first.saturating_add(part.pages)));
            if start < end {
                let inside = start.saturating_sub(part.first)..end.saturating_sub(part.first);
                let of_pages = start.saturating_sub(pages.start)..end.saturating_sub(pages.start);
                let installed = put(&memory, part.region, inside, of_pages, self.now())?;
                self.times.add_served(&installed.served);
            }
        }
        Ok(())
    }
}

/// Where the pages of a region are in the image.
fn in_image(parts: &[Part], region: RegionId, page: u64) -> Option<u64> {
    let part = parts.iter().find(|part| part.region == region)?;
    Some(part.first.saturating_add(page))
}

impl GuestSink for HandedSink {
    fn base_pages(&self, region: RegionId) -> u64 {
        self.base.as_ref().map_or(0, |base| base.pages(region))
    }

    fn starts_zero(&self) -> bool {
        false
    }

    /// It becomes part of no image: one of which anything stays before the guest starts is refused in the end.
    fn read_base(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.base.as_ref().ok_or(io::ErrorKind::Unsupported)?.read_or_zero(region, first, bytes);
        Ok(())
    }

    fn base_stays(&self) -> bool {
        self.base.is_some()
    }

    fn read_old(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.base.as_ref().ok_or(io::ErrorKind::Unsupported)?.read(region, first, bytes)
    }

    fn read(&mut self, _region: RegionId, _first: u64, _bytes: &mut [u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a hypervisor's memory is its own to read"))
    }

    fn install(&mut self, _region: RegionId, first: u64, bytes: &[u8]) -> io::Result<()> {
        let pages = first..first.saturating_add((bytes.len() / PAGE_BYTES) as u64);
        self.put(pages, |memory, region, inside, of_pages, now| {
            let at = |page: u64| usize::try_from(page).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES);
            let bytes = bytes.get(at(of_pages.start)..at(of_pages.end)).unwrap_or_default();
            Ok(memory.install_pages(region, inside.start, bytes, now)?)
        })
    }

    fn zero(&mut self, _region: RegionId, first: u64, count: u64) -> io::Result<()> {
        self.put(first..first.saturating_add(count), |memory, region, inside, _, now| {
            Ok(memory.zero_pages(region, inside.start, inside.end.saturating_sub(inside.start), now)?)
        })
    }

    fn can_wait(&self) -> bool {
        true
    }

    fn arm(&mut self, absent: &PageBitmap) -> io::Result<()> {
        self.armed = absent.count() == absent.len();
        if self.armed { Ok(()) } else { self.memory().map(drop) }
    }

    fn touches(&self) -> Option<BorrowedFd<'_>> {
        self.armed.then(|| self.handing.as_fd())
    }

    fn gather(&mut self, touched: &mut Vec<(RegionId, u64)>) -> io::Result<()> {
        if self.handed.is_none() {
            self.handed = self.handing.now();
        }
        let Some(Handed { memory, parts }) = self.handed.clone() else { return Ok(()) };
        let mut more = true;
        while more {
            let gathered = memory.gather(self.now())?;
            self.times.add_served(&gathered.served);
            let room = CHILDREN_MAX.saturating_sub(self.children.len());
            self.children.extend(gathered.children.into_iter().take(room));
            more = gathered.more;
        }
        while let Some(fault) = memory.next_fault() {
            // All of a huge page is needed, whatever the image's install size is; the page that was touched first.
            let others = fault.first..fault.first.saturating_add(u64::from(fault.pages));
            let pages = std::iter::once(fault.page).chain(others.filter(|page| *page != fault.page));
            let places = pages.filter_map(|page| in_image(&parts, fault.region, page));
            touched.extend(places.map(|page| (RegionId(0), page)));
        }
        Ok(())
    }

    fn renew_touches(&mut self) {
        if let Some(Handed { memory, .. }) = &self.handed {
            memory.renew_faults();
        }
    }

    fn fault_times(&self) -> Option<FaultTimes> {
        Some(self.times.clone())
    }

    fn finish(&mut self) -> io::Result<()> {
        if !self.armed {
            // All of it is what the base has, and nothing of that is in the hypervisor.
            return self.memory().map(drop);
        }
        match &self.handed {
            Some(Handed { memory, .. }) if memory.absent_pages() == 0 => match memory.finish() {
                // It had all of its pages, and has ended since: nothing of it is watched.
                Err(PostcopyError::Call { error, .. }) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {
                    Ok(())
                }
                finished => Ok(finished?),
            },
            _ => Ok(()),
        }
    }
}
