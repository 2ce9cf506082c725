//! A file that is read where it is.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

use super::header::{Entry, LONGEST, TensorTable};
use super::problem::file_error;
use crate::Error;

/// A safetensors file in memory, mapped or held. Its header is checked when it is opened; of the tensors only those
/// bytes are read that are looked at.
///
/// A mapped file must not be cut off by others while it is open: the system then ends the process that looks at what is
/// gone.
pub(crate) struct TensorFile {
    path: PathBuf,
    header: TensorTable,
    /// Where the tensors begin.
    start: usize,
    bytes: FileBytes,
}

/// Smaller tensors are not worth a call of the system.
const RELEASED: usize = 1 << 18;

enum FileBytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl TensorFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`file_error`] if it cannot be read, is not safetensors, or lies about its tensors.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let failed = |why: std::io::Error| file_error(path, format!("cannot be read: {why}"));
        // What is no file, as a pipe, would not end.
        if !fs::metadata(path).map_err(failed)?.is_file() {
            return Err(file_error(path, "is not a file"));
        }
        let mut file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let mut first = Vec::new();
        (&mut file).take(8).read_to_end(&mut first).map_err(failed)?;
        // Before a map is made of it: systems map no empty files.
        header_range(&first, size).map_err(|problem| file_error(path, problem))?;
        // SAFETY: a map of a file is unsound only if others change the file meanwhile, which the docs of this type
        // forbid.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Self::of(path.into(), FileBytes::Mapped(map))
    }

    /// Takes bytes that are in memory; errors call them by `name`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub(crate) fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self, Error> {
        Self::of(name.into(), FileBytes::Owned(bytes))
    }

    fn of(path: PathBuf, bytes: FileBytes) -> Result<Self, Error> {
        let all = bytes.all();
        let read = header_range(all, all.len() as u64).and_then(|range| {
            let there = (all.len() - range.end) as u64;
            Ok((range.end, TensorTable::parse(&all[range], there)?))
        });
        let (start, header) = read.map_err(|problem| file_error(&path, problem))?;
        Ok(Self { path, header, start, bytes })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors by name.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, Entry> {
        &self.header.tensors
    }

    /// Where the tensors begin: the bytes of the header.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// The bytes of one of its tensors.
    pub(crate) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.bytes.all()[self.start + entry.begin..self.start + entry.end]
    }

    /// Says that the bytes of a tensor have been looked at: they are memory of this process no longer. The system may
    /// keep them, and whoever looks at them again gets them again.
    pub(crate) fn release(&self, entry: &Entry) {
        if entry.end - entry.begin >= RELEASED {
            self.bytes.release(self.start + entry.begin, entry.end - entry.begin);
        }
    }
}

impl FileBytes {
    fn all(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }

    #[cfg(unix)]
    fn release(&self, start: usize, len: usize) {
        if let Self::Mapped(map) = self {
            // SAFETY: the map is of a file and is never written to, so what is dropped is read from the file again.
            let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, len) };
            if let Err(why) = advised {
                log::debug!("pages of a tensor file are kept: {why}");
            }
        }
    }

    /// Other systems take pages back by themselves.
    #[cfg(not(unix))]
    fn release(&self, _: usize, _: usize) {}
}

impl fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorFile").field("path", &self.path).field("tensors", &self.header.tensors.len()).finish()
    }
}

/// Where the header is in a file of `size` bytes that begins with `first`.
fn header_range(first: &[u8], size: u64) -> Result<Range<usize>, String> {
    let Some(length) = first.first_chunk::<8>() else {
        return Err(format!(
            "cannot read the header: the file has {size} bytes, and no safetensors file has fewer than 8"
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > LONGEST {
        return Err(format!("a header of {length} bytes is too long: this is no safetensors file"));
    }
    // What the file says of itself is compared with what there is before memory is taken for it.
    if 8 + length > size {
        return Err(format!(
            "the file of {size} bytes claims a header of {length}: it is cut off, or no safetensors file"
        ));
    }
    Ok(8..8 + length as usize)
}

#[cfg(test)]
mod tests {
    use super::TensorFile;

    /// A file of this header, whose length is told as `claimed`, and so many bytes.
    fn says(header: &str, claimed: usize, data: usize) -> Result<(), String> {
        let bytes = [&(claimed as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
        TensorFile::from_bytes("some.safetensors", bytes).map(|_| ()).map_err(|error| error.to_string())
    }

    #[track_caller]
    fn refused(header: &str, data: usize, words: &str) {
        let said = says(header, header.len(), data).unwrap_err();
        assert!(said.contains("some.safetensors") && said.contains(words), "`{words}` is missing in: {said}");
    }

    #[test]
    fn what_a_file_claims_must_be_there() {
        let header = r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#;
        assert_eq!(says(header, header.len(), 24), Ok(()));
        refused(header, 23, "tensor `a` is said to be at bytes 0 to 24 of 23");
        refused(header, 25, "24 bytes of tensors, and the file has 25");
        assert!(says(header, 99_999_999, 0).unwrap_err().contains("claims a header of 99999999"));
        assert!(says(header, usize::MAX, 0).unwrap_err().contains("too long"));
        let huge = r#"{"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]}}"#;
        refused(huge, 8, "tensor `a` is said to be at bytes 0 to 1152921504606846976 of 8");
        let overflow = r#"{"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#;
        refused(
            overflow,
            0,
            "tensor `a` of dims [4294967296, 4294967296] and dtype F64 takes more bytes than there can be",
        );
    }

    #[test]
    fn tensors_lie_one_behind_the_other() {
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
            )
        };
        assert_eq!(says(&two("[4,8]", "[0,4]"), two("[4,8]", "[0,4]").len(), 8), Ok(()));
        refused(&two("[0,4]", "[2,6]"), 6, "tensor `b` begins at byte 2 and tensor `a` ends at 4: they overlap");
        refused(&two("[0,4]", "[0,4]"), 4, "they overlap");
        refused(&two("[0,4]", "[5,9]"), 9, "bytes between that are nobody's");
        refused(&two("[4,0]", "[0,4]"), 8, "tensor `a` is said to be at bytes 4 to 0");
    }

    #[test]
    fn headers_that_lie() {
        let of = |name: &str, dtype: &str| format!(r#""{name}":{{"dtype":"{dtype}","shape":[],"data_offsets":[0,4]}}"#);
        refused(&format!("{{{},{}}}", of("a", "F32"), of("a", "F32")), 4, "tensor `a` is there twice");
        refused(&format!("{{{}}}", of("a", "F33")), 4, "tensor `a` is of the unknown dtype `F33`");
        refused(&format!("{{{}}}", of("a", "BF16")), 4, "takes 2 bytes, and is given 4");
        refused(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, "tensor `a`");
        refused(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}}"#, 4, "unknown field `more`");
        refused(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "`__metadata__` is there twice");
        refused("[]", 0, "a map from names to tensors");
        // No bytes, and strides that are no numbers.
        for shape in ["[0,4294967296,4294967296]", "[4611686018427387904,0,4]", "[2305843009213693952,0]"] {
            let none = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
            refused(&none, 0, "takes more bytes than there can be");
        }
        let none = r#"{"a":{"dtype":"F32","shape":[0,4294967296,4],"data_offsets":[0,0]}}"#;
        assert_eq!(says(none, none.len(), 0), Ok(()));
        // A dtype that burn lacks is no reason not to read the others.
        let odd = r#"{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#;
        assert_eq!(says(odd, odd.len(), 4), Ok(()));
    }
}
