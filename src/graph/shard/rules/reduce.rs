//! Reductions, and what else works along a dim: sums over a split dim are partial, means become sums, and the rest is
//! split along other dims.

use burn::tensor::DType;
use burn_ir::{
    ActivationOperationIr, NumericOperationIr as Numeric, OperationIr, ReduceDimOpIr, ReduceOpIr, ScalarIr, ScalarOpIr,
    TensorId, TensorIr,
};

use super::{Strategy, each_dim};
use crate::layout::Layout::{self, Partial, Sharded};

pub(super) fn numeric(op: &Numeric) -> Vec<Strategy> {
    match op {
        Numeric::Sum(op) => {
            let mut found = each_dim(&op.input.shape, |dim| Some(Strategy::new([Sharded(dim)], Partial)));
            found.push(Strategy::new([Partial], Partial));
            found
        }
        Numeric::SumDim(op) => sum(&op.input, &[op.axis]),
        Numeric::SumDims(op) => sum(&op.input, &op.axes),
        Numeric::Mean(_) => vec![Strategy::new([Partial], Partial)],
        Numeric::MeanDim(op) => {
            let mut found = beside(&op.input, op.axis);
            found.push(Strategy::new([Partial], Partial));
            found
        }
        Numeric::CumSum(op) => {
            let mut found = beside(&op.input, op.axis);
            found.push(Strategy::new([Partial], Partial));
            found
        }
        Numeric::ProdDim(op)
        | Numeric::ArgMax(op)
        | Numeric::ArgMin(op)
        | Numeric::MaxDim(op)
        | Numeric::MinDim(op)
        | Numeric::MaxAbsDim(op) => beside(&op.input, op.axis),
        Numeric::MaxDimWithIndices(op) | Numeric::MinDimWithIndices(op) => beside(&op.tensor, op.dim),
        Numeric::CumProd(op) | Numeric::CumMin(op) | Numeric::CumMax(op) => beside(&op.input, op.axis),
        _ => Vec::new(),
    }
}

pub(super) fn activation(op: &ActivationOperationIr) -> Vec<Strategy> {
    use ActivationOperationIr::{LogSoftmax, Softmax, Softmin};
    match op {
        Softmax(op) | LogSoftmax(op) | Softmin(op) => beside(&op.input, op.axis),
        _ => Vec::new(),
    }
}

fn sum(input: &TensorIr, axes: &[usize]) -> Vec<Strategy> {
    let mut found = each_dim(&input.shape, |dim| {
        Some(Strategy::new([Sharded(dim)], if axes.contains(&dim) { Partial } else { Sharded(dim) }))
    });
    found.push(Strategy::new([Partial], Partial));
    found
}

/// Split along any dim but this one.
fn beside(input: &TensorIr, axis: usize) -> Vec<Strategy> {
    each_dim(&input.shape, |dim| (dim != axis).then(|| Strategy::new([Sharded(dim)], Sharded(dim))))
}

/// A mean over a split dim: the sum, divided by the count.
pub(super) fn lower(
    dtype: DType,
    op: &Numeric,
    layouts: &[Layout],
    fresh: &mut dyn FnMut() -> TensorId,
) -> Option<Vec<OperationIr>> {
    let (Sharded(dim), out) = (*layouts.first()?, op_out(op)?) else { return None };
    let sum = TensorIr::uninit(fresh(), out.shape.clone(), out.dtype);
    let (op, count) = match op {
        Numeric::Mean(op) => {
            let count = op.input.shape.num_elements();
            (Numeric::Sum(ReduceOpIr { input: op.input.clone(), out: sum.clone() }), count)
        }
        Numeric::MeanDim(op) if op.axis == dim => {
            (Numeric::SumDim(ReduceDimOpIr { out: sum.clone(), ..op.clone() }), op.input.shape[dim])
        }
        _ => return None,
    };
    let scale = ScalarOpIr { lhs: sum, rhs: ScalarIr::Float(1.0 / count as f64), out: out.clone() };
    Some(vec![OperationIr::NumericFloat(dtype, op), OperationIr::NumericFloat(dtype, Numeric::MulScalar(scale))])
}

fn op_out(op: &Numeric) -> Option<&TensorIr> {
    match op {
        Numeric::Mean(op) => Some(&op.out),
        Numeric::MeanDim(op) => Some(&op.out),
        _ => None,
    }
}
