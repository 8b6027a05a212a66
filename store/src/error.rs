//! Why the store could not do something. None of it ends a session: a store that fails is a store that holds nothing.

use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why the store could not do something.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A folder or file of the store is not ours alone.
    #[error("{path}: {why}")]
    Refused {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong with it, and the way out.
        why: &'static str,
    },
    /// What is kept is not what was put there.
    #[error("{path}: is damaged: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// Somebody has the visit open.
    #[error("{path}: is in use by a session")]
    Busy {
        /// The manifest.
        path: PathBuf,
    },
    /// The caller's arguments contradict each other.
    #[error("{0}")]
    Misuse(&'static str),
    /// The operating system refused.
    #[error("{path}: {what}")]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}
