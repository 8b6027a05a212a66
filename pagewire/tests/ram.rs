//! Guests that arrive in memory of this process: what they share with the visit they left, and what they cost.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]
#![allow(clippy::cast_possible_truncation, reason = "tests choose their numbers")]

mod support;

use pagewire::store::{Keep, KeepImage, Lineage, Removed, VisitHead};
use pagewire::{
    Address, GuestMemory, GuestRam, InstallSize, Into, KeepWhat, Layout, PageBitmap, Region, RegionId, Report, Reuse,
    ServerEvent,
};
use pagewire_protocol::digest::PageHasher;
use pagewire_protocol::domain::DedupDomain;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use support::{Host, PAGE, noise};

const PAGES: u64 = 4096;

/// Receives one guest into memory while `send` runs.
fn arrives(host: &Host, reuse: Reuse, send: impl FnOnce(&Address)) -> (GuestRam, Report) {
    let (arrived, guests) = channel();
    let (to, report) = host.serve(Into::Memory, reuse, move |event| {
        if let ServerEvent::Arrived { memory, .. } = event {
            arrived.send(memory).unwrap();
        }
    });
    send(&to);
    let report = report.recv().unwrap();
    assert_eq!((report.outcome, report.warnings.len()), ("done", 0), "{report:?}");
    (guests.try_recv().unwrap(), report)
}

/// A guest comes back to a host that kept it.
fn returns(from: &Host, to: &Host, reuse: Reuse) -> (GuestRam, Report) {
    arrives(to, reuse, |to| {
        from.send_file(to, KeepWhat::Nothing).into_result().unwrap();
    })
}

fn bytes(ram: &GuestRam, region: u16) -> Vec<u8> {
    let mut bytes = vec![1; ram.layout().regions()[usize::from(region)].bytes as usize];
    ram.read(RegionId(region), 0, &mut bytes).unwrap();
    bytes
}

/// Pages of a guest's memory that are mapped over a visit, and those of them that are this process's own by now: the
/// kernel's word.
fn mapped(ram: &GuestRam) -> (u64, u64) {
    let regions: Vec<_> = ram.regions().map(|region| (region.start.addr().get() as u64, region.bytes)).collect();
    let (mut inside, mut sums) = (false, (0, 0));
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap(), words.next().unwrap_or_default());
        let kib = |text: &str| text.parse::<u64>().unwrap() / 4;
        if let Some((start, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            let at = |text| u64::from_str_radix(text, 16).unwrap();
            let (start, end) = (at(start), at(end));
            let is_ours = regions.iter().any(|(from, bytes)| *from <= start && end <= from + bytes);
            inside = is_ours && line.contains(".img");
        } else if inside && first == "Size:" {
            sums.0 += kib(second);
        } else if inside && first == "Anonymous:" {
            sums.1 += kib(second);
        }
    }
    sums
}

/// The guest left A for B, and A kept it.
fn left(image: &[u8]) -> (Host, Host, PathBuf) {
    let (a, b) = (Host::new(), Host::new());
    fs::write(a.image(), image).unwrap();
    let (to, received) = b.serve(b.folder(), b.reuse(KeepWhat::Manifest), |_| ());
    a.send_file(&to, KeepWhat::Visit).into_result().unwrap();
    received.recv().unwrap();
    let head = only(&a);
    let kept = a.store.path().join(format!("domains/{}/{}.img", head.domain, head.id));
    (a, b, kept)
}

fn only(host: &Host) -> VisitHead {
    let mut heads = host.store.heads().unwrap();
    assert_eq!(heads.len(), 1);
    heads.remove(0)
}

fn rewrite(file: &std::path::Path, pages: impl Iterator<Item = u64>) -> u64 {
    let file = File::options().write(true).open(file).unwrap();
    let write = |page| file.write_all_at(&noise(page + 1_000_000, 1), page * PAGE as u64).unwrap();
    pages.map(write).count() as u64
}

#[test]
fn a_return_costs_what_changed_and_the_visit_stays() {
    let (a, b, kept) = left(&noise(1, PAGES as usize));
    let before = fs::read(&kept).unwrap();
    let changed = rewrite(&b.image(), (0..PAGES).step_by(100));
    for trust in [false, true] {
        let reuse = Reuse { trust, ..a.reuse(KeepWhat::Nothing) };
        let (mut ram, report) = returns(&b, &a, reuse);
        // What is replaced before the receiver gets there need not be read.
        let (unverified, scanned) = if trust { (PAGES - changed, 0..=0) } else { (0, PAGES - changed..=PAGES) };
        assert_eq!((report.reuse.unverified, report.reuse.damaged), (unverified, 0));
        assert!(scanned.contains(&report.reuse.scanned), "{report:?}");
        assert_eq!(report.pages.base, PAGES - changed);
        // What was stated as a delta or with bytes is private; nothing else is, not even after all of it was read.
        assert!(bytes(&ram, 0) == fs::read(b.image()).unwrap());
        assert_eq!(mapped(&ram), (PAGES, changed), "trusted: {trust}");
        (0..50).for_each(|page| ram.write(RegionId(0), (page * 3 + 1) * PAGE as u64 + 9, b"it runs").unwrap());
        assert_eq!(mapped(&ram), (PAGES, changed + 50 - 1), "one of them was changed already");
        assert!(fs::read(&kept).unwrap() == before);
    }
}

