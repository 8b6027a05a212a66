//! Every bound of the protocol, written once, with its unit and its reason.
//!
//! A peer may be strict or generous inside these; nothing outside them is ever accepted, and nothing is allocated
//! before the number that sizes it was held against one of them.

use crate::time::Span;

// SPEC 9.1
/// Bytes of a page: the unit that is digested, stated and counted, whatever a region's install size is.
pub const PAGE_BYTES: usize = 4096;
/// Children of a node in the digest tree, and so pages below a lowest node (1 MiB): one HAVE digest each.
pub const SUBTREE_PAGES: usize = 256;
/// Bytes below a lowest node of the digest tree.
pub const SUBTREE_BYTES: usize = SUBTREE_PAGES * PAGE_BYTES;
/// Most pages of one PAGES frame that need a look of their own (reference or inline): a 2 MiB install page.
pub const BATCH_PAGES_MAX: usize = 512;
/// Most pages one PAGES frame may cover (64 MiB): bounds the work of checking a run of unchanged pages.
pub const COVER_PAGES_MAX: u32 = 16_384;
/// Most runs in a PAGES frame: one a page that needs a look, and one between each two of them.
pub const RUNS_MAX: usize = 2 * BATCH_PAGES_MAX + 1;
/// Largest body of a PAGES frame: fixed part, runs, references and raw pages at their maxima, rounded up to 64 KiB.
pub const PAGES_BODY_MAX: u32 = 2 * 1024 * 1024 + 64 * 1024;
/// Largest body of any other frame. 64 KiB is what peers in the field allow before authentication.
pub const CONTROL_BODY_MAX: u32 = 64 * 1024;
/// Most regions of one image. Hypervisors use fewer than ten; 64 leaves room for hotplugged memory.
pub const REGIONS_MAX: usize = 64;
/// Most pages of one image: a page's place in the image fits 32 bits (16 TiB).
pub const IMAGE_PAGES_MAX: u64 = u32::MAX as u64;
/// Image bytes a receiver accepts unless told otherwise (1 TiB).
pub const IMAGE_BYTES_DEFAULT: u64 = 1 << 40;
/// Roots of earlier images that OPEN names: the visits of one guest that a host may still know.
pub const ROOTS_MAX: usize = 8;
/// Bytes of an image name: letters, digits, `.`, `_`, `-`.
pub const NAME_BYTES_MAX: usize = 64;
/// Bytes of the text in CLOSE.
pub const REASON_BYTES_MAX: usize = 1024;
/// Bytes of the program name in HELLO.
pub const AGENT_BYTES_MAX: usize = 64;
/// Extensions in HELLO, and the bytes of each.
pub const EXTENSIONS_MAX: usize = 16;
/// Bytes of one extension in HELLO.
pub const EXTENSION_BYTES_MAX: usize = 1024;
/// Bulk lanes of a session.
pub const BULK_LANES_MAX: u8 = 8;
/// Digests in one HAVE frame: a frame for each 64 MiB keeps both sides busy and the header share under 1 %.
pub const HAVE_DIGESTS_MAX: usize = 64;
/// Wants in one ACK: a frame asks for at most this many pages, each its own run.
pub const WANTS_MAX: usize = 2 * BATCH_PAGES_MAX;
/// How often one page may be wanted in a round before the session ends: first miss, a reference that went stale, one more.
pub const WANTS_A_PAGE_MAX: u64 = 3;
/// Pages stated by reference that a receiver lets wait for the rest of its base (512 MiB): 7 MiB of bookkeeping, and what
/// is read in some tenths of a second.
pub const WAITING_PAGES_MAX: usize = 128 * 1024;
/// Bytes sent on a lane and not yet acknowledged (64 MiB): 10 Gbit/s over 50 ms.
pub const WINDOW_BYTES: u64 = 64 << 20;
/// PAGES bytes after which a receiver acknowledges at the latest.
pub const ACK_BYTES: u64 = 1 << 20;
/// Longest an acknowledgement waits for more to acknowledge.
pub const ACK_DELAY_MAX: Span = Span::from_millis(20);
/// From a connection's start to the end of its handshake.
pub const HANDSHAKE_SPAN_MAX: Span = Span::from_secs(10);
/// From a joining connection's start to its JOIN.
pub const JOIN_SPAN_MAX: Span = Span::from_secs(5);
/// A lane that is silent this long is asked for a sign of life.
pub const PING_AFTER: Span = Span::from_secs(5);
/// A session that hears nothing this long has lost its peer.
pub const SILENCE_MAX: Span = Span::from_secs(15);
/// A receiver waits this long for the next statement, or the next part of its own base, whatever signs of life come.
pub const STALL_SPAN_MAX: Span = Span::from_secs(120);
/// A frame that has begun must bring `PROGRESS_BYTES_MIN` in each span of this length: a trickle is not life.
pub const PROGRESS_SPAN: Span = Span::from_secs(15);
/// See [`PROGRESS_SPAN`].
pub const PROGRESS_BYTES_MIN: u64 = 16 * 1024;
/// Hand-overs of one guest that a host keeps records of: the last one, and those whose sender has not said GONE.
pub const HANDOVERS_MAX: usize = 16;
/// How far an epoch may lie above those that a host's records know of: an honest guest moves less often than that, and a
/// liar cannot use the numbers up.
pub const EPOCH_STEP_MAX: u64 = 1 << 32;
/// Blobs of one image: device state and whatever else must be there before the guest starts.
pub const BLOBS_MAX: usize = 16;
/// Bytes of one blob. Device state of hypervisors is below 1 MiB; what is larger belongs into a region.
pub const BLOB_BYTES_MAX: u32 = 16 << 20;
/// Bytes of a blob in one BLOB frame.
pub const BLOB_PART_BYTES_MAX: u32 = 32 * 1024;
/// Bytes of the bitmap in one LACKING: 1 GiB of pages.
pub const LACKING_BYTES_MAX: u32 = 32 * 1024;
/// Pages named in FAULT frames, a page on average over the image, in a fill session.
pub const FAULTS_A_PAGE_MAX: u64 = 4;
/// Runs of pages named ahead that the sender of a fill session remembers, of some 50 bytes each: what a receiver names
/// beyond comes with the rest.
pub const AHEAD_RUNS_MAX: usize = 1 << 20;
/// Pages that a store keeps of those a guest touched first: of 4 GiB, and more than any needs to get going.
pub const FIRST_TOUCHES_MAX: usize = 1 << 20;
