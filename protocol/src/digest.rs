//! Digests of pages: the only place that hashes.
//!
//! A digest is BLAKE3 of one page, keyed by its dedup domain. Pages are hashed in whole batches, one page per SIMD lane,
//! which is two to three times the rate of hashing one after the other and yields the very same digests (a property
//! test holds them equal on every SIMD level of the machine). `blake3::platform` is public but undocumented: nothing
//! outside this file may use it, and the manifest caps the version.

use crate::domain::DedupDomain;
use crate::limits::{PAGE_BYTES, SUBTREE_PAGES};
use alloc::vec;
use alloc::vec::Vec;
use blake3::IncrementCounter;
use blake3::platform::Platform;

/// The keyed BLAKE3 digest of one page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub [u8; 32]);

impl core::fmt::Debug for Digest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl core::fmt::Display for Digest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Debug::fmt(self, f)
    }
}

/// The digests of a whole subtree.
pub(crate) type SubtreeBytes = [u8; SUBTREE_DIGEST_BYTES];

/// One page, whole.
pub type PageBytes = [u8; PAGE_BYTES];

/// A hashing key in the two shapes BLAKE3 takes it in.
#[derive(Clone)]
pub(crate) struct Key {
    bytes: [u8; 32],
    words: [u32; 8],
}

impl Key {
    pub(crate) fn new(bytes: [u8; 32]) -> Self {
        Self { bytes, words: blake3::platform::words_from_le_bytes_32(&bytes) }
    }

    /// A keyed hash of what is to come.
    pub(crate) fn hasher(&self) -> blake3::Hasher {
        blake3::Hasher::new_keyed(&self.bytes)
    }

    /// The keyed hash of the concatenation of `parts`.
    pub(crate) fn hash<'a>(&self, parts: impl IntoIterator<Item = &'a [u8]>) -> Digest {
        let mut hasher = self.hasher();
        for part in parts {
            hasher.update(part);
        }
        Digest(*hasher.finalize().as_bytes())
    }
}

// BLAKE3's block flags (its paper, §2.2); a page is four chunks below two parents below the root.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;
const CHUNK_BYTES: usize = 1024;
/// The most chunks of what is hashed side by side: a page has four, the digests of a subtree eight.
const CHUNKS_MAX: usize = 8;
/// Bytes of the digests below a lowest node of a tree.
const SUBTREE_DIGEST_BYTES: usize = SUBTREE_PAGES * CV_BYTES;
pub(crate) const CV_BYTES: usize = 32;

/// Pages hashed side by side: the widest SIMD degree BLAKE3 has.
const LANES: usize = 16;
/// Pages that are looked at before they are hashed: 128 KiB.
const PIECE_PAGES: usize = 32;
/// Below this many pages a batch leaves so many lanes empty that one page after the other is faster.
const BATCH_MIN: usize = 4;

/// The digest of a single page.
pub fn page_digest(domain: &DedupDomain, page: &PageBytes) -> Digest {
    domain.page.hash([page.as_slice()])
}

/// Hashes pages of one domain in batches.
#[derive(Clone, Debug)]
pub struct PageHasher {
    domain: DedupDomain,
    platform: Platform,
    zero: Digest,
}

impl PageHasher {
    /// A hasher for `domain` on the widest SIMD level this machine has.
    pub fn new(domain: &DedupDomain) -> Self {
        Self::on(domain, Platform::detect())
    }

    /// A hasher for each SIMD level this machine has, by name, for tests and benchmarks.
    pub fn on_each_level(domain: &DedupDomain) -> Vec<(&'static str, Self)> {
        let mut levels = vec![("portable", Platform::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let known = [("sse4.1", Platform::sse41()), ("avx2", Platform::avx2()), ("avx512", Platform::avx512())];
            levels.extend(known.into_iter().filter_map(|(name, platform)| Some((name, platform?))));
        }
        levels.into_iter().map(|(name, platform)| (name, Self::on(domain, platform))).collect()
    }

    fn on(domain: &DedupDomain, platform: Platform) -> Self {
        Self { zero: page_digest(domain, &[0; PAGE_BYTES]), domain: domain.clone(), platform }
    }

    /// The domain.
    pub fn domain(&self) -> &DedupDomain {
        &self.domain
    }

    /// The digest of the page of zeros.
    pub fn zero(&self) -> Digest {
        self.zero
    }

    /// Hands the digest of each page of `pages` to `each`, in order.
    pub fn digest_pages<'a>(&self, pages: impl IntoIterator<Item = &'a PageBytes>, each: impl FnMut(Digest)) {
        self.hash_pages(&self.domain.page, pages, each);
    }

