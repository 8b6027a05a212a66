//! Where the demo runs, and how large: what the memory and the disk of this machine have room for.

use super::peak::kib;
use crate::demo::table::megabytes;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{statfs, statvfs};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A file system in memory, where Linux has one.
const IN_MEMORY: &str = "/dev/shm";
/// `TMPFS_MAGIC` of `statfs(2)`.
const TMPFS: u64 = 0x0102_1994;
/// Images of each guest at once: that on A, that on B, and the visit that one of them keeps.
const COPIES: u64 = 3;
/// For manifests, partial images and the process itself.
const MARGIN: u64 = 128 << 20;
/// Below this a guest has fewer than 30 pages, and the table says nothing.
const SCALE_MIN: f64 = 0.001;

/// A folder, and the scale that fits it.
pub(super) struct Place {
    dir: TempDir,
    pub(super) scale: f64,
    /// Nothing goes to a disk.
    pub(super) in_memory: bool,
    /// Why the scale is what it is.
    why: Option<String>,
}

impl Place {
    /// Makes a folder in `parent` with room for guests that have `largest` bytes of memory at full scale; without a
    /// parent where the guests' memory stays memory, if that takes no more than half of what is available.
    pub(super) fn find(parent: Option<&Path>, scale: Option<f64>, largest: u64) -> Result<Self> {
        let wanted = scale.unwrap_or(1.0);
        let in_memory = || Room::of(Path::new(IN_MEMORY)).ok().filter(|room| room.in_memory);
        let room = match parent {
            Some(parent) => Room::of(parent)?,
            None => match in_memory().filter(|room| room.scale(largest) >= wanted) {
                Some(room) => room,
                None => Room::of(&std::env::temp_dir())?,
            },
        };
        let fits = room.scale(largest);
        let told = format!("{} has room for {fits} of the full size", room.told());
        ensure!(scale.is_none_or(|scale| scale <= fits), "--scale {wanted} is too much: {told}");
        if fits < SCALE_MIN {
            bail!("there is too little room for a demo: {}", room.told());
        }
        let dir = tempfile::Builder::new().prefix("pagewire-demo").tempdir_in(&room.parent);
        let dir = dir.with_context(|| format!("no folder can be made in {}", room.parent.display()))?;
        let why = (scale.is_none() && fits < 1.0).then_some(told);
        Ok(Self { dir, scale: wanted.min(fits), in_memory: room.in_memory, why })
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A line that says where it runs and how large.
    pub(super) fn told(&self) -> String {
        let kind = if self.in_memory { "in memory" } else { "on a disk" };
        let why = self.why.as_ref().map_or(String::new(), |why| format!(": {why}"));
        format!("hosts A and B are folders in {}, {kind}; scale {}{why}", self.path().display(), self.scale)
    }
}

/// What there is.
struct Room {
    parent: PathBuf,
    in_memory: bool,
    free: u64,
    /// `MemAvailable`, if the kernel says it.
    memory: Option<u64>,
}

impl Room {
    fn of(parent: &Path) -> Result<Self> {
        let named = || parent.display().to_string();
        let (space, kind) = (statvfs(parent).with_context(named)?, statfs(parent).with_context(named)?);
        let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| kib(&text, "MemAvailable:"));
        Ok(Self {
            parent: parent.to_path_buf(),
            in_memory: u64::try_from(kind.f_type).is_ok_and(|kind| kind == TMPFS),
            free: space.f_bavail.saturating_mul(space.f_frsize),
            memory,
        })
    }

    /// The largest scale that fits, in steps of a thousandth: half of the room stays for others.
    fn scale(&self, largest: u64) -> f64 {
        let all = largest.saturating_mul(COPIES);
        // A disk is as good for the demo only if the guests' own memory fits into the page cache.
        let (needed, memory) = if self.in_memory { (all, self.memory) } else { (largest, self.memory) };
        let share = |room: u64, needed: u64| room.saturating_sub(MARGIN) as f64 / needed.max(1) as f64;
        let by_memory = memory.map_or(1.0, |memory| share(memory / 2, needed));
        let fits = share(self.free / 2, all).min(by_memory).min(1.0);
        (fits * 1000.0).floor() / 1000.0
    }

    fn told(&self) -> String {
        let memory = self.memory.map_or(String::new(), |memory| format!(" and {} of memory", megabytes(memory)));
        format!("{} with {} free{memory}", self.parent.display(), megabytes(self.free))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_down_by_what_is_short() {
        let room = |in_memory, free, memory| Room { parent: "/".into(), in_memory, free, memory: Some(memory) };
        let gb = 1_000_000_000;
        assert_eq!(room(true, 100 * gb, 100 * gb).scale(2 * gb), 1.0);
        assert!((0.4..0.5).contains(&room(true, 100 * gb, 6 * gb).scale(2 * gb)), "three copies in half of memory");
        assert_eq!(room(false, 100 * gb, 6 * gb).scale(2 * gb), 1.0, "on a disk one copy is cached");
        assert!((0.4..0.5).contains(&room(false, 6 * gb, 100 * gb).scale(2 * gb)), "three copies on half of the disk");
        assert_eq!(room(false, 0, 100 * gb).scale(2 * gb), 0.0);
    }
}