#[test]
fn a_visit_that_is_mapped_can_neither_be_consumed_nor_removed() {
    let (a, b, kept) = left(&noise(1, 64));
    let head = only(&a);
    let reuse = a.reuse(KeepWhat::Manifest);
    let (ram, _) = returns(&b, &a, reuse);
    let elsewhere = File::open(a.dir.path()).unwrap();
    let consume = || {
        let mut visit = a.store.open_visit(&head).unwrap().unwrap();
        visit.consume(std::os::fd::AsFd::as_fd(&elsewhere), "taken".as_ref()).unwrap()
    };
    assert!(consume().is_none());
    assert_eq!(a.store.remove(head.id).unwrap(), Removed::Busy);
    assert!(a.store.prune().unwrap().is_empty() && kept.exists());
    // One that turned out wrong goes all the same: whoever has it mapped keeps it.
    a.store.open_visit(&head).unwrap().unwrap().reject().unwrap();
    assert!(!kept.exists());
    assert!(bytes(&ram, 0) == fs::read(b.image()).unwrap());

    let (a, b, kept) = left(&noise(1, 64));
    let (head, reuse) = (only(&a), a.reuse(KeepWhat::Nothing));
    let (ram, _) = returns(&b, &a, reuse);
    drop(ram);
    assert_eq!((a.store.remove(head.id).unwrap(), kept.exists()), (Removed::Yes, false), "when it is gone all is free");
}

#[test]
fn damaged_pages_of_a_mapped_visit_are_fetched() {
    let (a, b, kept) = left(&noise(1, PAGES as usize));
    let damaged = rewrite(&kept, (3..PAGES).step_by(500));
    let reuse = a.reuse(KeepWhat::Nothing);
    let (ram, report) = returns(&b, &a, reuse);
    assert_eq!((report.reuse.damaged, report.wants), (damaged, damaged));
    assert!(bytes(&ram, 0) == fs::read(b.image()).unwrap());
    assert_eq!(mapped(&ram), (PAGES, damaged));
}

#[test]
fn pages_that_are_zero_or_were_not_kept_are_memory_of_its_own() {
    let mut image = noise(1, PAGES as usize);
    // A long run of zeros, which is no part of the mapping, and a short one, which is.
    image[1000 * PAGE..2000 * PAGE].fill(0);
    image[3000 * PAGE..3010 * PAGE].fill(0);
    let (a, b, _) = left(&image);
    // The newest visit keeps less.
    let head = only(&a);
    let visit = a.store.open_visit(&head).unwrap().unwrap();
    let hasher = PageHasher::new(&DedupDomain::new(visit.key()));
    let keep = Keep {
        lineage: Lineage { id: head.lineage, key: *visit.key() },
        name: head.name.clone(),
        session: head.session,
        kind: head.kind,
        layout: &head.layout,
        root: head.root,
    };
    let mut present = PageBitmap::full(PAGES);
    let lost = present.remove_range(40..50) + present.remove_range(3000..4000) - 10;
    let image_file = visit.image().unwrap();
    let trees = visit.trees(&hasher).unwrap();
    a.store.keep(&keep, &trees, Some(&present), Some(KeepImage::File(image_file))).unwrap();
    drop(visit);
    // Much becomes zero elsewhere, and what was zero does not stay it.
    let runs = File::options().write(true).open(b.image()).unwrap();
    runs.write_all_at(&vec![0; 512 * PAGE], 256 * PAGE as u64).unwrap();
    runs.write_all_at(&vec![0; 5 * PAGE], 900 * PAGE as u64).unwrap();
    runs.write_all_at(&noise(7, 4), 1500 * PAGE as u64).unwrap();
    let reuse = a.reuse(KeepWhat::Nothing);
    let (ram, report) = returns(&b, &a, reuse);
    assert!(bytes(&ram, 0) == fs::read(b.image()).unwrap());
    assert_eq!((report.wants, report.reuse.damaged), (lost, 0));
    // The long runs are not mapped; of the short ones ten pages came with bytes, and five zeros were written.
    assert_eq!(mapped(&ram), (PAGES - 1000 - 1000 - 512, 10 + 5));
}

/// A guest of several regions, in the memory of its embedder.
#[derive(Clone)]
struct Regions {
    layout: Layout,
    bytes: Vec<Vec<u8>>,
}

