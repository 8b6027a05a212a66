//! Moves memory images between hosts and sends only what the other side does not have.
//!
//! Pages travel under their BLAKE3 digest: zero pages, duplicates, and pages that the receiver holds already cost next
//! to nothing. This crate is the paved path over the others: images in files, over TCP, Unix sockets or inside one
//! process. Embedders with memory of their own implement [`GuestMemory`] and [`GuestSink`] and call [`send_memory`], or
//! drive the engines of `pagewire-sender` and `pagewire-receiver` themselves.
//!
//! ```
//! use pagewire::{CopyOptions, NoObserver, copy};
//!
//! let dir = tempfile::tempdir()?;
//! let (here, there) = (dir.path().join("ram"), dir.path().join("copy"));
//! std::fs::write(&here, vec![7; 1 << 20])?;
//! let report = copy(&here, &there, &CopyOptions::default(), &mut NoObserver).into_result()?;
//! assert_eq!((report.bytes_total, report.pages.inline, report.pages.reference), (1 << 20, 1, 255));
//! assert_eq!(std::fs::read(&there)?, std::fs::read(&here)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests choose their numbers"))]

mod copy;
mod entropy;
mod error;
mod ground;
mod inspect;
mod observe;
mod receive;
mod report;
mod reuse;
mod send;

pub use copy::{CopyOptions, copy};
pub use error::{Error, ErrorKind};
pub use inspect::{Inspection, inspect};
pub use observe::{Event, NoObserver, Observer};
pub use pagewire_protocol::bitmap::PageBitmap;
pub use pagewire_protocol::digest::Digest;
pub use pagewire_protocol::error::{GuestAt, chain};
pub use pagewire_protocol::frame::ImageName;
pub use pagewire_protocol::page::{InstallSize, Layout, Region, RegionId};
pub use pagewire_receiver::GuestSink;
pub use pagewire_sender::GuestMemory;
pub use pagewire_sender::memory::FileMemory;
pub use pagewire_store::{self as store, LandingOptions};
pub use pagewire_transport::{Address, AddressError, CancellationToken};
pub use receive::{Into, ReceiveOptions, Server, ServerEvent};
pub use report::{Decision, Faults, ImageId, Outcome, Pages, Report, ReuseCounts, Role, Round, WireBytes};
pub use reuse::{KeepWhat, Reuse};
pub use send::{SendOptions, send, send_memory};
