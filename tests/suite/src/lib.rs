//! The repository as its own tests see it: where it is, and which files it has. Nothing is written.

use std::io;
use std::path::PathBuf;

/// A file of the repository.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// From the root, with `/` between folders.
    pub path: String,
    /// What is in it.
    pub text: String,
}

/// The root of the repository. Cargo tells where it is when the test runs, too: two checkouts that share a target
/// folder may share the test's binary.
pub fn root() -> PathBuf {
    let told = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    told.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).join("../..")
}

/// A file of the repository, by its path from the root.
///
/// # Errors
/// It cannot be read as text.
pub fn read(path: &str) -> io::Result<String> {
    let text = std::fs::read_to_string(root().join(path));
    text.map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}

/// All files whose name ends in `ending`, sorted by path; built and hidden folders aside.
///
/// # Errors
/// A folder or file cannot be read.
pub fn files(ending: &str) -> io::Result<Vec<SourceFile>> {
    let (mut found, mut folders) = (Vec::new(), vec![String::new()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(root().join(&folder))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            if name.starts_with('.') || name == "target" {
                continue;
            }
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else if name.ends_with(ending) {
                found.push(SourceFile { text: read(&path)?, path });
            }
        }
    }
    found.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(found)
}
