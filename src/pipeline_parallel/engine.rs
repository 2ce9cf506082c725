//! What steps, evaluation and stores need of a pipelined model, as of any other.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ParamId};
use burn::tensor::Device;

use super::pipelined::Pipelined;
use crate::Error;
use crate::comm::{Communicator, Counters};
use crate::distribution::ModelSplit;
use crate::graph::{
    CheckedOptimizers, ClipRecord, ComparedCall, GradientLayout, GradientSink, MicroBatchResult, RandomSource,
    SplitParam, StepEngine, TensorTree, read_params,
};
use crate::lock::lock;
use crate::nesting::refuse_wrapping;
use crate::params::{self, FoundParams, ParamSlice, SliceSource, one_device};
use crate::step::{StepCounters, StepFn, Weight};
use crate::tensor::PlainTensor;

impl<M: Module> StepEngine for Pipelined<M> {
    type Model = M;
    type Wrapped = Self;

    fn local(&self) -> &M {
        &self.local
    }

    fn into_wrapped(self) -> Self {
        self
    }

    fn share_ids(self, group: &Communicator) -> Result<Self, Error> {
        let (local, renamed) = params::share_ids(self.local, group)?;
        if !renamed.is_empty() {
            lock(&self.state).rename(&renamed);
        }
        Ok(Self { local, ..self })
    }

    fn is_settled(&self) -> bool {
        self.is_cut()
    }

    fn settle<I: TensorTree + Clone>(
        &mut self,
        inputs: I,
        step: StepFn<'_, M, I>,
        group: &Communicator,
    ) -> Result<(), Error> {
        // Replicas with other numbers of rows would balance their stages otherwise.
        if group.rank() == 0 {
            self.prepare_step(inputs, step)?;
            let homes = lock(&self.state).listed_homes();
            return params::share_text(&homes, group).map(|_| ());
        }
        let homes = params::share_text("", group)?;
        lock(&self.state).keep_to(&homes);
        self.prepare_step(inputs, step)
    }

    fn settle_alone<I: TensorTree + Clone>(&mut self, inputs: I, step: StepFn<'_, M, I>) -> Result<(), Error> {
        self.prepare_step(inputs, step)
    }

    /// Gradients come once the pipeline has drained.
    fn run<I: TensorTree + Clone>(
        &mut self,
        params: &mut FoundParams,
        inputs: I,
        step: StepFn<'_, M, I>,
        unit: Option<f64>,
        sink: &mut dyn GradientSink,
    ) -> Result<MicroBatchResult, Error> {
        let updates = self.checked_optimizers.updates();
        let comparison = self.same_inputs.start(ComparedCall::Step, &inputs, updates)?;
        let shards = lock(&self.state).row_shards.clone();
        let divisor = unit.unwrap_or(1.0);
        if let Some(shards) = &shards {
            shards.begin_micro_batch(unit, 1.0 / divisor)?;
        }
        let (run, outputs, gradients) = self.run_step(params, inputs, step)?;
        comparison.finish()?;
        if let Some(shards) = &shards {
            shards.end_micro_batch(&run.weights);
        }
        let factor = if shards.is_some() { 1.0 } else { 1.0 / divisor };
        sink.expect(&gradients.iter().map(|(id, _)| *id).collect::<Vec<_>>())?;
        sink.weight(run.loss.weight, divisor)?;
        for (id, gradient) in gradients {
            sink.gradient(id, gradient.scale(factor))?;
        }
        let sum = Weight::tensor(run.loss.sum, &Device::flex());
        Ok(MicroBatchResult { loss: Some((sum, 1.0)), outputs, run: Some(run.report) })
    }

    fn is_prepared(&self) -> bool {
        lock(&self.state).cut.is_some()
    }

    fn later_dims(&self, id: ParamId) -> Option<Vec<usize>> {
        lock(&self.state).part_dims(id)
    }

    /// Gradients are added up in the stages, whoever takes them then.
    fn step_memory<I: TensorTree + Clone>(
        &mut self,
        inputs: I,
        step: StepFn<'_, M, I>,
        _keeps: bool,
    ) -> Result<usize, Error> {
        self.peak_of_step(inputs, step)
    }

