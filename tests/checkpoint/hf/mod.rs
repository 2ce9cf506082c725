//! Hugging Face directories.

mod adapter;
mod damage;
mod encoders;
mod finetune;
mod golden;
mod load;
mod mappings;
mod python;
mod records;
mod save;
mod statistics;

use std::path::{Path, PathBuf};

use burn::tensor::DType;
use safetensors::tensor::{Dtype, TensorView};

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
