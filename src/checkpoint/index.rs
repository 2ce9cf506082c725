//! The index of a checkpoint: what there is, and where.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Component, Path};

use burn::tensor::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use super::scalar::StoredScalar;
use super::{checkpoint_error, cover, file_problem};
use crate::Error;
use crate::graph::RandomUse;
use crate::tensor_file::{can_lie_in_memory, dtype_of};
use crate::train::ParallelModule;

/// The name of the index in the directory of a checkpoint.
pub(super) const INDEX: &str = "checkpoint.json";
/// The name of the file with the checksum of the index.
pub(super) const INDEX_CHECKSUM: &str = "checkpoint.json.xxh3";
const FORMAT: &str = "burn-parallel checkpoint";
const VERSION: u64 = 1;
/// An index is no longer than this: a million slices.
const LONGEST: u64 = 1 << 30;
/// More dims than any tensor of burn has.
const MOST_DIMS: usize = 64;
/// Checksums are of blocks of so many bytes of a slice.
pub(super) const BLOCK_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    format: String,
    version: u64,
    /// The step after which it was saved.
    pub(super) step: u64,
    /// The number of the step whose random numbers come next.
    pub(super) random_step: u64,
    /// What the random numbers of captured steps went by.
    pub(super) random_by: RandomUse,
    /// How many ranks saved it.
    pub(super) ranks: usize,
    /// How many replicas they had.
    pub(super) replicas: usize,
    /// The strategy that it was made under, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) made_under: Option<String>,
    /// The checksum of the index of the checkpoint of the same step that this one took the place of. So no two of one
    /// step have the same index, whatever they hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) replaces: Option<String>,
    pub(super) block_bytes: usize,
    pub(super) files: Vec<StoredFile>,
    pub(super) model: BTreeMap<String, StoredTensor>,
    pub(super) optimizers: BTreeMap<String, BTreeMap<String, OptimizerParam>>,
    pub(super) schedulers: BTreeMap<String, BTreeMap<String, StoredScalar>>,
    pub(super) values: BTreeMap<String, Value>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredFile {
    pub(super) name: String,
    pub(super) bytes: u64,
}

/// What an optimizer keeps of a parameter.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OptimizerParam {
    pub(super) scalars: BTreeMap<String, StoredScalar>,
    pub(super) moments: BTreeMap<String, StoredTensor>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredTensor {
    pub(super) dtype: String,
    pub(super) dims: Vec<usize>,
    pub(super) slices: Vec<StoredSlice>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredSlice {
    /// The number of its file.
    pub(super) file: usize,
    /// Its name there.
    pub(super) tensor: String,
    /// For each dim where it begins and ends in the whole.
    ranges: Vec<[usize; 2]>,
    /// XXH3 with 64 bits of each block of its bytes, in hexadecimal digits.
    pub(super) xxh3: Vec<String>,
}

impl StoredSlice {
    pub(super) fn new(file: usize, tensor: String, ranges: &[Range<usize>], xxh3: Vec<String>) -> Self {
        Self { file, tensor, ranges: ranges.iter().map(|range| [range.start, range.end]).collect(), xxh3 }
    }

    pub(super) fn ranges(&self) -> Vec<Range<usize>> {
        self.ranges.iter().map(|[start, end]| *start..*end).collect()
    }
}

impl StoredTensor {
    /// # Errors
    /// [`Error::Checkpoint`] if burn has no such dtype.
    pub(super) fn burn_dtype(&self) -> Result<DType, Error> {
        dtype_of(&self.dtype).ok_or_else(|| checkpoint_error(format!("dtype {} is none that burn has", self.dtype)))
    }
}

/// The checksum of bytes as text.
pub(super) fn checksum(bytes: &[u8]) -> String {
    format!("{:016x}", xxh3_64(bytes))
}

/// Where a model is in its random numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct SavedRandom {
    /// The step that comes next.
    pub(super) step: u64,
    /// What the numbers went by.
    pub(super) by: RandomUse,
    pub(super) replicas: usize,
}

impl SavedRandom {
    pub(super) fn of<P: ParallelModule>(model: &P) -> Self {
        let by = model.random().map_or(RandomUse::Unused, |random| random.used());
        Self { step: model.random_step(), by, replicas: model.report().replicas }
    }
}

