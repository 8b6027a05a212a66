//! The wire protocol of pagewire: frames, digests, limits, and what is legal when.
//!
//! This crate is pure. It opens no socket and no file, starts no thread, reads no clock and draws no random number:
//! time, entropy and memory come in as arguments, so the same code runs under tokio, in a hypervisor's own threads, in
//! the simulator and under a fuzzer. Bytes from a peer are judged here and nowhere else; what leaves this crate is a
//! typed value inside its limits. `docs/SPEC.md` is the authority on every byte.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests choose their numbers"))]

extern crate alloc;
#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod batch;
pub mod bitmap;
pub mod blobs;
pub mod challenge;
pub mod coding;
#[cfg(feature = "zstd")]
pub mod compress;
pub mod digest;
pub mod domain;
pub mod error;
pub mod frame;
pub mod framing;
pub mod handover;
mod leaves;
pub mod limits;
pub mod page;
pub mod page_buffer;
pub mod session;
pub mod time;
pub mod trace;
pub mod tree;
pub mod words;
