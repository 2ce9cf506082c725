//! Writing: the places of all tensors are known before the first byte of one is.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use serde_json::{Map, Value, json};

use super::dtype::name_of;
use super::problem::file_error;
use crate::Error;

/// Fewer bytes are not worth a call of the system.
const MANY: usize = 1 << 20;

/// What a file is to hold.
#[derive(Debug, Clone)]
pub(crate) struct NewTensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) dims: Vec<usize>,
}

impl NewTensor {
    /// Its bytes.
    pub(crate) fn size(&self) -> usize {
        self.dims.iter().product::<usize>() * self.dtype.size()
    }
}

/// A file before it is written: its header, and where each tensor begins, in the order in which they were given.
#[derive(Debug, Clone)]
pub(crate) struct NewFile {
    pub(crate) header: Vec<u8>,
    pub(crate) starts: Vec<u64>,
    pub(crate) size: u64,
}

impl NewFile {
    /// Lays tensors out one behind the other, those of large elements first, so that all are aligned.
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] if the format has no such dtype; [`Error::InvalidArgument`] if a name comes twice.
    pub(crate) fn new(tensors: &[NewTensor], metadata: &BTreeMap<String, String>) -> Result<Self, Error> {
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by_key(|place| std::cmp::Reverse(tensors[*place].dtype.size()));
        let (mut json, mut begins, mut end) = (Map::new(), vec![0; tensors.len()], 0);
        if !metadata.is_empty() {
            json.insert("__metadata__".into(), json!(metadata));
        }
        for place in order {
            let tensor = &tensors[place];
            let dtype = name_of(tensor.dtype)
                .ok_or(Error::UnsupportedDType { operation: "a safetensors file", dtype: tensor.dtype })?;
            begins[place] = end;
            end += tensor.size();
            let entry = json!({ "dtype": dtype, "shape": tensor.dims, "data_offsets": [begins[place], end] });
            if json.insert(tensor.name.clone(), entry).is_some() {
                let problem = format!("two tensors are to be called `{}`", tensor.name);
                return Err(Error::invalid("a safetensors file", problem));
            }
        }
        let mut text = Value::Object(json).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let header = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        let start = header.len() as u64;
        let starts = begins.into_iter().map(|begin| start + begin as u64).collect();
        Ok(Self { header, starts, size: start + end as u64 })
    }
}

/// A file into which several ranks may write, each its own places.
#[derive(Debug)]
pub(crate) struct PieceWriter {
    file: File,
    path: PathBuf,
}

impl PieceWriter {
    /// Makes a new file of the size of `new_file` with its header.
    ///
    /// # Errors
    /// [`file_error`] if there is such a file already, or the system refuses.
    pub(crate) fn create(path: &Path, new_file: &NewFile) -> Result<Self, Error> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let writer = Self { file: file.map_err(|why| refused(path, &why))?, path: path.into() };
        writer.file.set_len(new_file.size).map_err(|why| refused(path, &why))?;
        writer.write_at(0, &new_file.header)?;
        Ok(writer)
    }

    /// Opens the file that another rank has made.
    ///
    /// # Errors
    /// [`file_error`] if the system refuses.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let file = OpenOptions::new().write(true).open(path);
        Ok(Self { file: file.map_err(|why| refused(path, &why))?, path: path.into() })
    }

    /// Writes bytes at a place. Many at once are on their way to the disk from then on, while others are made.
    ///
    /// # Errors
    /// [`file_error`] if the system refuses.
    pub(crate) fn write_at(&self, start: u64, bytes: &[u8]) -> Result<(), Error> {
        write_all_at(&self.file, start, bytes).map_err(|why| refused(&self.path, &why))?;
        if bytes.len() >= MANY {
            begin_write_back(&self.file, start, bytes.len());
        }
        Ok(())
    }

    /// Waits until what was written is on the disk.
    ///
    /// # Errors
    /// [`file_error`] if the system refuses.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(|why| refused(&self.path, &why))
    }
}

fn refused(path: &Path, why: &io::Error) -> Error {
    file_error(path, format!("cannot be written: {why}"))
}

/// Has the system begin to bring bytes of a file to the disk, which it else does when it is waited for. What it says to
/// that matters to nobody: whoever waits hears of what is wrong.
#[cfg(target_os = "linux")]
fn begin_write_back(file: &File, start: u64, len: usize) {
    use std::os::fd::AsRawFd;
    // SAFETY: no memory is involved, and the descriptor is open.
    unsafe { libc::sync_file_range(file.as_raw_fd(), start as i64, len as i64, libc::SYNC_FILE_RANGE_WRITE) };
}

#[cfg(not(target_os = "linux"))]
fn begin_write_back(_: &File, _: u64, _: usize) {}

#[cfg(unix)]
fn write_all_at(file: &File, start: u64, bytes: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, start)
}

#[cfg(not(unix))]
fn write_all_at(mut file: &File, start: u64, bytes: &[u8]) -> io::Result<()> {
    use std::io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(start))?;
    file.write_all(bytes)
}