    /// Hands the hash of each page under `key` to `each`, in order.
    pub(crate) fn hash_pages<'a>(
        &self,
        key: &Key,
        pages: impl IntoIterator<Item = &'a PageBytes>,
        mut each: impl FnMut(Digest),
    ) {
        let mut pages = pages.into_iter();
        let mut batch: [&PageBytes; LANES] = [&[0; PAGE_BYTES]; LANES];
        loop {
            let mut filled = 0;
            for (slot, page) in batch.iter_mut().zip(&mut pages) {
                *slot = page;
                filled += 1;
            }
            self.hash_batch(key, &mut batch, filled, &mut each);
            if filled < LANES {
                return;
            }
        }
    }

    /// Appends the digest of each page to `digests`; pages of zeros are recognised and not hashed.
    pub fn digest_nonzero(&self, pages: &[PageBytes], digests: &mut Vec<Digest>) {
        let start = digests.len();
        digests.resize(start.saturating_add(pages.len()), self.zero);
        let nonzero = |(_, page): &(usize, &PageBytes)| !is_zero(page.as_slice());
        // Judged once, in pieces that stay in cache between the look and the hash.
        for (piece, pages) in pages.chunks(PIECE_PAGES).enumerate() {
            let mut filled = [0usize; PIECE_PAGES];
            let mut count = 0;
            for (slot, (at, _)) in filled.iter_mut().zip(pages.iter().enumerate().filter(nonzero)) {
                *slot = at;
                count += 1;
            }
            let first = start.saturating_add(piece.saturating_mul(PIECE_PAGES));
            let filled = filled.get(..count).unwrap_or_default();
            let mut places = filled.iter();
            self.digest_pages(filled.iter().filter_map(|&at| pages.get(at)), |digest| {
                let slot = places.next().and_then(|at| digests.get_mut(first.saturating_add(*at)));
                slot.into_iter().for_each(|slot| *slot = digest);
            });
        }
    }

    /// Hashes the first `filled` pages of `batch`; the rest is padding and may be overwritten.
    fn hash_batch<'a>(
        &self,
        key: &Key,
        batch: &mut [&'a PageBytes; LANES],
        filled: usize,
        each: &mut impl FnMut(Digest),
    ) {
        if filled < BATCH_MIN {
            batch.iter().take(filled).for_each(|page| each(key.hash([page.as_slice()])));
            return;
        }
        let width = filled.next_power_of_two().clamp(BATCH_MIN, LANES);
        let first: &'a PageBytes = batch[0];
        batch[filled..].fill(first);
        let mut out = [[0; CV_BYTES]; LANES];
        self.hash_side_by_side::<PAGE_BYTES>(key, &batch[..width], &mut out[..width]);
        out.iter().take(filled).for_each(|cv| each(Digest(*cv)));
    }

    /// Hands the digest of each whole subtree to `each`, in order: the nodes over 256 digests each.
    pub(crate) fn digest_subtrees(&self, subtrees: &[&SubtreeBytes], mut each: impl FnMut(Digest)) {
        let mut rest = subtrees.chunks_exact(LANES);
        for batch in rest.by_ref() {
            let mut out = [[0; CV_BYTES]; LANES];
            self.hash_side_by_side(&self.domain.subtree, batch, &mut out);
            out.iter().for_each(|cv| each(Digest(*cv)));
        }
        rest.remainder().iter().for_each(|bytes| each(self.domain.subtree.hash([bytes.as_slice()])));
    }

    /// The BLAKE3 trees of inputs of equal length (up to [`CHUNKS_MAX`] chunks, a power of two), level by level: all first
    /// chunks, all second ones, …, then parents, and parents of these.
    fn hash_side_by_side<const N: usize>(&self, key: &Key, inputs: &[&[u8; N]], out: &mut [[u8; CV_BYTES]]) {
        let (width, chunks) = (inputs.len(), N / CHUNK_BYTES);
        // The chaining values of one input lie in a row, so two by two they are its parents' blocks.
        let mut level = [[0u8; CV_BYTES]; CHUNKS_MAX * LANES];
        for chunk in 0..chunks {
            let at = chunk * CHUNK_BYTES;
            let mut blocks: [&[u8; CHUNK_BYTES]; LANES] = [&[0; CHUNK_BYTES]; LANES];
            for (block, input) in blocks.iter_mut().zip(inputs) {
                if let Some(bytes) = input.get(at..).and_then(<[u8]>::first_chunk) {
                    *block = bytes;
                }
            }
            let mut cvs = [[0u8; CV_BYTES]; LANES];
            let edge = (CHUNK_START, CHUNK_END);
            self.pass(key, &blocks[..width], chunk as u64, 0, edge, cvs[..width].as_flattened_mut());
            level.iter_mut().skip(chunk).step_by(chunks).zip(cvs).for_each(|(slot, cv)| *slot = cv);
        }
        let mut count = chunks * width;
        while count > width {
            count /= 2;
            let mut parents: [&[u8; 2 * CV_BYTES]; CHUNKS_MAX / 2 * LANES] =
                [&[0; 2 * CV_BYTES]; CHUNKS_MAX / 2 * LANES];
            for (block, bytes) in parents.iter_mut().zip(level.as_flattened().as_chunks().0) {
                *block = bytes;
            }
            let flags = if count == width { PARENT | ROOT } else { PARENT };
            let mut cvs = [[0u8; CV_BYTES]; CHUNKS_MAX / 2 * LANES];
            self.pass(key, &parents[..count], 0, flags, (0, 0), cvs[..count].as_flattened_mut());
            level[..count].copy_from_slice(&cvs[..count]);
        }
        out.copy_from_slice(&level[..width]);
    }

    fn pass<const N: usize>(
        &self,
        key: &Key,
        inputs: &[&[u8; N]],
        counter: u64,
        flags: u8,
        (start, end): (u8, u8),
        out: &mut [u8],
    ) {
        let words = &key.words;
        self.platform.hash_many(inputs, words, counter, IncrementCounter::No, KEYED_HASH | flags, start, end, out);
    }
}