impl Regions {
    fn new(lengths: &[u64]) -> Self {
        let region = |&bytes: &u64| Region { bytes, install_size: InstallSize::KIB_4 };
        let layout = Layout::new(lengths.iter().map(region).collect()).unwrap();
        let fill = |(seed, &len): (u64, &u64)| {
            let mut bytes = noise(seed, len.div_ceil(PAGE as u64) as usize);
            bytes.truncate(len as usize);
            bytes
        };
        Self { layout, bytes: (1..).zip(lengths).map(fill).collect() }
    }
}

impl GuestMemory for Regions {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let from = &self.bytes[usize::from(region.0)][first as usize * PAGE..];
        let (real, padding) = bytes.split_at_mut(from.len().min(bytes.len()));
        real.copy_from_slice(&from[..real.len()]);
        padding.fill(0);
        Ok(())
    }

    fn check_unchanged(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn images_of_several_regions_come_back_each_to_its_own() {
    const MIB: u64 = 1 << 20;
    // Where a region ends inside a page the next one begins there in the file, and cannot be mapped.
    let cases = [
        ([3 * MIB, 4096, 5 * MIB], 768 + 1 + 1280, 4),
        ([3 * MIB, 4096, 5 * MIB + 77], 768 + 1 + 1280, 4),
        ([MIB, 5000, MIB], 256 + 1, 2),
    ];
    for (lengths, most, changed) in cases {
        let (a, b) = (Host::new(), Host::new());
        let mut guest = Regions::new(&lengths);
        let send = |guest: &Regions, to: &Address| {
            b.send(guest.clone(), to, KeepWhat::Manifest).into_result().unwrap();
        };
        let (first, _) = arrives(&a, a.reuse(KeepWhat::Visit), |to| send(&guest, to));
        let same = |ram: &GuestRam, guest: &Regions| (0..3).all(|at| bytes(ram, at) == guest.bytes[usize::from(at)]);
        assert!(same(&first, &guest), "what arrives cold is whole, too");
        drop(first);
        for (region, offset) in [(0, 70_000), (0, 300_000), (2, 0), (2, 900_000)] {
            guest.bytes[region][offset] ^= 1;
        }
        let (ram, report) = arrives(&a, a.reuse(KeepWhat::Nothing), |to| send(&guest, to));
        assert!(same(&ram, &guest), "{lengths:?}");
        let pages: u64 = lengths.iter().map(|bytes| bytes.div_ceil(PAGE as u64)).sum();
        assert_eq!((report.pages.base, report.reuse.damaged), (pages - 4, 0));
        assert_eq!(mapped(&ram), (most, changed), "{lengths:?}");
    }
}

#[test]
fn an_image_that_grew_or_shrank_is_mapped_as_far_as_it_goes() {
    let pages = 1000;
    for len in [pages * PAGE + 3 * PAGE, pages * PAGE + 5, pages * PAGE - 100 * PAGE - 1234] {
        let (a, b, _) = left(&noise(1, pages));
        let file = File::options().write(true).open(b.image()).unwrap();
        file.set_len(len as u64).unwrap();
        let reuse = a.reuse(KeepWhat::Nothing);
        let (ram, report) = returns(&b, &a, reuse);
        assert!(bytes(&ram, 0) == fs::read(b.image()).unwrap(), "{len}");
        assert!(report.pages.inline + report.pages.delta <= 1, "{len}: {:?}", report.pages);
        let whole = len.min(pages * PAGE) / PAGE;
        assert_eq!(mapped(&ram), (whole as u64, 0), "{len}");
    }
}

#[test]
fn a_guest_that_does_not_arrive_leaves_no_memory_behind() {
    let (a, b, _) = left(&noise(1, 64));
    let (arrived, guests) = channel();
    let (to, report) = a.serve(Into::Memory, a.reuse(KeepWhat::Nothing), move |event| {
        if let ServerEvent::Arrived { memory, .. } = event {
            arrived.send(memory).unwrap();
        }
    });
    /// A guest whose memory is of no single moment.
    struct Unsteady(Regions);
    impl GuestMemory for Unsteady {
        fn layout(&self) -> &Layout {
            self.0.layout()
        }
        fn read(&mut self, region: RegionId, first: u64, bytes: &mut [u8]) -> io::Result<()> {
            self.0.read(region, first, bytes)
        }
        fn check_unchanged(&mut self) -> io::Result<()> {
            Err(io::Error::other("it runs"))
        }
    }
    let outcome = b.send(Unsteady(Regions::new(&[64 * PAGE as u64])), &to, KeepWhat::Nothing);
    assert!(outcome.error.is_some());
    assert_eq!(report.recv().unwrap().outcome, "failed");
    assert!(guests.try_recv().is_err());
    assert_eq!(a.store.remove(only(&a).id).unwrap(), Removed::Yes, "the visit is mapped by nobody");
}
