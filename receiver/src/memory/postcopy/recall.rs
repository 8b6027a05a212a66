//! A handler that comes after another: what is there already is the kernel's to say.

use super::{PostcopyError, PostcopyMemory, SMALL, failed, places, size};
use pagewire_protocol::bitmap::PageBitmap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of the pagemap that are read at once: of 32 MiB of memory.
const PIECE_BYTES: usize = 64 * 1024;
/// Bits of an entry: in memory, swapped out, protected against writes.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const PROTECTED: u64 = 1 << 57;

/// Whether an entry of the pagemap is of a page that is there. A swap entry that is protected may be the mark of a page
/// that was never there, so it is not believed: who puts that page in finds out.
fn is_there(entry: u64) -> bool {
    entry & PRESENT != 0 || entry & (SWAPPED | PROTECTED) == SWAPPED
}

impl PostcopyMemory {
    /// Takes over from a handler that is gone: pages that `pagemap` (`/proc/PID/pagemap` of the process whose memory it
    /// is) has count as present, pages that the guest `removed` by the last handler's account as removed, and everybody
    /// who waits is woken, to say it again. Gives how many pages are there.
    ///
    /// What is there and not seen costs one attempt to put it in. A removal that the last handler had read and not passed
    /// on is not known: that page comes again.
    ///
    /// # Errors
    /// It is not armed, or the pagemap cannot be read.
    pub fn recall(&self, pagemap: &File, removed: Option<&PageBitmap>) -> Result<u64, PostcopyError> {
        let uffd = self.uffd()?;
        let pieces: Vec<places::Piece> = self.places().all().collect();
        for run in removed.into_iter().flat_map(|removed| removed.runs(0..self.layout.pages())) {
            self.removed.insert_range(run.clone());
            self.settle(run);
        }
        for piece in &pieces {
            self.recall_piece(pagemap, piece).map_err(failed("the pagemap of the guest's process cannot be read"))?;
        }
        for piece in &pieces {
            let addresses = piece.address..piece.address.saturating_add(piece.bytes);
            uffd.wake(addresses).map_err(failed("those who wait cannot be woken"))?;
        }
        Ok(self.layout.pages().saturating_sub(self.absent_pages()))
    }

    fn recall_piece(&self, pagemap: &File, piece: &places::Piece) -> io::Result<()> {
        let mut buffer = vec![0; PIECE_BYTES];
        let all = self.all_places(piece.region);
        let (mut at, end) = (0, piece.bytes / SMALL);
        while at < end {
            let count = end.saturating_sub(at).min((PIECE_BYTES / 8) as u64);
            let bytes = buffer.get_mut(..size(count.saturating_mul(8))).unwrap_or_default();
            let entry = (piece.address / SMALL).saturating_add(at).saturating_mul(8);
            pagemap.read_exact_at(bytes, entry)?;
            let first = self.places_of(piece.region, piece.offset / SMALL..u64::MAX).start.saturating_add(at);
            let (entries, _) = bytes.as_chunks::<8>();
            for (place, entry) in (first..all.end).zip(entries) {
                if is_there(u64::from_ne_bytes(*entry)) {
                    self.settle(place..place.saturating_add(1));
                }
            }
            at = at.saturating_add(count);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_surely_there_counts() {
        assert!(is_there(PRESENT) && is_there(SWAPPED) && is_there(PRESENT | PROTECTED));
        assert!(!is_there(0) && !is_there(PROTECTED) && !is_there(SWAPPED | PROTECTED));
    }
}
