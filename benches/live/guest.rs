//! A guest as the figures need one: memory of this process or a file, and a thread that writes to it at a rate.
//!
//! Its pages are noise, so that nothing is compressed away. A write changes one byte of a page and then marks it.

use pagewire::{
    BitmapMemory, Blobs, DirtyBitmap, GuestHooks, GuestStarter, ImageName, InstallSize, MappedMemory, MappedRegion,
    Mapping, Started,
};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub(crate) const PAGE: usize = 4096;
/// How long a guest sleeps between its writes.
const NAP: Duration = Duration::from_millis(1);

/// A generator of numbers that only have to differ.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.word() % end.max(1)
    }
}

/// Where a guest's pages are.
#[derive(Clone)]
pub(crate) enum Pages {
    /// Private memory of this process, and its marks.
    Mapped(Arc<Mapping>, DirtyBitmap),
    /// A file; nobody is told of writes.
    File(Arc<File>),
}

/// How much a guest has, and of it in use: in each `stride` MiB the first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) bytes: u64,
    pub(crate) stride: u64,
}

impl Shape {
    /// All of it in use.
    pub(crate) fn full(bytes: u64) -> Self {
        Self { bytes, stride: 1 }
    }

    /// Pages in use.
    pub(crate) fn used(self) -> u64 {
        self.bytes / PAGE as u64 / self.stride
    }

    /// The page of the image that is the `at`-th in use.
    pub(crate) fn page(self, at: u64) -> u64 {
        at / 256 * 256 * self.stride + at % 256
    }
}

/// Where a guest writes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pattern {
    Uniform,
    /// Nine writes of ten into a twentieth of its pages.
    HotSet,
}

/// What a guest and its writer share.
struct Shared {
    pages: Pages,
    shape: Shape,
    /// Pages a second.
    rate: AtomicU64,
    stop: AtomicBool,
    stands: AtomicBool,
    ends: AtomicBool,
}

/// A guest; when it is dropped its writer ends.
pub(crate) struct Guest {
    shared: Arc<Shared>,
    memory: Option<(Arc<Mapping>, DirtyBitmap)>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Guest {
    /// A guest in private memory of this process.
    pub(crate) fn mapped(shape: Shape, pattern: Pattern) -> io::Result<Self> {
        let mapping = Arc::new(Mapping::private(usize::try_from(shape.bytes).unwrap_or(usize::MAX))?);
        let memory = memory(&mapping, None)?;
        let dirty = memory.dirty();
        let pages = Pages::Mapped(mapping.clone(), dirty.clone());
        Self::start(pages, shape, pattern, Some((mapping, dirty)))
    }

    /// A guest in a new file.
    pub(crate) fn in_file(path: &Path, shape: Shape, pattern: Pattern) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(shape.bytes)?;
        Self::start(Pages::File(Arc::new(file)), shape, pattern, None)
    }

    fn start(
        pages: Pages,
        shape: Shape,
        pattern: Pattern,
        memory: Option<(Arc<Mapping>, DirtyBitmap)>,
    ) -> io::Result<Self> {
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
        (0..shape.used()).try_for_each(|at| fill(&pages, shape.page(at), &mut noise))?;
        let flag = || AtomicBool::new(false);
        let shared = Shared { pages, shape, rate: AtomicU64::new(0), stop: flag(), stands: flag(), ends: flag() };
        let shared = Arc::new(shared);
        let writer = shared.clone();
        let thread = Some(std::thread::spawn(move || writer.run(pattern)));
        Ok(Self { shared, memory, thread })
    }

    /// Its memory for one more session.
    pub(crate) fn memory(&self) -> io::Result<BitmapMemory<MappedMemory>> {
        let (mapping, dirty) = self.memory.as_ref().ok_or_else(|| io::Error::other("it is in a file"))?;
        memory(mapping, Some(dirty))
    }

