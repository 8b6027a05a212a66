//! The key of a session that may leave pages behind: who brings them in a new process digests them with it.
//!
//! One for each guest, of the last session: while an earlier one has pages to bring, no other begins. It is durable before
//! the session connects, and so before any HANDED that needs it, and goes when GONE or RETURNED is durable, or when the
//! session ends without a hand-over. The store may have it too, and may be gone by then.

use super::disk::Folder;
use super::{JournalError, KEY};
use pagewire_protocol::digest::record_check;
use pagewire_protocol::domain::LineageId;
use pagewire_store::Lineage;

const FIELDS: usize = 16 + 16 + 32;
const BYTES: usize = FIELDS + 32;

/// Puts the key of a session in place of that of the last one.
pub(super) fn put(folder: &Folder, session: [u8; 16], lineage: &Lineage) -> Result<(), JournalError> {
    let mut bytes = [session.as_slice(), &lineage.id.0, &lineage.key].concat();
    let check = record_check(&bytes);
    bytes.extend_from_slice(&check);
    folder.put(KEY, &bytes)
}

/// The key of a session; `None` if it had none of its own.
///
/// # Errors
/// What is there is not what was written: the session's pages cannot be digested.
pub(super) fn get(folder: &Folder, session: [u8; 16]) -> Result<Option<Lineage>, JournalError> {
    let Some(bytes) = folder.read(KEY.as_ref(), BYTES)? else { return Ok(None) };
    let damaged = || JournalError::Refused {
        path: folder.path().join(KEY),
        why: "is damaged: pages that a guest lacks cannot be digested without it",
    };
    let (fields, check) = bytes.split_at_checked(FIELDS).ok_or_else(damaged)?;
    if check != record_check(fields) {
        return Err(damaged());
    }
    let (of, rest) = fields.split_first_chunk::<16>().ok_or_else(damaged)?;
    let (id, key) = rest.split_first_chunk::<16>().ok_or_else(damaged)?;
    let key = key.try_into().map_err(|_| damaged())?;
    Ok((*of == session).then_some(Lineage { id: LineageId(*id), key }))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LINEAGE, OTHER, handover, says};
    use super::*;
    use crate::Journal;
    use crate::journal::{GuestJournal, hex};
    use pagewire_protocol::handover::{Handover, Input, Word};
    use std::path::PathBuf;

    fn lineage(byte: u8) -> Lineage {
        Lineage { id: LineageId([byte; 16]), key: [byte; 32] }
    }

    fn restored(journal: &Journal) -> GuestJournal {
        journal.guest(LINEAGE, None, true).unwrap()
    }

    fn file(journal: &Journal) -> PathBuf {
        journal.path().join(hex(&LINEAGE.0)).join(KEY)
    }

    /// A session that may leave pages behind has begun.
    fn begun(journal: &Journal, epoch: u64) -> (GuestJournal, Handover) {
        let handover = Handover { post_copy: true, ..handover(journal.host(), true, epoch) };
        let mut guest = restored(journal);
        assert_eq!(guest.open(handover.session), Ok(handover.epoch));
        guest.keep_key(handover.session, &lineage(2)).unwrap();
        (guest, handover)
    }

    fn hand_over(guest: &mut GuestJournal, handover: Handover) {
        guest.send(handover).unwrap();
        for input in [says(Word::Ready, handover), Input::Commit] {
            guest.handle(input);
        }
    }

    #[test]
    fn a_key_stays_as_long_as_pages_may_have_to_be_brought_and_no_longer() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("journal")).unwrap();
        // Nothing was handed over.
        let (mut guest, handover) = begun(&journal, 1);
        assert!(guest.handle(Input::Connected(OTHER)).is_empty() && file(&journal).exists(), "the session goes on");
        guest.close(handover.session);
        assert!(!file(&journal).exists());
        drop(guest);
        // It was killed before it handed anything over.
        drop(begun(&journal, 1));
        assert!(file(&journal).exists());
        drop(restored(&journal));
        assert!(!file(&journal).exists());
        // The receiver rejects it, whoever hears that.
        let (mut guest, handover) = begun(&journal, 1);
        hand_over(&mut guest, handover);
        drop(guest);
        let mut guest = restored(&journal);
        assert!(guest.key_of(handover.session).unwrap() == Some(lineage(2)), "it may have to be brought");
        guest.handle(says(Word::Reject, handover));
        assert!(!file(&journal).exists());
        drop(guest);
        // It runs there, and then has all.
        let (mut guest, handover) = begun(&journal, 2);
        hand_over(&mut guest, handover);
        guest.close(handover.session);
        guest.handle(says(Word::Started, handover));
        assert!(guest.serving() == Some(handover) && file(&journal).exists());
        drop(guest);
        let mut guest = restored(&journal);
        assert!(guest.key_of(handover.session).unwrap() == Some(lineage(2)), "it has to be brought");
        guest.handle(says(Word::Started, handover));
        guest.filled(handover);
        assert!(!file(&journal).exists());
    }

    #[test]
    fn a_key_is_that_of_the_last_session_or_none_and_never_another() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("journal")).unwrap();
        let mut guest = restored(&journal);
        let key_of = |guest: &GuestJournal, session: u8| guest.key_of([session; 16]);
        assert!(key_of(&guest, 7).unwrap().is_none());
        guest.keep_key([7; 16], &lineage(2)).unwrap();
        assert!(key_of(&guest, 7).unwrap() == Some(lineage(2)) && key_of(&guest, 8).unwrap().is_none());
        guest.keep_key([8; 16], &lineage(3)).unwrap();
        assert!(key_of(&guest, 8).unwrap() == Some(lineage(3)) && key_of(&guest, 7).unwrap().is_none());
        let status = journal.guests().unwrap().pop().unwrap();
        assert!(status.damaged.is_empty() && status.records.is_empty(), "it is a file of a journal");
        let path = file(&journal);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            for wrong in [&changed[..], &whole[..at], &[&whole[..], &[0]].concat()[..]] {
                std::fs::write(&path, wrong).unwrap();
                assert!(key_of(&guest, 8).is_err_and(|error| error.path() == Some(&path)), "byte {at}");
            }
        }
    }
}
