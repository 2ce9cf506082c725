//! The inputs and outputs of a graph that do not belong to the module.

use burn::backend::{
    BackendTensor, DispatchAutodiffContext, DispatchKindConversion, DispatchTensor, GradientCheckpointingStrategy,
    TensorMetadata,
};
use burn::tensor::{DType, Shape};
use burn_capture::{CaptureBackend, CaptureDevice};
use burn_ir::TensorId;

use super::device::{as_autodiff, on_autodiff, placeholder, without_autodiff};
use super::graph_error;
use crate::Error;
use crate::tensor::{TensorMapper, place};

/// A tensor at the edge of the graph.
pub(crate) struct EdgeTensor {
    pub(crate) path: String,
    pub(crate) id: TensorId,
    pub(crate) shape: Shape,
    pub(crate) dtype: DType,
}

/// Inputs become capture tensors without data; for training on autodiff, as a batch made on the training device would
/// be: dropout and batch norm ask their input whether this is training.
pub(crate) struct CaptureInputs {
    device: CaptureDevice,
    strategy: Option<GradientCheckpointingStrategy>,
    path: Vec<usize>,
    pub(crate) inputs: Vec<EdgeTensor>,
}

impl CaptureInputs {
    /// With autodiff if there is a strategy for its checkpoints.
    pub(crate) fn new(device: CaptureDevice, strategy: Option<GradientCheckpointingStrategy>) -> Self {
        Self { device, strategy, path: Vec::new(), inputs: Vec::new() }
    }
}

impl TensorMapper for CaptureInputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        let (path, shape, dtype) = (place(&self.path), tensor.shape(), tensor.dtype());
        let tensor = placeholder(self.device, shape.clone(), dtype, &format!("input `{path}`"))?;
        self.inputs.push(EdgeTensor { path, id: tensor.id(), shape, dtype });
        Ok(match self.strategy {
            Some(strategy) => on_autodiff(tensor, dtype, strategy),
            None => without_autodiff(tensor, dtype),
        })
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }
}

pub(crate) struct CaptureOutputs {
    pub(crate) path: Vec<usize>,
    pub(crate) outputs: Vec<EdgeTensor>,
}

impl CaptureOutputs {
    pub(crate) fn new() -> Self {
        Self { path: Vec::new(), outputs: Vec::new() }
    }
}

/// A tensor that was computed on the capture device, as an edge of the graph.
pub(crate) fn computed(what: &str, path: String, tensor: &DispatchTensor) -> Result<EdgeTensor, Error> {
    let (shape, dtype) = (tensor.shape(), tensor.dtype());
    let id = match tensor.autodiff {
        DispatchAutodiffContext::Disabled => {
            match <DispatchTensor as DispatchKindConversion<CaptureBackend>>::try_into_backend(tensor.clone()) {
                Ok(BackendTensor::Float(t) | BackendTensor::Int(t) | BackendTensor::Bool(t)) => Some(t.id()),
                _ => None,
            }
        }
        DispatchAutodiffContext::Enabled(_) => match as_autodiff(tensor.clone()) {
            Some(BackendTensor::Float(t)) => Some(t.primitive().id()),
            Some(BackendTensor::Int(t) | BackendTensor::Bool(t)) => Some(t.id()),
            _ => None,
        },
    };
    let id = id.ok_or_else(|| graph_error(format!("{what} was not computed from the module and the inputs")))?;
    Ok(EdgeTensor { path, id, shape, dtype })
}

impl TensorMapper for CaptureOutputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        let path = place(&self.path);
        self.outputs.push(computed(&format!("output `{path}`"), path, &tensor)?);
        Ok(tensor)
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }
}
