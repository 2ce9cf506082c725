//! The index of a directory of several files: which tensor is in which.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Component, Path};

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::tensor_file::file_error;

/// An index is no longer than the longest header of a file.
const LONGEST: u64 = 100_000_000;

/// The files of tensors by their names.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct TensorFiles(pub(super) BTreeMap<String, String>);

impl TensorFiles {
    /// Reads an index. Its files are in the same directory.
    ///
    /// # Errors
    /// [`file_error`] if it cannot be read, is no index, has a tensor twice, or speaks of files elsewhere.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let wrong = |why: String| file_error(path, why);
        let size = fs::metadata(path).map_err(|why| wrong(format!("cannot be read: {why}")))?.len();
        if size > LONGEST {
            return Err(wrong(format!("has {size} bytes: this is no index")));
        }
        let text = fs::read(path).map_err(|why| wrong(format!("cannot be read: {why}")))?;
        Self::parse(&text).map_err(wrong)
    }

    /// # Errors
    /// What is wrong, with the tensor.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        let read: ReadIndex =
            serde_json::from_slice(json).map_err(|why| format!("this is no index of safetensors: {why}"))?;
        for (tensor, file) in &read.weight_map.0 {
            if !is_plain(file) {
                return Err(format!(
                    "tensor `{tensor}` is said to be in `{file}`, which is no name of a file beside the index"
                ));
            }
        }
        Ok(Self(read.weight_map.0))
    }
}

/// Whether a name is that of a file in the same directory, on any system.
pub(super) fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let one = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    one && !name.contains(['/', '\\', ':', '\0'])
}

#[derive(Deserialize)]
struct ReadIndex {
    weight_map: WeightMap,
}

/// What an index looks like.
#[derive(Serialize)]
pub(super) struct WrittenIndex<'a> {
    pub(super) metadata: Metadata,
    pub(super) weight_map: BTreeMap<&'a str, &'a str>,
}

/// How much there is.
#[derive(Serialize)]
pub(super) struct Metadata {
    pub(super) total_parameters: u64,
    pub(super) total_size: u64,
}

/// A map without a name that comes twice.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(WeightMapEntries).map(WeightMap)
    }
}

struct WeightMapEntries;

impl<'de> Visitor<'de> for WeightMapEntries {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensors to files")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut files = BTreeMap::new();
        while let Some((tensor, file)) = map.next_entry::<String, String>()? {
            if files.contains_key(&tensor) {
                return Err(A::Error::custom(format!("tensor `{tensor}` is there twice")));
            }
            files.insert(tensor, file);
        }
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::TensorFiles;

    #[test]
    fn what_an_index_may_say() {
        let says = |json: &str| TensorFiles::parse(json.as_bytes()).map(|index| index.0.len());
        assert_eq!(
            says(r#"{"metadata":{"total_size":8},"weight_map":{"a":"x.safetensors","b":"x.safetensors"}}"#),
            Ok(2)
        );
        let refused = |json: &str, words: &str| {
            let said = says(json).unwrap_err();
            assert!(said.contains(words), "`{words}` is missing in: {said}");
        };
        refused(r#"{"weight_map":{"a":"x","a":"y"}}"#, "tensor `a` is there twice");
        refused(r#"{"metadata":{}}"#, "weight_map");
        for name in ["../x", "/etc/passwd", "a/b", "..", ".", "", "c:x", r"a\\..\\b"] {
            refused(&format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#), "tensor `a` is said to be in");
        }
    }
}
