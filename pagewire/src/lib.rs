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
//!
//! A hypervisor receives into memory of its own process: [`Into::Memory`]. A guest that comes back finds the visit that
//! it left mapped copy-on-write, so nothing that did not change is copied, or takes memory a second time.
//!
//! ```
//! use pagewire::store::{Store, StoreOptions};
//! use pagewire::{ImageName, Into, NoObserver, ReceiveOptions, Reuse, SendOptions, Server, ServerEvent, send};
//!
//! let dir = tempfile::tempdir()?;
//! let reuse = |host: &str| Store::open(&dir.path().join(host), StoreOptions::default()).map(Reuse::new);
//! let (image, name) = (dir.path().join("ram"), ImageName::new("guest")?);
//! std::fs::write(&image, vec![7; 1 << 20])?;
//!
//! // One guest comes. What this host keeps of it stands in the way of nothing, and is there when it comes back.
//! let options = ReceiveOptions { reuse: Some(reuse("here")?), once: true, ..ReceiveOptions::new(Into::Memory) };
//! let server = Server::bind(&format!("unix:{}", dir.path().join("socket").display()).parse()?, options)?;
//! let (to, (arrived, guests)) = (server.address()?, std::sync::mpsc::channel());
//! let receiver = std::thread::spawn(move || {
//!     server.serve(move |event| {
//!         if let ServerEvent::Arrived { memory, .. } = event {
//!             let _ = arrived.send(memory);
//!         }
//!     })
//! });
//! let options = SendOptions { reuse: Some(reuse("there")?), ..SendOptions::default() };
//! send(&image, &name, &to, &options, &mut NoObserver).into_result()?;
//!
//! // The memory is this process's now: addresses to give to a virtual machine, for as long as `memory` lives.
//! let memory = guests.recv()?;
//! for region in memory.regions() {
//!     println!("{} bytes at {:?}", region.bytes, region.start);
//! }
//! let mut first = [0; 16];
//! memory.read(pagewire::RegionId(0), 0, &mut first)?;
//! assert_eq!(first, [7; 16]);
//! # receiver.join().map_err(|_| "the server panicked")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests choose their numbers"))]

mod copy;
mod entrance;
mod entropy;
mod error;
mod ground;
mod handed;
mod inspect;
mod journal;
mod lease;
mod live;
mod observe;
mod receive;
mod report;
mod reuse;
mod send;
pub mod trace;

pub use copy::{CopyOptions, copy};
pub use error::{Error, ErrorKind};
pub use inspect::{Inspection, inspect};
pub use journal::{GuestJournal, GuestStatus, Journal, JournalError};
pub use lease::Lease;
pub use live::{
    Arbiter, GuestHooks, GuestStarter, LiveOptions, Operator, PostCopy, Started, TakeOptions, ask_receiver,
    device_state_name, milliseconds, resume, resume_memory,
};
pub use observe::{Event, NoObserver, Observer, Phase};
pub use pagewire_protocol::bitmap::PageBitmap;
pub use pagewire_protocol::blobs::{BlobError, Blobs, NamedBlob};
pub use pagewire_protocol::digest::Digest;
pub use pagewire_protocol::domain::LineageId;
pub use pagewire_protocol::error::{GuestAt, chain};
pub use pagewire_protocol::frame::ImageName;
pub use pagewire_protocol::handover;
pub use pagewire_protocol::page::{InstallSize, Layout, Place, Region, RegionId};
pub use pagewire_receiver::GuestSink;
pub use pagewire_receiver::memory::uffd::FaultsOf;
pub use pagewire_receiver::memory::{Backing, GuestRam, HandedRegion, PostcopyMemory, RamRegion};
pub use pagewire_sender::converge::{AtLimit, Limits};
pub use pagewire_sender::memory::{BitmapMemory, DirtyBitmap, FileMemory, MappedMemory, MappedRegion, Mapping};
pub use pagewire_sender::{GuestMemory, Tracking};
pub use pagewire_store::{self as store, LandingOptions};
pub use pagewire_transport::{Address, AddressError, CancellationToken};
pub use receive::{Into, ReceiveOptions, Server, ServerEvent};
pub use report::{Decision, Faults, ImageId, Outcome, Pages, Report, ReuseCounts, Role, Round, ThreadWaits, WireBytes};
pub use reuse::{KeepWhat, Reuse};
pub use send::{SendOptions, send, send_live, send_live_memory, send_memory};
