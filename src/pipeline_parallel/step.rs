//! Runs a training step of a pipelined model.

use std::collections::HashMap;

use burn::module::{Module, ParamId};
use burn::tensor::Device;

use super::by_rows::exchanges;
use super::captured_step::CapturedStep;
use super::graph_stage::{GraphStage, accumulate};
use super::memory::peak;
use super::pipeline::PipelineRun;
use super::{Pipelined, Stage, stage_error};
use crate::Error;
use crate::distribution::RowShards;
use crate::graph::{StepParams, TensorTree};
use crate::lock::lock;
use crate::params::{FoundParams, one_device, sweep_leaves};
use crate::step::{Loss, StepFn};
use crate::tensor::PlainTensor;

impl<M: Module> Pipelined<M> {
    /// Captures and cuts the step for inputs of these shapes, without running it: afterwards this rank holds its stages
    /// only. Collective: every rank passes inputs of the same shapes.
    ///
    /// # Errors
    /// [`Error::Graph`] if the step cannot be recorded; [`Error::Plan`] if it cannot be cut as wanted;
    /// [`Error::Pipeline`] if the inputs cannot be divided; those of [`Communicator`](crate::comm::Communicator).
    pub fn prepare<I, F, R>(&mut self, inputs: I, mut loss: F) -> Result<(), Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> R,
        R: Into<Loss>,
    {
        let mut call = |model: &M, inputs: I| loss(model, inputs).into();
        self.prepare_step(inputs, StepFn::new::<F>(&mut call))
    }

    pub(super) fn prepare_step<I: TensorTree + Clone>(
        &mut self,
        inputs: I,
        step: StepFn<'_, M, I>,
    ) -> Result<(), Error> {
        let state = self.state.clone();
        let mut local = Some(self.local.clone());
        lock(&state).prepare(&mut local, &mut FoundParams::of(&self.local), inputs, step)?;
        self.take(local)
    }

    /// The most bytes that a step of such inputs has alive on this rank.
    pub(super) fn peak_of_step<I: TensorTree + Clone>(
        &mut self,
        inputs: I,
        step: StepFn<'_, M, I>,
    ) -> Result<usize, Error> {
        let state = self.state.clone();
        let mut state = lock(&state);
        let mut local = Some(self.local.clone());
        let (key, _) = state.prepare(&mut local, &mut FoundParams::of(&self.local), inputs, step)?;
        self.take(local)?;
        let rank = state.group.rank();
        let Some(CapturedStep { pipeline, stages, .. }) = state.steps.get_mut(&key) else {
            return Err(stage_error("the step was not captured"));
        };
        let device = one_device(&self.local, "the memory of a step")?.unwrap_or_else(Device::flex);
        Ok(peak(stages, &pipeline.timetable().rows()[rank], &device))
    }

    /// Runs a step. Returns its result, the outputs, and the gradients of the summed loss in the order of the module.
    #[allow(clippy::type_complexity)]
    pub(super) fn run_step<I: TensorTree + Clone>(
        &mut self,
        params: &mut FoundParams,
        inputs: I,
        step: StepFn<'_, M, I>,
    ) -> Result<(PipelineRun, Vec<Vec<PlainTensor>>, Vec<(ParamId, PlainTensor)>), Error> {
        let state = self.state.clone();
        let mut state = lock(&state);
        let state = &mut *state;
        let mut local = Some(self.local.clone());
        let (key, batch) = state.prepare(&mut local, params, inputs, step)?;
        self.take(local)?;
        if let Some(settled) = state.tied_params.settled(&self.local)? {
            self.local = settled;
            *params = FoundParams::of(&self.local);
        }
        state.tied_params.settle();
        let inputs: Vec<Vec<PlainTensor>> =
            (0..state.config.micro_batches).map(|micro_batch| batch.micro_batch(micro_batch)).collect();
        let Some(CapturedStep { pipeline, stages, trained }) = state.steps.get_mut(&key) else {
            return Err(stage_error("the step was not captured"));
        };
        let start = state.random.start();
        let rows: Vec<_> = (0..inputs.len()).map(|micro_batch| batch.rows(micro_batch)).collect();
        stages.iter_mut().for_each(|stage| stage.draw_from(&state.random, start, rows.clone()));
        if let Some(shards) = &state.row_shards {
            let own = exchanges(stages, &pipeline.timetable().rows()[state.group.rank()]);
            shards.agree(&self.local, Some(params), &own)?;
        }
        let whole = state.row_shards.as_ref().map_or(Ok(None), |shards| shards.whole(&self.local, Some(params)))?;
        let given = StepParams { found: Some(params), whole: whole.as_ref() };
        let mut executed = bound(stages, &self.local, given, |stages| pipeline.step(stages, &inputs))?;
        state.random.go_to(start, inputs.len(), rows.last().map_or(0, |last| last.end));
        if stages.iter().any(GraphStage::moves_statistics) {
            params.statistics_move();
        }
        let mut gradients = HashMap::new();
        for stage in stages {
            for (id, gradient) in stage.unbind(&self.local) {
                accumulate(&mut gradients, id, gradient);
            }
        }
        let mut trained = trained.clone();
        for (id, sum) in state.row_shards.as_ref().map_or(Ok(Vec::new()), RowShards::end_lending)? {
            accumulate(&mut gradients, id, sum);
        }
        if state.timetable.trains() && !state.tied_params.is_empty() {
            let device = params.one_device(&self.local, "a step")?.unwrap_or_else(Device::flex);
            match state.row_shards {
                Some(_) => state.tied_params.sum_any(&mut gradients, &device)?,
                None => state.tied_params.sum(&mut gradients, &trained, &device)?,
            }
        }
        trained.extend(gradients.keys().copied());
        let order = state.gradients(&trained);
        let gradients = order.into_iter().filter_map(|id| Some((id, gradients.remove(&id)?))).collect();
        state.sent = std::mem::take(&mut state.sent) + executed.report.counters.clone();
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

/// Runs stages with the parameters of `model`, with what is known of them. After an error nothing of the step is left.
pub(super) fn bound<M: Module>(
    stages: &mut [GraphStage],
    model: &M,
    params: StepParams<'_>,
    run: impl FnOnce(&mut [GraphStage]) -> Result<PipelineRun, Error>,
) -> Result<PipelineRun, Error> {
    sweep_leaves();
    let bound = GraphStage::bind(stages, model, params);
    bound.and_then(|()| run(stages)).inspect_err(|_| stages.iter_mut().for_each(GraphStage::discard))
}