/// Whether every byte is zero. Looks at the front first, where most pages that hold data already differ.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, tail) = bytes.as_chunks::<16>();
    let (blocks, rest) = words.as_chunks::<16>();
    // Blocks of 256 bytes: wide enough for the compiler to use whole vectors, short enough to stop early.
    let zero = |chunk: &[u8; 16]| u128::from_ne_bytes(*chunk);
    blocks.iter().all(|block| block.iter().fold(0, |all, word| all | zero(word)) == 0)
        && rest.iter().all(|word| zero(word) == 0)
        && tail.iter().all(|&byte| byte == 0)
}

/// The digest both sides compare to know that nobody changed either HELLO on the way.
pub fn transcript_digest(sender_hello: &[u8], receiver_hello: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key("pagewire 1 transcript");
    hasher.update(&(sender_hello.len() as u64).to_le_bytes());
    hasher.update(sender_hello);
    hasher.update(receiver_hello);
    Digest(*hasher.finalize().as_bytes())
}

/// What a record of a hand-over ends with: damage is found, and nothing is proven.
pub fn record_check(bytes: &[u8]) -> [u8; 32] {
    blake3::derive_key("pagewire 1 hand-over record", bytes)
}

/// What a part of a trace ends with, over two pieces in a row: damage is found, and nothing is proven.
pub fn trace_check(first: &[u8], second: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new_derive_key("pagewire 1 trace");
    hasher.update(first);
    hasher.update(second);
    hasher.finalize().as_bytes().first_chunk().copied().unwrap_or([0; 8])
}

/// What a joining connection shows to prove that it knows the session's secret.
pub fn join_proof(secret: &[u8; 32], session: &[u8; 16], lane: u8) -> Digest {
    let mut hasher = blake3::Hasher::new_keyed(secret);
    hasher.update(b"pagewire 1 join");
    hasher.update(session);
    hasher.update(&[lane]);
    Digest(*hasher.finalize().as_bytes())
}

// SPEC 3.8
/// Compares two proofs in constant time.
pub fn proofs_equal(left: &Digest, right: &Digest) -> bool {
    blake3::Hash::from_bytes(left.0) == blake3::Hash::from_bytes(right.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        // SPEC 3.2
        fn batches_equal_the_one_shot_call_on_every_simd_level(key: [u8; 32], seed: u64, count in 0usize..40) {
            let domain = DedupDomain::new(&key);
            let mut state = seed | 1;
            let pages: Vec<PageBytes> = (0..count).map(|_| core::array::from_fn(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_le_bytes()[7]
            })).collect();
            let page_key = blake3::derive_key("pagewire 1 page digest", &key);
            let expected: Vec<Digest> = pages.iter().map(|page| Digest(*blake3::keyed_hash(&page_key, page).as_bytes())).collect();
            for (level, hasher) in PageHasher::on_each_level(&domain) {
                let mut got = Vec::new();
                hasher.digest_pages(&pages, |digest| got.push(digest));
                prop_assert_eq!(&got, &expected, "{}", level);
            }
        }

        #[test]
        fn every_level_of_simd_agrees_with_the_one_shot_call_on_subtrees(seed: u64, count in 0usize..40) {
            let domain = DedupDomain::public();
            let mut state = seed | 1;
            let subtrees: Vec<SubtreeBytes> = (0..count).map(|_| core::array::from_fn(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_le_bytes()[7]
            })).collect();
            let key = blake3::derive_key("pagewire 1 subtree", &[0; 32]);
            let expected: Vec<Digest> = subtrees.iter().map(|bytes| Digest(*blake3::keyed_hash(&key, bytes).as_bytes())).collect();
            for (level, hasher) in PageHasher::on_each_level(&domain) {
                let mut got = Vec::new();
                hasher.digest_subtrees(&subtrees.iter().collect::<Vec<_>>(), |digest| got.push(digest));
                prop_assert_eq!(&got, &expected, "{}", level);
            }
        }

        #[test]
        fn zero_is_zero_only(len in 0usize..600, at in 0usize..600, byte in 1u8..) {
            let mut bytes = alloc::vec![0u8; len];
            prop_assert!(is_zero(&bytes));
            if let Some(one) = bytes.get_mut(at) {
                *one = byte;
                prop_assert!(!is_zero(&bytes));
            }
        }
    }

    #[test]
    fn domains_and_purposes_do_not_compare() {
        let page = [7; PAGE_BYTES];
        let one = page_digest(&DedupDomain::new(&[1; 32]), &page);
        assert_ne!(one, page_digest(&DedupDomain::new(&[2; 32]), &page));
        let domain = DedupDomain::new(&[1; 32]);
        assert_ne!(domain.node.hash([page.as_slice()]), one);
    }
}
