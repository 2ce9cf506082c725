//! What steps, evaluation and stores need of an eager model, as of any other.

use std::collections::{HashMap, HashSet};

use burn::backend::DispatchTensor;
use burn::module::{Module, ParamId};
use burn::tensor::Device;

use super::Eager;
use crate::Error;
use crate::comm::Communicator;
use crate::data_parallel::batch_norm::SyncBatchNorm;
use crate::data_parallel::gathered::{OnDeviceOf, assemble, checked_params, meta_whole, shards_of};
use crate::data_parallel::hook::detach;
use crate::graph::{
    CheckedOptimizers, ClipRecord, CustomOps, Executor, GradientLayout, GradientSink, MicroBatchResult, SplitParam,
    StepEngine, capture_step,
};
use crate::params::{self, FoundParams, ParamSlice, ShardedIds, SliceSource};
use crate::sharding::Rows;
use crate::step::{StepCounters, StepFn};
use crate::tensor::{PlainTensor, TensorMapper, TensorTree, rows_of_step};

impl<M: Module> StepEngine for Eager<M> {
    type Model = M;
    type Wrapped = M;

    fn local(&self) -> &M {
        &self.module
    }

    fn into_wrapped(self) -> M {
        detach(self.module)
    }

    fn share_ids(self, group: &Communicator) -> Result<Self, Error> {
        self.change(|module| params::share_ids(module, group).map(|(module, _)| module))
    }

    fn run<I: TensorTree + Clone>(
        &mut self,
        params: &mut FoundParams,
        inputs: I,
        mut step: StepFn<'_, M, I>,
        unit: Option<f64>,
        sink: &mut dyn GradientSink,
    ) -> Result<MicroBatchResult, Error> {
        let (inputs, rows) = rows_of_step(inputs)?;
        let inputs = inputs.map_tensors(&mut OnDeviceOf::params(params))?;
        let loss = self.forward_gathering(Some(params), || step.call(&self.module, inputs))?;
        self.backward(params, loss, rows, unit, sink)
    }

    /// That of the captured step operation by operation, which frees as early as can be: eager steps fuse nothing.
    fn step_memory<I: TensorTree + Clone>(
        &mut self,
        inputs: I,
        mut step: StepFn<'_, M, I>,
        keeps: bool,
    ) -> Result<usize, Error> {
        let module = match &self.gatherer {
            Some(gatherer) => meta_whole(&self.module, gatherer),
            None => self.module.clone(),
        };
        let whole = params::meta_module(&module, &|_, _| None);
        let graph = capture_step(&whole, inputs, |model: &M, inputs| step.call(model, inputs))?;
        let executor = Executor::new(graph, CustomOps::new().with_fusion(false))?;
        Ok(executor.memory_on(&Device::flex(), keeps))
    }

