//! Hugging Face directories.

#[path = "../common/mod.rs"]
mod common;

mod adapter;
mod damage;
mod golden;
mod load;
mod mappings;
mod records;
mod save;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use burn::tensor::DType;
use safetensors::tensor::{Dtype, TensorView};

/// A directory that is gone when it is dropped.
pub struct Dir(PathBuf);

impl Dir {
    pub fn fresh() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("burn-parallel-hf-{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A directory that comes with the tests.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hf").join(name)
}

/// Names, dims and values of tensors.
pub type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// Tensors of these names and dims, whose values count up over all of them.
pub fn counting(tensors: &[(&str, &[usize])]) -> Tensors {
    let mut next = 0;
    let mut made = Vec::new();
    for (name, dims) in tensors {
        let len: usize = dims.iter().product();
        made.push((name.to_string(), dims.to_vec(), (next..next + len).map(|x| x as f32 / 64.0).collect()));
        next += len;
    }
    made
}

/// A safetensors file of `f32` tensors.
pub fn file_of(tensors: &Tensors) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, _, values)| bytemuck::cast_slice(values).to_vec()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, dims, _), bytes)| (name.clone(), TensorView::new(Dtype::F32, dims.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// What a tensor of an opened directory holds, as `f32`.
pub fn values(weights: &mut burn_parallel::hf::Weights, name: &str) -> Vec<f32> {
    use burn_parallel::params::SliceSource;
    let dims = weights.tensor_dims(name).unwrap().to_vec();
    let ranges: Vec<_> = dims.iter().map(|size| 0..*size).collect();
    weights.read(name, &ranges).unwrap().convert_dtype(DType::F32).try_to_vec().unwrap()
}
