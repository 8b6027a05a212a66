//! What is read from a userfaultfd: messages of 32 bytes, each judged before it is a value.

use linux_raw_sys::general::{
    UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP,
    UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE,
};
use std::ops::Range;
use std::os::fd::OwnedFd;

/// Bytes of a message.
pub(super) const MESSAGE_BYTES: usize = 32;

/// Why a thread waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The page is not there.
    Missing,
    /// The page is in the file but not in the page table.
    Minor,
    /// The page is there and protected against the write that was tried.
    WriteProtected,
}

/// What a userfaultfd says.
#[derive(Debug)]
pub enum Message {
    /// A thread touched a page and waits.
    Fault {
        /// What it touched: the page's first byte, or the byte itself where [`EXACT_ADDRESS`](super::Features::EXACT_ADDRESS)
        /// is on.
        address: u64,
        /// Why it waits.
        kind: FaultKind,
        /// Whether it writes.
        write: bool,
        /// The thread, where [`THREAD_ID`](super::Features::THREAD_ID) is on.
        thread: Option<u32>,
    },
    /// These addresses are thrown away: zeros from now on. Who does it waited for this message to be read.
    Removed(Range<u64>),
    /// These addresses are unmapped.
    Unmapped(Range<u64>),
    /// Memory is at other addresses now.
    Remapped {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Its bytes.
        bytes: u64,
    },
    /// The process forked; the child's memory is served by this descriptor. Once nobody has it open, the child reads
    /// zeros where pages are missing.
    Forked(OwnedFd),
    /// Something that no kernel should say: its kind, and an address of it.
    Odd {
        /// The kind as it came.
        kind: u8,
        /// The first word behind it.
        word: u64,
    },
}

/// A message, or the number of a descriptor that only the reader may make one of.
#[derive(Debug)]
pub(super) enum Judged {
    Message(Message),
    Forked(u32),
}

fn word(message: &[u8; MESSAGE_BYTES], at: usize) -> u64 {
    let bytes = message.get(at..).and_then(|rest| rest.first_chunk::<8>());
    bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

fn half_word(message: &[u8; MESSAGE_BYTES], at: usize) -> u32 {
    let bytes = message.get(at..).and_then(|rest| rest.first_chunk::<4>());
    bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// Judges one message. Offsets are those of `struct uffd_msg`, which is packed: the kind, then three words from byte 8.
pub(super) fn judge(message: &[u8; MESSAGE_BYTES]) -> Judged {
    let kind = message.first().copied().unwrap_or(0);
    let (first, second, third) = (word(message, 8), word(message, 16), word(message, 24));
    let odd = Message::Odd { kind, word: first };
    Judged::Message(match u32::from(kind) {
        UFFD_EVENT_PAGEFAULT => fault(first, second, half_word(message, 24)),
        UFFD_EVENT_FORK => return Judged::Forked(half_word(message, 8)),
        UFFD_EVENT_REMAP if first.checked_add(third).is_some() && second.checked_add(third).is_some() => {
            Message::Remapped { from: first, to: second, bytes: third }
        }
        UFFD_EVENT_REMOVE if first <= second => Message::Removed(first..second),
        UFFD_EVENT_UNMAP if first <= second => Message::Unmapped(first..second),
        _ => odd,
    })
}

fn fault(flags: u64, address: u64, thread: u32) -> Message {
    let has = |flag: u32| flags & u64::from(flag) != 0;
    let kind = match () {
        () if has(UFFD_PAGEFAULT_FLAG_WP) => FaultKind::WriteProtected,
        () if has(UFFD_PAGEFAULT_FLAG_MINOR) => FaultKind::Minor,
        () => FaultKind::Missing,
    };
    // No thread has the number zero: it is what kernels say that were not asked for it.
    let thread = (thread != 0).then_some(thread);
    Message::Fault { address, kind, write: has(UFFD_PAGEFAULT_FLAG_WRITE), thread }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u32, words: [u64; 3]) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0] = kind as u8;
        for (at, word) in [8, 16, 24].into_iter().zip(words) {
            bytes[at..at + 8].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn shown(kind: u32, words: [u64; 3]) -> String {
        format!("{:?}", judge(&message(kind, words)))
    }

    #[test]
    fn the_layout_is_that_of_the_header() {
        assert_eq!(size_of::<linux_raw_sys::general::uffd_msg>(), MESSAGE_BYTES);
        assert_eq!(std::mem::offset_of!(linux_raw_sys::general::uffd_msg, arg), 8);
    }

    #[test]
    fn faults_say_what_who_and_why() {
        for (flags, kind, write) in
            [(0, "Missing", false), (1, "Missing", true), (3, "WriteProtected", true), (4, "Minor", false)]
        {
            let expected = format!(
                "Message(Fault {{ address: 4096, kind: {kind}, write: {write}, thread: {} }})",
                if write { "Some(7)" } else { "None" }
            );
            assert_eq!(shown(UFFD_EVENT_PAGEFAULT, [flags, 4096, if write { 7 } else { 0 }]), expected);
        }
    }

    #[test]
    fn events_are_judged_before_they_are_values() {
        assert_eq!(shown(UFFD_EVENT_REMOVE, [4096, 8192, 0]), "Message(Removed(4096..8192))");
        assert_eq!(shown(UFFD_EVENT_UNMAP, [4096, 4096, 0]), "Message(Unmapped(4096..4096))");
        assert_eq!(shown(UFFD_EVENT_REMAP, [1, 2, 3]), "Message(Remapped { from: 1, to: 2, bytes: 3 })");
        assert_eq!(shown(UFFD_EVENT_FORK, [5, 0, 0]), "Forked(5)");
        for (kind, words) in [
            (UFFD_EVENT_REMOVE, [8192, 4096, 0]),
            (UFFD_EVENT_UNMAP, [u64::MAX, 0, 0]),
            (UFFD_EVENT_REMAP, [u64::MAX, 0, 1]),
            (UFFD_EVENT_REMAP, [0, u64::MAX - 1, 2]),
            (0, [0; 3]),
            (255, [9; 3]),
        ] {
            assert!(shown(kind, words).starts_with("Message(Odd"), "{kind} {words:?}");
        }
    }
}
