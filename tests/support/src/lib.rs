//! Worlds in which pagewire's engines are tested, without an operating system.
//!
//! Time, entropy, memory and the network are values here: a seed and a commit replay everything. [`world`] drives a
//! pair of engines over virtual [`link`]s between [`memory`] with faults, or sends a [`guest`] that runs; [`checkers`]
//! says what must hold at the end; [`follower`] holds memory against its harvests;
//! [`peer`] is a scripted peer that may say anything, [`fill_peer`] one of the sessions that fill a guest; [`fuzz`] holds the bodies of the fuzz targets, so that plain
//! `cargo test` replays their corpora.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test code: a failed expectation is a failed test"
)]

pub mod attempt;
pub mod checkers;
pub mod fill_peer;
pub mod follower;
pub mod fuzz;
pub mod guest;
pub mod host;
pub mod image;
pub mod link;
pub mod live_peer;
pub mod memory;
pub mod peer;
pub mod rng;
pub mod world;

/// Says that this machine lacks what a test needs: where the harness does not keep it to itself, unlike `eprintln!`.
pub fn skip(what: impl std::fmt::Display) {
    use std::io::Write;
    let mut out = std::io::stderr();
    writeln!(out, "SKIPPED: {what}").unwrap();
}
