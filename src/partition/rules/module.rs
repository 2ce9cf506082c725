//! What else burn computes as one operation of a module: pooling and interpolation, norms, attention.

use burn_ir::{OperationIr, TensorIr};

use super::option::{ShardingOption, each_dim};
use crate::graph::operation::Form;
use crate::layout::Layout::{self, Replicated, Sharded};

pub(super) fn sharding_options(op: &OperationIr) -> Vec<ShardingOption> {
    match Form::of(op) {
        Form::ByChannel => each_channel(op),
        Form::BatchNorm => vec![
            ShardingOption::new([Sharded(0), Replicated, Replicated, Replicated, Replicated], Sharded(0)),
            ShardingOption::new([Sharded(1), Sharded(0), Sharded(0), Sharded(0), Sharded(0)], Sharded(1)),
        ],
        Form::LayerNorm(norm) => {
            let last = norm.input.shape.num_dims() - 1;
            each_dim(&norm.input.shape, |dim| {
                let inputs = op.inputs().enumerate().map(|(place, _)| match place {
                    0 => Sharded(dim),
                    _ => Replicated,
                });
                (dim != last).then(|| ShardingOption::of(inputs.collect(), Sharded(dim)))
            })
        }
        // Batches and heads have nothing to do with each other; masks and biases may be the same for all of them.
        Form::Attention(attention) => {
            let query = &attention.query;
            let split = |dim: usize| {
                let of = |input: &TensorIr| match input.shape.as_slice().get(dim) == Some(&query.shape[dim]) {
                    true => Sharded(dim),
                    false => Replicated,
                };
                ShardingOption::of(op.inputs().map(of).collect(), Sharded(dim))
            };
            vec![split(0), split(1)]
        }
        _ => Vec::new(),
    }
}

/// Every image and every channel for itself.
fn each_channel(op: &OperationIr) -> Vec<ShardingOption> {
    let along = |dim: usize| ShardingOption::of(op.inputs().map(|_| Layout::Sharded(dim)).collect(), Sharded(dim));
    vec![along(0), along(1)]
}
