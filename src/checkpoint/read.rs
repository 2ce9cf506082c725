//! A checkpoint that is read: the slices that a rank asks for, checked as they are read.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::TensorData;

use super::index::{Index, StoredSlice, StoredTensor, checksum};
use super::plan::TensorKey;
use super::{checkpoint_error, file_problem};
use crate::Error;
use crate::params::SliceSource;
use crate::tensor_file::{Elements, Loop, Side, TensorFile, copy_strided, row_major};

/// The directory of a checkpoint. Files are mapped when something of them is needed.
pub(super) struct CheckpointReader {
    dir: PathBuf,
    index: Arc<Index>,
    files: BTreeMap<usize, TensorFile>,
    /// Of each slice, by file and name, the blocks whose checksums were compared.
    checked: HashMap<(usize, String), Vec<bool>>,
    /// Bytes of tensors that were read so far.
    pub(super) bytes_read: u64,
}

impl CheckpointReader {
    pub(super) fn new(dir: &Path, index: Arc<Index>) -> Self {
        Self { dir: dir.into(), index, files: BTreeMap::new(), checked: HashMap::new(), bytes_read: 0 }
    }

    /// The elements of a tensor in these ranges, in the dtype of the checkpoint.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the file and the tensor, if a file is not what the index says.
    pub(super) fn read(
        &mut self,
        key: &TensorKey,
        tensor: &StoredTensor,
        ranges: &[Range<usize>],
    ) -> Result<TensorData, Error> {
        let dtype = tensor.burn_dtype()?;
        let fits = |(range, size): (&Range<usize>, &usize)| range.start <= range.end && range.end <= *size;
        if ranges.len() != tensor.dims.len() || !ranges.iter().zip(&tensor.dims).all(fits) {
            return Err(checkpoint_error(format!("`{key}` of dims {:?} has nothing at {ranges:?}", tensor.dims)));
        }
        let lens: Vec<usize> = ranges.iter().map(ExactSizeIterator::len).collect();
        let strides = row_major(&lens);
        let mut needed = Vec::new();
        for slice in &tensor.slices {
            let own = slice.ranges();
            let both: Vec<Range<usize>> =
                ranges.iter().zip(&own).map(|(a, b)| a.start.max(b.start)..a.end.min(b.end)).collect();
            if both.iter().any(|range| range.start >= range.end) {
                continue;
            }
            let dims: Vec<usize> = own.iter().map(ExactSizeIterator::len).collect();
            self.blocks(key, tensor, slice, &dims)?;
            needed.push((slice, own, both, dims));
        }
        // All of it is there, in files of the sizes that they are said to have: only now memory is taken for it.
        let mut elements = Elements::zeros(lens.iter().product(), dtype);
        let bytes = elements.bytes_mut();
        for (slice, own, both, dims) in needed {
            let inner: Vec<Range<usize>> =
                both.iter().zip(&own).map(|(both, own)| both.start - own.start..both.end - own.start).collect();
            let mut from = self.blocks(key, tensor, slice, &dims)?;
            let from_strides = row_major(&dims);
            let place = |starts: &mut dyn Iterator<Item = usize>, strides: &[isize]| -> usize {
                starts.zip(strides).map(|(start, stride)| start * *stride as usize).sum()
            };
            let first = place(&mut inner.iter().map(|range| range.start), &from_strides);
            let to = place(&mut both.iter().zip(ranges).map(|(both, all)| both.start - all.start), &strides);
            let whole_rows = both.iter().zip(dims.iter().zip(&lens)).skip(1);
            if whole_rows.clone().all(|(both, (own, all))| both.len() == *own && both.len() == *all) {
                let size = dtype.size();
                let len = both.iter().map(ExactSizeIterator::len).product::<usize>() * size;
                let (first, to) = (first * size, to * size);
                // Copied while it is in the cache.
                for begin in (0..len).step_by(from.block_bytes) {
                    let piece = begin..(begin + from.block_bytes).min(len);
                    from.check(first + piece.start..first + piece.end)?;
                    bytes[to + piece.start..to + piece.end]
                        .copy_from_slice(&from.bytes[first + piece.start..first + piece.end]);
                }
                continue;
            }
            let mut outcome = Ok(());
            for_runs(&dims, &inner, &mut |first, len| {
                if outcome.is_ok() {
                    outcome = from.check(first * dtype.size()..(first + len) * dtype.size());
                }
            });
            outcome?;
            let sides = from_strides.iter().zip(&strides);
            let loops: Vec<Loop> = both
                .iter()
                .zip(sides)
                .map(|(range, (from, to))| Loop { len: range.len(), from: *from, to: *to })
                .collect();
            copy_strided((from.bytes, Side { start: first, dtype }), (bytes, Side { start: to, dtype }), &loops)?;
        }
        Ok(elements.into_data(lens, dtype))
    }

