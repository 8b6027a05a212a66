//! What differs between pages and what they were before, word by word: a bit for each word, and the words that are new.
//!
//! A guest that runs changes words, not pages: a pointer, a counter, an object. Comparing each page with its old version
//! finds that at the speed of memory. It does not find what has moved inside its page; where much has, zstd with the old
//! pages as a prefix makes less of it (`compress`).

use crate::digest::PageBytes;
use crate::error::DecodeError;
use crate::limits::PAGE_BYTES;
use alloc::vec::Vec;

/// What is compared and replaced at once.
const WORD_BYTES: usize = 8;
/// The bits of a page's words.
const MASK_BYTES: usize = PAGE_BYTES / WORD_BYTES / 8;

/// Writes to `content` what makes `pages` of `old`, as many pages one after the other: the masks of all of them, then the
/// words that changed. False, with anything in it, if these words are more than `most` bytes.
// SPEC 5.15
pub fn differ<'a>(pages: impl Iterator<Item = &'a PageBytes>, old: &[u8], most: usize, content: &mut Vec<u8>) -> bool {
    let masks = old.as_chunks::<PAGE_BYTES>().0.len().saturating_mul(MASK_BYTES);
    content.clear();
    content.resize(masks, 0);
    // As many words at a time as a mask of 64 bits has.
    let parts = pages.flat_map(|page| page.as_chunks().0).zip(old.as_chunks().0);
    for (at, (new, old)) in parts.enumerate() {
        let mask = changed_words(new, old);
        if let Some(space) = content.as_chunks_mut().0.get_mut(at) {
            *space = mask.to_le_bytes();
        }
        for (first, count) in ones(mask) {
            let end = first.saturating_add(count);
            content.extend_from_slice(new.get(first * WORD_BYTES..end * WORD_BYTES).unwrap_or_default());
        }
        if content.len().saturating_sub(masks) > most {
            return false;
        }
    }
    true
}

/// A bit for each word, the first lowest: whether it differs.
fn changed_words(new: &[u8; 64 * WORD_BYTES], old: &[u8; 64 * WORD_BYTES]) -> u64 {
    // Eight words at a time are what compilers make one vector comparison of.
    let bytes = new.as_chunks::<64>().0.iter().zip(old.as_chunks::<64>().0).map(|(new, old)| {
        let words = new.as_chunks::<WORD_BYTES>().0.iter().zip(old.as_chunks::<WORD_BYTES>().0);
        words.enumerate().fold(0u64, |mask, (at, (new, old))| mask | u64::from(new != old) << at)
    });
    bytes.enumerate().fold(0, |mask, (at, byte)| mask | byte << (8 * at))
}

/// The runs of bits that are set, the lowest first: where each begins, and how long it is.
fn ones(mut mask: u64) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0usize;
    core::iter::from_fn(move || {
        let (skip, first) = (mask.trailing_zeros(), at.saturating_add(mask.trailing_zeros() as usize));
        mask = mask.unbounded_shr(skip);
        let count = mask.trailing_ones();
        mask = mask.unbounded_shr(count);
        at = first.saturating_add(count as usize);
        (count > 0).then_some((first, count as usize))
    })
}

