//! Reductions, and what else works along a dim: sums and means over a split dim are partial, the largest, smallest and the
//! product are reduced again over the ranks, and the rest is split along other dims.

use burn_ir::{
    ActivationOperationIr, BaseOperationIr as Base, NumericOperationIr as Numeric, OperationIr, ScalarIr, ScalarOpIr,
    TensorId, TensorIr,
};

use super::option::{LocalOperation, ShardingOption, each_dim};
use crate::layout::Layout::{Partial, Replicated, Sharded};
use crate::partition::collectives::CollectiveKind;

pub(super) fn numeric(op: &Numeric) -> Vec<ShardingOption> {
    use CollectiveKind::{AllReduceMax, AllReduceMin, AllReduceProduct};
    match op {
        Numeric::Sum(op) => {
            let mut found = each_dim(&op.input.shape, |dim| Some(ShardingOption::new([Sharded(dim)], Partial)));
            found.push(ShardingOption::new([Partial], Partial));
            found
        }
        Numeric::SumDim(op) => sum(&op.input, &[op.axis]),
        Numeric::SumDims(op) => sum(&op.input, &op.axes),
        Numeric::Mean(op) => {
            let share = |dim| Some(ShardingOption::new([Sharded(dim)], Partial).done(LocalOperation::Averaged));
            let mut found = each_dim(&op.input.shape, share);
            found.push(ShardingOption::new([Partial], Partial));
            found
        }
        Numeric::MeanDim(op) => {
            let mut found = beside(&op.input, op.axis);
            found.push(ShardingOption::new([Sharded(op.axis)], Partial).done(LocalOperation::Averaged));
            found.push(ShardingOption::new([Partial], Partial));
            found
        }
        Numeric::CumSum(op) => {
            let mut found = beside(&op.input, op.axis);
            found.push(ShardingOption::new([Partial], Partial));
            found
        }
        Numeric::ProdDim(op) => along(&op.input, op.axis, AllReduceProduct),
        Numeric::MaxDim(op) | Numeric::MaxAbsDim(op) => along(&op.input, op.axis, AllReduceMax),
        Numeric::MinDim(op) => along(&op.input, op.axis, AllReduceMin),
        Numeric::Prod(op) => over(&op.input, AllReduceProduct),
        Numeric::Max(op) | Numeric::MaxAbs(op) => over(&op.input, AllReduceMax),
        Numeric::Min(op) => over(&op.input, AllReduceMin),
        Numeric::ArgMax(op) | Numeric::ArgMin(op) | Numeric::ArgTopK(op) | Numeric::TopK(op) => {
            beside(&op.input, op.axis)
        }
        Numeric::Sort(op) | Numeric::ArgSort(op) => beside(&op.input, op.dim),
        Numeric::MaxDimWithIndices(op) | Numeric::MinDimWithIndices(op) => beside(&op.tensor, op.dim),
        Numeric::TopKWithIndices(op) => beside(&op.tensor, op.dim),
        Numeric::SortWithIndices(op) => beside(&op.input, op.dim),
        Numeric::CumProd(op) | Numeric::CumMin(op) | Numeric::CumMax(op) => beside(&op.input, op.axis),
        _ => Vec::new(),
    }
}

/// Of bools the largest is true if any is, the smallest if all are.
pub(super) fn base(op: &Base) -> Vec<ShardingOption> {
    match op {
        Base::All(op) => over(&op.input, CollectiveKind::AllReduceMin),
        Base::Any(op) => over(&op.input, CollectiveKind::AllReduceMax),
        Base::AllDim(op) => along(&op.input, op.axis, CollectiveKind::AllReduceMin),
        Base::AnyDim(op) => along(&op.input, op.axis, CollectiveKind::AllReduceMax),
        _ => Vec::new(),
    }
}

pub(super) fn activation(op: &ActivationOperationIr) -> Vec<ShardingOption> {
    use ActivationOperationIr::{LogSoftmax, Softmax, Softmin};
    match op {
        Softmax(op) | LogSoftmax(op) | Softmin(op) => beside(&op.input, op.axis),
        _ => Vec::new(),
    }
}

fn sum(input: &TensorIr, axes: &[usize]) -> Vec<ShardingOption> {
    let mut found = each_dim(&input.shape, |dim| {
        Some(ShardingOption::new([Sharded(dim)], if axes.contains(&dim) { Partial } else { Sharded(dim) }))
    });
    found.push(ShardingOption::new([Partial], Partial));
    found
}

/// Split along any dim but this one.
fn beside(input: &TensorIr, axis: usize) -> Vec<ShardingOption> {
    each_dim(&input.shape, |dim| (dim != axis).then(|| ShardingOption::new([Sharded(dim)], Sharded(dim))))
}

/// Split along any dim; along this one the ranks' results are reduced.
fn along(input: &TensorIr, axis: usize, kind: CollectiveKind) -> Vec<ShardingOption> {
    let mut found = beside(input, axis);
    found.push(ShardingOption::new([Sharded(axis)], Replicated).done(LocalOperation::Reduced(kind)));
    found
}

fn over(input: &TensorIr, kind: CollectiveKind) -> Vec<ShardingOption> {
    each_dim(&input.shape, |dim| {
        Some(ShardingOption::new([Sharded(dim)], Replicated).done(LocalOperation::Reduced(kind)))
    })
}

/// A mean over an equal share, as a summand of the mean over all.
pub(super) fn averaged(mut op: OperationIr, degree: usize, fresh: &mut dyn FnMut() -> TensorId) -> Vec<OperationIr> {
    let OperationIr::NumericFloat(dtype, mean) = &mut op else { return vec![op] };
    let dtype = *dtype;
    let out = match mean {
        Numeric::Mean(op) => &mut op.out,
        Numeric::MeanDim(op) => &mut op.out,
        _ => return vec![op],
    };
    let share = TensorIr { id: fresh(), ..out.clone() };
    let out = std::mem::replace(out, share.clone());
    let scale = ScalarOpIr { lhs: share, rhs: ScalarIr::Float(1.0 / degree as f64), out };
    vec![op, OperationIr::NumericFloat(dtype, Numeric::MulScalar(scale))]
}
