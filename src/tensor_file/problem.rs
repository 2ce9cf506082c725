//! What is wrong with a file.

use std::path::Path;

use crate::Error;

/// What is wrong with a file.
pub(crate) fn file_error(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::invalid("tensor file", format!("{}: {problem}", path.display()))
}
