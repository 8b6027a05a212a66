//! From two hellos to one agreement, the same on both sides.
//!
//! The session runs the highest common version and the intersection of features. Nothing is assumed: what one side
//! requires and the other does not offer ends the session with both values in the error.

use crate::error::Incompatible;
use crate::frame::{Codec, Hello, HelloBody, Role};
use crate::session::Agreed;
use alloc::string::ToString;
use alloc::vec::Vec;

/// What this side is ready to speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Lowest version.
    pub version_min: u16,
    /// Highest version.
    pub version_max: u16,
    /// Features it can use.
    pub features_offered: u64,
    /// Features it insists on.
    pub features_required: u64,
    /// Codecs it decodes, as bits.
    pub codecs: u32,
}

/// The protocol version this crate implements.
pub const VERSION: u16 = 1;

/// The feature bit of HELLO for post-copy: pages that come when the guest runs at the receiver.
pub const FEATURE_POST_COPY: u64 = 1 << 0;
/// The feature bit of HELLO for live sessions: blobs, and the hand-over of a guest.
pub const FEATURE_LIVE: u64 = 1 << 1;

impl Default for Policy {
    fn default() -> Self {
        let codecs = if cfg!(feature = "zstd") { Codec::ALL_BITS } else { Codec::NONE.bit() };
        Self { version_min: VERSION, version_max: VERSION, features_offered: 0, features_required: 0, codecs }
    }
}

impl Policy {
    /// The HELLO that says so.
    pub fn hello(&self, role: Role, nonce: [u8; 16]) -> Hello {
        let body = HelloBody {
            features_offered: self.features_offered,
            features_required: self.features_required,
            codecs: self.codecs,
            install_sizes: 1 | 1 << 4 | 1 << 9,
            nonce,
            agent: concat!("pagewire/", env!("CARGO_PKG_VERSION")).to_string(),
            extensions: Vec::new(),
        };
        Hello { version_min: self.version_min, version_max: self.version_max, role, body }
    }
}

/// What both sides run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The version.
    pub version: u16,
    /// The features.
    pub features: u64,
    /// The codecs both decode.
    pub codecs: u32,
    /// The install sizes both know, as bits: bit n is 4 KiB << n.
    pub install_sizes: u32,
}

impl Agreement {
    /// What both sides can do beyond a transfer at rest.
    pub fn reach(&self) -> Agreed {
        match (self.is_live(), self.is_post_copy()) {
            (_, true) => Agreed::PostCopy,
            (true, _) => Agreed::Live,
            _ => Agreed::AtRest,
        }
    }

    /// Whether both sides can hand a guest over.
    pub fn is_live(&self) -> bool {
        self.features & FEATURE_LIVE != 0
    }

    /// Whether a guest may be handed over before all of its pages are there.
    pub fn is_post_copy(&self) -> bool {
        self.is_live() && self.features & FEATURE_POST_COPY != 0
    }
}

/// Agrees on a session.
///
/// # Errors
/// Equal roles, no common version, or a required feature that is not offered.
pub fn negotiate(ours: &Hello, theirs: &Hello) -> Result<Agreement, Incompatible> {
    // SPEC 4.3
    if ours.role == theirs.role {
        return Err(Incompatible::Role(ours.role.name()));
    }
    let version = ours.version_max.min(theirs.version_max);
    if version < ours.version_min.max(theirs.version_min) {
        return Err(Incompatible::Version {
            ours_min: ours.version_min,
            ours_max: ours.version_max,
            theirs_min: theirs.version_min,
            theirs_max: theirs.version_max,
        });
    }
    for (one, other) in [(&ours.body, &theirs.body), (&theirs.body, &ours.body)] {
        if one.features_required & !other.features_offered != 0 {
            return Err(Incompatible::Feature { required: one.features_required, offered: other.features_offered });
        }
    }
    Ok(Agreement {
        version,
        features: ours.body.features_offered & theirs.body.features_offered,
        codecs: ours.body.codecs & theirs.body.codecs | Codec::NONE.bit(),
        install_sizes: ours.body.install_sizes & theirs.body.install_sizes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(role: Role, min: u16, max: u16, offered: u64, required: u64) -> Hello {
        let policy = Policy {
            version_min: min,
            version_max: max,
            features_offered: offered,
            features_required: required,
            ..Policy::default()
        };
        policy.hello(role, [0; 16])
    }

    #[test]
    fn picks_the_highest_common_version_and_common_features() {
        let cases =
            [((1, 1), (1, 2), Some(1)), ((1, 2), (2, 2), Some(2)), ((1, 3), (2, 5), Some(3)), ((1, 1), (2, 2), None)];
        for ((a, b), (c, d), expected) in cases {
            let (left, right) = (hello(Role::Sender, a, b, 0b11, 0), hello(Role::Receiver, c, d, 0b10, 0));
            let got = negotiate(&left, &right);
            assert_eq!(got.as_ref().ok().map(|agreement| agreement.version), expected);
            assert_eq!(got, negotiate(&right, &left).map_err(|_| got.clone().unwrap_err()));
            assert!(got.is_err() || got.is_ok_and(|agreement| agreement.features == 0b10));
        }
    }

    #[test]
    fn rejects_equal_roles_and_features_not_offered() {
        let sender = hello(Role::Sender, 1, 1, 1, 1);
        assert_eq!(negotiate(&sender, &sender), Err(Incompatible::Role("sender")));
        let lacking = hello(Role::Receiver, 1, 1, 2, 0);
        assert_eq!(negotiate(&sender, &lacking), Err(Incompatible::Feature { required: 1, offered: 2 }));
        assert_eq!(negotiate(&lacking, &sender), Err(Incompatible::Feature { required: 1, offered: 2 }));
    }
}