/// The fields by which a reader knows whether it can read the others.
#[derive(Deserialize)]
struct FormatVersion {
    format: String,
    version: u64,
}

impl Index {
    pub(super) fn new(step: u64, random: SavedRandom, ranks: usize) -> Self {
        let SavedRandom { step: random_step, by: random_by, replicas } = random;
        Self {
            format: FORMAT.into(),
            version: VERSION,
            step,
            random_step,
            random_by,
            ranks,
            replicas,
            made_under: None,
            replaces: None,
            block_bytes: BLOCK_BYTES,
            files: Vec::new(),
            model: BTreeMap::new(),
            optimizers: BTreeMap::new(),
            schedulers: BTreeMap::new(),
            values: BTreeMap::new(),
        }
    }

    /// The text of the file: one that could not be read again takes the place of nothing.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it could not be.
    pub(super) fn text(&self) -> Result<Vec<u8>, Error> {
        let text = serde_json::to_vec(self).map_err(|why| checkpoint_error(why.to_string()))?;
        let read = match text.len() as u64 > LONGEST {
            true => Err(format!("has {} bytes, too many for one", text.len())),
            false => Self::parse(&text).map(drop),
        };
        read.map_err(|why| checkpoint_error(format!("what is saved could not be read again: its index {why}")))?;
        Ok(text)
    }

    /// Takes the text of the index in a directory, and makes sure that it makes sense.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the file and what is wrong.
    pub(super) fn of(dir: &Path, text: &[u8]) -> Result<Self, Error> {
        Self::parse(text).map_err(|why| wrong(dir, why))
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let index = serde_json::from_slice::<Self>(text);
        let (format, version) = match &index {
            Ok(index) => (index.format.clone(), index.version),
            // Another version may have anything else in it.
            Err(_) => {
                serde_json::from_slice::<FormatVersion>(text).map(|it| (it.format, it.version)).map_err(no_index)?
            }
        };
        if format != FORMAT {
            return Err(format!("is a `{format}`, not a `{FORMAT}`"));
        }
        if version != VERSION {
            return Err(format!(
                "is of version {version} of the format, and this program reads version {VERSION}: take the version of \
                 burn-parallel that wrote it, or a newer one"
            ));
        }
        let index = index.map_err(no_index)?;
        index.check()?;
        Ok(index)
    }

    fn check(&self) -> Result<(), String> {
        if self.block_bytes == 0 {
            return Err("has blocks of no bytes".into());
        }
        let mut names = BTreeSet::new();
        for file in &self.files {
            if !is_plain(&file.name) {
                return Err(format!("speaks of `{}`, which is no name of a file beside it", file.name));
            }
            if !names.insert(&file.name) {
                return Err(format!("lists file `{}` twice", file.name));
            }
        }
        let mut places = HashSet::new();
        for (key, tensor) in self.tensors() {
            self.check_tensor(tensor).map_err(|why| format!("lies about `{key}`: {why}"))?;
            // No tensor has more bytes than the files.
            if let Some(again) = tensor.slices.iter().find(|slice| !places.insert((slice.file, slice.tensor.as_str())))
            {
                return Err(format!(
                    "lies about `{key}`: `{}` of file {} is another slice as well",
                    again.tensor, again.file
                ));
            }
        }
        Ok(())
    }

    /// All tensors, with what errors call them.
    fn tensors(&self) -> impl Iterator<Item = (String, &StoredTensor)> {
        let params = self.model.iter().map(|(path, tensor)| (format!("model/{path}"), tensor));
        let moments = self.optimizers.iter().flat_map(|(name, params)| {
            params.iter().flat_map(move |(path, param)| {
                let moments = param.moments.iter();
                moments.map(move |(moment, tensor)| (format!("optimizers/{name}/{path}/{moment}"), tensor))
            })
        });
        params.chain(moments)
    }

