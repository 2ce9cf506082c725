//! A training step of a pipelined model.

use std::collections::HashMap;

use burn::module::{Module, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::captured::CapturedStep;
use super::graph_stage::{GraphStage, accumulate};
use super::pipeline::{PipelineRun, RunReport};
use super::pipelined::lock;
use super::{Pipelined, Stage, stage_error};
use crate::Error;
use crate::graph::{GraphInputs, StepLoss, StepObserver, StepOutputs, gradients_params};
use crate::params::{one_device, sweep_leaves};
use crate::tensor::PlainTensor;

/// What [`Pipelined::step`] gives.
#[derive(Debug)]
pub struct Step {
    /// The mean loss over all items of the batch, on every rank.
    pub loss: f64,
    /// The number of items: what a [`TokenLoss`](crate::graph::TokenLoss) counts, else rows.
    pub weight: f64,
    /// The gradients of the parameters that this rank holds, for burn's optimizers.
    pub grads: GradientsParams,
    /// The extra outputs of the closure for each micro-batch, on the rank that computes them; empty on the others.
    pub outputs: Vec<Vec<PlainTensor>>,
    /// What it took on this rank.
    pub report: RunReport,
}

impl<M: Module> Pipelined<M> {
    /// Captures and cuts the step for inputs of these shapes, without running it: afterwards this rank holds its stages only.
    /// Collective: every rank passes inputs of the same shapes.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn prepare<I, F, R>(&mut self, inputs: I, mut loss: F) -> Result<(), Error>
    where
        I: GraphInputs + Clone,
        F: FnMut(&M, I) -> R,
        R: StepLoss,
    {
        let engine = self.engine.clone();
        let mut local = Some(self.local.clone());
        lock(&engine).prepare(&mut local, inputs, &mut loss)?;
        self.take(local)
    }

    /// Runs a training step on a batch: its rows are divided into micro-batches, which go through the stages as the schedule
    /// says.
    ///
    /// `loss` sees a micro-batch and the whole model. It is recorded when inputs of these shapes come for the first time, as
    /// [`graph`](crate::graph) tells, which also says what cannot be; later it is not called again. A bare `Tensor<1>` is
    /// taken for a mean over the rows of the micro-batch. Collective: every rank passes the whole batch.
    ///
    /// # Errors
    /// [`Error::Graph`] if the step cannot be recorded; [`Error::Plan`] if it cannot be cut as wanted; [`Error::Pipeline`] if
    /// the inputs cannot be divided; [`Error::Stage`] on all ranks, if a stage fails on one; those of
    /// [`Communicator`](crate::comm::Communicator).
    pub fn step<I, F, R>(&mut self, inputs: I, loss: F) -> Result<Step, Error>
    where
        I: GraphInputs + Clone,
        F: FnMut(&M, I) -> R,
        R: StepLoss,
    {
        let (run, outputs, mut gradients) = self.run(inputs, loss)?;
        let weight = run.loss.weight;
        // Of no items at all the loss is NaN, the gradients are those of nothing.
        if weight != 1.0 && weight > 0.0 {
            gradients = gradients.into_iter().map(|(id, sum)| (id, sum.scale(1.0 / weight))).collect();
        }
        let grads = gradients_params(&self.local, gradients.into_iter().collect());
        Ok(Step { loss: run.loss.sum / weight, weight, grads, outputs, report: self.last.clone().unwrap_or_default() })
    }

    /// As [`step`](Self::step), but hands weight and gradients to an observer when the pipeline has run. Gradients are those
    /// of the sum over all items.
    ///
    /// # Errors
    /// As [`step`](Self::step), and those of the observer.
    pub fn step_observed<I, F, R>(
        &mut self,
        inputs: I,
        loss: F,
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutputs, Error>
    where
        I: GraphInputs + Clone,
        F: FnMut(&M, I) -> R,
        R: StepLoss,
    {
        let (run, outputs, gradients) = self.run(inputs, loss)?;
        observer.expect(&gradients.iter().map(|(id, _)| *id).collect::<Vec<_>>())?;
        observer.weight(run.loss.weight)?;
        for (id, gradient) in gradients {
            observer.gradient(id, gradient)?;
        }
        let sum = TensorData::new(vec![run.loss.sum], [1]);
        Ok(StepOutputs {
            loss: Tensor::from_data(sum, (&Device::flex(), DType::F64)),
            weight: run.loss.weight,
            outputs: outputs.into_iter().flatten().collect(),
        })
    }

    /// Runs a step: what came of it, the outputs, and the gradients of the summed loss in the order of the module.
    #[allow(clippy::type_complexity)]
    fn run<I, F, R>(
        &mut self,
        inputs: I,
        mut loss: F,
    ) -> Result<(PipelineRun, Vec<Vec<PlainTensor>>, Vec<(ParamId, PlainTensor)>), Error>
    where
        I: GraphInputs + Clone,
        F: FnMut(&M, I) -> R,
        R: StepLoss,
    {
        let engine = self.engine.clone();
        let mut engine = lock(&engine);
        let engine = &mut *engine;
        let mut local = Some(self.local.clone());
        let (key, batch) = engine.prepare(&mut local, inputs, &mut loss)?;
        self.take(local)?;
        if let Some(settled) = engine.ties.settled(&self.local)? {
            self.local = settled;
        }
        engine.ties.settle();
        let inputs: Vec<Vec<PlainTensor>> =
            (0..engine.config.micro_batches).map(|micro_batch| batch.micro_batch(micro_batch)).collect();
        let Some(CapturedStep { pipeline, stages, trained }) = engine.steps.get_mut(&key) else {
            return Err(stage_error("the step was not captured"));
        };
        let first = engine.random.step();
        stages.iter_mut().for_each(|stage| stage.draw_from(&engine.random, first));
        let mut executed = bound(stages, &self.local, |stages| pipeline.step(stages, &inputs))?;
        engine.random.set_step(first + inputs.len() as u64);
        let mut gradients = HashMap::new();
        for stage in stages {
            for (id, gradient) in stage.unbind(&self.local) {
                accumulate(&mut gradients, id, gradient);
            }
        }
        let trained = trained.clone();
        if engine.timetable.trains() && !engine.ties.is_empty() {
            let device = one_device(&self.local, "a step")?.unwrap_or_else(Device::flex);
            engine.ties.sum(&mut gradients, &trained, &device)?;
        }
        let order = engine.gradients(&trained);
        let gradients = order.into_iter().filter_map(|id| Some((id, gradients.remove(&id)?))).collect();
        engine.sent = std::mem::take(&mut engine.sent) + executed.report.counters.clone();
        self.last = Some(executed.report.clone());
        let outputs = std::mem::take(&mut executed.outputs);
        let mut by_micro_batch = vec![Vec::new(); inputs.len()];
        for (unit, outputs) in outputs {
            by_micro_batch[unit.micro_batch].extend(outputs);
        }
        if by_micro_batch.iter().all(Vec::is_empty) {
            by_micro_batch.clear();
        }
        Ok((executed, by_micro_batch, gradients))
    }

    pub(super) fn take(&mut self, local: Option<M>) -> Result<(), Error> {
        self.local = local.ok_or_else(|| stage_error("the model was lost while it was cut"))?;
        Ok(())
    }
}

/// Runs stages with the parameters of `model`. After an error nothing of the step is left.
pub(super) fn bound<M: Module>(
    stages: &mut [GraphStage],
    model: &M,
    run: impl FnOnce(&mut [GraphStage]) -> Result<PipelineRun, Error>,
) -> Result<PipelineRun, Error> {
    sweep_leaves();
    let bound = GraphStage::bind(stages, model);
    bound.and_then(|()| run(stages)).inspect_err(|_| stages.iter_mut().for_each(GraphStage::discard))
}
