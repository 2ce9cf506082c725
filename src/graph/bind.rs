//! Checks the inputs and parameters of a step against those of the capture.

use std::collections::HashSet;

use burn::backend::DispatchTensor;
use burn::prelude::*;
use burn::tensor::DType;
use burn_ir::TensorIr;

use super::graph_error;
use crate::Error;
use crate::tensor::PlainTensor;
use crate::tensor::{TensorMapper, TensorTree, place};

/// Demands of a tensor the shape and dtype with which the graph was captured.
pub(crate) fn fits(what: impl FnOnce() -> String, value: &PlainTensor, binding: &TensorIr) -> Result<(), Error> {
    let (shape, dtype) = (value.shape(), value.dtype());
    if shape == binding.shape && dtype == binding.dtype {
        return Ok(());
    }
    Err(graph_error(format!(
        "{} is {dtype:?} {:?}, but the graph was captured with {:?} {:?}: capture again for other shapes (a \
         `GraphCache` does), or pad the batch",
        what(),
        shape.as_slice(),
        binding.dtype,
        binding.shape.as_slice()
    )))
}

/// Demands of a device that it can compute with the float dtypes that operations read or make.
pub(crate) fn computable<'a>(tensors: impl Iterator<Item = &'a TensorIr>, device: &Device) -> Result<(), Error> {
    let dtypes: HashSet<DType> = tensors.map(|tensor| tensor.dtype).filter(DType::is_float).collect();
    match dtypes.into_iter().find(|dtype| !device.supports_dtype(*dtype)) {
        None => Ok(()),
        Some(dtype) => {
            let advice = "cast to one that it has, in the model or in the loss";
            Err(graph_error(format!("the step computes with {dtype:?}, which {device:?} cannot: {advice}")))
        }
    }
}

/// Demands that a tensor is where the graph runs.
pub(crate) fn is_on(what: &str, value: &PlainTensor, device: &Device) -> Result<(), Error> {
    let found = value.device();
    if found == *device {
        return Ok(());
    }
    Err(graph_error(format!("{what} is on {found:?}, but the model is on {device:?}: move it there before the step")))
}

/// The tensors of a structure off their tape, with their places in it.
pub(crate) fn named_tensors<I: TensorTree>(inputs: I) -> Result<Vec<(String, PlainTensor)>, Error> {
    let mut bind = BindInputs { path: Vec::new(), values: Vec::new() };
    drop(inputs.map_tensors(&mut bind)?);
    Ok(bind.values)
}

/// The tensors of a structure in order, sharing their buffers.
///
/// # Errors
/// [`Error::Graph`] for a quantized tensor.
pub fn graph_tensors<I: TensorTree>(inputs: I) -> Result<Vec<PlainTensor>, Error> {
    Ok(named_tensors(inputs)?.into_iter().map(|(_, value)| value).collect())
}

struct BindInputs {
    path: Vec<usize>,
    values: Vec<(String, PlainTensor)>,
}

impl TensorMapper for BindInputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        let path = place(&self.path);
        let value = PlainTensor::of(tensor.clone(), &format!("input `{path}`"))?;
        self.values.push((path, value));
        Ok(tensor)
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }
}
