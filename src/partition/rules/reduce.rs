//! Reductions, and what else works along a dim: sums and means over a split dim are partial, the largest, smallest and
//! the product are reduced again over the ranks, and the rest is split along other dims.

use burn_ir::{OperationIr, TensorId, TensorIr};

use super::option::{LocalOperation, ShardingOption, each_dim};
use crate::graph::operation::{
    AlongDim, AlongDimKind, Reduction, ReductionDims, ReductionKind, build, mean_output_mut,
};
use crate::layout::Layout::{Partial, Replicated, Sharded};
use crate::partition::collectives::CollectiveKind;

pub(super) fn reduction(Reduction { by, input, over }: Reduction<'_>) -> Vec<ShardingOption> {
    use CollectiveKind::{AllReduceMax, AllReduceMin, AllReduceProduct};
    let kind = match by {
        ReductionKind::Sum => return sum(input, over),
        ReductionKind::Mean => return mean(input, over),
        ReductionKind::Product => AllReduceProduct,
        // Of bools the largest is true if any is, the smallest if all are.
        ReductionKind::Max | ReductionKind::MaxAbs | ReductionKind::Any => AllReduceMax,
        ReductionKind::Min | ReductionKind::All => AllReduceMin,
    };
    match over {
        ReductionDims::One(axis) => along(input, axis, kind),
        _ => all_over(input, kind),
    }
}

pub(super) fn along_dim(AlongDim { what, input, dim }: AlongDim<'_>) -> Vec<ShardingOption> {
    let mut found = beside(input, dim);
    if what == AlongDimKind::CumulativeSum {
        found.push(ShardingOption::new([Partial], Partial));
    }
    found
}

fn sum(input: &TensorIr, over: ReductionDims<'_>) -> Vec<ShardingOption> {
    let mut found = each_dim(&input.shape, |dim| {
        Some(ShardingOption::new([Sharded(dim)], if over.contains(dim) { Partial } else { Sharded(dim) }))
    });
    found.push(ShardingOption::new([Partial], Partial));
    found
}

fn mean(input: &TensorIr, over: ReductionDims<'_>) -> Vec<ShardingOption> {
    let share = |dim| ShardingOption::new([Sharded(dim)], Partial).done(LocalOperation::Averaged);
    let mut found = match over {
        ReductionDims::One(axis) => {
            let mut found = beside(input, axis);
            found.push(share(axis));
            found
        }
        _ => each_dim(&input.shape, |dim| Some(share(dim))),
    };
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

fn all_over(input: &TensorIr, kind: CollectiveKind) -> Vec<ShardingOption> {
    each_dim(&input.shape, |dim| {
        Some(ShardingOption::new([Sharded(dim)], Replicated).done(LocalOperation::Reduced(kind)))
    })
}

/// A mean over an equal share, as a summand of the mean over all.
pub(super) fn averaged(mut op: OperationIr, degree: usize, fresh: &mut dyn FnMut() -> TensorId) -> Vec<OperationIr> {
    let Some(out) = mean_output_mut(&mut op) else { return vec![op] };
    let share = TensorIr { id: fresh(), ..out.clone() };
    let out = std::mem::replace(out, share.clone());
    vec![op, build::scale(share, 1.0 / degree as f64, out)]
}
