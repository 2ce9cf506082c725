//! The results of a step, and the observer that gets them while the step runs.

use std::collections::HashMap;

use burn::module::ParamId;
use burn::optim::GradientsParams;
use burn::prelude::*;

use super::graph_error;
use crate::Error;
use crate::tensor::PlainTensor;

/// What [`Executor::step`](super::Executor::step) gives.
#[derive(Debug)]
pub struct StepResult {
    /// The loss, one element, without autodiff. Of a [`Loss`](crate::step::Loss) over items, the mean over them.
    pub loss: Tensor<1>,
    /// The number of items of a [`Loss`](crate::step::Loss); 1 for a plain mean.
    pub weight: f64,
    /// The gradients of that loss, ready for burn's optimizers.
    pub gradients: GradientsParams,
    /// The extra outputs, in order.
    pub outputs: Vec<PlainTensor>,
}

/// What [`Executor::step_with`](super::Executor::step_with) gives: the gradients went to its callback.
#[derive(Debug)]
pub struct StepOutputs {
    /// The loss, one element, without autodiff. Of a [`Loss`](crate::step::Loss) over items, the sum, of which the
    /// gradients are.
    pub loss: Tensor<1>,
    /// The number of items of a [`Loss`](crate::step::Loss): what loss and gradients are still to be divided by, once
    /// they are added up over micro-batches and ranks. 1 for a plain mean.
    pub weight: f64,
    /// The extra outputs, in order.
    pub outputs: Vec<PlainTensor>,
}

/// Gets the results of a step while it runs.
pub trait StepObserver {
    /// Before anything runs: the parameters whose gradients will come, in no particular order.
    ///
    /// # Errors
    /// Whatever ends the step.
    fn expect(&mut self, _gradients: &[ParamId]) -> Result<(), Error> {
        Ok(())
    }

    /// The number of items of the loss, once; mostly before the first gradient, always if it follows from shapes or
    /// from the inputs alone. 1 for a plain mean.
    ///
    /// # Errors
    /// Whatever ends the step.
    fn weight(&mut self, _weight: f64) -> Result<(), Error> {
        Ok(())
    }

    /// A gradient, as told at [`Executor::step_with`](super::Executor::step_with).
    ///
    /// # Errors
    /// Whatever ends the step.
    fn gradient(&mut self, id: ParamId, gradient: PlainTensor) -> Result<(), Error>;
}

/// What a result means to whom it is given.
#[derive(Clone, Copy, Debug)]
pub(super) enum ResultRole {
    Loss,
    Weight,
    Gradient(ParamId),
    Update(ParamId),
    Output(usize),
}

/// The results of a run that stay with the caller.
pub(super) struct StepValues {
    pub loss: Option<PlainTensor>,
    pub weight: Option<f64>,
    pub outputs: Vec<PlainTensor>,
}

/// The results of a run as they come in.
pub(super) struct Results {
    pub loss: Option<PlainTensor>,
    pub weight: Option<f64>,
    pub outputs: Vec<Option<PlainTensor>>,
    pub updates: HashMap<ParamId, PlainTensor>,
    /// The number of items, if it follows from the shapes: reading it would wait for the device.
    pub known_weight: Option<f64>,
}

impl Results {
    pub fn take(&mut self, role: ResultRole, value: PlainTensor, observer: &mut dyn StepObserver) -> Result<(), Error> {
        match role {
            ResultRole::Loss => self.loss = Some(value),
            ResultRole::Weight => {
                let weight = match self.known_weight {
                    Some(weight) => weight,
                    None => value.float::<1>()?.into_scalar::<f64>(),
                };
                if !(weight.is_finite() && weight >= 0.0) {
                    let must = "it must be finite and not negative";
                    return Err(graph_error(format!("the number of items of the loss is {weight}, {must}")));
                }
                observer.weight(weight)?;
                self.weight = Some(weight);
            }
            ResultRole::Gradient(id) => observer.gradient(id, value)?,
            ResultRole::Update(id) => drop(self.updates.insert(id, value)),
            ResultRole::Output(index) => self.outputs[index] = Some(value),
        }
        Ok(())
    }
}
