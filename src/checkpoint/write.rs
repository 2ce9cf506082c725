//! A rank's file: the slices that it writes, one behind the other.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use burn::backend::flex::FlexTensor;

use super::contents::{Contents, Slice};
use super::index::{BLOCK_BYTES, checksum};
use super::plan::{TensorKey, WritePlan};
use super::{checkpoint_error, fault};
use crate::Error;
use crate::tensor_file::{NewFile, NewTensor, PieceWriter};

/// Bytes that are written at once: whole blocks, few enough to be in the cache still when their checksums are known.
const PIECE: usize = 2 * BLOCK_BYTES;

/// The name of a rank's file.
pub(super) fn file_name(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// What a rank wrote.
pub(super) struct Written {
    /// The size of its file.
    pub(super) bytes: u64,
    /// The checksums of its slices, in the order of the plan.
    pub(super) checksums: Vec<Vec<String>>,
}

/// Writes what a rank is to write, if anything, and waits until it is on the disk. Beside its tensors a rank holds a copy of one
/// slice at most, where that is on a device or not contiguous.
///
/// # Errors
/// [`Error::InvalidArgument`] if the disk refuses.
pub(super) fn write(contents: &Contents, plan: &WritePlan, rank: usize, dir: &Path) -> Result<Option<Written>, Error> {
    let mut tensors = Vec::new();
    for (key, tensor, ranges) in plan.of_rank(rank) {
        let dims = ranges.iter().map(Range::len).collect();
        tensors.push(NewTensor { name: key.name(ranges), dtype: tensor.dtype, dims });
    }
    if tensors.is_empty() {
        return Ok(None);
    }
    let about = BTreeMap::from([("format".to_owned(), "burn-parallel checkpoint".to_owned())]);
    let new_file = NewFile::new(&tensors, &about)?;
    let file = PieceWriter::create(&dir.join(file_name(rank)), &new_file)?;
    let mut held: HashMap<&TensorKey, Vec<&Slice>> = HashMap::new();
    contents.slices.iter().for_each(|slice| held.entry(&slice.key).or_default().push(slice));
    let mut checksums = Vec::with_capacity(tensors.len());
    for (place, ((key, _, ranges), start)) in plan.of_rank(rank).zip(&new_file.starts).enumerate() {
        if place == tensors.len() / 2 {
            fault::point("half written");
        }
        let own = held.get(key).into_iter().flatten().find(|slice| within(ranges, &slice.ranges));
        let Some(slice) = own else {
            return Err(checkpoint_error(format!(
                "rank {rank} is to write {ranges:?} of `{key}`, which it does not have"
            )));
        };
        let values = contiguous(slice, ranges)?;
        let bytes = bytes_of(&values);
        let mut of_slice = Vec::with_capacity(bytes.len().div_ceil(BLOCK_BYTES));
        for (piece, bytes) in bytes.chunks(PIECE).enumerate() {
            of_slice.extend(bytes.chunks(BLOCK_BYTES).map(checksum));
            file.write_at(start + (piece * PIECE) as u64, bytes)?;
        }
        checksums.push(of_slice);
    }
    file.sync()?;
    Ok(Some(Written { bytes: new_file.size, checksums }))
}

fn within(inner: &[Range<usize>], outer: &[Range<usize>]) -> bool {
    inner.iter().zip(outer).all(|(inner, outer)| outer.start <= inner.start && inner.end <= outer.end)
}

/// The elements of a slice in these ranges of the whole, row-major in host memory: where they are, if they are so there.
fn contiguous(slice: &Slice, ranges: &[Range<usize>]) -> Result<FlexTensor, Error> {
    let mut value = slice.value.clone();
    for (dim, (range, own)) in ranges.iter().zip(&slice.ranges).enumerate() {
        let local = range.start - own.start..range.end - own.start;
        if local != (0..value.shape()[dim]) {
            value = value.narrow(dim, local);
        }
    }
    let value = value.into_flex()?;
    Ok(if value.is_contiguous() { value } else { value.to_contiguous() })
}

fn bytes_of(tensor: &FlexTensor) -> &[u8] {
    let (size, layout) = (tensor.dtype().size(), tensor.layout());
    &tensor.bytes()[layout.start_offset() * size..][..layout.num_elements() * size]
}
