//! Guest memory that is touched before it has arrived.
//!
//! [`PostcopyMemory`] is shared by everybody who loads pages and by whoever reads the faults; all of its calls take
//! `&self`. It holds to this, whoever calls what and when:
//!
//! - A page is put in once, by one loader, and never over what the guest may have written: the kernel refuses that, and
//!   a page that was there already is a wake, not a failure.
//! - A page that the guest threw away (a balloon) is zero from then on. Messages are read and taken into account while
//!   no loader is between its look at a page's state and the kernel's, so that none puts old bytes in afterwards.
//! - Zeros are put in where the sender said so or the guest threw the page away, and nowhere else: a page that is
//!   missing though it was put in is reported, and who touches it waits.
//!
//! The state is kept for pages of 4 KiB; what is put in is whole install units of the layout, less what of them is
//! there already. Pages of units that have come in part are kept aside.

mod faults;
mod gather;
mod install;
mod places;
mod recall;
mod sink;
mod staging;
mod states;
mod times;

pub use faults::Served;
pub use gather::{Gathered, Odd};
pub use install::Installed;
pub use places::{HandedRegion, TableError};
pub use sink::{Clock, PostcopySink};
pub use times::FaultTimes;

use super::mapping::Mapping;
use super::ram::RamRegion;
use super::uffd::{FaultsOf, Features, Message, Uffd, UffdError, Watch};
use faults::Faults;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{InstallSize, Layout, Region, RegionId};
use pagewire_protocol::time::Time;
use places::Places;
use staging::Staging;
use states::SharedBits;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use thiserror::Error;

/// The type of a tmpfs, of which memory files are, too.
const TMPFS: u64 = 0x0102_1994;
/// A page size of the kernel's, in bytes.
const SMALL: u64 = PAGE_BYTES as u64;
const HUGE: u64 = 2 << 20;

/// What memory of this process is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Memory of this process alone.
    Private,
    /// Memory files, which other processes can map too.
    Shared,
    /// Memory files in huge pages of 2 MiB where a region installs so much at once, and in small ones elsewhere.
    SharedHuge,
}

/// A touch of a page that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The region.
    pub region: RegionId,
    /// The first page of what has to be put in.
    pub first: u64,
    /// Its pages: an install unit, cut to the region.
    pub pages: u32,
    /// The page that was touched.
    pub page: u64,
    /// Whether somebody writes to it.
    pub write: bool,
    /// The thread, if the kernel tells.
    pub thread: Option<u32>,
    /// When the message was read.
    pub since: Time,
}

/// Why memory cannot be served.
#[derive(Debug, Error)]
pub enum PostcopyError {
    /// There is no userfaultfd that is fit for it.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The table of another process's regions.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The caller asked for something that makes no sense.
    #[error("{0}")]
    Misuse(&'static str),
    /// The process changes its address space all the time; what was not put in yet can be tried again.
    #[error("the guest's memory is being changed all the time")]
    Busy,
    /// The process whose memory it was is gone.
    #[error("the process that runs the guest is gone")]
    ProcessGone,
    /// The system has no memory for a page; it can be tried again.
    #[error("the system has no memory for another page")]
    NoMemory,
    /// A call failed.
    #[error("{what}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        error: io::Error,
    },
}

