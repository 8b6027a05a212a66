//! Digests of 4 KiB pages: whole batches across SIMD lanes against BLAKE3's one-shot call, page after page.
//!
//! `cargo run --release -p pagewire-benches --bin digest` prints one row for each SIMD level of this machine. Both sides
//! hash the same pages in turn, so that a machine that slows down slows both; the medians and their ratio count. The
//! one-shot call always uses the widest level, so only that level's row is a fair pair; `--features avx2`, `sse41` or
//! `portable` takes the levels above away from both.

use pagewire_protocol::digest::{PageBytes, PageHasher};
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::page_buffer::PageBuffer;
use std::hint::black_box;
use std::time::Instant;

/// 1 MiB: the pages of a subtree, in cache as they are when a batch was just read.
const PAGES: usize = 256;
const PASSES: usize = 200;
const RUNS: usize = 11;

fn main() {
    let mut state = 1u64;
    let mut byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()[7]
    };
    // In the buffer that the engines read into, which begins at a page border.
    let mut buffer = PageBuffer::new(PAGES * std::mem::size_of::<PageBytes>());
    buffer.iter_mut().for_each(|slot| *slot = byte());
    let pages: &[PageBytes] = buffer.as_chunks().0;
    println!("| SIMD level | batch GB/s | one-shot GB/s | ratio | ratio min to max |");
    println!("|---|---|---|---|---|");
    for (level, hasher) in PageHasher::on_each_level(&DedupDomain::public()) {
        let batch = || {
            hasher.digest_pages(pages, |digest| {
                black_box(digest);
            })
        };
        let one_shot = || {
            pages.iter().for_each(|page| {
                black_box(blake3::keyed_hash(&[0; 32], page));
            })
        };
        time(batch);
        time(one_shot);
        let pairs: Vec<(f64, f64)> = (0..RUNS).map(|_| (time(batch), time(one_shot))).collect();
        let ratios = sorted(pairs.iter().map(|(batch, one_shot)| batch / one_shot));
        let (fastest, slowest) = (ratios.last().copied().unwrap_or(0.0), ratios.first().copied().unwrap_or(0.0));
        println!(
            "| {level} | {:.2} | {:.2} | {:.2} | {slowest:.2} to {fastest:.2} |",
            median(pairs.iter().map(|pair| pair.0)),
            median(pairs.iter().map(|pair| pair.1)),
            median(ratios.iter().copied()),
        );
    }
}

/// GB/s of a pass over all pages.
fn time(pass: impl Fn()) -> f64 {
    let begin = Instant::now();
    (0..PASSES).for_each(|_| pass());
    (PASSES * std::mem::size_of::<[PageBytes; PAGES]>()) as f64 / begin.elapsed().as_secs_f64() / 1e9
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let values = sorted(values);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
