//! What goes when a domain is over its budget, and what an operator removes.
//!
//! A visit is superseded when the same guest was kept again later: its pages changed on another host, and what did not
//! change is in the newer visit. Those go first, oldest first; then whatever was used longest ago. A visit that somebody
//! has open stays, and so does the one that was just kept, without its first touches and its pages if it alone is too
//! much. One domain's budget never looks at another domain.

use crate::dir::{Folder, Found, allocated, try_lock};
use crate::error::StoreError;
use crate::manifest::VisitId;
use crate::store::{Role, Store, heads, role};
use crate::touches::touches_name;
use crate::visit::{VisitHead, image_name, manifest_name};
use pagewire_protocol::domain::DomainId;
use std::time::Duration;

/// What became of a visit that was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Removed {
    /// It is gone.
    Yes,
    /// Somebody has it open.
    Busy,
    /// There is no such visit.
    Unknown,
}

/// Removes a visit unless somebody has it open. The store's lock must be held.
pub(crate) fn remove(folder: &Folder, id: VisitId) -> Result<Removed, StoreError> {
    let name = manifest_name(id);
    let Found::File(file, _) = folder.open(&name, false)? else { return Ok(Removed::Unknown) };
    // STORE 4.2
    if !try_lock(&file, false) {
        return Ok(Removed::Busy);
    }
    // The manifest first, and for good: pages without a manifest are a leftover, a manifest without pages misleads.
    folder.unlink(&name)?;
    folder.sync()?;
    for beside in [image_name(id), touches_name(id)] {
        if matches!(folder.open(&beside, false)?, Found::File(..)) {
            folder.unlink(&beside)?;
        }
    }
    Ok(Removed::Yes)
}

/// A visit as eviction sees it; damaged ones have no head.
struct Candidate {
    id: VisitId,
    head: Option<VisitHead>,
    bytes: u64,
}

fn candidates(folder: &Folder, domain: DomainId) -> Result<Vec<Candidate>, StoreError> {
    let heads = heads(folder, domain);
    let mut candidates = Vec::new();
    for (id, _) in folder.names()?.iter().filter_map(|name| role(name)).filter(|(_, role)| *role == Role::Manifest) {
        let Found::File(_, manifest) = folder.open(&manifest_name(id), false)? else { continue };
        let mut bytes = allocated(&manifest);
        for beside in [image_name(id), touches_name(id)] {
            let file = folder.open(&beside, false)?.file();
            bytes = bytes.saturating_add(file.map_or(0, |(_, info)| allocated(&info)));
        }
        candidates.push(Candidate { id, head: heads.iter().find(|head| head.id == id).cloned(), bytes });
    }
    candidates.sort_by_key(|candidate| match &candidate.head {
        None => (0, 0, Duration::ZERO),
        Some(head) if head.superseded => (1, head.sequence, Duration::ZERO),
        Some(head) => (2, 0, head.last_used),
    });
    Ok(candidates)
}

/// Evicts until the domain takes at most `budget` bytes, or nothing is left that may go. The store's lock must be held.
pub(crate) fn to_budget(
    folder: &Folder,
    domain: DomainId,
    budget: u64,
    just_kept: Option<VisitId>,
) -> Result<Vec<VisitHead>, StoreError> {
    // STORE 5.3: all it looks at is in this one folder.
    let mut candidates = candidates(folder, domain)?;
    // STORE 5.2
    for kept in candidates.iter_mut().filter(|candidate| Some(candidate.id) == just_kept) {
        for beside in [touches_name(kept.id), image_name(kept.id)] {
            let file = folder.open(&beside, false)?.file();
            if let Some((_, info)) = file.filter(|_| kept.bytes > budget) {
                folder.unlink(&beside)?;
                kept.bytes = kept.bytes.saturating_sub(allocated(&info));
            }
        }
    }
    let mut total = candidates.iter().fold(0u64, |sum, candidate| sum.saturating_add(candidate.bytes));
    let mut evicted = Vec::new();
    for candidate in candidates.into_iter().filter(|candidate| Some(candidate.id) != just_kept) {
        if total <= budget {
            break;
        }
        if remove(folder, candidate.id)? == Removed::Yes {
            total = total.saturating_sub(candidate.bytes);
            evicted.extend(candidate.head);
        }
    }
    Ok(evicted)
}

impl Store {
    /// Removes a visit, damaged or not, unless somebody has it open.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn remove(&self, id: VisitId) -> Result<Removed, StoreError> {
        let _lock = self.root.lock(false)?;
        for domain in self.domain_ids()? {
            let Ok(Some(folder)) = self.folder(domain) else { continue };
            match remove(&folder, id)? {
                Removed::Unknown => {}
                removed => {
                    self.domains.remove_folder(domain.to_string().as_ref());
                    return Ok(removed);
                }
            }
        }
        Ok(Removed::Unknown)
    }

    /// Removes every superseded visit, and evicts what is over the budget in each domain. Returns what went; what
    /// somebody has open stays.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn prune(&self) -> Result<Vec<VisitHead>, StoreError> {
        let _lock = self.root.lock(false)?;
        let mut gone = Vec::new();
        for domain in self.domain_ids()? {
            let Ok(Some(folder)) = self.folder(domain) else { continue };
            for head in heads(&folder, domain).into_iter().filter(|head| head.superseded) {
                if remove(&folder, head.id)? == Removed::Yes {
                    gone.push(head);
                }
            }
            if let Some(budget) = self.budget {
                gone.extend(to_budget(&folder, domain, budget, None)?);
            }
            self.domains.remove_folder(domain.to_string().as_ref());
        }
        Ok(gone)
    }
}

#[cfg(test)]
mod tests;
