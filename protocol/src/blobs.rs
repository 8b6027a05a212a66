//! The blobs of an image: device state and whatever else must be there before the guest starts, named and versioned by
//! the embedder.
//!
//! What is in them is not looked at. Their parts come in order, one blob after the other, so a part that overlaps, leaves
//! a gap or belongs to another blob is refused, and no more is ever held than has come.

use crate::frame::{Blob, ImageName};
use crate::limits::{BLOB_BYTES_MAX, BLOB_PART_BYTES_MAX, BLOBS_MAX};
use alloc::vec::Vec;
use thiserror::Error;

/// A blob that is not like the others, or not where it belongs.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BlobError {
    /// More blobs than an image has.
    #[error("{0} is one blob too many: an image has at most {max}", max = BLOBS_MAX)]
    Count(ImageName),
    /// A blob over its limit.
    #[error("blob {name} has {bytes} bytes, more than {max}", max = BLOB_BYTES_MAX)]
    Length {
        /// Which.
        name: ImageName,
        /// Its bytes.
        bytes: usize,
    },
    /// Two blobs of one name.
    #[error("blob {0} comes twice")]
    Twice(ImageName),
    /// A part that does not continue its blob, or a blob that begins within another.
    #[error("blob {name} from byte {got}, expected {expected_name} from byte {expected}")]
    Order {
        /// Of which blob it is.
        name: ImageName,
        /// Where it begins.
        got: u32,
        /// Of which blob it must be.
        expected_name: ImageName,
        /// Where it must begin.
        expected: u32,
    },
    /// A part whose version or length is not its blob's.
    #[error("blob {0} changes its version or length from part to part")]
    Changed(ImageName),
    /// A blob that is not whole.
    #[error("blob {name}: {missing} bytes have not come")]
    Incomplete {
        /// Which.
        name: ImageName,
        /// What is missing.
        missing: u32,
    },
}

/// A blob, or as much of it as has come.
#[derive(Clone, PartialEq, Eq)]
pub struct NamedBlob {
    name: ImageName,
    version: u32,
    length: u32,
    bytes: Vec<u8>,
}

impl NamedBlob {
    /// What it is called.
    pub fn name(&self) -> &ImageName {
        &self.name
    }

    /// Which version of it.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What is in it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes that have come; none are held beyond the length, which fits 32 bits.
    fn come(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }
}

impl core::fmt::Debug for NamedBlob {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "NamedBlob({} v{}, {} of {} bytes)", self.name, self.version, self.bytes.len(), self.length)
    }
}

/// The blobs of an image, in the order in which they were sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blobs {
    blobs: Vec<NamedBlob>,
}

impl Blobs {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a blob that is to be sent.
    ///
    /// # Errors
    /// Too many, too long, or a name that is there already.
    pub fn insert(&mut self, name: ImageName, version: u32, bytes: Vec<u8>) -> Result<(), BlobError> {
        let length = u32::try_from(bytes.len()).ok().filter(|length| *length <= BLOB_BYTES_MAX);
        let Some(length) = length else { return Err(BlobError::Length { name, bytes: bytes.len() }) };
        self.begin(name, version, length)?;
        if let Some(blob) = self.blobs.last_mut() {
            blob.bytes = bytes;
        }
        Ok(())
    }

    // SPEC 12.3
    /// Takes the next part that has come.
    ///
    /// # Errors
    /// It does not continue what has come so far.
    pub fn handle_part(&mut self, part: &Blob<'_>) -> Result<(), BlobError> {
        let open = self.blobs.last().filter(|blob| blob.come() < blob.length);
        match open {
            Some(blob) if blob.name != part.name || blob.come() != part.offset => {
                return Err(BlobError::Order {
                    name: part.name.clone(),
                    got: part.offset,
                    expected_name: blob.name.clone(),
                    expected: blob.come(),
                });
            }
            Some(blob) if (blob.version, blob.length) != (part.version, part.length) => {
                return Err(BlobError::Changed(part.name.clone()));
            }
            Some(_) => {}
            None if part.offset != 0 => {
                let (name, got) = (part.name.clone(), part.offset);
                return Err(BlobError::Order { expected_name: name.clone(), name, got, expected: 0 });
            }
            None => self.begin(part.name.clone(), part.version, part.length)?,
        }
        if let Some(blob) = self.blobs.last_mut() {
            blob.bytes.extend_from_slice(part.part);
        }
        Ok(())
    }

    /// That nothing is missing of what has begun.
    ///
    /// # Errors
    /// The last blob is not whole.
    pub fn is_whole(&self) -> Result<(), BlobError> {
        match self.blobs.last() {
            Some(blob) if blob.come() < blob.length => {
                let missing = blob.length.saturating_sub(blob.come());
                Err(BlobError::Incomplete { name: blob.name.clone(), missing })
            }
            _ => Ok(()),
        }
    }

