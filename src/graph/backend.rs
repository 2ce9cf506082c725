//! The backends that graphs run on, and how tensors enter and leave them.

use burn::backend::flex::FlexDevice;
use burn::backend::{BackendTensor, DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::Device;
use burn_ir::{BackendIr, HandleKind};

use super::graph_error;
use crate::Error;
use crate::tensor::PlainTensor;

/// A backend that graphs run on.
pub(crate) trait GraphBackend: BackendIr
where
    DispatchTensor: DispatchKindConversion<Self>,
{
    fn device(device: &Self::Device) -> Device;
}

impl GraphBackend for Flex {
    fn device(_: &FlexDevice) -> Device {
        Device::flex()
    }
}

#[cfg(feature = "cubecl")]
impl GraphBackend for burn::backend::Cube {
    fn device(device: &Self::Device) -> Device {
        Device::new(burn::backend::DispatchDevice::Cube(device.clone()))
    }
}

pub(crate) fn into_handle<B: GraphBackend>(tensor: PlainTensor) -> Result<HandleKind<B>, Error>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    match tensor.into_backend::<B>() {
        Ok(BackendTensor::Float(tensor)) => Ok(HandleKind::Float(tensor)),
        Ok(BackendTensor::Int(tensor)) => Ok(HandleKind::Int(tensor)),
        Ok(BackendTensor::Bool(tensor)) => Ok(HandleKind::Bool(tensor)),
        Ok(other) => Err(graph_error(format!("a {} tensor cannot enter a graph", other.name()))),
        Err(problem) => Err(graph_error(format!("a tensor is not on the device on which the graph runs: {problem}"))),
    }
}

pub(crate) fn from_handle<B: GraphBackend>(handle: HandleKind<B>) -> Result<PlainTensor, Error>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    Ok(PlainTensor::from_backend::<B>(match handle {
        HandleKind::Float(tensor) => BackendTensor::Float(tensor),
        HandleKind::Int(tensor) => BackendTensor::Int(tensor),
        HandleKind::Bool(tensor) => BackendTensor::Bool(tensor),
        HandleKind::Quantized(_) => return Err(graph_error("a step cannot give a quantized tensor")),
    }))
}
