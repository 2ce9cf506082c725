//! The eager engine: a whole model on every rank, run by its own forward.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard};

use burn::backend::DispatchTensor;
use burn::module::{Module, ParamId};
use burn::tensor::{Device, Tensor};

use super::batch_norm::SyncBatchNorm;
use super::gathered::{
    Gatherer, OnDeviceOf, assemble, checked_params, is_of_two_devices, meta_whole, of_two_devices, shards_of,
};
use super::hook::{HookGroup, detach, listening};
use super::reducer::Reducer;
use crate::Error;
use crate::comm::Communicator;
use crate::delegate::module_of_field;
use crate::error::{catch_quietly, is_thrown};
use crate::graph::{
    CheckedOptimizers, ClipRecord, CustomOps, Executor, GradientLayout, GradientSink, MicroBatchResult, SplitParam,
    StepEngine, capture_step,
};
use crate::lock::lock;
use crate::params::{self, FoundParams, ParamSlice, ShardedIds, SliceSource};
use crate::sharding::Rows;
use crate::step::{Loss, LossParts, StepCounters, StepFn, Weight};
use crate::tensor::{PlainTensor, TensorMapper, TensorTree, rows};

/// A model that every rank of a group of replicas holds whole, or its rows of every parameter. Its own eager `forward`
/// computes, so shapes and decisions may change from step to step, and hooks at the parameters deliver gradients while
/// backward runs. Dereferences to the model.
#[derive(Clone)]
pub struct Eager<M> {
    module: M,
    /// What gathers the parameters, if each rank holds its rows of them.
    gatherer: Option<Arc<Gatherer>>,
    hooks: HookGroup,
    /// To tell the others of a loss that cannot be.
    control: Communicator,
    /// The captured steps with synchronised batch norm, once there are any.
    synchronized: Arc<Mutex<Option<SyncBatchNorm>>>,
    clipping: ClipRecord,
    checked_optimizers: CheckedOptimizers,
}

impl<M: Module> Eager<M> {
    pub(super) fn new(module: M, gatherer: Option<Arc<Gatherer>>, hooks: HookGroup, control: Communicator) -> Self {
        Self {
            module,
            gatherer,
            hooks,
            control,
            synchronized: Arc::default(),
            clipping: ClipRecord::default(),
            checked_optimizers: CheckedOptimizers::default(),
        }
    }

    /// Backward of a micro-batch whose inputs have this many rows.
    pub(super) fn backward(
        &self,
        params: &FoundParams,
        loss: Loss,
        rows: Option<usize>,
        unit: Option<f64>,
        sink: &mut dyn GradientSink,
    ) -> Result<MicroBatchResult, Error> {
        let LossParts { value, weight, outputs } = loss.into_parts()?;
        let elements = value.dims()[0];
        if elements != 1 {
            let problem =
                format!("it must have one element, but it has {elements}: reduce it with `.mean()` or `.sum()`");
            return Err(self.refuse(problem));
        }
        let (weight, summed) = match weight {
            Weight::Plain => (rows.unwrap_or(1) as f64, false),
            Weight::Mean(items) => (items, false),
            Weight::Sum(items) => (items, true),
            Weight::Counted(items) if items.dims() != [1] => {
                let elements = items.dims()[0];
                let problem = format!("its number of items must have one element, but it has {elements}: reduce it");
                return Err(self.refuse(problem));
            }
            Weight::Counted(items) => (items.into_scalar::<f64>(), true),
        };
        if !weight.is_finite() || weight < 0.0 {
            let problem = format!("its weight is {weight}, it must be finite and not negative");
            return Err(self.refuse(problem));
        }
        if weight > 0.0 && !value.is_tracked() {
            let problem = "it depends on no parameter that is trained: was its model made on a device without autodiff (`fork` keeps what it was \
                           made with: make it on `device.autodiff()`), or is every parameter frozen?";
            return Err(self.refuse(problem.into()));
        }
        let outputs = outputs.into_iter().map(|(path, output)| PlainTensor::of(output, &format!("output `{path}`")));
        let outputs = vec![outputs.collect::<Result<Vec<_>, _>>()?];
        let unit = unit.unwrap_or(weight);
        sink.weight(weight, unit)?;
        if weight == 0.0 {
            if let Some(gatherer) = &self.gatherer {
                // For the gathers of the others; nobody listens to its gradients. One that depends on no parameter has
                // none: then the end of the micro-batch gathers what its forward has used.
                gatherer.begin_backward();
                if value.is_tracked() {
                    drop(value.backward());
                }
                self.end_micro_batch()?;
            }
            return Ok(MicroBatchResult { loss: None, outputs, run: None });
        }
        let loss = Some((value.clone().inner(), if summed { 1.0 } else { weight }));
        let factor = if summed { 1.0 / unit } else { weight / unit };
        let scaled = if factor == 1.0 { value } else { value.mul_scalar(factor) };
        self.gatherer.iter().for_each(|gatherer| gatherer.begin_backward());
        let mut grads = listening(self.hooks, || scaled.backward());
        self.end_micro_batch()?;
        // Some stayed with burn: of parameters without a hook, or on a device that is not known here.
        for param in params.floats() {
            if let Some(gradient) = param.take_gradient(&mut grads) {
                sink.gradient(param.id(), gradient)?;
            }
        }
        Ok(MicroBatchResult { loss, outputs, run: None })
    }

