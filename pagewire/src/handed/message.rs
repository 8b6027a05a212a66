//! What a hypervisor says when it hands its memory over: one message, as Firecracker sends it. Hostile until judged here.
//!
//! A JSON array of regions, without a length in front, and one userfaultfd beside it. The peer must run as the user of
//! this process, or as root.

use pagewire_protocol::limits::{PAGE_BYTES, REGIONS_MAX};
use pagewire_protocol::page::{Layout, RegionId};
use pagewire_receiver::memory::{HandedRegion, PostcopyError, PostcopyMemory};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use rustix::process::{Uid, geteuid};
use serde::Deserialize;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Bytes of a message: 256 for each region there may be, where Firecracker needs about 150.
const MESSAGE_MAX: usize = 256 * REGIONS_MAX;
/// How long a peer that connected may take to say it.
const MESSAGE_SPAN_MAX: Duration = Duration::from_secs(5);
/// Descriptors that there is room for; more are cut off by the kernel, which says so.
const DESCRIPTORS_ROOM: usize = 2;

/// Why a hypervisor's memory is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandedError {
    #[error("user {0} may not hand memory over here")]
    User(u32),
    #[error("no whole message came within 5 s")]
    Late,
    #[error("the message has more than {MESSAGE_MAX} bytes")]
    TooLong,
    #[error("the peer ended before its message did")]
    Ended,
    #[error("the message is no array of regions")]
    Malformed(#[source] serde_json::Error),
    #[error("no descriptor came with the message")]
    NoDescriptor,
    #[error("more than one descriptor came with the message")]
    Descriptors,
    #[error("region {region} says two sizes of its pages, or none")]
    PageSize { region: usize },
    #[error("region {region}: offset {offset} of the image, where {expected} should come next")]
    Offset { region: usize, offset: u64, expected: u64 },
    #[error("the regions have {bytes} bytes together, and the image has {image}")]
    Size { bytes: u64, image: u64 },
    #[error("the image has {0} regions: only one of one region can go into memory that is handed over")]
    Regions(usize),
    #[error(transparent)]
    Memory(#[from] PostcopyError),
    #[error("the socket")]
    Socket(#[from] io::Error),
}

/// A region as the hypervisor says it. It may say more, which nobody here needs.
#[derive(Clone, Debug, Deserialize)]
struct Entry {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    /// Bytes.
    page_size: Option<u64>,
    /// The same, in bytes as well, whatever it is called; older hypervisors say this alone.
    page_size_kib: Option<u64>,
}

/// Which pages of the image a region of the hypervisor's holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The region there.
    pub(crate) region: RegionId,
    /// Its first page in the image.
    pub(crate) first: u64,
    /// Its pages.
    pub(crate) pages: u64,
}

/// Reads and judges the message of a peer that connected.
pub(crate) fn take(stream: &UnixStream, layout: &Layout) -> Result<(PostcopyMemory, Vec<Part>), HandedError> {
    let user = socket_peercred(stream).map_err(io::Error::from)?.uid;
    if !may_hand_over(user, geteuid()) {
        return Err(HandedError::User(user.as_raw()));
    }
    let (entries, uffd) = read(stream)?;
    let (table, parts) = fit(&entries, layout)?;
    Ok((PostcopyMemory::handed_over(uffd, &table)?, parts))
}

/// Whether a peer of this user may say where a guest's memory is: it gets the guest's pages for it.
fn may_hand_over(user: Uid, me: Uid) -> bool {
    user == me || user.is_root()
}

fn read(stream: &UnixStream) -> Result<(Vec<Entry>, OwnedFd), HandedError> {
    let until = Instant::now() + MESSAGE_SPAN_MAX;
    let (mut message, mut descriptors): (Vec<u8>, Vec<OwnedFd>) = Default::default();
    let mut piece = vec![0; MESSAGE_MAX + 1];
    let entries = loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HandedError::Late);
        }
        stream.set_read_timeout(Some(left))?;
        let count = read_piece(stream, &mut piece, &mut descriptors)?;
        message.extend_from_slice(piece.get(..count).unwrap_or_default());
        if message.len() > MESSAGE_MAX {
            return Err(HandedError::TooLong);
        }
        match serde_json::from_slice::<Vec<Entry>>(&message) {
            Ok(entries) => break entries,
            Err(_) if count == 0 => return Err(HandedError::Ended),
            Err(error) if error.is_eof() => {}
            Err(error) => return Err(HandedError::Malformed(error)),
        }
    };
    let uffd = descriptors.pop().ok_or(HandedError::NoDescriptor)?;
    if descriptors.is_empty() { Ok((entries, uffd)) } else { Err(HandedError::Descriptors) }
}

