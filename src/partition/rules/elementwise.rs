//! Operations that compute each element of the output from the elements at its place, with broadcasting.

use burn_ir::{
    ActivationOperationIr as Activation, BaseOperationIr as Base, FloatOperationIr as Float, IntOperationIr as Int,
    NumericOperationIr as Numeric, OperationIr, TensorIr,
};

use super::option::ShardingOption;
use crate::layout::Layout::{Partial, Replicated, Sharded};

pub(super) fn sharding_options(op: &OperationIr) -> Vec<ShardingOption> {
    if !is_elementwise(op) {
        return Vec::new();
    }
    let Some(out) = op.outputs().next() else { return Vec::new() };
    let inputs: Vec<&TensorIr> = op.inputs().collect();
    let rank = out.shape.num_dims();
    let broadcasts = inputs.iter().all(|input| {
        input.shape.num_dims() == rank
            && (0..rank).all(|dim| input.shape[dim] == out.shape[dim] || input.shape[dim] == 1)
    });
    if !broadcasts {
        return Vec::new();
    }
    let along = |dim: usize| {
        let of = |input: &&TensorIr| if input.shape[dim] == out.shape[dim] { Sharded(dim) } else { Replicated };
        ShardingOption::of(inputs.iter().map(of).collect(), Sharded(dim))
    };
    let mut found: Vec<ShardingOption> = (0..rank).filter(|dim| out.shape[*dim] > 1).map(along).collect();
    if is_linear(op) {
        found.push(ShardingOption::of(vec![Partial; inputs.len()], Partial));
    }
    found
}

/// Whether the operation of sums is the sum of the operations.
fn is_linear(op: &OperationIr) -> bool {
    match op {
        OperationIr::NumericFloat(_, op) => matches!(
            op,
            Numeric::Add(_) | Numeric::Sub(_) | Numeric::Neg(_) | Numeric::MulScalar(_) | Numeric::DivScalar(_)
        ),
        OperationIr::NumericInt(_, op) => matches!(op, Numeric::Add(_) | Numeric::Sub(_) | Numeric::Neg(_)),
        _ => false,
    }
}

/// Whether each element of the output is computed from the elements at its place, and nothing else.
pub(crate) fn is_elementwise(op: &OperationIr) -> bool {
    match op {
        OperationIr::BaseFloat(op) | OperationIr::BaseInt(op) | OperationIr::BaseBool(op) => matches!(
            op,
            Base::MaskWhere(_)
                | Base::MaskFill(_)
                | Base::Equal(_)
                | Base::EqualElem(_)
                | Base::NotEqual(_)
                | Base::NotEqualElem(_)
                | Base::Cast(_)
        ),
        OperationIr::NumericFloat(_, op) | OperationIr::NumericInt(_, op) => matches!(
            op,
            Numeric::Add(_)
                | Numeric::AddScalar(_)
                | Numeric::Sub(_)
                | Numeric::SubScalar(_)
                | Numeric::Div(_)
                | Numeric::DivScalar(_)
                | Numeric::Rem(_)
                | Numeric::RemScalar(_)
                | Numeric::Mul(_)
                | Numeric::MulScalar(_)
                | Numeric::Abs(_)
                | Numeric::Greater(_)
                | Numeric::GreaterElem(_)
                | Numeric::GreaterEqual(_)
                | Numeric::GreaterEqualElem(_)
                | Numeric::Lower(_)
                | Numeric::LowerElem(_)
                | Numeric::LowerEqual(_)
                | Numeric::LowerEqualElem(_)
                | Numeric::Clamp(_)
                | Numeric::Powi(_)
                | Numeric::PowiScalar(_)
                | Numeric::Neg(_)
                | Numeric::Sign(_)
                | Numeric::ClampMin(_)
                | Numeric::ClampMax(_)
        ),
        OperationIr::Float(_, op) => !matches!(
            op,
            Float::Matmul(_)
                | Float::Cross(_)
                | Float::Random(_)
                | Float::Quantize(_)
                | Float::Dequantize(_)
                | Float::GridSample2d(_)
        ),
        OperationIr::Int(op) => !matches!(op, Int::Matmul(_)),
        OperationIr::Bool(_) => true,
        OperationIr::Activation(op) => !matches!(
            op,
            Activation::PRelu(_) | Activation::Softmax(_) | Activation::LogSoftmax(_) | Activation::Softmin(_)
        ),
        _ => false,
    }
}
