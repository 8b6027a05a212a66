//! Random bytes from the operating system.

use crate::error::ErrorKind;

/// `N` random bytes.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], ErrorKind> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while let Some(space) = bytes.get_mut(filled..).filter(|space| !space.is_empty()) {
        let flags = rustix::rand::GetRandomFlags::empty();
        let count = rustix::rand::getrandom(space, flags).map_err(|errno| ErrorKind::Entropy(errno.into()))?;
        filled = filled.saturating_add(count);
    }
    Ok(bytes)
}
