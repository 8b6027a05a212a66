//! The one table of what is legal when: role × phase × lane × frame.
//!
//! ```text
//! sender:    Greeting ─HELLO→ Opening ─ACCEPT→ Sending ─(ROOT sent)→ Finishing ─DONE→ Over
//! receiver:  Greeting ─HELLO→ Waiting ─OPEN→ Deciding ─(ACCEPT sent)→ Receiving ─(synced, DONE sent)→ Parting ─DONE→ Over
//! ```

use crate::error::Violation;
use crate::frame::{FrameKind, LaneId, Role};

/// Where a session stands, seen from one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// HELLO is out, the peer's is awaited.
    Greeting,
    /// Sender: OPEN is out, ACCEPT is awaited.
    Opening,
    /// Sender: pages are being stated.
    Sending,
    /// Sender: ROOT is out, DONE is awaited.
    Finishing,
    /// Receiver: OPEN is awaited.
    Waiting,
    /// Receiver: whoever embeds it decides on OPEN.
    Deciding,
    /// Receiver: pages are being applied.
    Receiving,
    /// Receiver: DONE is out, its acknowledgement is awaited.
    Parting,
    /// The session has ended.
    Over,
}

impl Phase {
    /// All phases.
    pub const ALL: [Self; 9] = [
        Self::Greeting,
        Self::Opening,
        Self::Sending,
        Self::Finishing,
        Self::Waiting,
        Self::Deciding,
        Self::Receiving,
        Self::Parting,
        Self::Over,
    ];

    /// What a message calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Greeting => "greeting",
            Self::Opening => "opening",
            Self::Sending => "sending",
            Self::Finishing => "finishing",
            Self::Waiting => "waiting for OPEN",
            Self::Deciding => "deciding on OPEN",
            Self::Receiving => "receiving",
            Self::Parting => "parting",
            Self::Over => "over",
        }
    }
}

/// Whether a frame of `kind` may arrive on `lane` at a peer of `role` in `phase`; `live` if live sessions are agreed.
///
/// # Errors
/// It may not.
pub fn check(role: Role, phase: Phase, live: bool, lane: LaneId, kind: FrameKind) -> Result<(), Violation> {
    // SPEC 7.3, 11.2
    if legal(role, phase, lane).contains(&kind) || (live && legal_live(role, phase, lane).contains(&kind)) {
        return Ok(());
    }
    Err(Violation::Unexpected { kind, lane: lane.kind(), phase: phase.name() })
}

fn legal(role: Role, phase: Phase, lane: LaneId) -> &'static [FrameKind] {
    use FrameKind as K;
    match (role, phase, lane.kind()) {
        (_, Phase::Greeting, "control") => &[K::HELLO, K::CLOSE],
        (Role::Sender, Phase::Opening, "control") => &[K::ACCEPT, K::PING, K::CLOSE],
        (Role::Sender, Phase::Sending, "control") => &[K::HAVE, K::PING, K::CLOSE],
        (Role::Sender, Phase::Finishing, "control") => &[K::DONE, K::PING, K::CLOSE],
        (Role::Sender, Phase::Sending | Phase::Finishing, "bulk") => &[K::ACK, K::PING],
        (Role::Receiver, Phase::Waiting, "control") => &[K::OPEN, K::PING, K::CLOSE],
        (Role::Receiver, Phase::Deciding, "control") => &[K::PING, K::CLOSE],
        (Role::Receiver, Phase::Receiving, "control") => &[K::ROOT, K::PING, K::CLOSE],
        (Role::Receiver, Phase::Receiving, "bulk") => &[K::PAGES, K::ROUND, K::PING],
        (Role::Receiver, Phase::Parting, "control") => &[K::DONE, K::PING, K::CLOSE],
        // SPEC 7.4: late answers to wants, which are dropped.
        (Role::Receiver, Phase::Parting, "bulk") => &[K::PAGES, K::PING],
        (Role::Sender, Phase::Sending | Phase::Finishing, "urgent") => &[K::PING],
        (Role::Receiver, Phase::Receiving | Phase::Parting, "urgent") => &[K::PING],
        _ => &[],
    }
}

/// What may arrive beside that where live sessions are agreed. Before OPEN and ACCEPT the words are about a hand-over
/// that an earlier connection has left open.
fn legal_live(role: Role, phase: Phase, lane: LaneId) -> &'static [FrameKind] {
    use FrameKind as K;
    match (role, phase, lane.kind()) {
        (Role::Sender, Phase::Opening | Phase::Finishing, "control") => &[K::READY, K::STARTED, K::REJECT],
        (Role::Receiver, Phase::Waiting | Phase::Parting, "control") => &[K::COMMIT, K::GONE],
        (Role::Receiver, Phase::Receiving, "control") => &[K::BLOB],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::String;

    /// The rows of a whole matrix as text: what is legal with `live`, and is not without it if it is set.
    fn matrix(live: bool) -> String {
        let mut table = String::new();
        for role in [Role::Sender, Role::Receiver] {
            for phase in Phase::ALL {
                for lane in [LaneId::CONTROL, LaneId::bulk(0), LaneId::URGENT] {
                    let legal = |live, kind| check(role, phase, live, lane, kind).is_ok();
                    let is_new = |kind: &&FrameKind| legal(live, **kind) && !(live && legal(false, **kind));
                    let allowed = FrameKind::ALL.iter().filter(is_new);
                    let allowed: alloc::vec::Vec<_> = allowed.map(|kind| kind.name()).collect();
                    if !allowed.is_empty() {
                        table += &format!(
                            "| {} | {} | {} | {} |\n",
                            role.name(),
                            phase.name(),
                            lane.kind(),
                            allowed.join(", ")
                        );
                    }
                }
            }
        }
        table
    }

    /// A change of the matrix is a change of SPEC, sections 7 and 11, and must be made there too.
    #[test]
    fn the_matrix_is_the_one_of_spec() {
        let spec = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/SPEC.md")).unwrap();
        for table in [matrix(false), matrix(true)] {
            assert!(spec.contains(&table), "SPEC must hold exactly:\n{table}");
        }
    }
}