    /// The bytes of a slice of these dims.
    fn blocks<'a>(
        &'a mut self,
        key: &TensorKey,
        tensor: &StoredTensor,
        slice: &'a StoredSlice,
        dims: &[usize],
    ) -> Result<Blocks<'a>, Error> {
        let index = self.index.clone();
        let stored = &index.files[slice.file];
        let path = self.dir.join(&stored.name);
        let instead = INSTEAD;
        let file = match self.files.entry(slice.file) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(none) => {
                let there = fs::metadata(&path).map_err(|why| {
                    file_problem(&path, format!("cannot be read, and `{key}` is in it: {why}; {instead}"))
                })?;
                if there.len() != stored.bytes {
                    let (found, said) = (there.len(), stored.bytes);
                    let problem = format!("has {found} bytes, and the index says {said}: it is damaged; {instead}");
                    return Err(file_problem(&path, problem));
                }
                none.insert(TensorFile::open(&path).map_err(|why| checkpoint_error(format!("{why}; {instead}")))?)
            }
        };
        let entry = file.tensors().get(&slice.tensor).ok_or_else(|| {
            file_problem(&path, format!("has no tensor `{}`: it is of another checkpoint; {instead}", slice.tensor))
        })?;
        if entry.named != tensor.dtype || entry.dims != dims {
            let problem = format!(
                "has `{}` of {} {:?}, and the index says {} {dims:?}: it is damaged; {instead}",
                slice.tensor, entry.named, entry.dims, tensor.dtype
            );
            return Err(file_problem(&path, problem));
        }
        let known = (slice.file, slice.tensor.clone());
        let checked = self.checked.entry(known).or_insert_with(|| vec![false; slice.xxh3.len()]);
        let block_bytes = index.block_bytes;
        Ok(Blocks { path, slice, bytes: file.bytes(entry), block_bytes, checked, bytes_read: &mut self.bytes_read })
    }
}

/// What is tried when a file is damaged.
const INSTEAD: &str = "restore an earlier checkpoint with `restore_step`, or bring the file back";

/// The bytes of a slice, of which each block is compared with its checksum when it is needed for the first time.
struct Blocks<'a> {
    path: PathBuf,
    slice: &'a StoredSlice,
    bytes: &'a [u8],
    block_bytes: usize,
    checked: &'a mut [bool],
    bytes_read: &'a mut u64,
}

impl Blocks<'_> {
    /// Makes sure of all blocks that these bytes are in.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the file and the slice, if one is damaged.
    fn check(&mut self, bytes: Range<usize>) -> Result<(), Error> {
        for block in bytes.start / self.block_bytes..bytes.end.div_ceil(self.block_bytes) {
            if std::mem::replace(&mut self.checked[block], true) {
                continue;
            }
            let from = block * self.block_bytes;
            let block_bytes = &self.bytes[from..(from + self.block_bytes).min(self.bytes.len())];
            *self.bytes_read += block_bytes.len() as u64;
            if checksum(block_bytes) != self.slice.xxh3[block] {
                let range = from..from + block_bytes.len();
                let tensor = &self.slice.tensor;
                let problem =
                    format!("bytes {range:?} of `{tensor}` are damaged: their checksum is another; {INSTEAD}");
                return Err(file_problem(&self.path, problem));
            }
        }
        Ok(())
    }
}

/// Calls `run` with the first element and the length of each run of elements that makes up a part of a row-major
/// tensor.
fn for_runs(dims: &[usize], ranges: &[Range<usize>], run: &mut dyn FnMut(usize, usize)) {
    // Behind this dim everything is taken.
    let split = (0..dims.len()).rev().find(|dim| ranges[*dim].len() != dims[*dim]).unwrap_or(0);
    let behind: usize = dims.iter().skip(split + 1).product();
    let (size, range) = (dims.get(split).copied().unwrap_or(1), ranges.get(split).cloned().unwrap_or(0..1));
    fn outer(dims: &[usize], ranges: &[Range<usize>], first: usize, each: &mut dyn FnMut(usize)) {
        match (dims, ranges) {
            ([size, dims @ ..], [range, ranges @ ..]) => {
                range.clone().for_each(|index| outer(dims, ranges, first * size + index, each));
            }
            _ => each(first),
        }
    }
    outer(&dims[..split], &ranges[..split.min(ranges.len())], 0, &mut |start| {
        run((start * size + range.start) * behind, range.len() * behind);
    });
}

/// The parameters of a checkpoint, but for those that are to stay as they are.
pub(super) struct ParamSource {
    pub(super) reader: CheckpointReader,
    pub(super) kept: Arc<HashSet<String>>,
}

impl SliceSource for ParamSource {
    fn dims(&mut self, path: &str) -> Result<Option<Vec<usize>>, Error> {
        Ok(self.reader.index.model.get(path).map(|tensor| tensor.dims.clone()))
    }

    fn read(&mut self, path: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error> {
        let index = self.reader.index.clone();
        let tensor =
            index.model.get(path).ok_or_else(|| checkpoint_error(format!("there is no parameter `{path}`")))?;
        self.reader.read(&TensorKey::param(path), tensor, ranges)
    }

    fn keeps(&mut self, path: &str) -> bool {
        self.kept.contains(path)
    }

    /// By the index that there is now: what has taken the checkpoint's place by then does not pass for it.
    fn for_later(&self) -> Option<Box<dyn SliceSource + Send>> {
        let reader = Reader::new(&self.reader.dir, self.reader.index.clone());
        Some(Box::new(Self { reader, kept: self.kept.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::for_runs;

    #[test]
    fn parts_are_runs() {
        let runs = |dims: &[usize], ranges: &[std::ops::Range<usize>]| {
            let mut runs = Vec::new();
            for_runs(dims, ranges, &mut |first, len| runs.push((first, len)));
            runs
        };
        assert_eq!(runs(&[4, 6], &[0..4, 0..6]), [(0, 24)]);
        assert_eq!(runs(&[4, 6], &[2..4, 0..6]), [(12, 12)]);
        assert_eq!(runs(&[4, 6], &[1..3, 2..5]), [(8, 3), (14, 3)]);
        assert_eq!(runs(&[2, 2, 3], &[0..2, 1..2, 0..3]), [(3, 3), (9, 3)]);
        assert_eq!(runs(&[], &[]), [(0, 1)]);
    }
}
