//! What userfaultfd of a kernel can do, and what goes without.

use linux_raw_sys::general::{
    UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMOVE, UFFD_FEATURE_EVENT_UNMAP,
    UFFD_FEATURE_EXACT_ADDRESS, UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_HUGETLBFS,
    UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_MOVE, UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_POISON,
    UFFD_FEATURE_SIGBUS, UFFD_FEATURE_THREAD_ID, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFD_FEATURE_WP_UNPOPULATED,
};
use std::fmt;
use std::ops::BitOr;

/// A set of features. Missing faults on anonymous memory, `COPY`, `ZEROPAGE` and `WAKE` are no features: every kernel
/// with userfaultfd has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u64);

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:ident, $since:literal, $without:literal;)*) => {
        impl Features {
            $($(#[$doc])* pub const $name: Self = Self($bit as u64);)*
        }

        /// Each feature with its name, the first kernel that has it, and what still works without it.
        const NAMES: &[(Features, &str, &str, &str)] = &[$((Features::$name, stringify!($name), $since, $without),)*];
    };
}

features! {
    /// Write-protection of anonymous memory.
    WRITE_PROTECT = UFFD_FEATURE_PAGEFAULT_FLAG_WP, "5.7", "post-copy works; writes can be told by the VMM's dirty bitmap";
    /// A message when the process forks, with a descriptor for the child. Needs `CAP_SYS_PTRACE`.
    EVENT_FORK = UFFD_FEATURE_EVENT_FORK, "4.11", "post-copy works for a process that does not fork";
    /// A message when registered memory is moved by `mremap`.
    EVENT_REMAP = UFFD_FEATURE_EVENT_REMAP, "4.11", "post-copy works for memory that stays where it is";
    /// A message when registered memory is thrown away, as a balloon does.
    EVENT_REMOVE = UFFD_FEATURE_EVENT_REMOVE, "4.11", "post-copy works for a guest whose balloon is not inflated meanwhile";
    /// Missing faults on hugetlbfs.
    MISSING_HUGETLBFS = UFFD_FEATURE_MISSING_HUGETLBFS, "4.11", "post-copy works into anonymous memory";
    /// Missing faults on memory files.
    MISSING_SHMEM = UFFD_FEATURE_MISSING_SHMEM, "4.11", "post-copy works into anonymous memory";
    /// A message when registered memory is unmapped.
    EVENT_UNMAP = UFFD_FEATURE_EVENT_UNMAP, "4.11", "post-copy works for memory that stays mapped";
    /// A signal instead of a message for a fault.
    SIGBUS = UFFD_FEATURE_SIGBUS, "4.14", "faults come as messages";
    /// The thread of a fault.
    THREAD_ID = UFFD_FEATURE_THREAD_ID, "4.14", "faults are served; blocked times are counted for all vCPUs together";
    /// Minor faults on hugetlbfs.
    MINOR_HUGETLBFS = UFFD_FEATURE_MINOR_HUGETLBFS, "5.13", "missing faults are served; pages are copied in";
    /// Minor faults on memory files.
    MINOR_SHMEM = UFFD_FEATURE_MINOR_SHMEM, "5.14", "missing faults are served; pages are copied in";
    /// Addresses of faults to the byte, not to the page.
    EXACT_ADDRESS = UFFD_FEATURE_EXACT_ADDRESS, "5.18", "faults are served by their page";
    /// Write-protection of hugetlbfs and memory files.
    WRITE_PROTECT_SHARED = UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "5.19", "post-copy works; writes can be told by the VMM's dirty bitmap";
    /// Write-protection of pages that are not there yet.
    WRITE_PROTECT_ABSENT = UFFD_FEATURE_WP_UNPOPULATED, "6.4", "post-copy works; pages that are there can be protected";
    /// Pages whose touch is a signal.
    POISON = UFFD_FEATURE_POISON, "6.6", "post-copy works; a vCPU that touches a lost page stays blocked";
    /// Write-protection that the kernel lifts by itself.
    WRITE_PROTECT_ASYNC = UFFD_FEATURE_WP_ASYNC, "6.7", "post-copy works; writes can be told by the VMM's dirty bitmap";
    /// Pages that are moved in instead of copied.
    MOVE = UFFD_FEATURE_MOVE, "6.8", "post-copy works; pages are copied in";
}

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);

    /// The features of these bits, known here or not.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The kernel's bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `others` are among these.
    pub const fn contains(self, others: Self) -> bool {
        others.0 & !self.0 == 0
    }

    /// Those of both.
    #[must_use]
    pub const fn union(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// Those of these that are not in `others`.
    #[must_use]
    pub const fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// Those of both, alone.
    #[must_use]
    pub const fn common(self, others: Self) -> Self {
        Self(self.0 & others.0)
    }

    /// Judges a kernel that has these features.
    ///
    /// # Errors
    /// Some that are `wanted` are not among them.
    pub fn satisfy(self, wanted: Self) -> Result<(), Missing> {
        let lacks = wanted.without(self);
        if lacks == Self::NONE { Ok(()) } else { Err(Missing(lacks)) }
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, others: Self) -> Self {
        self.union(others)
    }
}

/// Features that a kernel lacks; shown with their names and with what still works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing(pub Features);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("userfaultfd of this kernel lacks ")?;
        let named = NAMES.iter().filter(|(feature, ..)| self.0.contains(*feature));
        let mut known = Features::NONE;
        for (feature, name, since, without) in named {
            let separator = if known == Features::NONE { "" } else { "; " };
            write!(f, "{separator}{name} (Linux {since}), without which {without}")?;
            known = known.union(*feature);
        }
        let unknown = self.0.without(known).bits();
        if unknown != 0 {
            let separator = if known == Features::NONE { "" } else { "; " };
            write!(f, "{separator}features {unknown:#x}, which are not known here")?;
        }
        Ok(())
    }
}

impl std::error::Error for Missing {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_feature_is_named_with_what_still_works() {
        let has = Features::MISSING_SHMEM | Features::EVENT_REMOVE;
        assert_eq!(has.satisfy(Features::NONE), Ok(()));
        assert_eq!(has.satisfy(has), Ok(()));
        let missing = has.satisfy(has | Features::POISON | Features::MISSING_HUGETLBFS).unwrap_err();
        assert_eq!(missing.0, Features::POISON | Features::MISSING_HUGETLBFS);
        assert_eq!(
            missing.to_string(),
            "userfaultfd of this kernel lacks MISSING_HUGETLBFS (Linux 4.11), without which post-copy works into anonymous \
             memory; POISON (Linux 6.6), without which post-copy works; a vCPU that touches a lost page stays blocked"
        );
        for &(feature, name, since, without) in NAMES {
            let text = Features::NONE.satisfy(feature).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(since) && text.ends_with(without), "{text}");
        }
    }

    #[test]
    fn bits_that_nobody_knows_are_said_by_number() {
        let odd = Features::from_bits(1 << 40);
        let text = Features::NONE.satisfy(odd).unwrap_err().to_string();
        assert!(text.ends_with("lacks features 0x10000000000, which are not known here"), "{text}");
        let both = Features::NONE.satisfy(odd | Features::MOVE).unwrap_err().to_string();
        assert!(both.contains("MOVE (Linux 6.8)") && both.contains("; features 0x10000000000"), "{both}");
    }

    #[test]
    fn every_bit_has_one_name() {
        let all = NAMES.iter().fold(0u64, |bits, (feature, ..)| {
            assert_eq!(bits & feature.bits(), 0);
            bits | feature.bits()
        });
        assert_eq!(all, (1 << 17) - 1, "the first seventeen");
    }
}
