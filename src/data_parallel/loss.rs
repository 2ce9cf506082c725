//! A loss with its weight in the average over the whole batch.

use burn::tensor::Tensor;

/// A loss, and how much it counts in the average over micro-batches and ranks.
///
/// What is trained on is `sum(weight * mean loss) / sum(weight)` over everything that makes up the step. With the number
/// of tokens as weight that is the mean over all tokens of the whole batch, whatever their distribution: never a mean of
/// means.
///
/// A bare `Tensor<1>` is a mean of weight 1, as in PyTorch's DDP: right when all ranks bring equally many items.
#[derive(Debug)]
pub struct Loss {
    pub(super) value: Tensor<1>,
    pub(super) weight: f64,
    pub(super) summed: bool,
}

impl Loss {
    /// A loss that was averaged over `weight` items (tokens, rows).
    pub fn mean(value: Tensor<1>, weight: f64) -> Self {
        Self { value, weight, summed: false }
    }

    /// A loss that was summed over `weight` items.
    pub fn sum(value: Tensor<1>, weight: f64) -> Self {
        Self { value, weight, summed: true }
    }

    /// The factor for the loss so that its gradients are those of the mean, times its weight in units of `unit`.
    pub(super) fn factor(&self, unit: f64) -> f64 {
        if self.summed { 1.0 / unit } else { self.weight / unit }
    }
}

impl From<Tensor<1>> for Loss {
    fn from(value: Tensor<1>) -> Self {
        Self::mean(value, 1.0)
    }
}
