//! The name of an image: the only text of a peer that ever becomes part of a path, so it is a type of its own.

use crate::error::DecodeError;
use crate::limits::NAME_BYTES_MAX;
use alloc::string::{String, ToString};

/// The name of an image: 1 to 64 of `A-Z a-z 0-9 . _ -`, and neither `.` nor `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageName(String);

impl ImageName {
    /// Judges a name.
    ///
    /// # Errors
    /// Anything else; the message carries it escaped and cut.
    pub fn new(name: &str) -> Result<Self, DecodeError> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let fits = (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(legal) && name != "." && name != "..";
        if !fits {
            let shown = name.chars().take(NAME_BYTES_MAX).flat_map(char::escape_default).collect();
            return Err(DecodeError::Name(shown));
        }
        Ok(Self(name.to_string()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl core::fmt::Display for ImageName {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_names_that_could_leave_their_folder() {
        let long = "x".repeat(65);
        let bad = ["", ".", "..", "../x", "/x", "a/../../b", "a\0b", "a\nb", "\u{1b}[31m", "ä", "a b", long.as_str()];
        for name in bad {
            let error = ImageName::new(name).unwrap_err().to_string();
            assert!(error.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "escaped: {error:?}");
        }
        for name in ["a", "vm-1.img", "...", "_", &"x".repeat(64)] {
            assert_eq!(ImageName::new(name).unwrap().as_str(), name);
        }
    }
}
