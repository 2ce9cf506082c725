//! The tensors of a directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use burn::tensor::DType;
use serde_json::Value;

use super::index::TensorFiles;
use crate::Error;
use crate::tensor_file::{Entry, TensorFile, file_error, left_by_a_save};

/// Opens the tensors of a Hugging Face directory: `model.safetensors`, or the files of `model.safetensors.index.json`.
/// A path of one safetensors file will do as well.
///
/// Only the headers are read. The files are mapped into memory: no other program may cut them off while they are open.
///
/// ```no_run
/// use burn_parallel::hf::{self, Mapping};
/// # use burn_parallel::train::ParallelModule;
/// # fn load<M: ParallelModule>(model: M) -> Result<M, burn_parallel::Error> {
/// let mut weights = hf::open("Llama-3.2-1B")?.mapped(Mapping::llama())?;
/// let model = model.load(&mut weights)?; // each rank reads the slices that it holds
/// # Ok(model)
/// # }
/// ```
///
/// # Errors
/// [`Error::InvalidArgument`] that names the file, and the tensor where it is about one: if a file is missing or cannot
/// be read, is not safetensors, is cut off or lies about its tensors; if the index has files of other directories, or
/// tensors that are not in the file where they are said to be; if it is what a save that was ended has left. Nothing is
/// allocated for a tensor before all of that is known.
pub fn open(path: impl AsRef<Path>) -> Result<Weights, Error> {
    open_stem(path.as_ref(), "model")
}

/// The tensors of `stem.safetensors`, or of the files of its index.
pub(super) fn open_stem(path: &Path, stem: &str) -> Result<Weights, Error> {
    if let Some(problem) = left_by_a_save(path) {
        return Err(file_error(path, problem));
    }
    if path.is_file() {
        return Weights::of_files(path.parent().unwrap_or(Path::new("")), vec![TensorFile::open(path)?], None);
    }
    let index = path.join(format!("{stem}.safetensors.index.json"));
    let single = path.join(format!("{stem}.safetensors"));
    if single.is_file() {
        return Weights::of_files(path, vec![TensorFile::open(&single)?], None);
    }
    if !index.is_file() {
        let pickled = path.join("pytorch_model.bin").exists() || path.join("pytorch_model.bin.index.json").exists();
        let advice = match pickled {
            true => "; it has pickled files of PyTorch, which can hold programs: make safetensors of them",
            false => "",
        };
        let problem = format!("has neither `{stem}.safetensors` nor `{stem}.safetensors.index.json`{advice}");
        return Err(file_error(path, problem));
    }
    let TensorFiles(said) = TensorFiles::read(&index)?;
    let mut names: Vec<&String> = said.values().collect();
    names.sort();
    names.dedup();
    let mut files = Vec::new();
    for name in &names {
        let file = path.join(name);
        if !file.is_file() {
            let tensors = said.iter().filter(|(_, of)| of == name);
            let (first, number) = (tensors.clone().next().map_or("", |(tensor, _)| tensor), tensors.count());
            return Err(file_error(&file, format!("is missing, and with it {number} tensors, as `{first}`")));
        }
        files.push(TensorFile::open(&file)?);
    }
    let place = |file: &String| names.binary_search(&file).ok();
    let places = said.iter().filter_map(|(tensor, file)| Some((tensor.clone(), place(file)?))).collect();
    Weights::of_files(path, files, Some(places))
}

/// The tensors of a directory, by their names there: a [`SliceSource`](crate::params::SliceSource) for models whose
/// parameters have these names and dims. [`mapped`](Self::mapped) gives others. A clone shares the files, which stay
/// open as long as there is one, and counts what is read together with the others.
#[derive(Debug, Clone)]
pub struct Weights {
    dir: PathBuf,
    files: Arc<Vec<TensorFile>>,
    /// Which file each tensor is in.
    places: Arc<BTreeMap<String, usize>>,
    bytes_read: Arc<AtomicU64>,
}

impl Weights {
    fn of_files(dir: &Path, files: Vec<TensorFile>, said: Option<BTreeMap<String, usize>>) -> Result<Self, Error> {
        let places = match said {
            Some(said) => said,
            None => files
                .iter()
                .enumerate()
                .flat_map(|(at, file)| file.tensors().keys().map(move |name| (name.clone(), at)))
                .collect(),
        };
        for (tensor, place) in &places {
            if !files[*place].tensors().contains_key(tensor) {
                return Err(file_error(
                    files[*place].path(),
                    format!("does not have tensor `{tensor}`, as the index says"),
                ));
            }
        }
        let headers = files.iter().map(|file| file.start() as u64).sum();
        Ok(Self {
            dir: dir.into(),
            files: Arc::new(files),
            places: Arc::new(places),
            bytes_read: Arc::new(AtomicU64::new(headers)),
        })
    }

    /// Bytes that are one safetensors file.
    ///
    /// # Errors
    /// As [`open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        Self::of_files(Path::new(""), vec![TensorFile::from_bytes("the bytes", bytes)?], None)
    }

    /// The names of the tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// The dims of a tensor; `None` if there is none of this name.
    pub fn tensor_dims(&self, name: &str) -> Option<&[usize]> {
        self.entry(name).map(|(_, entry)| entry.dims.as_slice())
    }

    /// The dtype of a tensor; `None` if there is none of this name, or burn has no such dtype.
    pub fn tensor_dtype(&self, name: &str) -> Option<DType> {
        self.entry(name).and_then(|(_, entry)| entry.dtype)
    }

    /// How many bytes were read so far: of the tensors those that were asked for, and all headers.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Relaxed)
    }

    pub(super) fn count(&self, bytes: u64) {
        self.bytes_read.fetch_add(bytes, Relaxed);
    }

    /// What `config.json` says.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it is missing or is no JSON.
    pub fn config(&self) -> Result<Value, Error> {
        read_json(&self.dir.join("config.json"))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// A tensor and the file that it is in.
    pub(super) fn entry(&self, name: &str) -> Option<(&TensorFile, &Entry)> {
        let file = &self.files[*self.places.get(name)?];
        Some((file, file.tensors().get(name)?))
    }
}

/// The JSON of a file.
///
/// # Errors
/// [`file_error`] if it cannot be read.
pub(super) fn read_json(path: &Path) -> Result<Value, Error> {
    let text = fs::read(path).map_err(|why| file_error(path, format!("cannot be read: {why}")))?;
    serde_json::from_slice(&text).map_err(|why| file_error(path, format!("is no JSON: {why}")))
}
