//! What a sender shows before it gets a page of another guest: that it has the page's bytes, and not its digest alone.
//!
//! The receiver's terms carry random bytes; from them, the session and the domain comes a key that was never used before.
//! A page's proof is half of its keyed hash under it: nobody has it who does not have the page, and it travels beside
//! the digest, so that it costs no round trip.

use crate::digest::{Key, PageBytes, PageHasher};

/// The proof of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageProof(pub [u8; 16]);

/// The key of one session's proofs.
#[derive(Clone)]
pub struct Challenge(Key);

impl Challenge {
    /// The challenge of a receiver's random bytes in a session over the domain of a key.
    // SPEC 3.10
    pub fn new(random: &[u8; 32], session: &[u8; 16], domain_key: &[u8; 32]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("pagewire 1 page proof");
        hasher.update(random).update(session).update(domain_key);
        Self(Key::new(*hasher.finalize().as_bytes()))
    }

    /// The proof of a single page.
    pub fn prove(&self, page: &PageBytes) -> PageProof {
        PageProof::of(self.0.hash([page.as_slice()]).0)
    }

    /// Hands the proof of each page to `each`, in order; they are hashed side by side.
    pub fn prove_pages<'a>(
        &self,
        hasher: &PageHasher,
        pages: impl IntoIterator<Item = &'a PageBytes>,
        mut each: impl FnMut(PageProof),
    ) {
        hasher.hash_pages(&self.0, pages, |hash| each(PageProof::of(hash.0)));
    }

    /// Whether `proof` is that of a page; compared in constant time.
    pub fn holds(&self, page: &PageBytes, proof: &PageProof) -> bool {
        let whole = |proof: &PageProof| {
            let mut bytes = [0; 32];
            bytes.iter_mut().zip(proof.0).for_each(|(to, from)| *to = from);
            blake3::Hash::from_bytes(bytes)
        };
        whole(&self.prove(page)) == whole(proof)
    }
}

impl core::fmt::Debug for Challenge {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Challenge(..)")
    }
}

impl PageProof {
    fn of(hash: [u8; 32]) -> Self {
        Self(hash.first_chunk().copied().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::page_digest;
    use crate::domain::DedupDomain;
    use alloc::vec::Vec;

    #[test]
    fn proofs_of_a_batch_are_those_of_its_pages_on_every_simd_level() {
        let challenge = Challenge::new(&[1; 32], &[2; 16], &[3; 32]);
        let pages: Vec<PageBytes> = (0..37).map(|page| [page; 4096]).collect();
        let expected: Vec<PageProof> = pages.iter().map(|page| challenge.prove(page)).collect();
        for (level, hasher) in PageHasher::on_each_level(&DedupDomain::public()) {
            for count in 0..=pages.len() {
                let mut proofs = Vec::new();
                challenge.prove_pages(&hasher, &pages[..count], |proof| proofs.push(proof));
                assert_eq!(proofs, expected[..count], "{level}");
            }
        }
        assert!(pages.iter().zip(&expected).all(|(page, proof)| challenge.holds(page, proof)));
        assert!(!challenge.holds(&pages[0], &expected[1]));
    }

    #[test]
    fn a_proof_of_another_challenge_session_domain_or_purpose_is_none() {
        let page = [5; 4096];
        let proof = Challenge::new(&[1; 32], &[2; 16], &[3; 32]).prove(&page);
        for (random, session, key) in [(4, 2, 3), (1, 4, 3), (1, 2, 4)] {
            assert!(!Challenge::new(&[random; 32], &[session; 16], &[key; 32]).holds(&page, &proof));
        }
        let digest = page_digest(&DedupDomain::new(&[3; 32]), &page);
        assert!(!Challenge::new(&[1; 32], &[2; 16], &[3; 32]).holds(&page, &PageProof::of(digest.0)));
    }
}
