//! A checkpoint that is read: the slices that a rank asks for, checked as they are read.

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
use crate::tensor_file::{Loop, Side, TensorFile, copy_strided, row_major};

/// The directory of a checkpoint. Files are mapped when something of them is needed.
pub(super) struct Reader {
    dir: PathBuf,
    index: Arc<Index>,
    files: BTreeMap<usize, TensorFile>,
    /// Of each slice, by file and name, the blocks whose checksums were compared.
    checked: HashMap<(usize, String), Vec<bool>>,
    /// Bytes of tensors that were read so far.
    pub(super) bytes_read: u64,
}

impl Reader {
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
        let mut bytes = vec![0; lens.iter().product::<usize>() * dtype.size()];
        for slice in &tensor.slices {
            let own = slice.ranges();
            let both: Vec<Range<usize>> =
                ranges.iter().zip(&own).map(|(a, b)| a.start.max(b.start)..a.end.min(b.end)).collect();
            if both.iter().any(|range| range.start >= range.end) {
                continue;
            }
            let dims: Vec<usize> = own.iter().map(ExactSizeIterator::len).collect();
            let inner: Vec<Range<usize>> =
                both.iter().zip(&own).map(|(both, own)| both.start - own.start..both.end - own.start).collect();
            let from = self.slice(key, tensor, slice, &dims, &inner)?;
            let from_strides = row_major(&dims);
            let place = |starts: &mut dyn Iterator<Item = usize>, strides: &[isize]| -> usize {
                starts.zip(strides).map(|(start, stride)| start * *stride as usize).sum()
            };
            let first = place(&mut inner.iter().map(|range| range.start), &from_strides);
            let to = place(&mut both.iter().zip(ranges).map(|(both, all)| both.start - all.start), &strides);
            let sides = from_strides.iter().zip(&strides);
            let loops: Vec<Loop> = both
                .iter()
                .zip(sides)
                .map(|(range, (from, to))| Loop { len: range.len(), from: *from, to: *to })
                .collect();
            copy_strided((from, Side { start: first, dtype }), (&mut bytes, Side { start: to, dtype }), &loops)?;
        }
        Ok(TensorData::from_bytes_vec(bytes, lens, dtype))
    }

    /// The bytes of a slice of these dims, of which those of `ranges` are made sure of.
    fn slice(
        &mut self,
        key: &TensorKey,
        tensor: &StoredTensor,
        slice: &StoredSlice,
        dims: &[usize],
        ranges: &[Range<usize>],
    ) -> Result<&[u8], Error> {
        let index = self.index.clone();
        let stored = &index.files[slice.file];
        let path = self.dir.join(&stored.name);
        let instead = "restore an earlier checkpoint with `restore_step`, or bring the file back";
        if !self.files.contains_key(&slice.file) {
            let there = fs::metadata(&path).map_err(|why| {
                file_problem(&path, format!("cannot be read, and `{key}` is in it: {why}; {instead}"))
            })?;
            if there.len() != stored.bytes {
                let problem =
                    format!("has {} bytes, and the index says {}: it is damaged; {instead}", there.len(), stored.bytes);
                return Err(file_problem(&path, problem));
            }
            let file = TensorFile::open(&path).map_err(|why| checkpoint_error(format!("{why}; {instead}")))?;
            self.files.insert(slice.file, file);
        }
        let file = &self.files[&slice.file];
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
        let bytes = file.bytes(entry);
        let known = (slice.file, slice.tensor.clone());
        let checked = self.checked.entry(known).or_insert_with(|| vec![false; slice.xxh3.len()]);
        let size = tensor.burn_dtype()?.size();
        let mut damaged = None;
        for_runs(dims, ranges, &mut |first, len| {
            let (begin, end) = (first * size, (first + len) * size);
            for block in begin / index.block_bytes..end.div_ceil(index.block_bytes) {
                if std::mem::replace(&mut checked[block], true) {
                    continue;
                }
                let from = block * index.block_bytes;
                let block_bytes = &bytes[from..(from + index.block_bytes).min(bytes.len())];
                self.bytes_read += block_bytes.len() as u64;
                if checksum(block_bytes) != slice.xxh3[block] && damaged.is_none() {
                    damaged = Some(from..from + block_bytes.len());
                }
            }
        });
        match damaged {
            Some(range) => Err(file_problem(
                &path,
                format!("bytes {range:?} of `{}` are damaged: their checksum is another; {instead}", slice.tensor),
            )),
            None => Ok(bytes),
        }
    }
}

/// Calls `run` with the first element and the length of each run of elements that makes up a part of a row-major tensor.
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
pub(super) struct ParamSource<'a> {
    pub(super) reader: &'a mut Reader,
    pub(super) kept: &'a HashSet<String>,
}

impl SliceSource for ParamSource<'_> {
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