    /// The blobs.
    pub fn iter(&self) -> core::slice::Iter<'_, NamedBlob> {
        self.blobs.iter()
    }

    /// The frames that bring them.
    pub fn parts(&self) -> impl Iterator<Item = Blob<'_>> {
        self.blobs.iter().flat_map(|blob| {
            let step = BLOB_PART_BYTES_MAX;
            let offsets = (0..blob.length.max(1)).step_by(usize::try_from(step).unwrap_or(usize::MAX));
            let at = |offset: u32| usize::try_from(offset).unwrap_or(usize::MAX);
            offsets.map(move |offset| Blob {
                name: blob.name.clone(),
                version: blob.version,
                length: blob.length,
                offset,
                part: blob.bytes.get(at(offset)..at(offset.saturating_add(step).min(blob.length))).unwrap_or_default(),
            })
        })
    }

    fn begin(&mut self, name: ImageName, version: u32, length: u32) -> Result<(), BlobError> {
        if self.blobs.iter().any(|blob| blob.name == name) {
            return Err(BlobError::Twice(name));
        }
        // SPEC 12.2
        if self.blobs.len() >= BLOBS_MAX {
            return Err(BlobError::Count(name));
        }
        self.blobs.push(NamedBlob { name, version, length, bytes: Vec::new() });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::domain::DedupDomain;
    use crate::tree::live_root;
    use alloc::format;
    use alloc::string::ToString;
    use alloc::vec;
    use proptest::prelude::*;

    fn name(text: &str) -> ImageName {
        ImageName::new(text).unwrap()
    }

    fn blobs(content: &[(&str, u32, usize)]) -> Blobs {
        let mut blobs = Blobs::new();
        for (text, version, bytes) in content {
            blobs.insert(name(text), *version, vec![*version as u8; *bytes]).unwrap();
        }
        blobs
    }

    fn part<'a>(text: &str, length: u32, offset: u32, part: &'a [u8]) -> Blob<'a> {
        Blob { name: name(text), version: 1, length, offset, part }
    }

    // SPEC 12.3
    #[test]
    fn rejects_parts_that_do_not_continue_their_blob() {
        let mut blobs = Blobs::new();
        assert!(blobs.handle_part(&part("a", 6, 1, b"x")).is_err(), "does not begin at 0");
        blobs.handle_part(&part("a", 6, 0, b"abc")).unwrap();
        assert_eq!(blobs.is_whole().unwrap_err().to_string(), "blob a: 3 bytes have not come");
        for bad in [
            part("a", 6, 2, b"x"),
            part("a", 6, 4, b"x"),
            part("b", 6, 3, b"x"),
            part("b", 6, 0, b"x"),
            part("a", 7, 3, b"x"),
            Blob { version: 2, ..part("a", 6, 3, b"x") },
        ] {
            assert!(blobs.clone().handle_part(&bad).is_err(), "{bad:?}");
        }
        blobs.handle_part(&part("a", 6, 3, b"def")).unwrap();
        assert_eq!(blobs.handle_part(&part("a", 1, 0, b"x")), Err(BlobError::Twice(name("a"))));
        blobs.handle_part(&part("empty", 0, 0, b"")).unwrap();
        assert!(blobs.is_whole().is_ok() && blobs.handle_part(&part("empty", 0, 0, b"")).is_err());
        let content: Vec<&[u8]> = blobs.iter().map(NamedBlob::bytes).collect();
        assert_eq!(content, [b"abcdef".as_slice(), b""]);
    }

    // SPEC 12.2
    #[test]
    fn rejects_a_blob_too_many_and_a_byte_too_many() {
        let most = BLOB_BYTES_MAX as usize;
        let mut blobs = Blobs::new();
        assert!(blobs.insert(name("long"), 1, vec![0; most + 1]).is_err());
        blobs.insert(name("long"), 1, vec![0; most]).unwrap();
        for count in 1..BLOBS_MAX {
            blobs.handle_part(&part(&format!("b{count}"), 0, 0, b"")).unwrap();
        }
        assert_eq!(blobs.handle_part(&part("more", 0, 0, b"")), Err(BlobError::Count(name("more"))));
        assert_eq!(blobs.insert(name("more"), 1, vec![]), Err(BlobError::Count(name("more"))));
    }

    // SPEC 12.4
    #[test]
    fn the_root_covers_every_field_of_every_blob() {
        let domain = DedupDomain::public();
        let root = |content: &[(&str, u32, usize)]| live_root(&domain, Digest([1; 32]), &blobs(content));
        let mut roots = vec![
            live_root(&domain, Digest([2; 32]), &Blobs::new()),
            root(&[]),
            root(&[("a", 1, 5)]),
            root(&[("b", 1, 5)]),
            root(&[("a", 2, 5)]),
            root(&[("a", 1, 6)]),
            root(&[("a", 1, 5), ("b", 1, 0)]),
            root(&[("b", 1, 0), ("a", 1, 5)]),
            root(&[("a", 1, 0), ("b", 1, 5)]),
        ];
        roots.sort();
        roots.dedup();
        assert_eq!(roots.len(), 9);
    }

    proptest! {
        #[test]
        fn what_is_sent_in_parts_arrives_whole(lengths in prop::collection::vec(0usize..100_000, 0..6)) {
            let mut sent = Blobs::new();
            for (at, length) in lengths.iter().enumerate() {
                sent.insert(name(&format!("b{at}")), at as u32, (0..*length).map(|byte| byte as u8).collect()).unwrap();
            }
            let mut come = Blobs::new();
            for part in sent.parts() {
                let mut body = Vec::new();
                part.encode(&mut body);
                let decoded = Blob::decode(&body).unwrap();
                prop_assert_eq!(&decoded, &part);
                come.handle_part(&decoded).unwrap();
            }
            come.is_whole().unwrap();
            prop_assert_eq!(come, sent);
        }
    }
}