fn read_piece(stream: &UnixStream, piece: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<usize, HandedError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_ROOM))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let read = recvmsg(stream, &mut [IoSliceMut::new(piece)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let read = match read {
        Err(rustix::io::Errno::AGAIN) => return Err(HandedError::Late),
        read => read.map_err(io::Error::from)?,
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let is_cut = read.flags.contains(ReturnFlags::CTRUNC);
    if is_cut || descriptors.len() > 1 { Err(HandedError::Descriptors) } else { Ok(read.bytes) }
}

/// The table as the memory takes it, and where its regions are in the image, in order. They hold all of it, each page
/// once.
fn fit(entries: &[Entry], layout: &Layout) -> Result<(Vec<HandedRegion>, Vec<Part>), HandedError> {
    let [image] = layout.regions() else { return Err(HandedError::Regions(layout.regions().len())) };
    let mut order: Vec<(RegionId, usize, &Entry)> = Vec::new();
    let mut table = Vec::new();
    for ((entry, at), region) in entries.iter().zip(0..).zip((0..).map(RegionId)) {
        let page_bytes = match (entry.page_size, entry.page_size_kib) {
            (Some(bytes), None) | (None, Some(bytes)) => bytes,
            (Some(bytes), Some(same)) if bytes == same => bytes,
            _ => return Err(HandedError::PageSize { region: at }),
        };
        table.push(HandedRegion { address: entry.base_host_virt_addr, bytes: entry.size, page_bytes });
        order.push((region, at, entry));
    }
    order.sort_by_key(|(_, _, entry)| entry.offset);
    let (mut parts, mut expected) = (Vec::new(), 0u64);
    for (region, at, &Entry { offset, size, .. }) in order {
        let is_whole = size.is_multiple_of(PAGE_BYTES as u64);
        if offset != expected || !is_whole {
            return Err(HandedError::Offset { region: at, offset, expected });
        }
        let page = PAGE_BYTES as u64;
        parts.push(Part { region, first: offset / page, pages: size / page });
        expected = expected.saturating_add(size);
    }
    if expected / PAGE_BYTES as u64 != image.pages() {
        return Err(HandedError::Size { bytes: expected, image: image.bytes });
    }
    Ok((table, parts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewire_protocol::page::{InstallSize, Region};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::fs::File;
    use std::io::IoSlice;
    use std::os::fd::{AsFd, BorrowedFd};

    const PAGE: u64 = PAGE_BYTES as u64;

    fn layout(pages: u64) -> Layout {
        Layout::new(vec![Region { bytes: pages * PAGE, install_size: InstallSize::KIB_4 }]).unwrap()
    }

    /// What is said to a message with these descriptors beside it.
    fn said(message: &[u8], descriptors: &[BorrowedFd<'_>], layout: &Layout) -> HandedError {
        let (near, far) = UnixStream::pair().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        if message.is_empty() {
            drop(near);
        } else {
            // What does not fit into a socket's buffer is sent by a thread that is not waited for.
            let message = message.to_vec();
            let (first, rest) = message.split_at(message.len().min(4096));
            sendmsg(&near, &[IoSlice::new(first)], &mut control, SendFlags::empty()).unwrap();
            let rest = rest.to_vec();
            std::thread::spawn(move || drop(io::Write::write_all(&mut &near, &rest)));
        }
        take(&far, layout).unwrap_err()
    }

    fn region(address: u64, size: u64, offset: u64) -> String {
        format!(
            r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},"page_size":4096,"page_size_kib":4096}}"#
        )
    }

    #[test]
    fn hostile_messages_are_refused_by_what_is_wrong_with_them() {
        use HandedError as E;
        let (null, image) = (File::open("/dev/null").unwrap(), layout(4));
        let one = [null.as_fd()];
        let good = format!("[{}]", region(1 << 20, 4 * PAGE, 0));
        assert!(matches!(said(b"", &[], &image), E::Ended));
        assert!(matches!(said(b"[{\"base_host", &one, &image), E::Ended));
        assert!(matches!(said(b"{}", &one, &image), E::Malformed(_)));
        assert!(matches!(said(b"[1]", &one, &image), E::Malformed(_)));
        assert!(matches!(said(b"[{\"size\":-1}]", &one, &image), E::Malformed(_)));
        assert!(matches!(said((good.clone() + "!").as_bytes(), &one, &image), E::Malformed(_)));
        assert!(matches!(said(good.as_bytes(), &[], &image), E::NoDescriptor));
        assert!(matches!(said(good.as_bytes(), &[null.as_fd(); 2], &image), E::Descriptors));
        assert!(matches!(said(good.as_bytes(), &[null.as_fd(); 5], &image), E::Descriptors));
        // A descriptor of something else.
        assert!(matches!(said(good.as_bytes(), &one, &image), E::Memory(PostcopyError::Uffd(_))));
        assert!(matches!(said(" ".repeat(MESSAGE_MAX + 1).as_bytes(), &one, &image), E::TooLong));
        assert!(matches!(said(b"[]", &one, &image), E::Size { bytes: 0, .. }));
        let sizes = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"page_size_kib":4}]"#;
        assert!(matches!(said(sizes.as_bytes(), &one, &image), E::PageSize { region: 0 }));
    }

    #[test]
    fn other_users_are_refused() {
        let user = Uid::from_raw;
        assert!(may_hand_over(user(1000), user(1000)) && may_hand_over(user(0), user(1000)));
        assert!(!may_hand_over(user(1001), user(1000)) && !may_hand_over(user(1000), user(0)));
    }

    #[test]
    fn tables_that_do_not_hold_the_image_once_are_refused() {
        use HandedError as E;
        let (null, image) = (File::open("/dev/null").unwrap(), layout(4));
        let said = |table: &[(u64, u64, u64)]| {
            let regions: Vec<String> =
                table.iter().map(|&(address, size, offset)| region(address, size, offset)).collect();
            said(format!("[{}]", regions.join(",")).as_bytes(), &[null.as_fd()], &image)
        };
        let at = 1 << 20;
        assert!(matches!(said(&[(at, 3 * PAGE, 0)]), E::Size { .. }), "too little");
        assert!(matches!(said(&[(at, 5 * PAGE, 0)]), E::Size { .. }), "too much");
        assert!(matches!(said(&[(at, 4 * PAGE, PAGE)]), E::Offset { expected: 0, .. }), "a hole in front");
        assert!(matches!(said(&[(at, 2 * PAGE, 0), (2 * at, 2 * PAGE, PAGE)]), E::Offset { .. }), "twice");
        assert!(matches!(said(&[(at, 2 * PAGE, 0), (2 * at, 2 * PAGE, 3 * PAGE)]), E::Offset { .. }), "a hole");
        assert!(matches!(said(&[(at, 100, 0), (2 * at, 4 * PAGE, 100)]), E::Offset { .. }), "half a page");
        assert!(matches!(said(&[(at, u64::MAX - 4095, 0), (2 * at, PAGE, u64::MAX - 4095)]), E::Size { .. }));
        let memory = |table: &[(u64, u64, u64)]| matches!(said(table), E::Memory(PostcopyError::Table(_)));
        assert!(memory(&[(at, 2 * PAGE, 0), (at + PAGE, 2 * PAGE, 2 * PAGE)]), "addresses overlap");
        assert!(memory(&[(at + 1, 4 * PAGE, 0)]), "no whole pages");
        assert!(memory(&[(u64::MAX - 4095, 4 * PAGE, 0)]), "beyond all addresses");
    }

    #[test]
    fn regions_are_found_in_the_image_whatever_their_order() {
        let entry = |base_host_virt_addr, size, offset| {
            let (page_size, page_size_kib) = (Some(4096), None);
            Entry { base_host_virt_addr, size, offset, page_size, page_size_kib }
        };
        let (table, parts) = fit(&[entry(1 << 30, PAGE, 3 * PAGE), entry(1 << 20, 3 * PAGE, 0)], &layout(4)).unwrap();
        assert_eq!((table[0].address, table[1].bytes), (1 << 30, 3 * PAGE));
        let part = |region, first, pages| Part { region: RegionId(region), first, pages };
        assert_eq!(parts, [part(1, 0, 3), part(0, 3, 1)]);
    }
}
