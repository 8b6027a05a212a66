//! zstd for the inline pages of a batch: one independent frame a batch, output of an exact known size.
//!
//! The size of what comes out is fixed by the PAGES frame before anything is decompressed and the buffer is exactly
//! that large, so a bomb is a clean error. One context a worker, reused.

use crate::error::DecodeError;
use alloc::string::ToString;
use alloc::vec::Vec;
use zstd::zstd_safe::{CCtx, CParameter, DCtx, get_error_name};

/// Compresses batches; keeps its context.
pub struct Compressor {
    context: zstd::bulk::Compressor<'static>,
    level: i32,
}

impl Compressor {
    /// A compressor with nothing compressed yet.
    ///
    /// # Errors
    /// zstd cannot allocate its context.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { context: zstd::bulk::Compressor::new(1)?, level: 1 })
    }

    /// Appends the zstd frame of `pages` to `out`; false, with `out` as it was, if it would not be smaller.
    pub fn compress(&mut self, pages: &[u8], level: i32, out: &mut Vec<u8>) -> bool {
        if self.level != level && self.context.set_compression_level(level).is_err() {
            return false;
        }
        self.level = level;
        let start = out.len();
        out.resize(start.saturating_add(pages.len()), 0);
        let Some(space) = out.get_mut(start..) else { return false };
        // A destination smaller than the source makes zstd stop as soon as it does not pay.
        let written = self.context.compress_to_buffer(pages, space).ok().filter(|&written| written < pages.len());
        out.truncate(start.saturating_add(written.unwrap_or(0)));
        written.is_some()
    }
}

/// The level of deltas: a fast match finder is enough where most of a page is the old page.
const DELTA_LEVEL: i32 = 1;

/// Appends the zstd frame of `pages` with the prefix `old` to `out`; false, with `out` as it was, if it would not be
/// smaller than `most` bytes. A prefix is bound to the context that knows it, so each call has a context of its own.
pub fn compress_delta(pages: &[u8], old: &[u8], most: usize, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    out.resize(start.saturating_add(most.min(pages.len())), 0);
    let Some(space) = out.get_mut(start..) else { return false };
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
    let written = ready.and_then(|_| context.compress2(space, pages)).ok().filter(|&written| written < pages.len());
    out.truncate(start.saturating_add(written.unwrap_or(0)));
    written.is_some()
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

/// Decompresses batches; keeps its context.
pub struct Decompressor {
    context: zstd::bulk::Decompressor<'static>,
}

impl Decompressor {
    /// A decompressor. It works in one shot into a buffer of the exact size and so needs no window.
    ///
    /// # Errors
    /// zstd cannot allocate its context.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { context: zstd::bulk::Decompressor::new()? })
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
            assert!(compress_delta(&new, &old, bytes, &mut payload));
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
        let mut out = alloc::vec![9];
        assert!(!compress_delta(&noise(4096), &[5; 4096], 4096, &mut out));
        assert_eq!(out, [9]);
    }

    #[test]
    fn leaves_noise_alone() {
        let noise = noise(4096);
        let mut out = alloc::vec![9];
        assert!(!Compressor::new().unwrap().compress(&noise, 1, &mut out));
        assert_eq!(out, [9]);
    }
}