    /// Ends the backward of a micro-batch, and drops the parameters that were gathered for it.
    ///
    /// # Errors
    /// What went wrong in the middle of it, from where no error can be returned; those of gathers that others need.
    fn end_micro_batch(&self) -> Result<(), Error> {
        let Some(gatherer) = &self.gatherer else { return Ok(()) };
        let ended = gatherer.end_backward();
        gatherer.end_micro_batch();
        ended
    }

    /// Runs a forward of the model, whose parameters may have to be gathered: those that were found, if they were.
    ///
    /// # Errors
    /// What went wrong with that, for which a forward has no way out but to panic.
    fn forward_gathering<T>(&self, params: Option<&FoundParams>, forward: impl FnOnce() -> T) -> Result<T, Error> {
        let Some(gatherer) = &self.gatherer else { return Ok(forward()) };
        gatherer.set_shards(match params {
            Some(params) => shards_of(params, gatherer),
            None => shards_of(&self.find_params()?, gatherer),
        });
        let is_quiet = |said: &str| is_thrown(said) || is_of_two_devices(said);
        catch_quietly(is_quiet, forward).map_err(|panic| match (gatherer.failure(), of_two_devices(&*panic)) {
            (Some(error), _) => error,
            // The others wait for what the rest of this forward would gather.
            (None, Some(error)) => self.fail(error),
            (None, None) => resume_unwind(panic),
        })
    }

    /// What gathers the parameters, if each rank holds its rows of them.
    pub(super) fn gathers(&self) -> bool {
        self.gatherer.is_some()
    }

    /// Fails the world because of a loss that this rank was given.
    fn refuse(&self, problem: String) -> Error {
        self.fail(Error::invalid("Loss", problem))
    }

    fn fail(&self, error: Error) -> Error {
        self.control.fail(error.clone());
        error
    }

    /// Runs micro-batches with synchronised batch norm. Returns their losses, each with its factor.
    pub(super) fn run_sync_batch_norm<I: TensorTree + Clone>(
        &self,
        reducer: &Reducer,
        params: &FoundParams,
        micro_batches: Vec<(I, f64)>,
        forward: impl FnMut(&M, I) -> Tensor<1>,
    ) -> Result<Vec<(Tensor<1>, f64)>, Error> {
        let mut synchronized = self.synchronized();
        let steps = match &mut *synchronized {
            Some(steps) => steps,
            none => none.insert(SyncBatchNorm::new(reducer.data())?),
        };
        steps.run(&self.module, reducer, params, micro_batches, forward)
    }

    pub(super) fn synchronized(&self) -> MutexGuard<'_, Option<SyncBatchNorm>> {
        lock(&self.synchronized)
    }

    pub(super) fn change(self, change: impl FnOnce(M) -> Result<M, Error>) -> Result<Self, Error> {
        Ok(Self { module: change(self.module)?, ..self })
    }
}

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
        let (inputs, rows) = rows(inputs)?;
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

impl<M> Deref for Eager<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.module
    }
}

impl<M> DerefMut for Eager<M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.module
    }
}

impl<M: fmt::Debug> fmt::Debug for Eager<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.module.fmt(f)
    }
}

module_of_field!(Eager<M: Module>, module);
