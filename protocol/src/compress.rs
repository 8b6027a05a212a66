//! zstd for the inline pages of a batch, whole or what differs from old ones: one independent frame a batch, output of an
//! exact known size.
//!
//! The size of what comes out is fixed by the PAGES frame before anything is decompressed, or has that as its limit, and
//! no more is ever written, so a bomb is a clean error. One context a worker, reused.

use crate::digest::PageBytes;
use crate::error::DecodeError;
use crate::words::{differ, patch};
use alloc::string::ToString;
use alloc::vec::Vec;
use zstd::zstd_safe::{CCtx, CParameter, DCtx, get_error_name, get_frame_content_size};

/// Compresses batches; keeps its context and buffer.
pub struct Compressor {
    context: zstd::bulk::Compressor<'static>,
    level: i32,
    /// Changed words before they are compressed.
    content: Vec<u8>,
}

impl Compressor {
    /// A compressor with nothing compressed yet.
    ///
    /// # Errors
    /// zstd cannot allocate its context.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { context: zstd::bulk::Compressor::new(1)?, level: 1, content: Vec::new() })
    }

    /// Makes `out` the zstd frame of `pages`; false, with anything in it, if it would not be smaller.
    pub fn compress(&mut self, pages: &[u8], level: i32, out: &mut Vec<u8>) -> bool {
        self.set_level(level) && shrinks(pages.len(), out, |out| self.context.compress_to_buffer(pages, out).ok())
    }

    /// Makes `out` the zstd frame of the words in which pages differ from `old`, as many one after the other; false, with
    /// anything in it, if they are not few.
    // SPEC 5.15
    pub fn compress_words<'a>(
        &mut self,
        pages: impl Iterator<Item = &'a PageBytes>,
        old: &[u8],
        out: &mut Vec<u8>,
    ) -> bool {
        differ(pages, old, old.len() / WORDS_SHARE, &mut self.content)
            && self.set_level(DELTA_LEVEL)
            && shrinks(old.len(), out, |out| self.context.compress_to_buffer(&self.content, out).ok())
    }

    fn set_level(&mut self, level: i32) -> bool {
        let is_set = self.level == level || self.context.set_compression_level(level).is_ok();
        self.level = if is_set { level } else { self.level };
        is_set
    }
}

/// Whether what `write` makes of `raw` bytes is in `out`, and smaller than they are.
fn shrinks(raw: usize, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>) -> Option<usize>) -> bool {
    out.clear();
    // There may be more room, from earlier batches; zstd gives up as soon as there is none.
    out.reserve(raw);
    write(out).is_some_and(|written| written > 0 && written < raw)
}

/// The level of deltas: a fast match finder is enough where most of a page is the old page.
const DELTA_LEVEL: i32 = 1;
/// Words travel where at most one in so many differs. Beyond that much has moved inside its page, too, and zstd with the
/// old pages as a prefix finds it, in twice the time.
const WORDS_SHARE: usize = 5;

/// Makes `out` the zstd frame of `pages` with the prefix `old`; false, with anything in it, if it would not be smaller
/// than they are. zstd is a tenth faster where `pages` lie right behind `old`. A prefix is bound to the context that knows
/// it, so each call has a context of its own.
pub fn compress_delta(pages: &[u8], old: &[u8], out: &mut Vec<u8>) -> bool {
    // The window reaches the front of the prefix, and a slot for each eight bytes remembers it: 256 KiB of them for 64
    // pages, which leaves room in a core's second cache. Twice as many find 2 % more and cost 5 to 10 % more time.
    let window = pages.len().saturating_add(old.len()).next_power_of_two().ilog2().clamp(10, 22);
    let slots = window.saturating_sub(3).max(10);
    let mut context = CCtx::create();
    let ready = context
        .set_parameter(CParameter::CompressionLevel(DELTA_LEVEL))
        .and_then(|_| context.set_parameter(CParameter::WindowLog(window)))
        .and_then(|_| context.set_parameter(CParameter::HashLog(slots)))
        .and_then(|_| context.ref_prefix(old));
    ready.is_ok() && shrinks(pages.len(), out, |out| context.compress2(out, pages).ok())
}

