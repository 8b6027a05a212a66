//! What a session did, counted.

/// Pages by the way they came, and what it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Stated as zero.
    pub zero: u64,
    /// Unchanged since the base.
    pub base: u64,
    /// Found here by their digest.
    pub reference: u64,
    /// Came with their bytes.
    pub inline: u64,
    /// Came as what differs from a page of the base.
    pub delta: u64,
    /// Of the unchanged ones, those that were taken on trust and never read.
    pub unverified: u64,
    /// Of those found here, those that another guest of the domain has.
    pub others: u64,
    /// Pages of an agreed base that were not what its manifest says.
    pub damaged: u64,
    /// Asked for, because what was referred to is not here.
    pub wants: u64,
    /// Pages of the base that were read and digested.
    pub scanned: u64,
    /// Left at the sender when the guest started here.
    pub absent: u64,
}

/// How the pages came that a guest lacked when it started here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FillCounts {
    /// As zero.
    pub zero: u64,
    /// With their bytes.
    pub inline: u64,
    /// Found here by their digest.
    pub local: u64,
    /// Came a second time, and were dropped.
    pub again: u64,
    /// Asked for because the guest waited for them.
    pub faults: u64,
    /// Of those that came as zero or with their bytes, those that came alone because they were asked for.
    pub answers: u64,
}
