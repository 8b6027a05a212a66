//! What the receiver holds, as far as the sender may rely on it.
//!
//! Subtree digests come by HAVE, in order. Contents come to be held by being sent: a page may be referred to when its
//! bytes went earlier on the same lane, or are acknowledged. Both are beliefs; the receiver checks them in use.

use pagewire_protocol::digest::Digest;
use pagewire_protocol::error::Violation;
use pagewire_protocol::frame::{Accept, Have};
use pagewire_protocol::limits::SUBTREE_PAGES;
use pagewire_protocol::page::{Layout, RegionId};
use std::collections::VecDeque;

/// What is known of one region of the receiver's base.
#[derive(Debug, Default)]
struct RegionHoldings {
    /// First pages that are held.
    pages: u64,
    /// Subtrees whose HAVE was promised.
    promised: u64,
    /// Subtrees whose HAVE has come.
    come: u64,
    /// Those that have come and were not looked at: they begin at `come - digests.len()`.
    digests: VecDeque<Digest>,
}

/// The receiver's base, region by region.
#[derive(Debug)]
pub(crate) struct Holdings {
    regions: Vec<RegionHoldings>,
}

/// What is known of a subtree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// Nothing is held there.
    Nothing,
    /// Its HAVE is still to come.
    Unknown,
    /// Its digest.
    Digest(Digest),
}

impl Holdings {
    /// `held` first pages of each region will be announced.
    pub(crate) fn new(layout: &Layout, held: &[u64]) -> Self {
        let regions = layout.regions().iter().zip(held.iter().chain(std::iter::repeat(&0)));
        let regions = regions.map(|(region, &held)| RegionHoldings {
            pages: held.min(region.pages()),
            promised: held.min(region.pages()).div_ceil(SUBTREE_PAGES as u64),
            ..Default::default()
        });
        Self { regions: regions.collect() }
    }

    /// More subtrees are announced.
    pub(crate) fn handle_have(&mut self, have: &Have) -> Result<(), Violation> {
        let expected = self.regions.get(usize::from(have.region)).map_or(0, |region| region.come);
        let wrong = Violation::Have { region: have.region, got: have.first, expected };
        let Some(region) = self.regions.get_mut(usize::from(have.region)) else { return Err(wrong) };
        let come = have.first.saturating_add(have.digests.len() as u64);
        // SPEC 6.13
        if have.first != region.come || come > region.promised {
            return Err(wrong);
        }
        region.come = come;
        region.digests.extend(&have.digests);
        Ok(())
    }

    /// What is held of a subtree. Subtrees are asked for in ascending order; the answer to earlier ones is forgotten.
    pub(crate) fn look(&mut self, region: RegionId, subtree: u64) -> Held {
        let Some(known) = self.regions.get_mut(usize::from(region.0)) else { return Held::Nothing };
        if subtree >= known.promised {
            return Held::Nothing;
        }
        if subtree >= known.come {
            return Held::Unknown;
        }
        let front = known.come.saturating_sub(known.digests.len() as u64);
        known.digests.drain(..usize::try_from(subtree.saturating_sub(front)).unwrap_or(0));
        known.digests.front().map_or(Held::Nothing, |&digest| Held::Digest(digest))
    }

    /// How many first pages of a region are held.
    pub(crate) fn pages(&self, region: RegionId) -> u64 {
        self.regions.get(usize::from(region.0)).map_or(0, |known| known.pages)
    }

    /// Whether anything was promised at all.
    pub(crate) fn any(&self) -> bool {
        self.regions.iter().any(|region| region.promised > 0)
    }
}

/// SPEC 4.13: one number of held pages for each region, none above the region's own.
pub(crate) fn check_holdings(accept: &Accept, layout: &Layout, agreed: Option<&[u64]>) -> Result<(), Violation> {
    let (got, expected) = (accept.held_pages.len() as u64, layout.regions().len() as u64);
    if got != expected {
        return Err(Violation::Terms { what: "regions held", got, expected });
    }
    let mut held = accept.held_pages.iter().zip(layout.regions());
    if let Some(agreed) = agreed.filter(|agreed| **agreed != *accept.held_pages) {
        let (got, expected) = (accept.held_pages.iter().sum(), agreed.iter().sum());
        return Err(Violation::Terms { what: "pages held of an agreed image", got, expected });
    }
    let wrong = |held: u64, pages: u64| held > pages;
    match held.find(|(held, region)| wrong(**held, region.pages())) {
        Some((held, region)) => {
            Err(Violation::Terms { what: "pages held of a region", got: *held, expected: region.pages() })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::page::{InstallSize, Region};

    #[test]
    fn have_continues_or_is_refused() {
        let region = Region { bytes: 3 << 20, install_size: InstallSize::KIB_4 };
        let layout = Layout::new(vec![region, region]).unwrap();
        let mut holdings = Holdings::new(&layout, &[300, 0]);
        let have = |region, first, count| Have { region, first, digests: vec![Digest([1; 32]); count] };
        assert!(holdings.handle_have(&have(0, 1, 1)).is_err());
        assert!(holdings.handle_have(&have(0, 0, 3)).is_err());
        assert!(holdings.handle_have(&have(1, 0, 1)).is_err());
        assert!(holdings.handle_have(&have(2, 0, 1)).is_err());
        assert!(holdings.handle_have(&have(0, 0, 1)).is_ok());
        assert_eq!(holdings.look(RegionId(0), 0), Held::Digest(Digest([1; 32])));
        assert_eq!(holdings.look(RegionId(0), 1), Held::Unknown);
        assert!(holdings.handle_have(&have(0, 1, 1)).is_ok());
        assert_eq!(holdings.look(RegionId(0), 1), Held::Digest(Digest([1; 32])));
        assert_eq!(holdings.look(RegionId(0), 2), Held::Nothing);
        assert_eq!(holdings.look(RegionId(1), 0), Held::Nothing);
        assert!(holdings.any());
    }
}
