//! The bytes of a manifest: what is known of a visit, and the digest of each page. `docs/STORE.md` is the authority.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..8 | magic | `PWVISIT` and a zero byte |
//! | 8..12 | version | 1 |
//! | 12..16 | n | bytes of the body |
//! | 16..16+n | body | bincode as in SPEC 1.4: the fields of `Body`, in order |
//! | 16+n..48+n | seal | of bytes 0..16+n, keyed by the domain in the body |
//! | ..4096 | | zero |
//! | 4096.. | present | one bit a page, zeros up to a multiple of 4096; sealed in the body |
//! | then | digests | 32 bytes a page in page order over all regions; 32 zero bytes for the zero page |
//!
//! Nothing here touches a file. A manifest is judged once and then trusted to be what its seal says; what it says of
//! pages is a claim, and a page is verified when it is used.

use pagewire_protocol::bitmap::PageBitmap;
use pagewire_protocol::coding::{Reader, Writer, decode_body, encode_body};
use pagewire_protocol::digest::Digest;
use pagewire_protocol::domain::{DedupDomain, LineageId};
use pagewire_protocol::error::DecodeError;
use pagewire_protocol::frame::{ImageName, RegionSpec};
use pagewire_protocol::page::{InstallSize, Layout, Region};
use thiserror::Error;

/// What a manifest begins with.
pub const MAGIC: [u8; 8] = *b"PWVISIT\0";
/// The only version there is.
pub const VERSION: u32 = 1;
/// Bytes of the header, padded; and what the bitmap is padded to, so that zero runs of digests can be holes.
pub const BLOCK: usize = 4096;
/// Bytes of a digest.
pub(crate) const DIGEST_BYTES: u64 = 32;
const FIXED: usize = 16;
const SEAL: usize = 32;
/// Bytes of the largest body that leaves room for the rest: all regions and the longest name take 1,024.
const BODY_MAX: usize = BLOCK - FIXED - SEAL;

/// Id, key, lineage, name, session, created, sequence, kind, regions, root, seal of the present bitmap.
type Body = ([u8; 16], [u8; 32], [u8; 16], String, [u8; 16], u64, u64, u8, Vec<RegionSpec>, [u8; 32], [u8; 32]);

/// Why bytes are no manifest.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ManifestError {
    /// Another kind of file.
    #[error("not a manifest")]
    Magic,
    /// Written by a program that knows more.
    #[error("version {0} is not known here")]
    Version(u32),
    /// The header's fields do not decode.
    #[error("header: {0}")]
    Header(#[from] DecodeError),
    /// The header is not what was written.
    #[error("the header's seal does not fit")]
    Seal,
    /// Bytes that must be zero are not.
    #[error("padding is not zero")]
    Padding,
    /// The bitmap is not what was written.
    #[error("the bitmap's seal does not fit")]
    Present,
    /// The file was cut, or has grown.
    #[error("{found} bytes, expected {expected}")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes its header asks for.
        expected: u64,
    },
    /// It is another visit's.
    #[error("it is another visit's manifest")]
    Foreign,
}

/// A visit's id: random, and the name of its files.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VisitId(pub [u8; 16]);

impl VisitId {
    /// The id of 32 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => byte.checked_sub(b'0'),
            b'a'..=b'f' => byte.checked_sub(b'a')?.checked_add(10),
            _ => None,
        };
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != 16 || !rest.is_empty() {
            return None;
        }
        let mut id = [0; 16];
        for (byte, [high, low]) in id.iter_mut().zip(pairs) {
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Some(Self(id))
    }
}

impl std::fmt::Display for VisitId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for VisitId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// How an image came to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VisitKind {
    /// The guest left this host.
    Departed,
    /// The guest came to this host.
    Arrived,
}

impl VisitKind {
    /// `departed` or `arrived`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Departed => "departed",
            Self::Arrived => "arrived",
        }
    }

    fn from_number(number: u8) -> Result<Self, DecodeError> {
        match number {
            1 => Ok(Self::Departed),
            2 => Ok(Self::Arrived),
            value => Err(DecodeError::Unknown { field: "kind", value: u64::from(value) }),
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Departed => 1,
            Self::Arrived => 2,
        }
    }
}

/// The header around a body, sealed for the domain of `key`. A body that is too long is cut, and decodes to nothing.
pub fn seal(key: &[u8; 32], body: &[u8]) -> [u8; BLOCK] {
    let mut bytes = Vec::with_capacity(BLOCK);
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    Writer(&mut bytes).bytes(&MAGIC).u32(VERSION).u32(len).bytes(body);
    let seal = DedupDomain::new(key).seal(&[&bytes]);
    bytes.extend_from_slice(&seal.0);
    let mut block = [0; BLOCK];
    block.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    block
}

/// What a manifest says of its visit, the digests aside.
#[derive(Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The visit.
    pub id: VisitId,
    /// The key of its dedup domain.
    pub key: [u8; 32],
    /// The guest, through all its hosts and visits.
    pub lineage: LineageId,
    /// What the guest was called.
    pub name: ImageName,
    /// The session that brought or took it.
    pub session: [u8; 16],
    /// When, in seconds since 1970 by this host's clock.
    pub created: u64,
    /// Which of its domain's visits it is, in the order in which this store came to keep them: clocks go back.
    pub sequence: u64,
    /// How it came to be kept.
    pub kind: VisitKind,
    /// Its regions.
    pub layout: Layout,
    /// The image's root.
    pub root: Digest,
    /// The seal of its present bitmap.
    pub present: Digest,
}