/// Makes of `pages`, which are the old ones, what `content` says.
///
/// # Errors
/// `content` has more or fewer bytes than its masks ask for. `pages` are as they were then.
// SPEC 5.15
pub fn patch(content: &[u8], pages: &mut [u8]) -> Result<(), DecodeError> {
    let pages = pages.as_chunks_mut::<PAGE_BYTES>().0;
    let (masks, mut words) = content.split_at_checked(pages.len() * MASK_BYTES).unwrap_or((content, &[]));
    let masks = || masks.as_chunks().0.iter().map(|mask| u64::from_le_bytes(*mask));
    let changed = masks().fold(0usize, |sum, mask| sum.saturating_add(mask.count_ones() as usize));
    let expected = pages.len().saturating_mul(MASK_BYTES).saturating_add(changed.saturating_mul(WORD_BYTES));
    if content.len() != expected {
        let (value, expected) = (content.len() as u64, expected as u64);
        return Err(DecodeError::Mismatch { field: "bytes of masks and changed words", value, expected });
    }
    let parts = pages.as_flattened_mut().as_chunks_mut::<{ 64 * WORD_BYTES }>().0;
    for (part, mask) in parts.iter_mut().zip(masks()) {
        for (first, count) in ones(mask) {
            let end = first.saturating_add(count);
            let space = part.get_mut(first * WORD_BYTES..end * WORD_BYTES).unwrap_or_default();
            if let Some((new, later)) = words.split_at_checked(space.len()) {
                space.copy_from_slice(new);
                words = later;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    fn content(new: &[u8], old: &[u8]) -> Vec<u8> {
        let mut content = vec![1];
        assert!(differ(new.as_chunks().0.iter(), old, new.len(), &mut content));
        content
    }

    /// SPEC 5.15, by its example.
    #[test]
    fn is_the_example_of_the_specification() {
        let spec = include_str!("../../docs/SPEC.md");
        let (old, mut new) = ([0; 2 * PAGE_BYTES], [0; 2 * PAGE_BYTES]);
        new[8] = 1;
        new[16..24].copy_from_slice(b"pagewire");
        new[2 * PAGE_BYTES - 1] = 2;
        let content = content(&new, &old);
        assert_eq!(content.len(), 2 * MASK_BYTES + 3 * WORD_BYTES);
        let hex: alloc::string::String = content.iter().map(|byte| alloc::format!("{byte:02x}")).collect();
        let (first, last) = (hex.get(..16).unwrap(), hex.get(hex.len() - 64..).unwrap());
        assert!(hex.get(16..hex.len() - 64).unwrap().bytes().all(|digit| digit == b'0'));
        assert!(spec.contains(&alloc::format!("`{first}`, 112 zero bytes,\n`{last}`")), "{first} {last}");
    }

    #[test]
    fn rejects_content_of_any_other_length_and_leaves_pages_alone() {
        let old = vec![7; 3 * PAGE_BYTES];
        let mut new = old.clone();
        new[5000] = 8;
        let right = content(&new, &old);
        for length in (0..right.len()).chain([right.len() + 1, right.len() + WORD_BYTES]) {
            let mut wrong = right.clone();
            wrong.resize(length, 0);
            let mut pages = old.clone();
            assert!(patch(&wrong, &mut pages).is_err(), "{length}");
            assert_eq!(pages, old, "{length}");
        }
        let mut all = vec![0xff; MASK_BYTES];
        assert!(patch(&all, &mut [0; PAGE_BYTES]).is_err());
        all.resize(MASK_BYTES + PAGE_BYTES, 3);
        let mut page = [0; PAGE_BYTES];
        assert_eq!(patch(&all, &mut page), Ok(()));
        assert_eq!(page, [3; PAGE_BYTES]);
    }

    #[test]
    fn is_given_up_when_too_much_differs() {
        let mut content = Vec::new();
        let mut new = vec![0; 2 * PAGE_BYTES];
        let old = new.clone();
        new[..80].fill(1);
        for (most, is_enough) in [(79, false), (80, true)] {
            assert_eq!(differ(new.as_chunks().0.iter(), &old, most, &mut content), is_enough, "{most}");
        }
        assert!(differ(old.as_chunks().0.iter(), &old, 0, &mut content));
        assert_eq!(content, [0; 2 * MASK_BYTES]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_differs_makes_the_new_pages_of_the_old(
            pages in 1usize..5,
            changes in proptest::collection::vec((any::<u16>(), 0usize..200, any::<u8>()), 0..40),
            seed in any::<u8>(),
        ) {
            let old: Vec<u8> = (0..pages * PAGE_BYTES).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect();
            let mut new = old.clone();
            for (at, length, value) in changes {
                let at = usize::from(at) % new.len();
                let end = (at + length).min(new.len());
                new[at..end].fill(value);
            }
            let differing = new.chunks(WORD_BYTES).zip(old.chunks(WORD_BYTES)).filter(|(new, old)| new != old).count();
            let content = content(&new, &old);
            prop_assert_eq!(content.len(), pages * MASK_BYTES + differing * WORD_BYTES);
            let mut back = old;
            prop_assert_eq!(patch(&content, &mut back), Ok(()));
            prop_assert!(back == new);
        }
    }
}
