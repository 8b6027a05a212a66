//! OPEN: what the sender wants to send, as bincode: the fields of `Body` in their order.

use crate::coding::{decode_body, encode_body};
use crate::digest::Digest;
use crate::domain::LineageId;
use crate::error::DecodeError;
use crate::frame::ImageName;
use crate::handover::{Epoch, HostId};
use crate::limits::{BULK_LANES_MAX, ROOTS_MAX};
use crate::page::{InstallSize, Layout, Region};
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// A region as OPEN carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct RegionSpec {
    /// Its length in bytes.
    pub bytes: u64,
    /// Bytes installed at once: 4096, 65536 or 2097152.
    pub install_size: u32,
}

#[derive(bincode::Encode, bincode::Decode)]
struct LiveBody {
    guest: [u8; 16],
    epoch: u64,
    host: [u8; 32],
    arbiter: bool,
    post_copy: bool,
}

/// The hand-over that a live session is to end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveOpen {
    /// Which guest; not zeros.
    pub guest: LineageId,
    /// The hand-over's number in its life.
    pub epoch: Epoch,
    /// The sender's host.
    pub host: HostId,
    /// An arbiter is asked before anybody starts it.
    pub arbiter: bool,
    /// It may start before all of its pages are there.
    pub post_copy: bool,
}

#[derive(bincode::Encode, bincode::Decode)]
struct Body {
    transcript: [u8; 32],
    session: [u8; 16],
    name: String,
    fresh: bool,
    live: Option<LiveBody>,
    single_stream: bool,
    lanes: u8,
    domain_key: [u8; 32],
    regions: Vec<RegionSpec>,
    lineage: [u8; 16],
    known: Vec<[u8; 32]>,
}

/// What the sender wants to send, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The transcript digest over both hellos.
    pub transcript: [u8; 32],
    /// The session's id, random.
    pub session: [u8; 16],
    /// The image's name at the receiver.
    pub name: ImageName,
    /// Ignore what is at the destination.
    pub fresh: bool,
    /// The guest runs: it is to be handed over when its memory is there.
    pub live: Option<LiveOpen>,
    /// All lanes travel on the control connection.
    pub single_stream: bool,
    /// Bulk lanes asked for, 1 to 8.
    pub lanes: u8,
    /// The key of the dedup domain; zeros for the public one.
    pub domain_key: [u8; 32],
    /// The image's regions.
    pub layout: Layout,
    /// Which guest it is through all its visits; zeros for one that nobody has kept.
    pub lineage: LineageId,
    /// Roots of earlier images of this guest whose digests the sender knows, the newest first.
    pub known: Vec<Digest>,
}

impl Open {
    /// Judges a body.
    ///
    /// # Errors
    /// A name, a count of lanes or a layout outside its limits, or an unknown install size.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let Body { transcript, session, name, fresh, live, single_stream, lanes, domain_key, regions, lineage, known } =
            decode_body(body)?;
        // SPEC 4.7
        if lanes == 0 || lanes > BULK_LANES_MAX {
            return Err(DecodeError::limit("lanes (from 1)", u64::from(lanes), u64::from(BULK_LANES_MAX)));
        }
        if known.len() > ROOTS_MAX {
            return Err(DecodeError::limit("known roots", known.len() as u64, ROOTS_MAX as u64));
        }
        // SPEC 4.21
        let live = match live {
            Some(LiveBody { guest, epoch, .. }) if guest == [0; 16] || epoch == 0 => {
                return Err(DecodeError::Unknown { field: "guest or epoch to be handed over", value: epoch });
            }
            Some(LiveBody { guest, epoch, host, arbiter, post_copy }) => {
                let (guest, epoch, host) = (LineageId(guest), Epoch::new(epoch), HostId(host));
                Some(LiveOpen { guest, epoch, host, arbiter, post_copy })
            }
            None => None,
        };
        let (known, lineage) = (known.into_iter().map(Digest).collect(), LineageId(lineage));
        let regions = regions.into_iter().map(|spec| {
            let unknown = DecodeError::Unknown { field: "install size", value: u64::from(spec.install_size) };
            let install_size = InstallSize::from_bytes(spec.install_size).ok_or(unknown)?;
            Ok(Region { bytes: spec.bytes, install_size })
        });
        let layout = Layout::new(regions.collect::<Result<_, DecodeError>>()?)?;
        let name = ImageName::new(&name)?;
        Ok(Self { transcript, session, name, fresh, live, single_stream, lanes, domain_key, layout, lineage, known })
    }

    /// Appends the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let spec = |region: &Region| RegionSpec { bytes: region.bytes, install_size: region.install_size.bytes() };
        let body = Body {
            transcript: self.transcript,
            session: self.session,
            name: self.name.as_str().to_string(),
            fresh: self.fresh,
            live: self.live.map(|live| LiveBody {
                guest: live.guest.0,
                epoch: live.epoch.number(),
                host: live.host.0,
                arbiter: live.arbiter,
                post_copy: live.post_copy,
            }),
            single_stream: self.single_stream,
            lanes: self.lanes,
            domain_key: self.domain_key,
            regions: self.layout.regions().iter().map(spec).collect(),
            lineage: self.lineage.0,
            known: self.known.iter().map(|root| root.0).collect(),
        };
        encode_body(&body, out);
    }
}
