//! Operations that make tensors from nothing: each rank makes its part.

use burn_ir::{OperationIr, TensorIr};

use super::option::{ShardingOption, each_dim};
use crate::graph::operation::is_filled;
use crate::graph::random::{draw_from, is_counter_based_rng};
use crate::layout::Layout::Sharded;

pub(super) fn random(op: &OperationIr) -> Vec<ShardingOption> {
    match op.outputs().next() {
        Some(out) if is_counter_based_rng(op) => anywhere(out),
        _ => Vec::new(),
    }
}

/// Has a random operation, whose output is local already, draw this rank's part along a dim.
pub(super) fn draw_part(op: &mut OperationIr, dim: usize, rank: usize) {
    let part = op.outputs().next().map_or(0, |out| out.shape[dim]);
    draw_from(op, dim, rank * part);
}

pub(super) fn anywhere(out: &TensorIr) -> Vec<ShardingOption> {
    each_dim(&out.shape, |dim| Some(ShardingOption::new([], Sharded(dim))))
}

/// Whether an operation makes its output from nothing, in whatever part is asked for.
pub(crate) fn creates(op: &OperationIr) -> bool {
    is_filled(op) || is_counter_based_rng(op)
}
