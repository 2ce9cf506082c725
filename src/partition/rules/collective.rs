//! Collectives over another axis, which an earlier partition put in. They are linear, and treat alike all places along
//! the dims that they do not divide.

use burn_ir::OperationIr;

use super::option::{ShardingOption, each_dim};
use crate::layout::Layout::{Partial, Sharded};
use crate::partition::collectives::{CollectiveKind, CollectiveOp, dim};

pub(super) fn sharding_options(op: &OperationIr) -> Vec<ShardingOption> {
    let Some((CollectiveOp { kind, .. }, op)) = CollectiveOp::of(op) else { return Vec::new() };
    let [input] = op.inputs.as_slice() else { return Vec::new() };
    let divided: Vec<usize> = match kind {
        CollectiveKind::AllGather | CollectiveKind::ReduceScatter => dim(op, 0).into_iter().collect(),
        CollectiveKind::AllToAll => [dim(op, 0), dim(op, 1)].into_iter().flatten().collect(),
        _ => Vec::new(),
    };
    let mut found = each_dim(&input.shape, |dim| {
        (!divided.contains(&dim)).then(|| ShardingOption::new([Sharded(dim)], Sharded(dim)))
    });
    let nonlinear =
        [CollectiveKind::AllReduceMax, CollectiveKind::AllReduceMin, CollectiveKind::AllReduceProduct].contains(&kind);
    if !nonlinear {
        found.push(ShardingOption::new([Partial], Partial));
    }
    found
}
