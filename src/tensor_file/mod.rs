//! Files of named tensors in the safetensors format: read through a memory map, of which only the pages that are asked for
//! become memory, and written piece by piece at the places that the header says.
//!
//! A file begins with the length of its header (8 bytes, little-endian) and the header, JSON that gives each tensor's dtype,
//! dims and place. The tensors follow without gaps, row-major and little-endian.

mod draft;
mod dtype;
mod header;
mod mapped;
mod strided;
mod writer;

use std::path::Path;

pub(crate) use draft::{Draft, write_file};
pub(crate) use dtype::{dtype_of, name_of};
pub(crate) use header::Entry;
pub(crate) use mapped::TensorFile;
pub(crate) use strided::{Loop, Side, copy_strided, row_major};
pub(crate) use writer::{NewFile, NewTensor, PieceWriter};

use crate::Error;

/// What is wrong with a file.
pub(crate) fn file_error(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::invalid("tensor file", format!("{}: {problem}", path.display()))
}
