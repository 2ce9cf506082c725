//! Files that are not what they say.

use std::fs;

use burn_parallel::hf::{self, Weights};
use burn_parallel::params::SliceSource;
use proptest::prelude::*;

use crate::Dir;
use crate::hf::{counting, file_of};

fn index(map: &str) -> String {
    format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{map}}}"#)
}

fn says(dir: &Dir, words: &[&str]) {
    let said = hf::open(dir.path()).unwrap_err().to_string();
    for words in words {
        assert!(said.contains(words), "`{words}` is missing in: {said}");
    }
}

#[test]
fn directories_that_lack_something() {
    let dir = Dir::fresh();
    says(&dir, &["neither `model.safetensors` nor `model.safetensors.index.json`"]);
    fs::write(dir.join("pytorch_model.bin"), "").unwrap();
    says(&dir, &["pickled files of PyTorch"]);
    fs::write(dir.join("model.safetensors.index.json"), index(r#"{"a":"one.safetensors","b":"one.safetensors"}"#))
        .unwrap();
    says(&dir, &["one.safetensors: is missing, and with it 2 tensors, as `a`"]);
    fs::write(dir.join("one.safetensors"), file_of(&counting(&[("a", &[2])]))).unwrap();
    says(&dir, &["one.safetensors: does not have tensor `b`, as the index says"]);
    fs::write(dir.join("one.safetensors"), "").unwrap();
    says(&dir, &["one.safetensors: cannot read the header: the file has 0 bytes"]);
    fs::remove_file(dir.join("one.safetensors")).unwrap();
    fs::create_dir(dir.join("one.safetensors")).unwrap();
    says(&dir, &["one.safetensors: is missing"]);
    let said = hf::open(dir.join("nowhere")).unwrap_err().to_string();
    assert!(said.contains("nowhere"), "{said}");
}

#[test]
fn an_index_stays_in_its_directory() {
    let dir = Dir::fresh();
    let inner = dir.join("inner");
    fs::create_dir(&inner).unwrap();
    fs::write(dir.join("outside.safetensors"), file_of(&counting(&[("a", &[2])]))).unwrap();
    for name in ["../outside.safetensors", dir.join("outside.safetensors").to_str().unwrap()] {
        fs::write(inner.join("model.safetensors.index.json"), index(&format!(r#"{{"a":"{name}"}}"#))).unwrap();
        let said = hf::open(&inner).unwrap_err().to_string();
        assert!(said.contains("index.json: tensor `a` is said to be in") && said.contains("outside"), "{said}");
    }
    fs::write(inner.join("model.safetensors.index.json"), index(r#"{"a":"x","a":"x"}"#)).unwrap();
    let said = hf::open(&inner).unwrap_err().to_string();
    assert!(said.contains("tensor `a` is there twice"), "{said}");
}

#[test]
fn a_dtype_that_burn_lacks_harms_no_other_tensor() {
    let header = r#"{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[2],"data_offsets":[4,6]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[1, 2, 3, 4, 5, 6]].concat();
    let mut weights = Weights::from_bytes(bytes).unwrap();
    assert_eq!(weights.read("b", std::slice::from_ref(&(0..2))).unwrap().try_to_vec::<i8>().unwrap(), [5, 6]);
    let said = weights.read("a", std::slice::from_ref(&(0..2))).unwrap_err().to_string();
    assert!(said.contains("tensor `a` is F8_E4M3, which burn has no dtype for"), "{said}");
    let said = weights.read("b", std::slice::from_ref(&(1..3))).unwrap_err().to_string();
    assert!(said.contains("has nothing at [1..3]"), "{said}");
    let said = weights.read("c", &[]).unwrap_err().to_string();
    assert!(said.contains("`c`"), "{said}");
}

/// A good file with some of its bytes changed, most of them in the header.
fn changed() -> impl Strategy<Value = Vec<u8>> {
    let good = file_of(&counting(&[("a", &[2, 3]), ("b", &[4]), ("c", &[])]));
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let changes =
        prop::collection::vec((0..header + 8, prop::sample::select(b"0123456789[]{}:,\"aF\0\xff".to_vec())), 0..4);
    let cut = prop::option::of(0..good.len());
    (changes, cut).prop_map(move |(changes, cut)| {
        let mut bytes = good.clone();
        for (place, byte) in changes {
            if let Some(at) = bytes.get_mut(place) {
                *at = byte;
            }
        }
        bytes.truncate(cut.unwrap_or(bytes.len()));
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_are_an_error_or_tensors(bytes in prop_oneof![changed(), prop::collection::vec(any::<u8>(), 0..64)]) {
        let len = bytes.len();
        let Ok(mut weights) = Weights::from_bytes(bytes) else { return Ok(()) };
        let names: Vec<String> = weights.names().map(Into::into).collect();
        let mut all = 0;
        for name in names {
            let dims = weights.tensor_dims(&name).unwrap().to_vec();
            let ranges: Vec<_> = dims.iter().map(|size| 0..*size).collect();
            if let Ok(data) = weights.read(&name, &ranges) {
                prop_assert_eq!(data.shape().as_slice(), dims.as_slice());
                all += data.bytes().len();
            }
        }
        prop_assert!(all <= len);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    /// An index of which some bytes are others: an error that names a file of the directory, or tensors that are there.
    #[test]
    fn any_index_is_an_error_or_tensors(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(b"ab./\\0{}:,\"\0\xff".to_vec())), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let dir = Dir::fresh();
        fs::write(dir.join("a.safetensors"), file_of(&counting(&[("a", &[2, 3]), ("b", &[4])]))).unwrap();
        let mut bytes = index(r#"{"a":"a.safetensors","b":"a.safetensors"}"#).into_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(dir.join("model.safetensors.index.json"), bytes).unwrap();
        match hf::open(dir.path()) {
            Ok(weights) => prop_assert!(weights.names().all(|name| ["a", "b"].contains(&name))),
            Err(error) => prop_assert!(error.to_string().contains(dir.path().to_str().unwrap()), "{}", error),
        }
    }
}
