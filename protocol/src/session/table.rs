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
    /// Sender of a guest that runs at the receiver: what it lacks is sent.
    Serving,
    /// Receiver whose guest runs: what it lacks is applied.
    Filling,
    /// Receiver: DONE is out, its acknowledgement is awaited.
    Parting,
    /// The session has ended.
    Over,
}

impl Phase {
    /// All phases.
    pub const ALL: [Self; 11] = [
        Self::Greeting,
        Self::Opening,
        Self::Sending,
        Self::Finishing,
        Self::Waiting,
        Self::Deciding,
        Self::Receiving,
        Self::Serving,
        Self::Filling,
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
            Self::Serving => "serving",
            Self::Filling => "filling",
            Self::Parting => "parting",
            Self::Over => "over",
        }
    }
}

/// What both sides can do beyond a transfer at rest, each including what stands before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Agreed {
    /// Nothing.
    #[default]
    AtRest,
    /// Guests that run are handed over.
    Live,
    /// They may start before all of their pages are there.
    PostCopy,
}

/// Whether a frame of `kind` may arrive on `lane` at a peer of `role` in `phase`.
///
/// # Errors
/// It may not.
pub fn check(role: Role, phase: Phase, agreed: Agreed, lane: LaneId, kind: FrameKind) -> Result<(), Violation> {
    // SPEC 7.3, 11.2, 13.3
    let tables = [legal, legal_live, legal_post_copy];
    if tables.iter().take(agreed as usize + 1).any(|table| table(role, phase, lane).contains(&kind)) {
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

/// What may arrive beside that where post-copy is agreed: the sessions that fill a guest which runs already.
fn legal_post_copy(role: Role, phase: Phase, lane: LaneId) -> &'static [FrameKind] {
    use FrameKind as K;
    match (role, phase, lane.kind()) {
        (Role::Sender, Phase::Opening, "control") => &[K::LACK],
        (Role::Sender, Phase::Serving, "control") => &[K::DONE, K::PING, K::CLOSE, K::LACKING],
        (Role::Sender, Phase::Serving, "bulk") => &[K::ACK, K::PING],
        (Role::Sender, Phase::Serving, "urgent") => &[K::PING, K::FAULT],
        (Role::Receiver, Phase::Waiting, "control") => &[K::FILL],
        (Role::Receiver, Phase::Filling, "control") => &[K::PING, K::CLOSE],
        (Role::Receiver, Phase::Filling, "bulk" | "urgent") => &[K::PAGES, K::PING],
        (Role::Receiver, Phase::Parting, "bulk" | "urgent") => &[K::PAGES],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::String;

    /// The rows of a whole matrix as text: what is legal with `agreed`, and is not with `less`.
    fn matrix(agreed: Agreed, less: Option<Agreed>) -> String {
        let mut table = String::new();
        for role in [Role::Sender, Role::Receiver] {
            for phase in Phase::ALL {
                for lane in [LaneId::CONTROL, LaneId::bulk(0), LaneId::URGENT] {
                    let legal = |agreed, kind| check(role, phase, agreed, lane, kind).is_ok();
                    let is_new =
                        |kind: &&FrameKind| legal(agreed, **kind) && !less.is_some_and(|less| legal(less, **kind));
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

    /// A change of the matrix is a change of SPEC, sections 7, 11 and 13, and must be made there too.
    #[test]
    fn the_matrix_is_the_one_of_spec() {
        let spec = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/SPEC.md")).unwrap();
        let tables =
            [(Agreed::AtRest, None), (Agreed::Live, Some(Agreed::AtRest)), (Agreed::PostCopy, Some(Agreed::Live))];
        for table in tables.map(|(agreed, less)| matrix(agreed, less)) {
            assert!(spec.contains(&table), "SPEC must hold exactly:\n{table}");
        }
    }
}
