//! Reads parts of parameters from safetensors files.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use ::safetensors::tensor::{Dtype, Metadata};
use burn::tensor::{DType, TensorData};

use super::SliceSource;
use crate::Error;

/// A [`SliceSource`] on a safetensors file, or anything that reads like one. Only its header is read when it is opened, and
/// later the runs of bytes that make up the parts that are asked for.
///
/// Names of tensors are paths of parameters, as burn-store writes them.
#[derive(Debug)]
pub struct Safetensors<R> {
    reader: R,
    metadata: Metadata,
    /// Where the data begins.
    start: u64,
    bytes_read: u64,
}

/// A header is no longer than this, says the format.
const LONGEST_HEADER: u64 = 100_000_000;

impl Safetensors<File> {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it cannot be read or is not safetensors.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|why| wrong(format!("cannot open {}: {why}", path.display())))?;
        Self::new(file)
    }
}

impl<R: Read + Seek> Safetensors<R> {
    /// Takes what a reader gives from its beginning on.
    ///
    /// # Errors
    /// As [`open`](Safetensors::open).
    pub fn new(mut reader: R) -> Result<Self, Error> {
        let failed = |why: std::io::Error| wrong(format!("cannot read the header: {why}"));
        let size = reader.seek(SeekFrom::End(0)).map_err(failed)?;
        reader.seek(SeekFrom::Start(0)).map_err(failed)?;
        let mut length = [0; 8];
        reader.read_exact(&mut length).map_err(failed)?;
        let length = u64::from_le_bytes(length);
        if length > LONGEST_HEADER {
            return Err(wrong(format!("a header of {length} bytes is too long: this is no safetensors file")));
        }
        // What the file says of itself is compared with what there is before memory is taken for it.
        let start = 8 + length;
        if start > size {
            return Err(wrong(format!(
                "the file of {size} bytes claims a header of {length}: it is cut off, or no safetensors file"
            )));
        }
        let mut header = vec![0; length as usize];
        reader.read_exact(&mut header).map_err(failed)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|why| wrong(format!("this is no safetensors file: {why}")))?;
        let (claimed, there) = (metadata.data_len() as u64, size - start);
        if claimed > there {
            return Err(wrong(format!(
                "the header speaks of {claimed} bytes of tensors, and the file has {there}: it is cut off"
            )));
        }
        Ok(Self { reader, metadata, start, bytes_read: start })
    }

    /// How many bytes were read so far, the header included.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }
}

impl<R: Read + Seek> SliceSource for Safetensors<R> {
    fn dims(&mut self, path: &str) -> Result<Option<Vec<usize>>, Error> {
        Ok(self.metadata.info(path).map(|info| info.shape.clone()))
    }

    fn read(&mut self, path: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error> {
        let Some(info) = self.metadata.info(path) else { return Err(wrong(format!("there is no tensor `{path}`"))) };
        let dtype = dtype(info.dtype)
            .ok_or_else(|| wrong(format!("tensor `{path}` is {:?}, which burn has no dtype for", info.dtype)))?;
        let fits = |(range, size): (&Range<usize>, &usize)| range.start <= range.end && range.end <= *size;
        if ranges.len() != info.shape.len() || !ranges.iter().zip(&info.shape).all(fits) {
            let dims = &info.shape;
            return Err(wrong(format!("tensor `{path}` of dims {dims:?} has nothing at {ranges:?}")));
        }
        let size = dtype.size();
        let first = self.start + info.data_offsets.0 as u64;
        let dims = info.shape.clone();
        let shape: Vec<usize> = ranges.iter().map(ExactSizeIterator::len).collect();
        let mut bytes = vec![0; shape.iter().product::<usize>() * size];
        let mut rest = &mut bytes[..];
        for (place, length) in runs(&dims, ranges) {
            let (run, later) = rest.split_at_mut(length * size);
            let failed = |why| wrong(format!("cannot read tensor `{path}`: {why}"));
            self.reader.seek(SeekFrom::Start(first + (place * size) as u64)).map_err(failed)?;
            self.reader.read_exact(run).map_err(failed)?;
            rest = later;
        }
        self.bytes_read += bytes.len() as u64;
        Ok(TensorData::from_bytes_vec(bytes, shape, dtype))
    }
}

/// The places and lengths of the runs of elements that make up a part of a contiguous tensor.
fn runs(dims: &[usize], ranges: &[Range<usize>]) -> Vec<(usize, usize)> {
    if ranges.iter().any(Range::is_empty) {
        return Vec::new();
    }
    // Behind this dim everything is taken.
    let split = (0..dims.len()).rev().find(|dim| ranges[*dim].len() != dims[*dim]).unwrap_or(0);
    let behind: usize = dims.iter().skip(split + 1).product();
    let mut starts = vec![0];
    for (dim, range) in ranges.iter().enumerate().take(split) {
        starts = starts.iter().flat_map(|start| range.clone().map(move |index| start * dims[dim] + index)).collect();
    }
    let (size, range) = (dims.get(split).copied().unwrap_or(1), ranges.get(split).cloned().unwrap_or(0..1));
    starts.into_iter().map(|start| ((start * size + range.start) * behind, range.len() * behind)).collect()
}

fn dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::I8 => DType::I8,
        Dtype::U64 => DType::U64,
        Dtype::U32 => DType::U32,
        Dtype::U16 => DType::U16,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
}

fn wrong(problem: String) -> Error {
    Error::invalid("Safetensors", problem)
}

#[cfg(test)]
mod tests {
    use super::{Safetensors, runs};

    #[test]
    fn parts_are_runs() {
        assert_eq!(runs(&[4, 6], &[0..4, 0..6]), [(0, 24)]);
        assert_eq!(runs(&[4, 6], &[2..4, 0..6]), [(12, 12)]);
        assert_eq!(runs(&[4, 6], &[1..3, 2..5]), [(8, 3), (14, 3)]);
        assert_eq!(runs(&[2, 2, 3], &[0..2, 1..2, 0..3]), [(3, 3), (9, 3)]);
        assert_eq!(runs(&[], &[]), [(0, 1)]);
        // Nothing of many rows is nothing.
        assert_eq!(runs(&[usize::MAX, 0, 5], &[0..usize::MAX, 0..0, 0..3]), []);
    }

    /// A file of these tensors, as its header says, and so many bytes.
    fn file(header: &str, claimed: usize, data: usize) -> Result<(), String> {
        let bytes = [&(claimed as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
        Safetensors::new(std::io::Cursor::new(bytes)).map(|_| ()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_file_claims_must_be_there() {
        let header = r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#;
        assert_eq!(file(header, header.len(), 24), Ok(()));
        let says = |claimed, data, words: &str| {
            let said = file(header, claimed, data).unwrap_err();
            assert!(said.contains(words), "`{words}` is missing in: {said}");
        };
        says(header.len(), 23, "24 bytes of tensors, and the file has 23");
        says(99_999_999, 0, "claims a header of 99999999");
        says(usize::MAX, 0, "too long");
        let huge = r#"{"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]}}"#;
        let said = file(huge, huge.len(), 8).unwrap_err();
        assert!(said.contains("1152921504606846976 bytes of tensors, and the file has 8"), "{said}");
    }
}