    /// Lets it write so many pages a second.
    pub(crate) fn run_at(&self, rate: u64) {
        self.shared.rate.store(rate, Ordering::Relaxed);
        self.shared.stop.store(false, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        self.thread.iter().for_each(|thread| thread.thread().unpark());
    }

    /// What stops it, and notes when.
    pub(crate) fn hooks(&self, clock: &Arc<Clock>) -> Option<Box<dyn GuestHooks>> {
        let thread = self.thread.as_ref()?.thread().clone();
        Some(Box::new(Hooks { shared: self.shared.clone(), thread, clock: clock.clone() }))
    }

    /// Whether the file at `path` is what its memory is, in all pages in use.
    pub(crate) fn is_at(&self, path: &Path) -> io::Result<bool> {
        let (file, shape) = (File::open(path)?, self.shared.shape);
        let (mut ours, mut theirs) = (vec![0; 256 * PAGE], vec![0; 256 * PAGE]);
        for at in (0..shape.used()).step_by(256) {
            let offset = shape.page(at) * PAGE as u64;
            file.read_exact_at(&mut theirs, offset)?;
            match &self.shared.pages {
                Pages::File(file) => file.read_exact_at(&mut ours, offset)?,
                Pages::Mapped(mapping, _) => {
                    for (byte, at) in ours.iter_mut().zip(usize::try_from(offset).unwrap_or(usize::MAX)..) {
                        *byte = mapping.byte(at).map_or(0, |byte| byte.load(Ordering::Relaxed));
                    }
                }
            }
            if ours != theirs {
                return Ok(false);
            }
        }
        Ok(file.metadata()?.len() == shape.bytes)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        self.wake();
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

fn memory(mapping: &Arc<Mapping>, dirty: Option<&DirtyBitmap>) -> io::Result<BitmapMemory<MappedMemory>> {
    let memory = MappedMemory::new(vec![MappedRegion::of(mapping.clone(), InstallSize::KIB_4)])?;
    Ok(match dirty {
        Some(dirty) => BitmapMemory::over(memory, dirty.clone())?,
        None => BitmapMemory::new(memory),
    })
}

fn fill(pages: &Pages, page: u64, noise: &mut Noise) -> io::Result<()> {
    let start = page * PAGE as u64;
    match pages {
        Pages::File(file) => {
            let bytes: Vec<u8> = (0..PAGE / 8).flat_map(|_| noise.word().to_le_bytes()).collect();
            file.write_all_at(&bytes, start)
        }
        Pages::Mapped(mapping, _) => {
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            for at in (start..start + PAGE).step_by(8) {
                for (at, value) in (at..).zip(noise.word().to_le_bytes()) {
                    mapping.byte(at).into_iter().for_each(|byte| byte.store(value, Ordering::Relaxed));
                }
            }
            Ok(())
        }
    }
}

impl Shared {
    /// The writer: what is due each millisecond, and nothing while it has to stand still.
    fn run(&self, pattern: Pattern) {
        let (mut noise, mut last, mut due) = (Noise(77), Instant::now(), 0.0);
        while !self.ends.load(Ordering::Relaxed) {
            if self.stop.load(Ordering::Acquire) {
                self.stands.store(true, Ordering::Release);
                std::thread::park_timeout(NAP);
                (last, due) = (Instant::now(), 0.0);
                continue;
            }
            self.stands.store(false, Ordering::Release);
            let now = Instant::now();
            due += now.duration_since(last).as_secs_f64() * self.rate.load(Ordering::Relaxed) as f64;
            last = now;
            while due >= 1.0 && !self.stop.load(Ordering::Relaxed) {
                due -= 1.0;
                self.write(pattern, &mut noise);
            }
            std::thread::park_timeout(NAP);
        }
    }

    fn write(&self, pattern: Pattern, noise: &mut Noise) {
        let used = self.shape.used();
        let at = match pattern {
            Pattern::HotSet if noise.below(10) > 0 => noise.below(used / 20),
            Pattern::Uniform | Pattern::HotSet => noise.below(used),
        };
        let (page, word) = (self.shape.page(at), noise.below(PAGE as u64));
        let offset = page * PAGE as u64 + word;
        match &self.pages {
            Pages::Mapped(mapping, dirty) => {
                let byte = mapping.byte(usize::try_from(offset).unwrap_or(usize::MAX));
                byte.into_iter().for_each(|byte| {
                    byte.fetch_add(1, Ordering::Relaxed);
                });
                dirty.mark(page..page + 1);
            }
            Pages::File(file) => {
                let mut byte = [0];
                let done = file.read_exact_at(&mut byte, offset).and_then(|()| {
                    byte[0] = byte[0].wrapping_add(1);
                    file.write_all_at(&byte, offset)
                });
                done.unwrap_or_else(|_| self.ends.store(true, Ordering::Relaxed));
            }
        }
    }
}

/// When what happened to a guest.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    pub(crate) paused: Moment,
    pub(crate) stands: Moment,
    pub(crate) resumed: Moment,
    pub(crate) prepared: Moment,
    pub(crate) started: Moment,
}

/// When something happened, if it has, and how much processor time this process had taken until then.
#[derive(Debug, Default)]
pub(crate) struct Moment(Mutex<Option<(Instant, Duration)>>);

impl Moment {
    fn note(&self) {
        let busy = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let busy = Duration::try_from(busy).unwrap_or_default();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| (Instant::now(), busy));
    }

    pub(crate) fn at(&self) -> Option<Instant> {
        self.noted().map(|(at, _)| at)
    }

    /// Processor time of this process until then.
    pub(crate) fn busy(&self) -> Duration {
        self.noted().map_or(Duration::ZERO, |(_, busy)| busy)
    }

    fn noted(&self) -> Option<(Instant, Duration)> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Hooks {
    shared: Arc<Shared>,
    thread: std::thread::Thread,
    clock: Arc<Clock>,
}

impl GuestHooks for Hooks {
    fn pause(&mut self) -> Result<Blobs, String> {
        self.clock.paused.note();
        self.shared.stands.store(false, Ordering::Release);
        self.shared.stop.store(true, Ordering::Release);
        while !self.shared.stands.load(Ordering::Acquire) {
            self.thread.unpark();
            std::thread::yield_now();
        }
        self.clock.stands.note();
        Ok(Blobs::new())
    }

    fn resume(&mut self) -> Result<(), String> {
        self.clock.resumed.note();
        self.shared.stop.store(false, Ordering::Release);
        self.thread.unpark();
        Ok(())
    }
}

/// Notes when a guest is started at its new host.
#[derive(Debug)]
pub(crate) struct Starter(pub(crate) Arc<Clock>);

impl GuestStarter for Starter {
    fn prepare(&self, _name: &ImageName, _blobs: &Blobs) -> Result<(), String> {
        self.0.prepared.note();
        Ok(())
    }

    fn start(&self, _started: &Started<'_>) -> Result<(), String> {
        self.0.started.note();
        Ok(())
    }
}
