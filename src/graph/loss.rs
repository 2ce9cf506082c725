//! What a step closure may return.

use burn::prelude::*;
use burn::tensor::{DType, TensorData};

use super::inputs::{GraphInputs, TensorMapper};
use crate::error::Error;

/// What the closure of a step may return: the loss, or the loss and further outputs, where the loss is a `Tensor<1>` or a
/// [`TokenLoss`].
pub trait StepLoss {
    /// Separates the loss and hands the further outputs to `mapper`.
    ///
    /// # Errors
    /// Those of the mapper.
    fn split(self, mapper: &mut dyn TensorMapper) -> Result<LossParts, Error>;
}

/// What is differentiated in a step, and what it counts for.
#[derive(Debug)]
pub struct LossParts {
    /// One element: gradients are those of this.
    pub loss: Tensor<1>,
    /// One element: the number of items that `loss` is the sum over. `None` for a mean, which counts for 1.
    pub weight: Option<Tensor<1>>,
}

/// A loss that was **summed** over items (tokens, rows), with their number: for averages that are exact whatever the
/// number of items in each micro-batch and on each rank.
///
/// The gradients of the step are those of the sum, and the number is a result of the step like the sum, so that an engine
/// adds both up over all micro-batches and ranks and divides once at the end: `sum(losses) / sum(counts)`, never a mean of
/// means. A number that depends on the data (tokens that are not padding) is computed in the step with tensors;
/// one that follows from the shapes is a plain number, for [`of`](Self::of).
///
/// A step whose closure returns a bare `Tensor<1>` is a mean of weight 1. Engines that combine several of those give
/// each the same weight; that is exact only if all have equally many items.
///
/// ```
/// use burn::{nn::LinearConfig, prelude::*};
/// use burn_parallel::graph::{CustomOps, Executor, TokenLoss, capture_step};
///
/// let device = Device::flex().autodiff();
/// let model = LinearConfig::new(4, 2).init(&device);
/// let x = Tensor::<2>::ones([3, 4], &device);
/// let real = Tensor::<1>::from_floats([1.0, 1.0, 0.0], &device); // the last row is padding
/// let graph = capture_step(&model, (x.clone(), real.clone()), |model, (x, real)| {
///     let losses = model.forward(x).powi_scalar(2).sum_dim(1).squeeze_dim::<1>(1);
///     TokenLoss::new((losses * real.clone()).sum(), real.sum())
/// })?;
/// let step = Executor::new(graph, CustomOps::new())?.step(&model, (x, real))?;
/// assert_eq!(step.weight, 2.0); // `step.loss` and `step.gradients` are of the mean over two rows
/// # Ok::<(), burn_parallel::Error>(())
/// ```
#[derive(Debug)]
pub struct TokenLoss {
    sum: Tensor<1>,
    count: Tensor<1>,
}

impl TokenLoss {
    /// The sum of losses over items, and the number of items, both of one element. The number is not differentiated.
    pub fn new(sum: Tensor<1>, count: Tensor<1>) -> Self {
        Self { sum, count }
    }

    /// The sum of losses over `count` items.
    pub fn of(sum: Tensor<1>, count: usize) -> Self {
        let count = TensorData::new(vec![count as f64], [1]);
        let count = Tensor::from_data(count, (&sum.device(), DType::F64));
        Self { sum, count }
    }
}

impl StepLoss for Tensor<1> {
    fn split(self, _: &mut dyn TensorMapper) -> Result<LossParts, Error> {
        Ok(LossParts { loss: self, weight: None })
    }
}

impl StepLoss for TokenLoss {
    fn split(self, _: &mut dyn TensorMapper) -> Result<LossParts, Error> {
        Ok(LossParts { loss: self.sum, weight: Some(self.count) })
    }
}

impl<O: GraphInputs> StepLoss for (Tensor<1>, O) {
    fn split(self, mapper: &mut dyn TensorMapper) -> Result<LossParts, Error> {
        self.1.map_tensors(mapper)?;
        Ok(LossParts { loss: self.0, weight: None })
    }
}

impl<O: GraphInputs> StepLoss for (TokenLoss, O) {
    fn split(self, mapper: &mut dyn TensorMapper) -> Result<LossParts, Error> {
        self.1.map_tensors(mapper)?;
        self.0.split(mapper)
    }
}