/// Fills `out` exactly from one zstd frame with the prefix `old`.
///
/// # Errors
/// Not one zstd frame with this prefix, or not of exactly that size.
pub fn decompress_delta(payload: &[u8], old: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    whole_frame(payload)?;
    let mut context = DCtx::create();
    let error = |code| DecodeError::Compressed(get_error_name(code).to_string());
    context.ref_prefix(old).map_err(error)?;
    let written = context.decompress(out, payload).map_err(error)?;
    exactly(written, out.len())
}

// SPEC 5.5
fn whole_frame(payload: &[u8]) -> Result<(), DecodeError> {
    let whole = zstd::zstd_safe::find_frame_compressed_size(payload).ok();
    if whole == Some(payload.len()) {
        return Ok(());
    }
    Err(DecodeError::Compressed("not one whole zstd frame".to_string()))
}

fn exactly(written: usize, expected: usize) -> Result<(), DecodeError> {
    if written == expected {
        return Ok(());
    }
    Err(DecodeError::Mismatch { field: "decompressed bytes", value: written as u64, expected: expected as u64 })
}

impl core::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Compressor").field("level", &self.level).finish_non_exhaustive()
    }
}

/// Decompresses batches; keeps its context and buffer.
pub struct Decompressor {
    context: zstd::bulk::Decompressor<'static>,
    content: Vec<u8>,
}

impl Decompressor {
    /// A decompressor. It works in one shot into a buffer of the exact size and so needs no window.
    ///
    /// # Errors
    /// zstd cannot allocate its context.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { context: zstd::bulk::Decompressor::new()?, content: Vec::new() })
    }

    /// Fills `out` exactly from one zstd frame.
    ///
    /// # Errors
    /// Not one zstd frame, or not of exactly that size.
    pub fn decompress(&mut self, payload: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        whole_frame(payload)?;
        let expected = out.len();
        let written = self
            .context
            .decompress_to_buffer(payload, out)
            .map_err(|error| DecodeError::Compressed(error.to_string()))?;
        exactly(written, expected)
    }

    /// Makes of `pages`, which are the old ones, the new ones, by one zstd frame of the words in which they differ.
    ///
    /// # Errors
    /// Not one zstd frame, one that does not say that its content is smaller than the pages, or not of what makes just
    /// so many pages. `pages` are as they were then.
    // SPEC 5.15
    pub fn decompress_words(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeError> {
        whole_frame(payload)?;
        let size = get_frame_content_size(payload).ok().flatten();
        let size = size.ok_or_else(|| DecodeError::Compressed("no content size".to_string()))?;
        let limit = pages.len().saturating_sub(1);
        let expected = usize::try_from(size).ok().filter(|&size| size <= limit);
        let expected = expected.ok_or(DecodeError::limit("content of changed words", size, limit as u64))?;
        self.content.resize(expected.max(self.content.len()), 0);
        let content = self.content.get_mut(..expected).unwrap_or_default();
        let written = self
            .context
            .decompress_to_buffer(payload, content)
            .map_err(|error| DecodeError::Compressed(error.to_string()))?;
        exactly(written, expected)?;
        patch(content, pages)
    }
}

