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
/// Scales are counted in thousandths. With one of them a guest has 30 pages, and with less the table says nothing.
const FULL: u64 = 1000;

/// A folder, and the scale that fits it.
pub(super) struct Place {
    dir: TempDir,
    /// In thousandths.
    scale: u64,
    /// Nothing goes to a disk.
    pub(super) in_memory: bool,
    /// Why the scale is what it is.
    why: Option<String>,
}

impl Place {
    /// Makes a folder in `parent` with room for guests that have `largest` bytes of memory at full scale; without a
    /// parent where the guests' memory stays memory, if that takes no more than half of what is available.
    ///
    /// `scale` counts thousandths.
    pub(super) fn find(parent: Option<&Path>, scale: Option<u32>, largest: u64) -> Result<Self> {
        let wanted = scale.map_or(FULL, u64::from);
        let in_memory = || Room::of(Path::new(IN_MEMORY)).ok().filter(|room| room.in_memory);
        let room = match parent {
            Some(parent) => Room::of(parent)?,
            None => match in_memory().filter(|room| room.scale(largest) >= wanted) {
                Some(room) => room,
                None => Room::of(&std::env::temp_dir())?,
            },
        };
        let fits = room.scale(largest);
        let told = format!("{} has room for {} of the full size", room.told(), factor(fits));
        ensure!(scale.is_none() || wanted <= fits, "--scale {} is too much: {told}", factor(wanted));
        if fits == 0 {
            bail!("there is too little room for a demo: {}", room.told());
        }
        let dir = tempfile::Builder::new().prefix("pagewire-demo").tempdir_in(&room.parent);
        let dir = dir.with_context(|| format!("no folder can be made in {}", room.parent.display()))?;
        let why = (scale.is_none() && fits < FULL).then_some(told);
        Ok(Self { dir, scale: wanted.min(fits), in_memory: room.in_memory, why })
    }

    /// As `--scale` takes it.
    pub(super) fn scale(&self) -> f64 {
        factor(self.scale)
    }

    /// What bytes at full scale are here.
    pub(super) fn scaled(&self, bytes: u64) -> u64 {
        bytes.saturating_mul(self.scale) / FULL
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A line that says where it runs and how large.
    pub(super) fn told(&self) -> String {
        let kind = if self.in_memory { "in memory" } else { "on a disk" };
        let why = self.why.as_ref().map_or(String::new(), |why| format!(": {why}"));
        format!("hosts A and B are folders in {}, {kind}; scale {}{why}", self.path().display(), self.scale())
    }
}

/// What there is.
struct Room {
    parent: PathBuf,
    in_memory: bool,
    free: u64,
    /// What may be taken of memory, if the kernel says it.
    memory: Option<u64>,
}

impl Room {
    fn of(parent: &Path) -> Result<Self> {
        let named = || parent.display().to_string();
        let (space, kind) = (statvfs(parent).with_context(named)?, statfs(parent).with_context(named)?);
        Ok(Self {
            parent: parent.to_path_buf(),
            in_memory: u64::try_from(kind.f_type).is_ok_and(|kind| kind == TMPFS),
            free: space.f_bavail.saturating_mul(space.f_frsize),
            memory: memory_available(),
        })
    }

    /// The largest scale that fits, in thousandths: half of the room stays for others.
    fn scale(&self, largest: u64) -> u64 {
        let all = largest.saturating_mul(COPIES);
        // A disk is as good for the demo only if the guests' own memory fits into the page cache.
        let in_memory = if self.in_memory { all } else { largest };
        let share = |room: u64, needed: u64| (room / 2).saturating_sub(MARGIN).saturating_mul(FULL) / needed.max(1);
        let by_memory = self.memory.map_or(FULL, |memory| share(memory, in_memory));
        share(self.free, all).min(by_memory).min(FULL)
    }

    fn told(&self) -> String {
        let memory = self.memory.map_or(String::new(), |memory| format!(" and {} of memory", megabytes(memory)));
        format!("{} with {} free{memory}", self.parent.display(), megabytes(self.free))
    }
}

/// `MemAvailable`, or what a control group leaves of it: files of a tmpfs count there, and too many end the process.
fn memory_available() -> Option<u64> {
    let text = |path: PathBuf| std::fs::read_to_string(path).ok();
    let of_machine = text("/proc/meminfo".into()).and_then(|text| kib(&text, "MemAvailable:"));
    let group = text("/proc/self/cgroup".into()).unwrap_or_default();
    let group = group.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let groups = Path::new("/sys/fs/cgroup").join(group);
    let number = |path: PathBuf| text(path)?.trim().parse::<u64>().ok();
    let left = |group: &Path| {
        let limit = number(group.join("memory.max"))?;
        Some(limit.saturating_sub(number(group.join("memory.current"))?))
    };
    of_machine.into_iter().chain(groups.ancestors().filter_map(left)).min()
}

fn factor(thousandths: u64) -> f64 {
    thousandths as f64 / FULL as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_down_by_what_is_short() {
        let room = |in_memory, free, memory| Room { parent: "/".into(), in_memory, free, memory: Some(memory) };
        let gb = 1_000_000_000;
        assert_eq!(room(true, 100 * gb, 100 * gb).scale(2 * gb), FULL);
        assert!((400..500).contains(&room(true, 100 * gb, 6 * gb).scale(2 * gb)), "three copies in half of memory");
        assert_eq!(room(false, 100 * gb, 6 * gb).scale(2 * gb), FULL, "on a disk one copy is cached");
        assert!((400..500).contains(&room(false, 6 * gb, 100 * gb).scale(2 * gb)), "three copies on half of the disk");
        assert_eq!(room(false, 0, 100 * gb).scale(2 * gb), 0);
    }
}