    fn forward<I, F, O>(&self, inputs: I, mut forward: F) -> Result<O, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        let inputs = inputs.map_tensors(&mut Detach)?;
        let outputs = self.forward_gathering(None, || forward(&self.module.valid(), inputs))?;
        if let Some(gatherer) = &self.gatherer {
            gatherer.end_pass();
            gatherer.end_gathers()?;
        }
        outputs.map_tensors(&mut Detach)
    }

    /// Fails the world if rows are not there as they should be.
    fn find_params(&self) -> Result<FoundParams, Error> {
        match &self.gatherer {
            None => Ok(FoundParams::of(&self.module)),
            Some(gatherer) => {
                checked_params(&self.module, gatherer).inspect_err(|error| self.control.fail(error.clone()))
            }
        }
    }

    fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error> {
        self.find_params()?;
        let slices = self.param_slices()?;
        let loaded = self.change(|module| params::load(module, source, &|id| slices.get(&id).cloned()))?;
        loaded.rows_changed();
        Ok(loaded)
    }

    fn assemble(&self) -> Result<M, Error> {
        let Some(gatherer) = &self.gatherer else { return Ok(self.module.clone()) };
        let params = self.find_params()?;
        self.end_gathers(&params)?;
        gatherer.set_shards(shards_of(&params, gatherer));
        assemble(&self.module, gatherer)
    }

    fn param_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
        let dims = params::dims_of(&self.module).into_iter();
        let whole = |(id, dims)| (id, ParamSlice::whole(dims));
        let Some(gatherer) = &self.gatherer else { return Ok(dims.map(whole).collect()) };
        let (stand_ins, rank) = (ShardedIds::of(&self.module).stand_ins, gatherer.comms().rank());
        let held = |(id, dims): (ParamId, Vec<usize>)| match gatherer.rows(id) {
            Some(rows) => (id, rows.held(rank)),
            None => whole((id, dims)),
        };
        Ok(dims.filter(|(id, _)| !stand_ins.contains(id)).map(held).collect())
    }

    fn counters(&self) -> StepCounters {
        let statistics = self.synchronized().as_ref().map(SyncBatchNorm::counters).unwrap_or_default();
        let waited = self.gatherer.as_ref().map(|gatherer| gatherer.waited()).unwrap_or_default();
        let control = self.gatherer.as_ref().map(|gatherer| gatherer.wants_counters()).unwrap_or_default();
        let (norm, skipped) = (self.clipping.counters(), self.clipping.skipped());
        StepCounters { statistics, control, norm, skipped, waited, ..StepCounters::default() }
    }

    fn split_params(&self) -> Vec<SplitParam> {
        Vec::new()
    }

    fn groups(&self) -> Vec<Communicator> {
        Vec::new()
    }

    fn gradient_layout(&self) -> GradientLayout {
        GradientLayout { rank: self.control.world_rank(), clipping: self.clipping.clone(), ..GradientLayout::default() }
    }

    fn clipping(&self) -> &ClipRecord {
        &self.clipping
    }

    fn checked_optimizers(&self) -> &CheckedOptimizers {
        &self.checked_optimizers
    }

    fn shard_rows(&self, id: ParamId) -> Option<Rows> {
        self.gatherer.as_ref()?.rows(id).cloned()
    }

    fn stand_ins(&self) -> Option<&HashSet<ParamId>> {
        self.gatherer.as_ref()?.stand_ins()
    }

    fn rows_changed(&self) {
        if let Some(gatherer) = &self.gatherer {
            gatherer.set_shards(shards_of(&FoundParams::of(&self.module), gatherer));
        }
    }

    fn rows_are_out(&self, params: &[ParamId]) {
        self.gatherer.iter().for_each(|gatherer| gatherer.forget_shards(params));
    }

    fn rows_are_back(&self, rows: &HashMap<ParamId, PlainTensor>) {
        self.gatherer.iter().for_each(|gatherer| gatherer.set_shards(rows.clone()));
    }

    fn begin_uneven(&self, leader: usize) {
        if let Some(gatherer) = &self.gatherer {
            gatherer.begin_uneven(leader);
        }
    }

    fn end_uneven(&self) -> Result<(), Error> {
        self.gatherer.as_ref().map_or(Ok(()), |gatherer| gatherer.end_uneven())
    }

    fn end_gathers(&self, params: &FoundParams) -> Result<(), Error> {
        let Some(gatherer) = self.gatherer.as_ref().filter(|gatherer| gatherer.says_what_it_wants()) else {
            return Ok(());
        };
        gatherer.set_shards(shards_of(params, gatherer));
        gatherer.end_gathers()
    }

    fn follow(&self, params: &FoundParams, leader: usize) -> Result<(), Error> {
        let Some(gatherer) = &self.gatherer else { return Ok(()) };
        gatherer.set_shards(shards_of(params, gatherer));
        gatherer.follow(leader)
    }
}

/// Takes tensors off their tape: evaluation differentiates nothing.
struct Detach;

impl TensorMapper for Detach {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        PlainTensor::of(tensor, "a tensor of an evaluation").map(PlainTensor::into_dispatch)
    }

    fn enter(&mut self, _: usize) {}

    fn exit(&mut self) {}
}
