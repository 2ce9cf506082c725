//! What stands in the module for a parameter of which this rank holds its rows.

use burn::module::ParamMapper;
use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor};

use crate::params::{LeafKind, leaf};

/// A frozen parameter of these dims, in which one element that is not a number stands for all: who looks at its dims
/// finds them, who takes it for the values of the parameter notices.
pub(super) fn stand_in<const D: usize>(
    dims: [usize; D],
    one: &Tensor<D>,
    strategy: LeafKind,
    mapper: ParamMapper<Tensor<D>>,
) -> Param<Tensor<D>> {
    let device: Device = one.device();
    let whole = match dims.contains(&0) {
        true => Tensor::zeros(dims, (&device, one.dtype())),
        // Stride 0.
        false => Tensor::<D>::full([1; D], f32::NAN, (&device, one.dtype())).expand(dims),
    };
    let value = leaf(whole, LeafKind { trained: false, ..strategy });
    Param::from_mapped_value(ParamId::new(), value, mapper).set_require_grad(false)
}