impl From<PostcopyError> for io::Error {
    fn from(error: PostcopyError) -> Self {
        let kind = match &error {
            PostcopyError::Misuse(_) | PostcopyError::Table(_) => io::ErrorKind::InvalidInput,
            PostcopyError::Busy => io::ErrorKind::WouldBlock,
            PostcopyError::NoMemory => io::ErrorKind::OutOfMemory,
            PostcopyError::Uffd(_) => io::ErrorKind::Unsupported,
            PostcopyError::ProcessGone | PostcopyError::Call { .. } => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> PostcopyError {
    move |error| PostcopyError::Call { what, error }
}

/// Memory of this process.
#[derive(Debug)]
struct Own {
    /// Written to before it is armed only: whoever reads may be waiting for a page, with the lock held.
    mappings: RwLock<Vec<Mapping>>,
    files: Vec<Option<File>>,
}

/// A guest's memory, of this process or of another, that can be put in page by page while the guest runs.
///
/// Memory of this process begins as plain memory, which pre-copy writes to as often as it likes; it is
/// [armed](Self::arm) before the guest runs. Memory of another process is armed when it comes.
///
/// Dropping it with pages missing leaves memory of this process unmapped; threads that waited in it get a signal. The
/// memory of another process reads as zeros where pages are missing, once no
/// [duplicate](Self::duplicate) of the descriptor is left.
#[derive(Debug)]
pub struct PostcopyMemory {
    layout: Layout,
    // Dropped before the descriptor: while it is open, nobody sees a zero.
    own: Option<Own>,
    uffd: OnceLock<Uffd>,
    /// Bytes of the kernel's pages, by region.
    page_bytes: Vec<u64>,
    places: RwLock<Places>,
    /// Pages that are there, were thrown away, or cannot be put in any more: nobody has to bring them.
    present: SharedBits,
    present_count: AtomicU64,
    /// Of these, the pages that the guest threw away.
    removed: SharedBits,
    /// First pages of units that a loader is just putting in.
    claimed: SharedBits,
    /// Units that have come in part.
    staging: Mutex<Staging>,
    /// Held to write while messages are read and taken into account, to read while pages are put in.
    gate: RwLock<()>,
    faults: Mutex<Faults>,
    reader: Mutex<Vec<Message>>,
    news: Mutex<Gathered>,
    /// How often somebody was woken for a page that is there.
    woken: Mutex<BTreeMap<u64, u32>>,
}

impl PostcopyMemory {
    /// Zeros of this process: plain memory until it is [armed](Self::arm). Children of this process do not get it.
    ///
    /// # Errors
    /// The system has not so much memory, or not so many huge pages.
    pub fn new(layout: Layout, backing: Backing) -> io::Result<Self> {
        let (mut mappings, mut files, mut page_bytes) = (Vec::new(), Vec::new(), Vec::new());
        for region in layout.regions() {
            let bytes = usize::try_from(region.bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
            let huge = backing == Backing::SharedHuge && region.install_size == InstallSize::MIB_2;
            let (mapping, file) = if backing == Backing::Private {
                (Mapping::new(bytes)?, None)
            } else {
                let (mapping, file) = Mapping::shared(bytes, huge)?;
                (mapping, Some(file))
            };
            mappings.push(mapping);
            files.push(file);
            page_bytes.push(if huge { HUGE } else { SMALL });
        }
        Self::of_own(layout, mappings, files, page_bytes)
    }

    /// As [`new`](Self::new), in a file of shared memory that is as long as the image, all regions in a row, and zeros: on
    /// a tmpfs, or one that has no name. Whoever cuts it makes the touch of a page a signal.
    ///
    /// # Errors
    /// It is on another file system, whose pages nobody can be made to wait for; or a region does not begin at a page.
    pub fn in_file(layout: Layout, file: &File) -> io::Result<Self> {
        let kind = rustix::fs::fstatfs(file)?.f_type;
        if u64::try_from(kind).ok() != Some(TMPFS) {
            let why = format!(
                "a file on a file system of type {kind:#x} cannot be served by userfaultfd, which knows private memory, \
                 files of shared memory and hugetlbfs: put it on a tmpfs, as /dev/shm is"
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let (mut mappings, mut files, mut start) = (Vec::new(), Vec::new(), 0u64);
        for region in layout.regions() {
            if !start.is_multiple_of(SMALL) {
                let why = "a region of the image that does not begin at a page of its file cannot be mapped";
                return Err(io::Error::new(io::ErrorKind::Unsupported, why));
            }
            mappings.push(Mapping::of_file(file, start, size(region.bytes))?);
            files.push(Some(file.try_clone()?));
            start = start.saturating_add(region.bytes);
        }
        let page_bytes = vec![SMALL; mappings.len()];
        Self::of_own(layout, mappings, files, page_bytes)
    }

    fn of_own(
        layout: Layout,
        mappings: Vec<Mapping>,
        files: Vec<Option<File>>,
        page_bytes: Vec<u64>,
    ) -> io::Result<Self> {
        mappings.iter().try_for_each(Mapping::keep_from_children)?;
        let place = |(mapping, region): (&Mapping, &Region)| {
            // A region without bytes has an address all the same.
            let bytes = if region.bytes == 0 { 0 } else { mapping.bytes() as u64 };
            (mapping.start().addr().get() as u64, bytes)
        };
        let places = Places::of_own(mappings.iter().zip(layout.regions()).map(place));
        let own = Own { mappings: RwLock::new(mappings), files };
        Ok(Self::with(layout, places, page_bytes, Some(own), OnceLock::new()))
    }

    /// Memory of a process that registered it for missing pages and handed over the descriptor, and this table of it.
    /// It is a region of the layout for each entry. Nothing is known to be there; see [`recall`](Self::recall).
    ///
    /// # Errors
    /// The descriptor is no userfaultfd, or the table is one of no possible process.
    pub fn handed_over(uffd: OwnedFd, table: &[HandedRegion]) -> Result<Self, PostcopyError> {
        let (layout, places) = Places::judge(table)?;
        let page_bytes = table.iter().map(|region| region.page_bytes).collect();
        let uffd = OnceLock::from(Uffd::handed_over(uffd)?);
        Ok(Self::with(layout, places, page_bytes, None, uffd))
    }

    fn with(layout: Layout, places: Places, page_bytes: Vec<u64>, own: Option<Own>, uffd: OnceLock<Uffd>) -> Self {
        let pages = layout.pages();
        Self {
            layout,
            own,
            uffd,
            page_bytes,
            places: RwLock::new(places),
            present: SharedBits::new(pages),
            present_count: AtomicU64::new(0),
            removed: SharedBits::new(pages),
            claimed: SharedBits::new(pages),
            staging: Mutex::default(),
            gate: RwLock::new(()),
            faults: Mutex::default(),
            reader: Mutex::default(),
            news: Mutex::default(),
            woken: Mutex::default(),
        }
    }

    /// From now on the pages that are `absent`, by their places in the image, are missing and can be put in; all others
    /// stay as they are. Nobody may touch the memory meanwhile. Gives the pages that are absent: all of a huge page if one
    /// of it is.
    ///
    /// A thread of this process that throws memory away (`MADV_DONTNEED`) waits from now on until somebody
    /// [gathers](Self::gather).
    ///
    /// # Errors
    /// There is no userfaultfd to be had, or it lacks a feature; or it is armed already, or of another process.
    pub fn arm(&self, absent: &PageBitmap, of: FaultsOf) -> Result<PageBitmap, PostcopyError> {
        let own = self.own.as_ref().ok_or(PostcopyError::Misuse("memory of another process is armed already"))?;
        if self.uffd.get().is_some() || absent.len() != self.layout.pages() {
            return Err(PostcopyError::Misuse("memory is armed once, with a bitmap of its own size"));
        }
        let available = Uffd::available(of)?;
        let wish = Features::THREAD_ID | Features::POISON;
        let uffd = Uffd::open(of, self.needs() | available.common(wish))?;
        let absent = self.whole_kernel_pages(absent);
        let mappings = own.mappings.read().unwrap_or_else(PoisonError::into_inner);
        for ((region, mapping), file) in (0..).map(RegionId).zip(mappings.iter()).zip(&own.files) {
            let page_bytes = self.page_bytes(region);
            for run in absent.runs(self.all_places(region)) {
                let (_, first) = self.layout.locate(place_of(run.start));
                let start = first.0.saturating_mul(SMALL);
                let end = start.saturating_add(run.end.saturating_sub(run.start).saturating_mul(SMALL));
                let bytes = size(end.next_multiple_of(page_bytes).saturating_sub(start));
                mapping.discard(size(start), bytes, file.is_some()).map_err(failed("pages cannot be made absent"))?;
            }
            let watched = uffd.register_mapping(mapping, 0..usize::MAX, Watch::MISSING);
            watched.map_err(failed("the guest's memory cannot be watched"))?;
        }
        for run in absent.gaps(0..self.layout.pages()) {
            self.settle(run);
        }
        self.uffd.set(uffd).map_err(|_| PostcopyError::Misuse("memory is armed once"))?;
        Ok(absent)
    }

    /// What userfaultfd must be able to do to serve memory like this.
    fn needs(&self) -> Features {
        let shared = self.own.iter().flat_map(|own| &own.files).any(Option::is_some);
        let mut needs = Features::EVENT_REMOVE;
        if shared && self.page_bytes.contains(&SMALL) {
            needs = needs | Features::MISSING_SHMEM;
        }
        if self.page_bytes.contains(&HUGE) {
            needs = needs | Features::MISSING_HUGETLBFS;
        }
        needs
    }

    /// The set, and with each page the others of its page in the kernel.
    fn whole_kernel_pages(&self, absent: &PageBitmap) -> PageBitmap {
        let mut whole = absent.clone();
        for region in (0..).map(RegionId).take(self.page_bytes.len()) {
            let (pages, all) = (self.page_bytes(region) / SMALL, self.all_places(region));
            for run in absent.runs(all.clone()) {
                let start = run.start.saturating_sub(run.start.saturating_sub(all.start) % pages);
                let end = run.end.saturating_sub(all.start).next_multiple_of(pages).saturating_add(all.start);
                whole.insert_range(start..end.min(all.end));
            }
        }
        whole
    }

    /// Everything is there: the guest's memory is watched no more.
    ///
    /// # Errors
    /// Pages are absent.
    pub fn finish(&self) -> Result<(), PostcopyError> {
        if self.absent_pages() > 0 {
            return Err(PostcopyError::Misuse("pages are absent"));
        }
        let uffd = self.uffd()?;
        for piece in self.places().all() {
            let addresses = piece.address..piece.address.saturating_add(piece.bytes);
            uffd.unregister(addresses).map_err(failed("the guest's memory stays watched"))?;
        }
        Ok(())
    }

    /// The regions as the sender has them.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The regions in this process, in order; none of memory of another process.
    pub fn regions(&self) -> Vec<RamRegion> {
        let Some(own) = &self.own else { return Vec::new() };
        let mappings = own.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let region = |(mapping, region): (&Mapping, &Region)| RamRegion { start: mapping.start(), bytes: region.bytes };
        mappings.iter().zip(self.layout.regions()).map(region).collect()
    }

    /// The memory file of a region, if it has one.
    pub fn file(&self, region: RegionId) -> Option<&File> {
        self.own.as_ref()?.files.get(usize::from(region.0))?.as_ref()
    }

    /// The table that another handler needs with a [duplicate](Self::duplicate) of the descriptor.
    pub fn table(&self) -> Vec<HandedRegion> {
        let piece = |piece: places::Piece| HandedRegion {
            address: piece.address,
            bytes: piece.bytes,
            page_bytes: self.page_bytes(piece.region),
        };
        let mut pieces: Vec<places::Piece> = self.places().all().collect();
        pieces.sort_by_key(|piece| (piece.region, piece.offset));
        pieces.into_iter().map(piece).collect()
    }

    /// Whether missing pages are served: before, this is plain memory.
    pub fn is_armed(&self) -> bool {
        self.uffd.get().is_some()
    }

    /// Another descriptor of the same, for who watches over this handler: while it is open, faults wait for the next
    /// handler, and nobody sees a zero.
    ///
    /// # Errors
    /// It is not armed, or there are too many descriptors.
    pub fn duplicate(&self) -> Result<OwnedFd, PostcopyError> {
        self.uffd()?.duplicate().map_err(failed("the descriptor cannot be duplicated"))
    }

    /// Whether nobody has to bring a page: it is there, or was thrown away or unmapped.
    pub fn is_present(&self, region: RegionId, page: u64) -> bool {
        self.page_place(region, page).is_some_and(|place| self.present.contains(place))
    }

    /// All pages that nobody has to bring, by their places.
    pub fn present(&self) -> PageBitmap {
        self.present.bitmap(self.layout.pages())
    }

    /// All pages that the guest threw away, by their places: they are zero, or what the guest wrote since.
    pub fn removed(&self) -> PageBitmap {
        self.removed.bitmap(self.layout.pages())
    }

    /// How many pages somebody has to bring.
    pub fn absent_pages(&self) -> u64 {
        self.layout.pages().saturating_sub(self.present_count.load(Ordering::Acquire))
    }

    /// The next fault that nobody has been given, in the order of arrival; one for all threads that wait for it.
    pub fn next_fault(&self) -> Option<Fault> {
        lock(&self.faults).next()
    }

    /// Gives all faults that wait once more, the oldest first: whoever was asked for their pages is gone.
    pub fn renew_faults(&self) {
        lock(&self.faults).renew();
    }

    /// How many units are waited for.
    pub fn waiting(&self) -> usize {
        lock(&self.faults).count()
    }

    /// Since when the longest of them has been waited for.
    pub fn waiting_since(&self) -> Option<Time> {
        lock(&self.faults).oldest()
    }

    /// Copies bytes of this process's memory out; waits for pages that are not there, so the handler must not ask for
    /// any.
    ///
    /// # Errors
    /// They are not all inside the region.
    pub fn read(&self, region: RegionId, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let own = self.own.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let mappings = own.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let mapping = mappings.get(usize::from(region.0)).ok_or(io::ErrorKind::InvalidInput)?;
        mapping.read(usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?, bytes)
    }

    /// Writes a word to this process's memory, as a device model does; waits for its page as [`read`](Self::read) does.
    /// `offset` is a multiple of eight.
    ///
    /// # Errors
    /// It is not inside the region, or not the beginning of a word.
    pub fn store(&self, region: RegionId, offset: u64, word: u64) -> io::Result<()> {
        let own = self.own.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let mappings = own.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let mapping = mappings.get(usize::from(region.0)).ok_or(io::ErrorKind::InvalidInput)?;
        mapping.store(usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?, word)
    }

    /// Throws pages of this process's memory away, as a balloon does: they are zeros when they are touched next. Waits
    /// until somebody [gathers](Self::gather), if the memory is armed.
    ///
    /// # Errors
    /// They are not inside the region, or not whole pages of the kernel; or it is the memory of another process.
    pub fn discard(&self, region: RegionId, first: u64, count: u64) -> io::Result<()> {
        let own = self.own.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let mappings = own.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let mapping = mappings.get(usize::from(region.0)).ok_or(io::ErrorKind::InvalidInput)?;
        let bytes = |pages: u64| size(pages.saturating_mul(SMALL));
        mapping.discard(bytes(first), bytes(count), self.file(region).is_some())
    }

    fn uffd(&self) -> Result<&Uffd, PostcopyError> {
        self.uffd.get().ok_or(PostcopyError::Misuse("the memory is not armed"))
    }

    fn places(&self) -> RwLockReadGuard<'_, Places> {
        self.places.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn page_bytes(&self, region: RegionId) -> u64 {
        self.page_bytes.get(usize::from(region.0)).copied().unwrap_or(SMALL)
    }

    /// Nobody has to bring these any more.
    fn settle(&self, places: Range<u64>) -> u64 {
        let added = self.present.insert_range(places);
        self.present_count.fetch_add(added, Ordering::AcqRel);
        added
    }

    fn all_places(&self, region: RegionId) -> Range<u64> {
        let pages = self.layout.region(region).map_or(0, Region::pages);
        self.places_of(region, 0..pages)
    }

    /// The places of pages that are inside the region.
    fn places_of(&self, region: RegionId, pages: Range<u64>) -> Range<u64> {
        let start = u64::from(self.layout.place(region, 0).0);
        start.saturating_add(pages.start)..start.saturating_add(pages.end)
    }

    fn page_place(&self, region: RegionId, page: u64) -> Option<u64> {
        let inside = self.layout.region(region).is_some_and(|region| page < region.pages());
        inside.then(|| self.places_of(region, page..page).start)
    }
}

/// Readable when there is something to [gather](PostcopyMemory::gather).
///
/// # Panics
/// Where the memory is not armed: there is no descriptor before.
impl AsFd for PostcopyMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        #[expect(clippy::expect_used, reason = "a misuse that cannot be told otherwise, and is documented")]
        self.uffd.get().expect("the memory is armed").as_fd()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn place_of(place: u64) -> pagewire_protocol::page::Place {
    pagewire_protocol::page::Place(u32::try_from(place).unwrap_or(u32::MAX))
}