impl std::fmt::Debug for Manifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the key: it must not reach a log.
        f.debug_struct("Manifest").field("id", &self.id).field("name", &self.name).finish_non_exhaustive()
    }
}

impl Manifest {
    // STORE 2.3
    /// Judges the first [`BLOCK`] bytes of a manifest file of `len` bytes.
    ///
    /// # Errors
    /// They are no manifest, or not what was written, or the file has another length.
    pub fn decode(block: &[u8; BLOCK], len: u64) -> Result<Self, ManifestError> {
        let mut reader = Reader::new(block);
        if reader.array("magic")? != MAGIC {
            return Err(ManifestError::Magic);
        }
        let version = reader.u32("version")?;
        if version != VERSION {
            return Err(ManifestError::Version(version));
        }
        let claimed = reader.u32("body")?;
        let body_len = usize::try_from(claimed).unwrap_or(usize::MAX);
        if body_len > BODY_MAX {
            return Err(DecodeError::limit("body", u64::from(claimed), BODY_MAX as u64).into());
        }
        let manifest = Self::from_body(reader.bytes("body", body_len)?)?;
        let seal: [u8; SEAL] = reader.array("seal")?;
        let sealed = block.get(..FIXED.saturating_add(body_len)).unwrap_or_default();
        if manifest.domain().seal(&[sealed]) != Digest(seal) {
            return Err(ManifestError::Seal);
        }
        if reader.rest().iter().any(|&byte| byte != 0) {
            return Err(ManifestError::Padding);
        }
        let expected = manifest.file_len();
        if len == expected { Ok(manifest) } else { Err(ManifestError::Length { found: len, expected }) }
    }

    fn from_body(bytes: &[u8]) -> Result<Self, DecodeError> {
        let body: Body = decode_body(bytes)?;
        let (id, key, lineage, name, session, created, sequence, kind, regions, root, present) = body;
        let region = |spec: &RegionSpec| {
            let unknown = DecodeError::Unknown { field: "install size", value: u64::from(spec.install_size) };
            let install_size = InstallSize::from_bytes(spec.install_size).ok_or(unknown)?;
            Ok(Region { bytes: spec.bytes, install_size })
        };
        let regions: Result<Vec<Region>, DecodeError> = regions.iter().map(region).collect();
        Ok(Self {
            id: VisitId(id),
            key,
            lineage: LineageId(lineage),
            name: ImageName::new(&name)?,
            session,
            created,
            sequence,
            kind: VisitKind::from_number(kind)?,
            layout: Layout::new(regions?)?,
            root: Digest(root),
            present: Digest(present),
        })
    }

    /// The first [`BLOCK`] bytes of its file.
    pub fn encode(&self) -> [u8; BLOCK] {
        let spec = |region: &Region| RegionSpec { bytes: region.bytes, install_size: region.install_size.bytes() };
        let regions: Vec<RegionSpec> = self.layout.regions().iter().map(spec).collect();
        let name = self.name.as_str().to_owned();
        let kind = self.kind.number();
        let body: Body = (
            self.id.0,
            self.key,
            self.lineage.0,
            name,
            self.session,
            self.created,
            self.sequence,
            kind,
            regions,
            self.root.0,
            self.present.0,
        );
        let mut encoded = Vec::new();
        encode_body(&body, &mut encoded);
        debug_assert!(encoded.len() <= BODY_MAX, "a name and regions inside their limits fit");
        seal(&self.key, &encoded)
    }

    /// Its dedup domain.
    pub fn domain(&self) -> DedupDomain {
        DedupDomain::new(&self.key)
    }

    /// Where the present bitmap lies, and its bytes without padding.
    pub fn present_span(&self) -> (u64, u64) {
        (BLOCK as u64, self.layout.pages().div_ceil(8))
    }

    /// Where the digest of a place lies.
    pub fn digest_offset(&self, place: u64) -> u64 {
        let (offset, bytes) = self.present_span();
        let start = offset.saturating_add(bytes.next_multiple_of(BLOCK as u64));
        start.saturating_add(place.saturating_mul(DIGEST_BYTES))
    }

    /// Bytes of the whole file.
    pub fn file_len(&self) -> u64 {
        self.digest_offset(self.layout.pages())
    }

    /// The seal of a present bitmap of this visit.
    pub fn seal_present(&self, bytes: &[u8]) -> Digest {
        self.domain().seal(&[b"present", &self.id.0, bytes])
    }

    /// Judges the present bitmap: all bytes between the header and the digests.
    ///
    /// # Errors
    /// They are not what was written.
    pub fn decode_present(&self, padded: &[u8]) -> Result<PageBitmap, ManifestError> {
        let (_, bytes) = self.present_span();
        let split = padded.split_at_checked(usize::try_from(bytes).unwrap_or(usize::MAX));
        let (bitmap, padding) = split.ok_or(ManifestError::Present)?;
        if self.seal_present(bitmap) != self.present {
            return Err(ManifestError::Present);
        }
        if padding.iter().any(|&byte| byte != 0) {
            return Err(ManifestError::Padding);
        }
        PageBitmap::from_bytes(self.layout.pages(), bitmap).ok_or(ManifestError::Present)
    }
}

#[cfg(test)]
mod tests;
