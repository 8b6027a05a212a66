//! Memory that is read somewhere, with writes that KVM tells of.

use crate::log::DirtyLog;
use crate::raw::Slot;
use crate::ring::DirtyRings;
use kvm_ioctls::VmFd;
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::Digest;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{Layout, RegionId};
use pagewire_sender::memory::DirtyBitmap;
use pagewire_sender::{GuestMemory, Tracking};
use std::io;
use std::ops::Range;
use std::sync::Arc;

#[derive(Debug)]
enum Teller {
    Log(DirtyLog),
    Rings(DirtyRings),
}

/// The memory `M`, a slot of a VM for each of its regions, and what KVM knows of writes to them.
///
/// `M` gives the bytes: [`MappedMemory`](pagewire_sender::memory::MappedMemory) over the VMM's mapping, for instance,
/// whose own tracking is not used then. While tracking is on, logging these slots is this value's business alone.
#[derive(Debug)]
pub struct KvmMemory<M> {
    memory: M,
    vm: Arc<VmFd>,
    slots: Vec<Slot>,
    teller: Teller,
    marks: DirtyBitmap,
    is_tracking: bool,
}

impl<M: GuestMemory> KvmMemory<M> {
    /// Memory whose writes are found in the VM's dirty log; `slots` are those of the regions, in order.
    ///
    /// # Errors
    /// A slot is not as long as its region, the host's pages are not of 4 KiB, or KVM has no such log.
    pub fn logged(memory: M, vm: Arc<VmFd>, slots: Vec<Slot>, log: DirtyLog) -> io::Result<Self> {
        log.choose(&vm)?;
        Self::new(memory, vm, slots, Teller::Log(log))
    }

    /// Memory whose writes are found in the vCPUs' dirty rings; `slots` are those of the regions, in order.
    ///
    /// # Errors
    /// A slot is not as long as its region, or the host's pages are not of 4 KiB.
    pub fn with_rings(memory: M, vm: Arc<VmFd>, slots: Vec<Slot>, rings: DirtyRings) -> io::Result<Self> {
        let memory = Self::new(memory, vm, slots, Teller::Rings(rings.clone()))?;
        rings.mark_in(memory.marks(), memory.places());
        Ok(memory)
    }

    fn new(memory: M, vm: Arc<VmFd>, slots: Vec<Slot>, teller: Teller) -> io::Result<Self> {
        let regions = memory.layout().regions();
        if !slots.iter().map(Slot::bytes).eq(regions.iter().map(|region| region.bytes)) {
            let what = "the slots of the VM are not as long as the regions of the memory, each in its place";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        if rustix::param::page_size() != PAGE_BYTES {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "KVM logs pages of this host's size, not of 4 KiB"));
        }
        let marks = DirtyBitmap::new(memory.layout());
        Ok(Self { memory, vm, slots, teller, marks, is_tracking: false })
    }

    /// A handle to mark pages with that the VMM itself or a device wrote: KVM knows of vCPUs' writes alone.
    pub fn marks(&self) -> DirtyBitmap {
        self.marks.clone()
    }

    /// The places of each slot's pages.
    fn places(&self) -> Vec<(u32, Range<u64>)> {
        let start = |region| u64::from(self.memory.layout().place(RegionId(region), 0).0);
        let places = |(slot, region): (&Slot, u16)| {
            let start = start(region);
            (slot.id(), start..start.saturating_add(slot.pages()))
        };
        self.slots.iter().zip(0..).map(places).collect()
    }

    /// Takes what KVM knows. After an error everything is marked, as some may be lost.
    fn take(&self, dirty: &mut PageBitmap) -> io::Result<()> {
        let taken = match &self.teller {
            Teller::Rings(rings) => rings.collect(),
            Teller::Log(log) => self.slots.iter().zip(self.places()).try_for_each(|(slot, (_, places))| {
                let words = log.take(&self.vm, slot)?;
                for (word, first) in words.iter().zip(places.clone().step_by(64)) {
                    dirty.insert_bits(first, *word);
                }
                Ok(())
            }),
        };
        taken.inspect_err(|_| self.marks.mark_all())
    }

    fn start(&self) -> io::Result<()> {
        self.slots.iter().try_for_each(|slot| match &self.teller {
            Teller::Log(log) => log.start(&self.vm, slot),
            Teller::Rings(_) => slot.set_log(&self.vm, true),
        })
    }

    /// Whether KVM does not log any of the slots any more.
    fn stop(&self) -> bool {
        // Each is tried, whatever became of the others.
        self.slots.iter().filter(|slot| slot.set_log(&self.vm, false).is_err()).count() == 0
    }
}

impl<M: GuestMemory> GuestMemory for KvmMemory<M> {
    fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.memory.read(region, first, bytes)
    }

    fn tracking(&self) -> Tracking {
        Tracking::Dirty
    }

    fn start_tracking(&mut self) -> io::Result<()> {
        if !self.is_tracking {
            self.start().inspect_err(|_| _ = self.stop())?;
            self.is_tracking = true;
        }
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        if !self.is_tracking {
            return Err(io::Error::other("writes are not watched"));
        }
        self.take(dirty)?;
        self.marks.take(dirty);
        Ok(())
    }

    fn put_back(&mut self, dirty: &PageBitmap) {
        self.marks.put_back(dirty);
    }

    fn stop_tracking(&mut self) {
        if !self.is_tracking {
            return;
        }
        let mut dirty = PageBitmap::new(self.layout().pages());
        // An error has marked everything, which is what there is to do about it.
        let _ = self.take(&mut dirty);
        self.marks.put_back(&dirty);
        // Logging that cannot be turned off goes on, and so does this.
        self.is_tracking = !self.stop();
    }

    fn free_pages(&mut self) -> Option<PageBitmap> {
        self.memory.free_pages()
    }

    fn unchanged_since(&mut self, root: &Digest, session: &[u8; 16]) -> Option<PageBitmap> {
        self.memory.unchanged_since(root, session)
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        Ok(())
    }
}
