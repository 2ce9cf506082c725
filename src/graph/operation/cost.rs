//! What an operation takes, counted from its shapes: multiplications, elements, bytes.

use burn_ir::{FloatOperationIr, IntOperationIr, ModuleOperationIr as Module, OperationIr, TensorIr};

/// Elements of a tensor.
pub(crate) fn elements(tensor: &TensorIr) -> u64 {
    tensor.shape.num_elements() as u64
}

/// Bytes of a tensor.
pub(crate) fn bytes(tensor: &TensorIr) -> u64 {
    elements(tensor) * tensor.dtype.size() as u64
}

/// The multiplications of a matrix product, a convolution or an attention, forward or backward; 0 for any other
/// operation.
pub(crate) fn multiplications(op: &OperationIr) -> u64 {
    match op {
        OperationIr::Float(_, FloatOperationIr::Matmul(op)) | OperationIr::Int(IntOperationIr::Matmul(op)) => {
            elements(&op.out) * last(&op.lhs)
        }
        OperationIr::Module(module) => of_module(module),
        _ => 0,
    }
}

fn of_module(op: &Module) -> u64 {
    match op {
        Module::Linear(op) => elements(&op.weight) * rows(&op.x),
        Module::LinearXBackward(op) => elements(&op.weight) * rows(&op.output_grad),
        Module::LinearWeightBackward(op) => elements(&op.out) * rows(&op.x),
        // Scores, then the values that they weigh.
        Module::Attention(op) => {
            2 * elements(&op.query) * op.key.shape.iter().rev().nth(1).map_or(1, |keys| *keys as u64)
        }
        Module::Conv1d(op) => convolution(&op.out, &op.weight),
        Module::Conv2d(op) => convolution(&op.out, &op.weight),
        Module::Conv3d(op) => convolution(&op.out, &op.weight),
        Module::DeformableConv2d(op) => convolution(&op.out, &op.weight),
        Module::Conv1dXBackward(op) => convolution(&op.output_grad, &op.weight),
        Module::Conv2dXBackward(op) => convolution(&op.output_grad, &op.weight),
        Module::Conv3dXBackward(op) => convolution(&op.output_grad, &op.weight),
        Module::Conv1dWeightBackward(op) => convolution(&op.output_grad, &op.weight),
        Module::Conv2dWeightBackward(op) => convolution(&op.output_grad, &op.weight),
        Module::Conv3dWeightBackward(op) => convolution(&op.output_grad, &op.weight),
        // Of the input, of the offsets, and of the weight.
        Module::DeformableConv2dBackward(op) => 3 * convolution(&op.out_grad, &op.weight),
        Module::ConvTranspose1d(op) => convolution(&op.x, &op.weight),
        Module::ConvTranspose2d(op) => convolution(&op.x, &op.weight),
        Module::ConvTranspose3d(op) => convolution(&op.x, &op.weight),
        Module::ConvTranspose1dWeightBackward(op) => convolution(&op.x, &op.weight),
        Module::ConvTranspose2dWeightBackward(op) => convolution(&op.x, &op.weight),
        Module::ConvTranspose3dWeightBackward(op) => convolution(&op.x, &op.weight),
        _ => 0,
    }
}

/// A convolution multiplies each element of its output (a transposed one: of its input) with all weights of one
/// channel.
fn convolution(of: &TensorIr, weight: &TensorIr) -> u64 {
    elements(of) * (elements(weight) / weight.shape.first().copied().unwrap_or(1).max(1) as u64)
}

fn last(tensor: &TensorIr) -> u64 {
    tensor.shape.last().copied().unwrap_or(1) as u64
}

/// The rows of a tensor: everything but its last dim.
fn rows(tensor: &TensorIr) -> u64 {
    elements(tensor) / last(tensor).max(1)
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use burn::nn::PaddingConfig2d;
    use burn::nn::conv::{Conv2d, Conv2dConfig, ConvTranspose2d, ConvTranspose2dConfig};
    use burn::nn::{Linear, LinearConfig};
    use burn::prelude::*;

    use super::*;
    use crate::graph::capture_step;

    /// The multiplications of the products of a step: forward, gradient of the input, gradient of the weight.
    fn products<M: Module, const D: usize>(
        model: &M,
        dims: [usize; D],
        loss: impl FnOnce(&M, Tensor<D>) -> Tensor<1>,
    ) -> Vec<u64> {
        let device = Device::flex().autodiff();
        let graph = capture_step(model, Tensor::ones(dims, &device), loss).unwrap();
        graph.operations.iter().map(multiplications).filter(|count| *count > 0).collect()
    }

    #[test]
    fn products_are_counted_forward_and_backward() {
        let device = Device::flex().autodiff();
        let linear: Linear = LinearConfig::new(5, 7).init(&device);
        let pair = vec![linear, LinearConfig::new(7, 2).init(&device)];
        let found = products(&pair, [3, 4, 5], |pair, x| pair[1].forward(pair[0].forward(x)).mean());
        // Of the first layer no gradient of the input is computed.
        let (first, second) = (12 * 5 * 7, 12 * 7 * 2);
        assert_eq!(found.iter().sum::<u64>(), 2 * first + 3 * second, "{found:?}");

        let convolution: Conv2d = Conv2dConfig::new([3, 4], [3, 3]).with_padding(PaddingConfig2d::Valid).init(&device);
        let found = products(&convolution, [2, 3, 8, 7], |layer, x| layer.forward(x).mean());
        assert_eq!(found, vec![2 * 4 * 6 * 5 * 3 * 9; 2]);

        let transposed: ConvTranspose2d = ConvTranspose2dConfig::new([3, 4], [2, 2]).init(&device);
        let found = products(&transposed, [2, 3, 5, 5], |layer, x| layer.forward(x).mean());
        assert_eq!(found.first(), Some(&(2 * 3 * 25 * 4 * 4)), "{found:?}");
    }
}
