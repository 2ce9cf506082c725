//! Products of matrices, and burn's linear layer forward and backward. With the contracted dim split, each rank has a
//! partial product.

use burn::tensor::Shape;
use burn_ir::{LinearOpIr, MatmulOpIr, OperationIr, TensorId, TensorIr};

use super::option::{ShardingOption, each_dim};
use crate::graph::operation::{Form, build};
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

pub(super) fn matmul(op: &MatmulOpIr) -> Vec<ShardingOption> {
    let (lhs, rhs, out) = (&op.lhs.shape, &op.rhs.shape, &op.out.shape);
    let rank = out.num_dims();
    if rank < 2 || lhs.num_dims() != rank || rhs.num_dims() != rank {
        return Vec::new();
    }
    let (row, column) = (rank - 2, rank - 1);
    let batch = |shape: &Shape, dim: usize| if shape[dim] == out[dim] { Sharded(dim) } else { Replicated };
    let mut found: Vec<ShardingOption> =
        (0..row).map(|dim| ShardingOption::new([batch(lhs, dim), batch(rhs, dim)], Sharded(dim))).collect();
    found.push(ShardingOption::new([Sharded(row), Replicated], Sharded(row)));
    found.push(ShardingOption::new([Replicated, Sharded(column)], Sharded(column)));
    found.push(ShardingOption::new([Sharded(column), Sharded(row)], Partial));
    found
}

/// Of a linear layer and its backward.
pub(super) fn linear(form: Form<'_>) -> Vec<ShardingOption> {
    match form {
        Form::Linear(op) => {
            let last = op.x.shape.num_dims() - 1;
            let bias = |layout: Layout| op.bias.iter().map(move |_| layout);
            let with_bias = |inputs: [Layout; 2], of_bias: Layout, output: Layout| {
                ShardingOption::of(inputs.into_iter().chain(bias(of_bias)).collect(), output)
            };
            let mut found: Vec<ShardingOption> =
                (0..last).map(|dim| with_bias([Sharded(dim), Replicated], Replicated, Sharded(dim))).collect();
            found.push(with_bias([Replicated, Sharded(1)], Sharded(0), Sharded(last)));
            if op.bias.is_none() {
                found.push(ShardingOption::new([Sharded(last), Sharded(0)], Partial));
            }
            found
        }
        Form::LinearXBackward(op) => {
            let last = op.output_grad.shape.num_dims() - 1;
            let mut found: Vec<ShardingOption> =
                (0..last).map(|dim| ShardingOption::new([Replicated, Sharded(dim)], Sharded(dim))).collect();
            found.push(ShardingOption::new([Sharded(1), Sharded(last)], Partial));
            found.push(ShardingOption::new([Sharded(0), Replicated], Sharded(last)));
            found
        }
        Form::LinearWeightBackward(op) => {
            let last = op.output_grad.shape.num_dims() - 1;
            let mut found: Vec<ShardingOption> =
                (0..last).map(|dim| ShardingOption::new([Sharded(dim); 2], Partial)).collect();
            found.push(ShardingOption::new([Replicated, Sharded(last)], Sharded(1)));
            found.push(ShardingOption::new([Sharded(last), Replicated], Sharded(0)));
            found
        }
        Form::LinearBiasBackward(op) => {
            let last = op.output_grad.shape.num_dims() - 1;
            let mut found = each_dim(&op.output_grad.shape, |dim| {
                Some(ShardingOption::new([Sharded(dim)], if dim == last { Sharded(0) } else { Partial }))
            });
            found.push(ShardingOption::new([Partial], Partial));
            found
        }
        _ => Vec::new(),
    }
}

/// A linear layer whose product is partial adds its bias after the sum, so the two are separated.
pub(super) fn lower(
    op: &LinearOpIr,
    layouts: &[Layout],
    fresh: &mut dyn FnMut() -> TensorId,
) -> Option<Vec<OperationIr>> {
    let bias = op.bias.as_ref()?;
    let last = op.x.shape.num_dims() - 1;
    let [x, weight, ..] = layouts else { return None };
    if !(*weight == Sharded(0) || (*x == Sharded(last) && *weight == Replicated)) {
        return None;
    }
    let product = TensorIr::uninit(fresh(), op.out.shape.clone(), op.out.dtype);
    let mut dims = vec![1; last + 1];
    dims[last] = bias.shape[0];
    let row = TensorIr::uninit(fresh(), Shape::from(dims), bias.dtype);
    Some(vec![
        build::linear(op.x.clone(), op.weight.clone(), product.clone()),
        build::reshape(bias.clone(), row.clone()),
        build::add(product, row, op.out.clone()),
    ])
}
