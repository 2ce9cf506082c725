//! Autodiff leaves of parameters.

use burn::backend::{DispatchAutodiffContext, GradientCheckpointingStrategy};
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::Error;
use crate::tensor::PlainTensor;

/// What a parameter is besides its value.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LeafKind {
    /// How its operations take part in gradient checkpointing; `None` without autodiff.
    pub(crate) strategy: Option<GradientCheckpointingStrategy>,
    pub(crate) trained: bool,
}

impl LeafKind {
    /// The kind of a tensor.
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        Self { strategy: tensor.gradient_checkpointing_strategy(), trained: tensor.is_require_grad() }
    }

    /// The kind that a parameter made on `device` has.
    pub(crate) fn on(device: &Device, trained: bool) -> Self {
        let strategy = Tensor::<1>::empty([0], device).gradient_checkpointing_strategy();
        Self { strategy, trained: trained && strategy.is_some() }
    }
}

/// A tensor without autodiff as a leaf of this kind.
pub(crate) fn leaf<const D: usize>(value: Tensor<D>, kind: LeafKind) -> Tensor<D> {
    match kind.strategy {
        Some(strategy) => with_autodiff(value, strategy).set_require_grad(kind.trained),
        None => value,
    }
}

/// A leaf of one element in the place of the value of a parameter.
///
/// # Errors
/// Those of [`PlainTensor::float`].
pub(crate) fn stand_in<const D: usize>(param: &Param<Tensor<D>>) -> Result<Tensor<D>, Error> {
    let value = param.base();
    let kind = LeafKind::of(&value);
    let value = PlainTensor::from(value);
    let one = PlainTensor::zeros(vec![1; D], value.dtype(), &value.device());
    Ok(leaf(one.float()?, kind))
}

/// The tensor on autodiff, as one that takes part in gradient checkpointing by `strategy`.
pub(crate) fn with_autodiff<const D: usize>(tensor: Tensor<D>, strategy: GradientCheckpointingStrategy) -> Tensor<D> {
    let mut tensor = tensor.autodiff().into_dispatch();
    tensor.autodiff = DispatchAutodiffContext::Enabled(strategy);
    Tensor::from_dispatch(tensor)
}

/// A lazy parameter, seen without making its value: a stand-in of one element that has its settings.
pub(crate) struct LazyParam<const D: usize> {
    pub(crate) placeholder: Param<Tensor<D>>,
    pub(crate) device: Device,
    /// Whether training mode makes it require a gradient.
    pub(crate) trained: bool,
}

impl<const D: usize> LazyParam<D> {
    pub(crate) fn of(param: &Param<Tensor<D>>) -> Self {
        let device = param.lazy_device();
        let one = Tensor::zeros([1; D], &device);
        // Loading is the one way that reads the settings of a lazy parameter and does not make it.
        let placeholder = param.clone().transform_for_load(one, param.id);
        let trained = placeholder.clone().train().val().is_require_grad();
        Self { placeholder, device, trained }
    }
}
