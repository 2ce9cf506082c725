//! What is chosen when a directory is written.

use std::path::PathBuf;

use burn::config::Config;
use burn::tensor::DType;
use serde::{Deserialize, Deserializer, Serialize};

use super::problem::wrong;
use crate::Error;
use crate::forms::optional_float;
use crate::hf::index::is_plain;
use crate::hf::mapping::Mapping;

/// How a directory is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveConfig {
    pub(in crate::hf) mapping: Mapping,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "dtype")]
    pub(super) dtype: Option<DType>,
    #[serde(default = "shard_bytes")]
    pub(super) shard_bytes: u64,
    #[serde(default = "piece_bytes")]
    pub(super) piece_bytes: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) files_of: Option<PathBuf>,
    #[serde(default)]
    pub(super) overwrite: bool,
    #[serde(default, rename = "merged_adapters", skip_serializing_if = "Option::is_none")]
    pub(super) merged: Option<f64>,
    /// Names and contents of further files.
    #[serde(default, rename = "files", skip_serializing_if = "Vec::is_empty")]
    pub(super) texts: Vec<(String, String)>,
}

impl Config for SaveConfig {}

fn shard_bytes() -> u64 {
    5_000_000_000
}

fn piece_bytes() -> usize {
    8 << 20
}

fn dtype<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<DType>, D::Error> {
    optional_float(deserializer).map(|dtype| dtype.map(DType::from))
}

impl SaveConfig {
    /// The names and layouts of a mapping, the dtypes of the model, files of at most 5 GB.
    pub fn new(mapping: Mapping) -> Self {
        Self {
            mapping,
            dtype: None,
            shard_bytes: shard_bytes(),
            piece_bytes: piece_bytes(),
            files_of: None,
            overwrite: false,
            merged: None,
            texts: Vec::new(),
        }
    }

    /// Floats are cast to this dtype: `DType::BF16`, `F16`, `F32` or `F64`.
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// A file has at most so many bytes of tensors, unless one tensor has more. If there are several, an index says
    /// what is where.
    pub fn with_shard_bytes(self, bytes: u64) -> Self {
        Self { shard_bytes: bytes, ..self }
    }

    /// Tensors are put together and written in pieces of at most so many bytes, at least one element: 8 MiB if this is
    /// not said.
    pub fn with_piece_bytes(self, bytes: usize) -> Self {
        Self { piece_bytes: bytes, ..self }
    }

    /// Carries over what another directory has beside its tensors: `config.json`, with the dtype that is written, and
    /// with `tie_word_embeddings` false if an `lm_head.weight` is written; `generation_config.json`; the files of the
    /// tokenizer.
    pub fn with_files_of(self, dir: impl Into<PathBuf>) -> Self {
        Self { files_of: Some(dir.into()), ..self }
    }

    /// Takes the place of a directory that is there and not empty, once the new one is whole.
    pub fn with_overwrite(self, overwrite: bool) -> Self {
        Self { overwrite, ..self }
    }

    /// Adds the LoRA adapters of the model, made with this `alpha`, to the weights that they adapt, as they are
    /// written. The model stays as it is. However weights and adapters are split, each rank is sent the rows and
    /// columns of the factors that its parts of the weights lack.
    pub fn with_merged_adapters(self, alpha: f64) -> Self {
        Self { merged: Some(alpha), ..self }
    }

    /// Adds a file of this name and text, or puts it in the place of one that is [carried over](Self::with_files_of): a
    /// `config.json`, say, that the caller has made.
    pub fn with_file(mut self, name: impl Into<String>, text: impl Into<String>) -> Self {
        self.texts.push((name.into(), text.into()));
        self
    }

    /// The same with another mapping.
    pub(in crate::hf) fn with_mapping(self, mapping: Mapping) -> Self {
        Self { mapping, ..self }
    }

    /// What all ranks must pass alike.
    pub(super) fn lines(&self) -> Result<Vec<(String, String)>, Error> {
        let Self { mapping, dtype, shard_bytes, piece_bytes, files_of, overwrite, merged, texts } = self;
        let rest = format!("{dtype:?} {shard_bytes} {piece_bytes} {files_of:?} {overwrite} {merged:?} {texts:?}");
        let line = |what: &str, value: String| (what.to_owned(), value.replace(['\n', '\t'], " "));
        Ok(vec![line("the mapping of a save", mapping.to_toml()?), line("the config of a save", rest)])
    }

    /// # Errors
    /// [`Error::UnsupportedDType`] if floats cannot be cast to the dtype; [`Error::InvalidArgument`] if a further file
    /// is not in the directory.
    pub(super) fn check(&self) -> Result<(), Error> {
        match self.dtype {
            Some(dtype) if !matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16) => {
                Err(Error::UnsupportedDType { operation: "hf::save", dtype })
            }
            _ => match self.texts.iter().find(|(name, _)| !is_plain(name) || name.contains(".safetensors")) {
                Some((name, _)) => Err(wrong(format!("`{name}` is no name for a further file"))),
                None => Ok(()),
            },
        }
    }
}
