//! The digest that proves a PAGES frame.
//!
//! It covers what the pages of the frame are, however each is stated: a receiver that resolved every one as the sender
//! meant it finds the same value. Runs of pages of which the frame's table says all there is to know count once, so
//! that a few changed pages far from each other, or a gibibyte of zeros, cost nobody a digest for each page around them.
//! Of an agreed base that is so of its pages, too: both sides have proved its digests against one root.

use crate::digest::{CV_BYTES, Digest};
use crate::domain::DedupDomain;
use crate::frame::{EntryKind, Run};
use alloc::vec::Vec;

/// Bytes that are hashed at once: BLAKE3 hashes whole kibibytes side by side.
const PIECE_BYTES: usize = 64 * 1024;

/// A batch digest under construction.
#[derive(Debug)]
pub struct BatchHasher {
    hasher: blake3::Hasher,
    bytes: Vec<u8>,
    agreed: bool,
}

impl BatchHasher {
    /// Nothing yet; `agreed` says whether base pages are those of a manifest that both sides know.
    pub fn new(domain: &DedupDomain, agreed: bool) -> Self {
        Self { hasher: domain.batch.hasher(), bytes: Vec::new(), agreed }
    }

    /// The next run, with the digests of its pages; they are not looked at unless its pages [count](counts).
    // SPEC 3.6
    pub fn run(&mut self, run: Run, digests: &[Digest]) {
        if !counts(run.kind, self.agreed) {
            let mut value = [0; CV_BYTES];
            value.iter_mut().zip(run.encode()).for_each(|(byte, of_run)| *byte = of_run);
            return self.push(&value);
        }
        digests.iter().for_each(|digest| self.push(&digest.0));
    }

    /// The digest of the runs so far, of which the first begins at page `first`.
    pub fn finish(mut self, first: u64) -> Digest {
        self.hasher.update(&self.bytes);
        self.hasher.update(&first.to_le_bytes());
        Digest(*self.hasher.finalize().as_bytes())
    }

    fn push(&mut self, value: &[u8; CV_BYTES]) {
        self.bytes.extend_from_slice(value);
        if self.bytes.len() >= PIECE_BYTES {
            self.hasher.update(&self.bytes);
            self.bytes.clear();
        }
    }
}

/// Whether the digest of each page of an entry counts: what the page is depends on what somebody holds or sends.
pub fn counts(kind: EntryKind, agreed: bool) -> bool {
    match kind {
        EntryKind::ZERO | EntryKind::SKIPPED | EntryKind::ABSENT => false,
        EntryKind::BASE => !agreed,
        _ => true,
    }
}

/// The batch digest of `runs` from page `first`, with the digests of those of their pages that [count](counts), in order.
pub fn batch_digest(
    (domain, agreed): (&DedupDomain, bool),
    first: u64,
    runs: impl IntoIterator<Item = Run>,
    mut digests: &[Digest],
) -> Digest {
    let mut batch = BatchHasher::new(domain, agreed);
    for run in runs {
        let count = if counts(run.kind, agreed) { usize::from(run.count) } else { 0 };
        let (of_run, rest) = digests.split_at(count.min(digests.len()));
        batch.run(run, of_run);
        digests = rest;
    }
    batch.finish(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        let all = [
            EntryKind::ZERO,
            EntryKind::BASE,
            EntryKind::REFERENCE,
            EntryKind::INLINE,
            EntryKind::SHIFTED,
            EntryKind::SKIPPED,
            EntryKind::ABSENT,
        ];
        let run = (proptest::sample::select(all.to_vec()), 1u16..600).prop_map(|(kind, count)| Run { kind, count });
        proptest::collection::vec(run, 0..40)
    }

    proptest! {
        /// SPEC 3.6, written down as it stands there.
        #[test]
        fn is_what_the_specification_says(runs in runs(), first: u64, key: [u8; 32], agreed: bool) {
            let domain = DedupDomain::new(&key);
            let (mut digests, mut values) = (Vec::new(), Vec::new());
            for (at, run) in runs.iter().enumerate() {
                let digest = Digest([at as u8; 32]);
                let kinds = [(EntryKind::ZERO, 1), (EntryKind::BASE, 2), (EntryKind::SKIPPED, 6), (EntryKind::ABSENT, 7)];
                match kinds.iter().find(|(kind, _)| *kind == run.kind && (agreed || *kind != EntryKind::BASE)) {
                    Some((_, byte)) => {
                        let [low, high] = run.count.to_le_bytes();
                        values.extend([*byte, 0, low, high]);
                        values.extend([0; 28]);
                    }
                    None => (0..run.count).for_each(|_| {
                        values.extend(digest.0);
                        digests.push(digest);
                    }),
                }
            }
            values.extend(first.to_le_bytes());
            let expected = domain.batch.hash([values.as_slice()]);
            prop_assert_eq!(batch_digest((&domain, agreed), first, runs, &digests), expected);
        }
    }

    #[test]
    fn tells_runs_apart_that_only_the_table_tells_apart() {
        let domain = DedupDomain::public();
        let of = |runs: &[(EntryKind, u16)], first| {
            let runs = runs.iter().map(|&(kind, count)| Run { kind, count });
            batch_digest((&domain, true), first, runs, &[Digest([1; 32])])
        };
        let all = [
            of(&[(EntryKind::BASE, 1), (EntryKind::INLINE, 1), (EntryKind::SKIPPED, 2)], 0),
            of(&[(EntryKind::BASE, 2), (EntryKind::INLINE, 1), (EntryKind::SKIPPED, 1)], 0),
            of(&[(EntryKind::SKIPPED, 1), (EntryKind::INLINE, 1), (EntryKind::SKIPPED, 2)], 0),
            of(&[(EntryKind::SKIPPED, 2), (EntryKind::INLINE, 1), (EntryKind::SKIPPED, 1)], 0),
            of(&[(EntryKind::ABSENT, 2), (EntryKind::INLINE, 1), (EntryKind::SKIPPED, 1)], 0),
            of(&[(EntryKind::ZERO, 2), (EntryKind::INLINE, 1), (EntryKind::SKIPPED, 1)], 0),
            of(&[(EntryKind::ZERO, 2), (EntryKind::INLINE, 1), (EntryKind::SKIPPED, 1)], 1),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| one != other), "{at}");
        }
    }
}
