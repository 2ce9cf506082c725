//! Files of named tensors in the safetensors format: read through a memory map, of which only the pages that are asked
//! for become memory, and written piece by piece at the places that the header says.
//!
//! A file begins with the length of its header (8 bytes, little-endian) and the header, JSON that gives each tensor's
//! dtype, dims and place. The tensors follow without gaps, row-major and little-endian.

mod draft;
mod dtype;
mod elements;
pub(crate) mod fault;
mod header;
#[cfg(all(test, unix))]
pub(crate) mod killed;
mod mapped;
mod problem;
mod strided;
mod writer;

pub(crate) use draft::{Draft, left_by_a_save, sync_dir, write_file};
pub(crate) use dtype::{dtype_of, name_of};
pub(crate) use elements::Elements;
pub(crate) use header::Entry;
pub(crate) use mapped::TensorFile;
pub(crate) use problem::file_error;
pub(crate) use strided::{Loop, Side, can_lie_in_memory, copy_strided, row_major};
pub(crate) use writer::{NewFile, NewTensor, PieceWriter};
