//! A guest: a file that stands for its memory, and the small key-value workload that writes to it.

use anyhow::{Context, Result, ensure};
use pagewire::CancellationToken;
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

/// The guest works for a while: it writes `percent` of its pages in use anew, here and there. Returns how many.
pub(super) fn work(path: &Path, percent: u64, seed: u64, cancel: &CancellationToken) -> Result<u64> {
    let file = File::options().write(true).open(path)?;
    let pages = file.metadata()?.len() / PAGE as u64;
    let mut rewritten = 0;
    let mut text = Vec::with_capacity(PAGE);
    for page in (0..used(pages)).filter(|page| mixed(!seed, *page) % 100 < percent) {
        ensure!(!cancel.is_cancelled(), "stopped");
        text.clear();
        records(mixed(seed, page), &mut text);
        file.write_all_at(&text, page.saturating_mul(PAGE as u64))?;
        rewritten += 1;
    }
    file.sync_all()?;
    Ok(rewritten)
}

/// Compares two images page by page.
///
/// # Errors
/// They differ.
pub(super) fn compare(left: &Path, right: &Path, cancel: &CancellationToken) -> Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let (mut one, mut other) = (open(left)?, open(right)?);
    let (mut here, mut there) = (Vec::with_capacity(PIECE), Vec::with_capacity(PIECE));
    let mut first = 0;
    loop {
        ensure!(!cancel.is_cancelled(), "stopped");
        here.clear();
        there.clear();
        one.by_ref().take(PIECE as u64).read_to_end(&mut here)?;
        other.by_ref().take(PIECE as u64).read_to_end(&mut there)?;
        let (here, there) = (here.chunks(PAGE), there.chunks(PAGE));
        let pages = here.len();
        ensure!(pages == there.len(), "{} and {} have different lengths", left.display(), right.display());
        if let Some(page) = here.zip(there).position(|(here, there)| here != there) {
            let page = page.saturating_add(first);
            anyhow::bail!("page {page} of {} is not that of {}", right.display(), left.display());
        }
        if pages == 0 {
            return Ok(());
        }
        first = first.saturating_add(pages);
    }
}

fn used(pages: u64) -> u64 {
    pages - pages / UNTOUCHED_SHARE
}

/// A number that neighbours say nothing about.
fn mixed(seed: u64, page: u64) -> u64 {
    let mut state = seed.wrapping_add(page).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// Appends a page of records that a content number decides: text that compresses about as memory does.
fn records(content: u64, page: &mut Vec<u8>) {
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
    fn rewrites_the_share_it_is_told_and_a_difference_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (left, right, cancel) = (dir.path().join("left"), dir.path().join("right"), CancellationToken::new());
        create(&left, PAGES, 7, &cancel).unwrap();
        create(&right, PAGES, 7, &cancel).unwrap();
        compare(&left, &right, &cancel).unwrap();
        let rewritten = work(&right, 20, 8, &cancel).unwrap();
        assert!((150..230).contains(&rewritten), "{rewritten}");
        assert!(compare(&left, &right, &cancel).is_err());
        std::fs::copy(&left, &right).unwrap();
        let file = File::options().write(true).open(&right).unwrap();
        file.write_all_at(b"!", 700 * PAGE as u64 + 4095).unwrap();
        let why = compare(&left, &right, &cancel).unwrap_err().to_string();
        assert!(why.starts_with("page 700 of") && why.contains("right"), "{why}");
        std::fs::copy(&left, &right).unwrap();
        file.set_len(PAGES * PAGE as u64 - 1).unwrap();
        assert!(compare(&left, &right, &cancel).is_err(), "shorter by a byte");
    }

    #[test]
    fn stops_when_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = CancellationToken::new();
        cancel.cancel();
        assert!(create(&dir.path().join("memory"), PAGES, 1, &cancel).is_err());
    }
}
