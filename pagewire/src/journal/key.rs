//! The key of a session that may leave pages behind: who brings them in a new process digests them with it.
//!
//! One for each guest, of the last session: while an earlier one has pages to bring, no other begins. It is durable before
//! the session connects, and so before any HANDED that needs it. The store may have it too, and may be gone by then.

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
    use super::*;
    use crate::Journal;

    #[test]
    fn a_key_is_that_of_the_last_session_or_none_and_never_another() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("journal")).unwrap();
        let guest = || journal.guest(LineageId([1; 16]), None, true).unwrap();
        let key_of = |session: u8| {
            let guest = guest();
            guest.key_of([session; 16])
        };
        let lineage = |byte: u8| Lineage { id: LineageId([byte; 16]), key: [byte; 32] };
        assert!(key_of(7).unwrap().is_none());
        guest().keep_key([7; 16], &lineage(2)).unwrap();
        assert!(key_of(7).unwrap() == Some(lineage(2)) && key_of(8).unwrap().is_none());
        guest().keep_key([8; 16], &lineage(3)).unwrap();
        assert!(key_of(8).unwrap() == Some(lineage(3)) && key_of(7).unwrap().is_none());
        let status = journal.guests().unwrap().pop().unwrap();
        assert!(status.damaged.is_empty() && status.records.is_empty(), "it is a file of a journal");
        let path = status.name.is_none().then(|| journal.path().join("01".repeat(16)).join(KEY)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            for wrong in [&changed[..], &whole[..at], &[&whole[..], &[0]].concat()[..]] {
                std::fs::write(&path, wrong).unwrap();
                assert!(key_of(8).is_err_and(|error| error.path() == Some(&path)), "byte {at}");
            }
        }
    }
}
