//! Convolutions and their transposes, forward and backward: split along the batch, along the output channels, or along
//! the input channels, whose products are partial. Channels are split only without groups.
//!
//! Tensors are `[batch, channels, ..]`. Weights of a convolution are `[out, in, ..]`, of a transposed one `[in, out,
//! ..]`. The backward operations read of one input only its shape, which is what the local operation needs it for.

use burn::tensor::Shape;
use burn_ir::{OperationIr, TensorId, TensorIr};

use super::option::ShardingOption;
use crate::graph::operation::{Convolution, ConvolutionPass, Form, build, without_bias};
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

pub(super) fn sharding_options(Convolution { pass, transposed, groups }: Convolution) -> Vec<ShardingOption> {
    let out = usize::from(transposed);
    match pass {
        ConvolutionPass::Forward { bias } => forward(bias, groups, out),
        ConvolutionPass::InputGradient => of_input(groups),
        ConvolutionPass::WeightGradient => of_weight(groups, out),
        ConvolutionPass::BiasGradient => vec![
            ShardingOption::new([Sharded(0), Replicated, Sharded(0)], Partial),
            ShardingOption::new([Replicated, Sharded(0), Sharded(1)], Sharded(0)),
        ],
    }
}

/// `x, weight[, bias]`; the output channels are dim `out` of the weight.
fn forward(bias: bool, groups: usize, out: usize) -> Vec<ShardingOption> {
    let of = |x: Layout, weight: Layout, of_bias: Layout, output: Layout| {
        let inputs = [x, weight].into_iter().chain(bias.then_some(of_bias)).collect();
        ShardingOption::of(inputs, output)
    };
    let mut found = vec![of(Sharded(0), Replicated, Replicated, Sharded(0))];
    if groups == 1 {
        found.push(of(Replicated, Sharded(out), Sharded(0), Sharded(1)));
        if !bias {
            found.push(of(Sharded(1), Sharded(1 - out), Replicated, Partial));
        }
    }
    found
}

/// `x, weight, output_grad` to the gradient of `x`.
fn of_input(groups: usize) -> Vec<ShardingOption> {
    let mut found = vec![
        ShardingOption::new([Sharded(0), Replicated, Sharded(0)], Sharded(0)),
        ShardingOption::new([Replicated, Replicated, Partial], Partial),
    ];
    if groups == 1 {
        found.push(ShardingOption::new([Sharded(1), Sharded(1), Replicated], Sharded(1)));
        found.push(ShardingOption::new([Replicated, Sharded(0), Sharded(1)], Partial));
    }
    found
}

/// `x, weight, output_grad` to the gradient of `weight`, whose output channels are dim `out`.
fn of_weight(groups: usize, out: usize) -> Vec<ShardingOption> {
    let mut found = vec![ShardingOption::new([Sharded(0), Replicated, Sharded(0)], Partial)];
    if groups == 1 {
        found.push(ShardingOption::new([Replicated, Sharded(out), Sharded(1)], Sharded(out)));
        found.push(ShardingOption::new([Sharded(1), Sharded(1 - out), Replicated], Sharded(1 - out)));
    }
    found
}

/// A convolution whose product is partial adds its bias after the sum, so the two are separated.
pub(super) fn lower(
    op: &OperationIr,
    layouts: &[Layout],
    fresh: &mut dyn FnMut() -> TensorId,
) -> Option<Vec<OperationIr>> {
    let Form::Convolution(Convolution { transposed, groups, .. }) = Form::of(op) else { return None };
    let [x, weight, ..] = layouts else { return None };
    let contracts = *weight == Sharded(usize::from(!transposed)) || (*x == Sharded(1) && *weight == Replicated);
    if groups != 1 || !contracts {
        return None;
    }
    let mut product = op.clone();
    let (bias, out) = without_bias(&mut product, |out| TensorIr { id: fresh(), ..out.clone() })?;
    let made = product.outputs().next()?.clone();
    let mut dims = vec![1; out.shape.num_dims()];
    dims[1] = bias.shape[0];
    let row = TensorIr::uninit(fresh(), Shape::from(dims), bias.dtype);
    Some(vec![product, build::reshape(bias, row.clone()), build::add(made, row, out)])
}
