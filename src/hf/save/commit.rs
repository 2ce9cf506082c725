//! What goes with a model beside its tensors.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::Error;
use crate::hf::weights::read_json;
use crate::tensor_file::{file_error, write_file};

/// What a directory has beside its tensors that goes with a model.
const CARRIED: [&str; 14] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
];

/// Copies the files that go with a model.
///
/// # Errors
/// [`file_error`] if the system refuses.
pub(super) fn carry_over(from: &Path, to: &Path) -> Result<(), Error> {
    for name in CARRIED {
        let source = from.join(name);
        if source.is_file() {
            let bytes = fs::read(&source).map_err(|why| file_error(&source, format!("cannot be read: {why}")))?;
            write_file(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

/// The `config.json` of a directory, as it is to be for what is written: with its dtype, and not tied if the output
/// layer is there.
///
/// # Errors
/// [`file_error`] if there is none.
pub(super) fn config_for(from: &Path, dtype: Option<&str>, untied: bool) -> Result<Value, Error> {
    let mut config = read_json(&from.join("config.json"))?;
    if let Some(map) = config.as_object_mut() {
        if let Some(dtype) = dtype {
            for key in ["torch_dtype", "dtype"] {
                if let Some(said) = map.get_mut(key) {
                    *said = dtype.into();
                }
            }
        }
        if untied && map.get("tie_word_embeddings") == Some(&Value::Bool(true)) {
            map.insert("tie_word_embeddings".into(), Value::Bool(false));
        }
    }
    Ok(config)
}