impl core::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Decompressor(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compressed(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        assert!(Compressor::new().unwrap().compress(bytes, 1, &mut out));
        out
    }

    #[test]
    fn rejects_outputs_of_any_other_size() {
        let payload = compressed(&[5; 8192]);
        let mut decompressor = Decompressor::new().unwrap();
        for size in [0, 1, 4096, 8191, 8193, 16384] {
            assert!(decompressor.decompress(&payload, &mut alloc::vec![0; size]).is_err(), "{size}");
        }
        let mut out = [0; 8192];
        assert_eq!(decompressor.decompress(&payload, &mut out), Ok(()));
        assert_eq!(out, [5; 8192]);
    }

    #[test]
    fn rejects_bombs_and_trailing_bytes() {
        let mut decompressor = Decompressor::new().unwrap();
        let bomb = compressed(&alloc::vec![0; 64 << 20]);
        assert!(decompressor.decompress(&bomb, &mut [0; 4096]).is_err());
        let mut trailing = compressed(&[5; 4096]);
        trailing.push(0);
        assert!(decompressor.decompress(&trailing, &mut [0; 4096]).is_err());
        let twice = [compressed(&[5; 4096]), compressed(&[5; 4096])].concat();
        assert!(decompressor.decompress(&twice, &mut [0; 8192]).is_err());
    }

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()[7]
        };
        (0..bytes).map(|_| next()).collect()
    }

    #[test]
    fn a_delta_is_small_and_needs_the_very_prefix() {
        // As large as a frame can be: a delta must find what stands at the front of its prefix.
        for bytes in [4096, 256 << 10, 2 << 20] {
            let old = noise(bytes);
            let mut new = old.clone();
            new[1000] ^= 1;
            let (mut payload, mut back) = (Vec::new(), alloc::vec![0; bytes]);
            assert!(compress_delta(&new, &old, &mut payload));
            assert!(payload.len() < 64 + bytes / 1000, "{bytes} became {}", payload.len());
            assert_eq!(decompress_delta(&payload, &old, &mut back), Ok(()));
            assert_eq!(back, new);
            let other = alloc::vec![7; bytes];
            assert!(decompress_delta(&payload, &other, &mut back).is_err() || back != new);
            assert!(decompress_delta(&payload, &[], &mut back).is_err() || back != new);
            assert!(decompress_delta(&payload, &old, &mut alloc::vec![0; bytes - 1]).is_err());
            payload.push(0);
            assert!(decompress_delta(&payload, &old, &mut back).is_err());
        }
        assert!(!compress_delta(&noise(4096), &[5; 4096], &mut Vec::new()));
    }

    #[test]
    fn words_go_where_few_differ_and_come_back_over_the_old_pages() {
        let mut compressor = Compressor::new().unwrap();
        let mut decompressor = Decompressor::new().unwrap();
        for bytes in [4096, 256 << 10, 2 << 20] {
            let old = noise(bytes);
            let mut new = old.clone();
            new.chunks_mut(400).for_each(|part| part[0] ^= 1);
            let (mut payload, mut back) = (alloc::vec![9], old.clone());
            assert!(compressor.compress_words(new.as_chunks().0.iter(), &old, &mut payload));
            assert!(payload.len() < bytes / 20, "{bytes} became {}", payload.len());
            assert_eq!(decompressor.decompress_words(&payload, &mut back), Ok(()));
            assert!(back == new);
            let mut shorter = alloc::vec![0; bytes - 4096];
            assert!(decompressor.decompress_words(&payload, &mut shorter).is_err());
            payload.push(0);
            back.clone_from(&old);
            assert!(decompressor.decompress_words(&payload, &mut back).is_err(), "trailing byte");
            assert!(back == old, "untouched");
            new.chunks_mut(30).for_each(|part| part[0] ^= 1);
            assert!(!compressor.compress_words(new.as_chunks().0.iter(), &old, &mut payload), "more than one in five");
        }
    }

    /// What the frame itself says of its size is a limit before anything is written, and is held against what comes.
    #[test]
    fn words_that_are_bombs_or_do_not_say_how_large_they_are_write_nothing() {
        let mut decompressor = Decompressor::new().unwrap();
        let mut pages = [7; 8192];
        let mut unsized_frame = Vec::new();
        let mut context = CCtx::create();
        context.set_parameter(CParameter::ContentSizeFlag(false)).unwrap();
        unsized_frame.reserve(1000);
        context.compress2(&mut unsized_frame, &[0; 128]).unwrap();
        for payload in [compressed(&alloc::vec![0; 64 << 20]), compressed(&[0; 8192]), unsized_frame, Vec::new()] {
            assert!(decompressor.decompress_words(&payload, &mut pages).is_err());
            assert!(decompressor.content.is_empty(), "nothing was made room for");
        }
        // Content of 128 bytes in one block as it is, in a frame that says so, or one more or less.
        for stated in [127, 128, 129] {
            let mut lying = alloc::vec![0x28, 0xb5, 0x2f, 0xfd, 0x20, stated, 0x01, 0x04, 0x00];
            lying.resize(lying.len() + 128, 0);
            assert_eq!(decompressor.decompress_words(&lying, &mut pages).is_ok(), stated == 128, "{stated}");
        }
        assert_eq!(decompressor.decompress_words(&compressed(&[0; 128]), &mut pages), Ok(()));
        assert_eq!(pages, [7; 8192], "no word differs");
    }

    #[test]
    fn leaves_noise_alone() {
        assert!(!Compressor::new().unwrap().compress(&noise(4096), 1, &mut Vec::new()));
    }
}
