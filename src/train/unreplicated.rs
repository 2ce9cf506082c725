//! Runs the steps of a model that has no replicas.

use std::collections::HashMap;

use burn::module::ParamId;

use crate::Error;
use crate::graph::{GradientSink, StepEngine, TensorTree, found_gradients};
use crate::step::{LossValue, NoNoise, NoiseState, Step, StepFn};
use crate::tensor::PlainTensor;

/// The gradients of the micro-batches of a step, added up.
#[derive(Default)]
struct GradientSum {
    gradients: HashMap<ParamId, PlainTensor>,
    weight: f64,
    unit: f64,
}

impl GradientSink for GradientSum {
    fn expect(&mut self, _: &[ParamId]) -> Result<(), Error> {
        Ok(())
    }

    fn weight(&mut self, weight: f64, unit: f64) -> Result<(), Error> {
        if self.unit == 0.0 && weight > 0.0 {
            self.unit = unit;
        }
        self.weight += weight;
        Ok(())
    }

    fn gradient(&mut self, id: ParamId, gradient: PlainTensor) -> Result<(), Error> {
        let sum = match self.gradients.remove(&id) {
            Some(sum) => sum.add(gradient),
            None => gradient,
        };
        self.gradients.insert(id, sum);
        Ok(())
    }
}

/// Runs a step on the micro-batches.
pub(super) fn step<E: StepEngine, I: TensorTree + Clone>(
    engine: &mut E,
    micro_batches: impl IntoIterator<Item = I>,
    mut step: StepFn<'_, E::Model, I>,
) -> Result<Step, Error> {
    let before = engine.counters();
    let mut params = engine.find_params()?;
    let mut sum = GradientSum::default();
    let (mut losses, mut outputs, mut runs) = (Vec::new(), Vec::new(), Vec::new());
    for inputs in micro_batches {
        let unit = (sum.unit > 0.0).then_some(sum.unit);
        let gave = engine.run(&mut params, inputs, step.again(), unit, &mut sum)?;
        losses.extend(gave.loss);
        outputs.extend(gave.outputs);
        runs.extend(gave.run);
    }
    let GradientSum { gradients, weight, unit } = sum;
    // Of no items at all the loss is NaN, the gradients are those of nothing.
    let factor = if weight > 0.0 { unit / weight } else { 1.0 };
    let gradients = gradients.into_iter().map(|(id, gradient)| (id, gradient.scale(factor))).collect();
    let grads = found_gradients(&params, gradients);
    let (loss, noise) = (LossValue::mean(losses, weight), NoiseState::None(NoNoise::NoReplicas));
    let counters = engine.counters() - before;
    Ok(Step { outputs, counters, runs, ..Step::new(loss, weight, grads, noise) })
}
