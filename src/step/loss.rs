//! A loss and its weight in the average over the whole batch.

use burn::backend::DispatchTensor;
use burn::prelude::*;
use burn::tensor::{DType, Int, TensorData};

use crate::Error;
use crate::tensor::{TensorMapper, TensorTree};

/// What the closure of a training step returns: a loss, how much it counts in the average over micro-batches and ranks,
/// and further outputs.
///
/// What is trained on is `sum(losses) / sum(items)` over everything that makes up the step, never a mean of means:
///
/// | the closure returns | which is | counts for |
/// |---|---|---|
/// | `Tensor<1>` | a plain mean | the rows of the inputs, see below |
/// | [`Loss::mean(tensor, items)`](Self::mean) | a mean over so many items | the items |
/// | [`Loss::sum(tensor, items)`](Self::sum) | a sum over so many items | the items |
///
/// Items (tokens, rows) are a number, or a tensor where the number depends on the data, as that of the tokens that are
/// not padding does. **Masked tokens need one of the last two**: the mean over them is over fewer items than there are
/// rows.
///
/// # A plain mean
/// The *rows* of a micro-batch are the size of the first dim of the first tensor among its inputs. A closure that
/// returns a bare tensor is taken to return the mean over these rows, and counts for them, with every strategy; without
/// any tensor among the inputs it counts for 1. [`Replica::backward`](crate::data_parallel::Replica::backward) is given
/// a loss alone and knows of no inputs: there a bare tensor counts for 1.
///
/// # Outputs
/// A pair of a loss and tensors returns the tensors as well, in [`Step::outputs`](super::Step::outputs):
/// `|model, x| { let y = model.forward(x); (y.clone().powi_scalar(2).mean(), y) }`.
#[derive(Debug)]
pub struct Loss {
    value: Tensor<1>,
    weight: Weight,
    outputs: Result<Vec<ExtraOutput>, Error>,
}

/// A further output: its place in the structure of the outputs, and the tensor.
pub(crate) type ExtraOutput = (String, DispatchTensor);

/// What a loss is, and over how many items.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there is one a micro-batch, taken apart at once")]
pub(crate) enum Weight {
    /// A mean over the rows of the inputs.
    Plain,
    Mean(f64),
    Sum(f64),
    /// A sum over as many items as a tensor of one element says.
    Counted(Tensor<1>),
}

/// The parts of a loss.
pub(crate) struct LossParts {
    pub value: Tensor<1>,
    pub weight: Weight,
    pub outputs: Vec<ExtraOutput>,
}

impl Loss {
    /// A loss that was averaged over so many items. Where these may be none, give the sum: a mean over nothing is NaN.
    pub fn mean(value: Tensor<1>, items: impl Into<Count>) -> Self {
        match items.into().0 {
            Counted::Known(items) => Self::new(value, Weight::Mean(items)),
            Counted::Tensor(items) => {
                let sum = value.clone() * items.clone().detach().cast(value.dtype());
                Self::new(sum, Weight::Counted(items))
            }
        }
    }

    /// A loss that was summed over so many items.
    pub fn sum(value: Tensor<1>, items: impl Into<Count>) -> Self {
        match items.into().0 {
            Counted::Known(items) => Self::new(value, Weight::Sum(items)),
            Counted::Tensor(items) => Self::new(value, Weight::Counted(items)),
        }
    }

    fn new(value: Tensor<1>, weight: Weight) -> Self {
        Self { value, weight, outputs: Ok(Vec::new()) }
    }

    fn with_outputs(self, outputs: impl TensorTree) -> Self {
        let mut collect = CollectOutputs { path: Vec::new(), outputs: Vec::new() };
        let outputs = outputs.map_tensors(&mut collect).map(|_| collect.outputs);
        Self { outputs, ..self }
    }

    /// A plain mean becomes one over so many rows.
    pub(crate) fn over_rows(self, rows: usize) -> Self {
        match self.weight {
            Weight::Plain => Self { weight: Weight::Mean(rows as f64), ..self },
            _ => self,
        }
    }

    /// # Errors
    /// What went wrong with the outputs.
    pub(crate) fn into_parts(self) -> Result<LossParts, Error> {
        Ok(LossParts { value: self.value, weight: self.weight, outputs: self.outputs? })
    }
}

impl Weight {
    /// A number of items as a tensor of one element.
    pub(crate) fn tensor(items: f64, device: &Device) -> Tensor<1> {
        Tensor::from_data(TensorData::new(vec![items], [1]), (device, DType::F64))
    }
}

impl From<Tensor<1>> for Loss {
    fn from(value: Tensor<1>) -> Self {
        Self::new(value, Weight::Plain)
    }
}

impl<O: TensorTree> From<(Tensor<1>, O)> for Loss {
    fn from((value, outputs): (Tensor<1>, O)) -> Self {
        Self::from(value).with_outputs(outputs)
    }
}

impl<O: TensorTree> From<(Loss, O)> for Loss {
    fn from((loss, outputs): (Loss, O)) -> Self {
        loss.with_outputs(outputs)
    }
}

/// The number of items of a loss: a number, or a tensor of one element. It is not differentiated.
#[derive(Debug, Clone)]
pub struct Count(Counted);

#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there is one a micro-batch, taken apart at once")]
enum Counted {
    Known(f64),
    Tensor(Tensor<1>),
}

impl From<f64> for Count {
    fn from(items: f64) -> Self {
        Self(Counted::Known(items))
    }
}

impl From<usize> for Count {
    fn from(items: usize) -> Self {
        Self(Counted::Known(items as f64))
    }
}

impl From<Tensor<1>> for Count {
    fn from(items: Tensor<1>) -> Self {
        Self(Counted::Tensor(items))
    }
}

impl From<Tensor<1, Int>> for Count {
    fn from(items: Tensor<1, Int>) -> Self {
        Self(Counted::Tensor(items.float()))
    }
}

struct CollectOutputs {
    path: Vec<usize>,
    outputs: Vec<ExtraOutput>,
}

impl TensorMapper for CollectOutputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        self.outputs.push((crate::tensor::place(&self.path), tensor.clone()));
        Ok(tensor)
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }
}