    fn check_tensor(&self, tensor: &StoredTensor) -> Result<(), String> {
        let StoredTensor { dtype, dims, slices } = tensor;
        let size = dtype_of(dtype).ok_or_else(|| format!("dtype {dtype} is none that burn has"))?.size();
        if dims.len() > MOST_DIMS {
            return Err(format!("{} dims are more than a tensor can have", dims.len()));
        }
        if !can_lie_in_memory(dims.iter().map(|dim| *dim as u64), 8 * size as u64) {
            return Err(format!("dims {dims:?} are more than there can be"));
        }
        let all: Vec<Vec<Range<usize>>> = slices.iter().map(StoredSlice::ranges).collect();
        let all: Vec<&[Range<usize>]> = all.iter().map(Vec::as_slice).collect();
        cover::check(dims, &all)?;
        for (slice, ranges) in slices.iter().zip(all) {
            if slice.file >= self.files.len() {
                return Err(format!("slice {ranges:?} is said to be in file {} of {}", slice.file, self.files.len()));
            }
            let bytes = ranges.iter().map(Range::len).product::<usize>() * size;
            if slice.xxh3.len() != bytes.div_ceil(self.block_bytes) {
                return Err(format!("slice {ranges:?} of {bytes} bytes has {} checksums", slice.xxh3.len()));
            }
        }
        Ok(())
    }
}

/// Opens a file. What is none, as a pipe, might have a reader wait for ever, and is an error.
pub(super) fn open_file(path: &Path) -> io::Result<File> {
    match fs::metadata(path)?.is_file() {
        true => File::open(path),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file")),
    }
}

/// Reads the text of the index in a directory, and compares its checksum.
///
/// # Errors
/// [`Error::Checkpoint`] with the file and what is wrong.
pub(super) fn index_text(dir: &Path) -> Result<Vec<u8>, Error> {
    let read = |name| {
        let path = dir.join(name);
        let failed = |why: io::Error| file_problem(&path, format!("cannot be read: {why}"));
        let file = open_file(&path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        if bytes > LONGEST {
            return Err(file_problem(&path, format!("has {bytes} bytes, too many for an index")));
        }
        let mut text = Vec::new();
        file.take(LONGEST).read_to_end(&mut text).map_err(failed)?;
        Ok(text)
    };
    let is_lost = |name: &&str| matches!(dir.join(name).try_exists(), Ok(false));
    if let Some(lost) = [INDEX, INDEX_CHECKSUM].into_iter().find(is_lost)
        && dir.is_dir()
    {
        return Err(file_problem(
            &dir.join(lost),
            "is not there, as it is in every checkpoint: if the directory is somebody else's, move it elsewhere; if it is a \
             checkpoint that lost the file, restore another one with `restore_step`",
        ));
    }
    let (text, sum) = (read(INDEX)?, read(INDEX_CHECKSUM)?);
    if sum.trim_ascii() != checksum(&text).as_bytes() {
        return Err(wrong(dir, format!("is damaged: its checksum is not the one in {INDEX_CHECKSUM}")));
    }
    Ok(text)
}

fn no_index(why: serde_json::Error) -> String {
    format!("is no index of a checkpoint: {why}")
}

/// What is wrong with the index in a directory, and what to do.
fn wrong(dir: &Path, why: String) -> Error {
    let instead = "restore an earlier one with `restore_step`, or remove the directory";
    file_problem(&dir.join(INDEX), format!("{why}; {instead}"))
}

/// Whether a name is that of a file in the same directory, on any system.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let one = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    one && !name.contains(['/', '\\', ':', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It would take the place of a checkpoint that can be.
    #[test]
    fn what_could_not_be_read_again_is_not_written() {
        let random = SavedRandom { step: 1, by: RandomUse::Unused, replicas: 1 };
        let mut index = Index::new(1, random, 1);
        assert_eq!(Index::parse(&index.text().unwrap()).unwrap().step, 1);
        index.files.push(StoredFile { name: "../elsewhere".into(), bytes: 1 });
        let said = index.text().unwrap_err().to_string();
        assert!(said.contains("could not be read again: its index speaks of `../elsewhere`"), "{said}");
        index.files.clear();
        // Nothing is in a file that is not there.
        let slice = StoredSlice::new(0, "a".into(), &[0..1, 0..2], vec![checksum(&[0; 8])]);
        index.model.insert("a".into(), StoredTensor { dtype: "F32".into(), dims: vec![1, 2], slices: vec![slice] });
        let said = index.text().unwrap_err().to_string();
        assert!(said.contains("its index lies about `model/a`"), "{said}");
    }
}
