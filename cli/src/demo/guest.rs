//! A guest's memory: the file that stands for it, what is in its pages, and whether two of them are equal.

use anyhow::{Context, Result, ensure};
use pagewire::CancellationToken;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub(super) const PAGE: usize = 4096;
/// Read or written at once.
const PIECE: usize = 256 * PAGE;
/// One page in so many, at the end, was never touched.
const UNTOUCHED_SHARE: u64 = 16;
/// One page in so many belongs to a library that is mapped more than once.
const LIBRARY_SHARE: u64 = 16;
/// Pages of that library.
const LIBRARY_PAGES: u64 = 16;

/// Pages that were written, and the number that decides what is in each.
pub(super) type Written = BTreeMap<u64, u64>;

/// Gives a guest its first memory.
pub(super) fn create(path: &Path, pages: u64, seed: u64, cancel: &CancellationToken) -> Result<()> {
    let file = File::options().write(true).create_new(true).open(path)?;
    file.set_len(pages.saturating_mul(PAGE as u64))?;
    let used = used(pages);
    let mut piece = Vec::with_capacity(PIECE);
    for page in 0..used {
        let library = page % LIBRARY_SHARE == LIBRARY_SHARE - 1;
        let content = if library { page / LIBRARY_SHARE % LIBRARY_PAGES } else { mixed(seed, page) };
        records(content, &mut piece);
        if piece.len() == PIECE || page + 1 == used {
            ensure!(!cancel.is_cancelled(), "stopped");
            let end = (page + 1).saturating_mul(PAGE as u64);
            file.write_all_at(&piece, end.saturating_sub(piece.len() as u64))?;
            piece.clear();
        }
    }
    // The time of a leg shall be that of the transfer: what the guest wrote is on the disk before.
    Ok(file.sync_all()?)
}

/// Compares two images page by page. Pages of `written` have to be in the right one what was written to them there.
///
/// # Errors
/// They differ.
pub(super) fn compare(left: &Path, right: &Path, written: &Written, cancel: &CancellationToken) -> Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let names = (left.display().to_string(), right.display().to_string());
    compare_readers((open(left)?, open(right)?), (&names.0, &names.1), written, cancel)
}

/// As [`compare`], whatever they are read from.
///
/// # Errors
/// They differ, or cannot be read.
pub(super) fn compare_readers(
    (mut one, mut other): (impl Read, impl Read),
    (left, right): (&str, &str),
    written: &Written,
    cancel: &CancellationToken,
) -> Result<()> {
    let (mut here, mut there) = (Vec::with_capacity(PIECE), Vec::with_capacity(PIECE));
    let (mut first, mut text) = (0, Vec::with_capacity(PAGE));
    loop {
        ensure!(!cancel.is_cancelled(), "stopped");
        here.clear();
        there.clear();
        one.by_ref().take(PIECE as u64).read_to_end(&mut here)?;
        other.by_ref().take(PIECE as u64).read_to_end(&mut there)?;
        ensure!(here.len() == there.len(), "{left} and {right} have different lengths");
        if here.is_empty() {
            return Ok(());
        }
        for (page, (here, there)) in (first..).zip(here.chunks(PAGE).zip(there.chunks(PAGE))) {
            let is_equal = match written.get(&page) {
                None => here == there,
                Some(content) => {
                    text.clear();
                    records(*content, &mut text);
                    text == there
                }
            };
            ensure!(is_equal, "page {page} of {right} is not that of {left}");
        }
        first = first.saturating_add((here.len() / PAGE) as u64);
    }
}

/// Pages that are in use, from the first on.
pub(super) fn used(pages: u64) -> u64 {
    pages - pages / UNTOUCHED_SHARE
}

/// A number that neighbours say nothing about.
pub(super) fn mixed(seed: u64, page: u64) -> u64 {
    let mut state = seed.wrapping_add(page).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// Appends a page of records that a content number decides: text that compresses about as memory does.
pub(super) fn records(content: u64, page: &mut Vec<u8>) {
    const WORDS: [&[u8; 6]; 8] =
        [b"digest", b"memory", b"guests", b"rounds", b"visits", b"images", b"region", b"switch"];
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let end = page.len() + PAGE;
    let mut state = content;
    while page.len() < end {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let word = WORDS.get((state >> 61) as usize).copied().unwrap_or(b"memory");
        let digit = |at: usize| usize::try_from(state >> (8 + 4 * at) & 15).ok().and_then(|digit| HEX.get(digit));
        let digits: [u8; 12] = std::array::from_fn(|at| digit(at).copied().unwrap_or(b'0'));
        page.extend_from_slice(b"{\"");
        page.extend_from_slice(word);
        page.extend_from_slice(b"\":\"0x");
        page.extend_from_slice(&digits);
        page.extend_from_slice(b"\"},\n");
    }
    page.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 1000;

    #[test]
    fn a_difference_is_named_and_what_was_written_is_looked_at_too() {
        let dir = tempfile::tempdir().unwrap();
        let (left, right, cancel) = (dir.path().join("left"), dir.path().join("right"), CancellationToken::new());
        create(&left, PAGES, 7, &cancel).unwrap();
        create(&right, PAGES, 7, &cancel).unwrap();
        let none = Written::new();
        compare(&left, &right, &none, &cancel).unwrap();
        let file = File::options().write(true).open(&right).unwrap();
        file.write_all_at(b"!", 700 * PAGE as u64 + 4095).unwrap();
        let why = compare(&left, &right, &none, &cancel).unwrap_err().to_string();
        assert!(why.starts_with("page 700 of") && why.contains("right"), "{why}");
        let written = Written::from([(700, 5)]);
        assert!(compare(&left, &right, &written, &cancel).is_err(), "that is not what was written");
        let mut text = Vec::new();
        records(5, &mut text);
        file.write_all_at(&text, 700 * PAGE as u64).unwrap();
        compare(&left, &right, &written, &cancel).unwrap();
        assert!(compare(&left, &left, &written, &cancel).is_err(), "nor is what was there before");
        std::fs::copy(&left, &right).unwrap();
        file.set_len(PAGES * PAGE as u64 - 1).unwrap();
        assert!(compare(&left, &right, &none, &cancel).is_err(), "shorter by a byte");
    }

    #[test]
    fn stops_when_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = CancellationToken::new();
        cancel.cancel();
        assert!(create(&dir.path().join("memory"), PAGES, 1, &cancel).is_err());
    }
}
