//! Guests for tests: small images of two regions, one of them ending inside a page, with zero pages among the others.

use crate::{Keep, KeepImage, Lineage, Store, StoreOptions, Visit, VisitHead, VisitKind};
use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::digest::{Digest, PageHasher, page_digest};
use pagewire_protocol::domain::{DedupDomain, LineageId};
use pagewire_protocol::frame::ImageName;
use pagewire_protocol::limits::PAGE_BYTES;
use pagewire_protocol::page::{InstallSize, Layout, Region, RegionId};
use pagewire_protocol::tree::{DigestTree, image_root};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

pub(crate) struct Guest {
    pub(crate) lineage: Lineage,
    pub(crate) layout: Layout,
    /// All regions in a row.
    pub(crate) bytes: Vec<u8>,
}

impl Guest {
    /// A guest of about `pages` pages; `seed` selects its pages, `who` its lineage and domain.
    pub(crate) fn new(who: u8, seed: u8, pages: u64) -> Self {
        let second = (pages / 3 + 1) * 4096 - 1000;
        let first = pages.saturating_sub(pages / 3 + 1) * 4096;
        let region = |bytes| Region { bytes, install_size: InstallSize::KIB_4 };
        let layout = Layout::new(vec![region(first), region(second)]).unwrap();
        let lineage = Lineage { id: LineageId([who; 16]), key: [who; 32] };
        let mut guest = Self { lineage, bytes: vec![0; layout.bytes() as usize], layout };
        for page in 0..guest.layout.pages() as usize {
            // Every fourth page is zero, and a third of the others are equal.
            let kind = page % 4 + usize::from(page % 3 == 0) * 4;
            let fill = match kind {
                0 | 4 => 0,
                5.. => 0x5a_u64,
                _ => (page as u64 + 1) << 8 | u64::from(seed),
            };
            let (region, number) = guest.layout.locate(pagewire_protocol::page::Place(page as u32));
            let start = guest.layout.file_offset(region, number.0) as usize;
            let len = guest.layout.region(region).unwrap().bytes_of(number.0, 1) as usize;
            let slot = &mut guest.bytes[start..start + len];
            slot.chunks_mut(8)
                .for_each(|word| word.iter_mut().zip(fill.to_le_bytes()).for_each(|(to, from)| *to = from));
        }
        guest
    }

    pub(crate) fn domain(&self) -> DedupDomain {
        DedupDomain::new(&self.lineage.key)
    }

    pub(crate) fn hasher(&self) -> PageHasher {
        PageHasher::new(&self.domain())
    }

    pub(crate) fn page(&self, region: RegionId, page: u64) -> [u8; PAGE_BYTES] {
        let start = self.layout.file_offset(region, page) as usize;
        let len = self.layout.region(region).unwrap().bytes_of(page, 1) as usize;
        let mut bytes = [0; PAGE_BYTES];
        bytes[..len].copy_from_slice(&self.bytes[start..start + len]);
        bytes
    }

    pub(crate) fn trees(&self) -> Vec<DigestTree> {
        let hasher = self.hasher();
        let tree = |(index, region): (u16, &Region)| {
            let mut tree = DigestTree::new(&hasher, region.pages());
            for page in 0..region.pages() {
                tree.set(page, page_digest(hasher.domain(), &self.page(RegionId(index), page)));
            }
            tree
        };
        (0u16..).zip(self.layout.regions()).map(tree).collect()
    }

    pub(crate) fn root(&self) -> Digest {
        image_root(&self.domain(), &self.layout, &mut self.trees())
    }

    pub(crate) fn order(&self) -> Keep<'_> {
        self.order_with(self.root())
    }

    pub(crate) fn order_with(&self, root: Digest) -> Keep<'_> {
        Keep {
            lineage: self.lineage,
            name: ImageName::new("vm.img").unwrap(),
            session: [3; 16],
            kind: VisitKind::Departed,
            layout: &self.layout,
            root,
        }
    }

    pub(crate) fn keep(&self, store: &Store) -> VisitHead {
        self.try_keep(store, None).unwrap()
    }

    pub(crate) fn try_keep(&self, store: &Store, present: Option<&PageBitmap>) -> Result<VisitHead, crate::StoreError> {
        let mut read = |region: RegionId, first: u64, bytes: &mut [u8]| {
            for (page, slot) in (first..).zip(bytes.chunks_mut(PAGE_BYTES)) {
                slot.copy_from_slice(&self.page(region, page));
            }
            Ok(())
        };
        store.keep(&self.order(), &self.trees(), present, Some(KeepImage::Pages(&mut read))).map(|kept| kept.head)
    }

    pub(crate) fn file(&self) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&self.bytes, 0).unwrap();
        file
    }
}

/// A store in a folder that goes away with it.
pub(crate) struct Home {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) store: Store,
}

impl Home {
    pub(crate) fn new(budget: Option<u64>) -> Self {
        Self::below(tempfile::tempdir().unwrap(), budget)
    }

    pub(crate) fn below(dir: tempfile::TempDir, budget: Option<u64>) -> Self {
        let store = Store::open(&dir.path().join("store"), StoreOptions { budget, existing: false }).unwrap();
        Self { dir, store }
    }

    /// Where a file of a visit is.
    pub(crate) fn path(&self, head: &VisitHead, suffix: &str) -> std::path::PathBuf {
        self.store.path().join(format!("domains/{}/{}.{suffix}", head.domain, head.id))
    }

    pub(crate) fn visit(&self, head: &VisitHead) -> Option<Visit> {
        self.store.open_visit(head).unwrap()
    }

    /// Every file below the store, the lock aside.
    pub(crate) fn files(&self) -> Vec<String> {
        fn walk(dir: &std::path::Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, found) } else { found.push(path.display().to_string()) }
            }
        }
        let mut found = Vec::new();
        walk(&self.store.path().join("domains"), &mut found);
        found.sort();
        found
    }
}

/// A small file system that shares blocks, for root; elsewhere the test is skipped, and says so.
pub(crate) struct Sharing(tempfile::TempDir);

impl Sharing {
    pub(crate) fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (disk, at) = (dir.path().join("disk"), dir.path().join("mounted"));
        File::create(&disk).unwrap().set_len(320 << 20).unwrap();
        std::fs::create_dir(&at).unwrap();
        let ran = |mut command: Command| command.output().is_ok_and(|output| output.status.success());
        let mut make = Command::new("mkfs.xfs");
        make.args(["-q", "-m", "reflink=1"]).arg(&disk);
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).args([&disk, &at]);
        let mounted = ran(make) && ran(mount);
        if !mounted {
            println!("SKIPPED: a file system that shares blocks needs root, mkfs.xfs and a loop device");
        }
        mounted.then_some(Self(dir))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("mounted")
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// Digests proven against the root, and every kept page against its digest: what holds of an undamaged visit.
pub(crate) fn is_whole(visit: &Visit, key: &[u8; 32]) -> bool {
    let hasher = PageHasher::new(&DedupDomain::new(key));
    let (Ok(trees), Ok(present)) = (visit.trees(&hasher), visit.present()) else { return false };
    let layout = visit.head().layout.clone();
    let kept = |place: u64| {
        let (region, page) = layout.locate(pagewire_protocol::page::Place(place as u32));
        let mut bytes = [0; PAGE_BYTES];
        visit.read(region, page.0, &mut bytes).is_ok()
            && page_digest(hasher.domain(), &bytes) == trees[usize::from(region.0)].leaf(page.0)
    };
    visit.image().is_none() || present.runs(0..layout.pages()).flatten().all(kept)
}