    fn complete(&mut self, gradients: &mut HashMap<ParamId, PlainTensor>) -> Result<(), Error> {
        let device = one_device(&self.local, "a step")?.unwrap_or_else(Device::flex);
        lock(&self.state).tied_params.sum_any(gradients, &device)
    }

    fn forward<I, F, O>(&self, inputs: I, forward: F) -> Result<O, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        let updates = self.checked_optimizers.updates();
        let comparison = self.same_inputs.start(ComparedCall::Forward, &inputs, updates)?;
        let outputs = self.run_forward(inputs, forward)?;
        comparison.finish()?;
        Ok(outputs)
    }

    fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error> {
        let local = lock(&self.state).load(self.local.clone(), source)?;
        Ok(Self { local, ..self })
    }

    fn assemble(&self) -> Result<M, Error> {
        let state = lock(&self.state);
        let local = match &state.row_shards {
            Some(shards) => shards.assemble(self.local.clone())?,
            None => self.local.clone(),
        };
        let whole = match state.homes() {
            // Every rank still has everything.
            None => local,
            Some(homes) => {
                let device = one_device(&local, "assemble")?.unwrap_or_else(Device::flex);
                let mut values = HashMap::new();
                for (row, home) in homes {
                    let own = match home == self.group.rank() {
                        true => read_params(&local, &[row.id].into())?.remove(&row.id),
                        false => None,
                    };
                    let nothing = || PlainTensor::zeros(row.dims.clone(), row.dtype, &device);
                    values.insert(row.id, self.group.broadcast(own.unwrap_or_else(nothing), home)?);
                }
                params::replace_values(local, values)
            }
        };
        match &state.split {
            Some(split) => split.assemble(&whole),
            None => Ok(whole),
        }
    }

    fn param_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
        lock(&self.state).param_slices()
    }

    fn held_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
        lock(&self.state).held_slices()
    }

    fn moments_restored(&self, params: &HashSet<ParamId>) {
        lock(&self.state).moments_restored(params);
    }

    fn random_step(&self) -> u64 {
        lock(&self.state).random.step()
    }

    fn set_random_step(&self, step: u64) {
        lock(&self.state).random.set_step(step);
    }

    fn random(&self) -> Option<RandomSource> {
        Some(lock(&self.state).random.clone())
    }

    fn counters(&self) -> StepCounters {
        let state = lock(&self.state);
        let split = state.split.iter().flat_map(ModelSplit::groups).map(|group| self.clipping.beside(group));
        let tensor = split.fold(Counters::default(), |sum, counters| sum + counters);
        let (pipeline, norm) = (state.sent.clone() + state.tied_params.counters(), self.clipping.counters());
        StepCounters { tensor, pipeline, norm, skipped: self.clipping.skipped(), ..StepCounters::default() }
    }

    /// A parameter that several stages hold counts on the rank of its own stage.
    fn gradient_layout(&self) -> GradientLayout {
        let groups = StepEngine::groups(self);
        let state = lock(&self.state);
        let mut elsewhere = state.split.as_ref().map(ModelSplit::counted_elsewhere).unwrap_or_default();
        let homes = state.homes().unwrap_or_default().into_iter();
        elsewhere.extend(homes.filter(|(_, home)| *home != state.group.rank()).map(|(row, _)| row.id));
        GradientLayout {
            groups,
            elsewhere,
            rank: state.group.world_rank(),
            clipping: self.clipping.clone(),
            ..GradientLayout::default()
        }
    }

    fn split_params(&self) -> Vec<SplitParam> {
        lock(&self.state).split.as_ref().map(ModelSplit::split_params).unwrap_or_default()
    }

    fn groups(&self) -> Vec<Communicator> {
        let state = lock(&self.state);
        state.split.iter().flat_map(ModelSplit::groups).chain([&state.group]).cloned().collect()
    }

    fn shares_between_stages(&self) -> bool {
        lock(&self.state).shares_between_stages()
    }

    fn trains(&self) -> bool {
        lock(&self.state).timetable.trains()
    }

    fn clipping(&self) -> &ClipRecord {
        &self.clipping
    }

    fn checked_optimizers(&self) -> &CheckedOptimizers {
        &self.checked_optimizers
    }
}

refuse_wrapping!(Pipelined: tensor_parallel, pipeline_parallel, parallelize);
