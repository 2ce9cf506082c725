//! Convolutions and their transposes, forward and backward: split along the batch, along the output channels, or along
//! the input channels, whose products are partial. Channels are split only without groups.
//!
//! Tensors are `[batch, channels, ..]`. Weights of a convolution are `[out, in, ..]`, of a transposed one `[in, out, ..]`.
//! The backward operations read of one input only its shape, which is what the local operation needs it for.

use burn::tensor::Shape;
use burn_ir::{
    BaseOperationIr, BinaryOpIr, ModuleOperationIr as Module, NumericOperationIr, OperationIr, ShapeOpIr, TensorId,
    TensorIr,
};

use super::option::ShardingOption;
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

pub(super) fn module(op: &Module) -> Vec<ShardingOption> {
    use Module::*;
    match op {
        Conv1d(op) => forward(op.bias.is_some(), op.options.groups, 0),
        Conv2d(op) => forward(op.bias.is_some(), op.options.groups, 0),
        Conv3d(op) => forward(op.bias.is_some(), op.options.groups, 0),
        ConvTranspose1d(op) => forward(op.bias.is_some(), op.options.groups, 1),
        ConvTranspose2d(op) => forward(op.bias.is_some(), op.options.groups, 1),
        ConvTranspose3d(op) => forward(op.bias.is_some(), op.options.groups, 1),
        Conv1dXBackward(op) => of_input(op.options.groups),
        Conv2dXBackward(op) => of_input(op.options.groups),
        Conv3dXBackward(op) => of_input(op.options.groups),
        Conv1dWeightBackward(op) => of_weight(op.options.groups, 0),
        Conv2dWeightBackward(op) => of_weight(op.options.groups, 0),
        Conv3dWeightBackward(op) => of_weight(op.options.groups, 0),
        ConvTranspose1dWeightBackward(op) => of_weight(op.options.groups, 1),
        ConvTranspose2dWeightBackward(op) => of_weight(op.options.groups, 1),
        ConvTranspose3dWeightBackward(op) => of_weight(op.options.groups, 1),
        Conv1dBiasBackward(_)
        | Conv2dBiasBackward(_)
        | Conv3dBiasBackward(_)
        | ConvTranspose1dBiasBackward(_)
        | ConvTranspose2dBiasBackward(_)
        | ConvTranspose3dBiasBackward(_) => vec![
            ShardingOption::new([Sharded(0), Replicated, Sharded(0)], Partial),
            ShardingOption::new([Replicated, Sharded(0), Sharded(1)], Sharded(0)),
        ],
        _ => Vec::new(),
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
pub(super) fn lower(op: &Module, layouts: &[Layout], fresh: &mut dyn FnMut() -> TensorId) -> Option<Vec<OperationIr>> {
    let mut product = op.clone();
    let (bias, out, groups, input_channels) = match &mut product {
        Module::Conv1d(op) => (&mut op.bias, &mut op.out, op.options.groups, 1),
        Module::Conv2d(op) => (&mut op.bias, &mut op.out, op.options.groups, 1),
        Module::Conv3d(op) => (&mut op.bias, &mut op.out, op.options.groups, 1),
        Module::ConvTranspose1d(op) => (&mut op.bias, &mut op.out, op.options.groups, 0),
        Module::ConvTranspose2d(op) => (&mut op.bias, &mut op.out, op.options.groups, 0),
        Module::ConvTranspose3d(op) => (&mut op.bias, &mut op.out, op.options.groups, 0),
        _ => return None,
    };
    let [x, weight, ..] = layouts else { return None };
    let contracts = *weight == Sharded(input_channels) || (*x == Sharded(1) && *weight == Replicated);
    if groups != 1 || !contracts {
        return None;
    }
    let bias = bias.take()?;
    let made = TensorIr { id: fresh(), ..out.clone() };
    let out = std::mem::replace(out, made.clone());
    let mut dims = vec![1; out.shape.num_dims()];
    dims[1] = bias.shape[0];
    let row = TensorIr::uninit(fresh(), Shape::from(dims), bias.dtype);
    let dtype = out.dtype;
    Some(vec![
        OperationIr::Module(product),
        OperationIr::BaseFloat(BaseOperationIr::Reshape(ShapeOpIr { input: bias, out: row.clone() })),
        OperationIr::NumericFloat(dtype, NumericOperationIr::Add(BinaryOpIr { lhs: made, rhs: row, out })),
    ])
}
