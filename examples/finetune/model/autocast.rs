//! Products of fewer bits than the weights.

use burn::nn::Linear;
use burn::tensor::module::linear;
use burn::tensor::{DType, Tensor};

/// In which float type products are computed, as with PyTorch's `autocast`: the factors are cast for each product.
/// Weights, their gradients, what the optimizer keeps of them, norms, softmax, sums along the residual stream and the
/// loss stay what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Autocast(pub Option<DType>);

impl Autocast {
    /// A factor of a product, or what lies between two products.
    pub fn narrow<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self.0 {
            Some(dtype) => x.cast(dtype),
            None => x,
        }
    }

    /// What no product takes, as what is made of products.
    pub fn wide<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self.0 {
            Some(_) => x.cast(DType::F32),
            None => x,
        }
    }

    /// What a layer makes of `x`, narrow.
    ///
    /// # Shapes
    ///
    /// - x: `[rows, length, inputs]`
    /// - output: `[rows, length, outputs]`
    pub fn linear(self, layer: &Linear, x: Tensor<3>) -> Tensor<3> {
        let bias = layer.bias.as_ref().map(|bias| self.narrow(bias.val()));
        linear(self.narrow(x), self.narrow(layer.weight.val()), bias)
    }
}
