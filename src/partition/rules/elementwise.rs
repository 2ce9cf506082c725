//! Operations that compute each element of the output from the elements at its place, with broadcasting.

use burn_ir::{OperationIr, TensorIr};

use super::option::ShardingOption;
use crate::graph::operation::{is_elementwise, is_linear};
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
