//! Builds `pagewire-protocol` into a static library without std.
//!
//! The proof is that it builds at all: this crate brings its own panic handler and global allocator, and a crate in the
//! graph that linked std would bring a second panic handler, which is error E0152, "duplicate lang item `panic_impl`".
//! `cargo build --features std` shows it. Nothing here is ever run.
#![no_std]
#![allow(unsafe_code, reason = "an allocator and exported functions cannot be written without")]

extern crate alloc;

use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::null_mut;
use pagewire_protocol::digest::PageHasher;
use pagewire_protocol::domain::DedupDomain;
use pagewire_protocol::error::CloseCode;
use pagewire_protocol::frame::{Close, Frame, LaneId};
use pagewire_protocol::framing::Framer;
use pagewire_protocol::tree::DigestTree;

/// Never has memory.
struct NoMemory;

// SAFETY: a null pointer says that the allocation failed, so nothing is ever handed out or given back.
unsafe impl GlobalAlloc for NoMemory {
    unsafe fn alloc(&self, _layout: Layout) -> *mut u8 {
        null_mut()
    }

    unsafe fn dealloc(&self, _pointer: *mut u8, _layout: Layout) {}
}

#[global_allocator]
static MEMORY: NoMemory = NoMemory;

#[panic_handler]
fn stop(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Uses every part of the crate that works without an operating system, so that the linker keeps it: a frame is encoded
/// and decoded, pages are digested, a tree is built. Returns the bytes that a CLOSE has on the wire.
#[unsafe(no_mangle)]
pub extern "C" fn pagewire_no_os(pages: u64) -> usize {
    let hasher = PageHasher::new(&DedupDomain::public());
    let mut tree = DigestTree::new(&hasher, pages);
    hasher.digest_pages([&[1; 4096]; 16], |digest| tree.set(0, digest));
    let mut bytes = Vec::from(tree.root().0);
    bytes.clear();
    Frame::Close(Close::new(CloseCode::CANCELLED, "stopped")).encode(LaneId::CONTROL, &mut bytes);
    let mut framer = Framer::new();
    for byte in &bytes {
        if let Some(slot) = framer.space().first_mut() {
            *slot = *byte;
        }
        framer.filled(1);
    }
    let whole = framer.next_frame().ok().flatten();
    whole.and_then(|(header, body)| Frame::decode(header.kind, body).ok()).map_or(0, |_| bytes.len())
}
