//! A tensor-parallel model: each rank holds a part, and trains it through a captured step.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use burn::module::{Module, ParamId};
use burn::tensor::Device;

use super::TensorParallelConfig;
use crate::Error;
use crate::comm::{Communicator, Counters};
use crate::delegate::module_of_field;
use crate::distribution::{ModelSplit, RowShards};
use crate::graph::{
    CheckedOptimizers, ClipRecord, ComparedCall, CustomOps, GRAPHS, GradientLayout, GradientSink, GraphCache,
    MicroBatchResult, RandomSource, SameInputs, ScaledGradients, SplitParam, StepEngine, StepGraph, StepObserver,
    StepParams,
};
use crate::lock::lock;
use crate::nesting::{self, refuse_wrapping};
use crate::params::{self, FoundParams, ParamSlice, SliceSource, one_device};
use crate::partition::{Exchange, ShardReport};
use crate::plan::PlanTable;
use crate::step::{StepCounters, StepFn};
use crate::tensor::{TensorTree, rows, rows_of_step};

/// A model split over a group: a burn [`Module`] with the paths and ids of the model and this rank's parts of its
/// parameters, so optimizers, records and visitors take it as they take the model. Its own `forward` makes no sense on
/// parts; [`ParallelModule::step`](crate::train::ParallelModule::step) runs it.
///
/// A record of another run is loaded into the model before it is wrapped: the parameters take the ids of the record
/// then, by which optimizers know them. [`load`](crate::train::ParallelModule::load) reads values alone.
///
/// Element-wise optimizers as AdamW train exactly as on one device. Those whose update is not element by element (Muon,
/// LAMB, burn's clipping of each gradient by its norm) would see parts only in burn's own `step`;
/// [`optimize`](crate::train::ParallelModule::optimize) gives them the whole.
/// [`Step::clip_grad_norm`](crate::step::Step::clip_grad_norm) clips by the norm over all parts.
#[derive(Clone)]
pub struct Sharded<M> {
    local: M,
    pub(super) split: ModelSplit,
    same_inputs: SameInputs,
    state: Arc<Mutex<ShardedState>>,
    clipping: ClipRecord,
    checked_optimizers: CheckedOptimizers,
}

struct ShardedState {
    graphs: GraphCache,
    reports: Arc<Mutex<Vec<ShardReport>>>,
}

impl ShardedState {
    fn of(split: &ModelSplit, graphs: usize) -> Self {
        let reports = Arc::<Mutex<Vec<ShardReport>>>::default();
        let mut ops = CustomOps::new().with_fusion(split.fusion());
        split.register(&mut ops);
        let pass = {
            let (split, reports) = (split.clone(), reports.clone());
            move |graph: &mut StepGraph| {
                let mut found = split.apply(graph)?;
                split.schedule(graph, &mut found);
                *lock(&reports) = found;
                Ok(())
            }
        };
        Self { graphs: GraphCache::new(ops, pass).with_most(graphs), reports }
    }
}

impl<M: Module> Sharded<M> {
    pub(super) fn new(model: M, axes: &[(&str, &Communicator)], config: TensorParallelConfig) -> Result<Self, Error> {
        nesting::check(&model, "tensor_parallel")?;
        let TensorParallelConfig { plan, seed, check_inputs_every, fusion } = config;
        let (local, split) = ModelSplit::distribute(model, axes, &plan)?;
        let split = split.with_seed(seed).with_fusion(fusion);
        let same_inputs = SameInputs::new(split.groups(), check_inputs_every)?;
        let state = Arc::new(Mutex::new(ShardedState::of(&split, GRAPHS)));
        Ok(Self {
            local,
            state,
            split,
            same_inputs,
            clipping: ClipRecord::default(),
            checked_optimizers: CheckedOptimizers::default(),
        })
    }

    /// Sets the seed of the random numbers that steps draw, dropout above all: the same on every rank of the split,
    /// which then draw what one device would. That of the [`TensorParallelConfig`] by default. Forgets the captured
    /// steps, not the [number](Self::random_step) of the step.
    pub fn with_seed(self, seed: u64) -> Self {
        let split = self.split.clone().with_seed(seed);
        self.with_split(split)
    }

    /// This model with another split of the same parts.
    fn with_split(self, split: ModelSplit) -> Self {
        let graphs = lock(&self.state).graphs.most();
        Self { state: Arc::new(Mutex::new(ShardedState::of(&split, graphs))), split, ..self }
    }

    /// Sets how many captured steps, and as many forwards, are kept: those used last, and at least one, the same on
    /// every rank of the split. 16 by default; a batch of other shapes than these is captured anew. Forgets the
    /// captured steps.
    pub fn with_graphs(self, graphs: usize) -> Self {
        Self { state: Arc::new(Mutex::new(ShardedState::of(&self.split, graphs))), ..self }
    }

    /// How many captured steps and forwards there are.
    pub fn graphs(&self) -> usize {
        lock(&self.state).graphs.len()
    }

    /// The seed of the random numbers that steps draw.
    pub fn seed(&self) -> u64 {
        self.split.random().seed()
    }

    /// The number of the step whose random numbers are drawn next: how many steps this model has made. Part of a
    /// checkpoint, with the [seed](Self::seed).
    pub fn random_step(&self) -> u64 {
        self.split.random().step()
    }

    /// Has the next step draw the random numbers of step number `step`: when training goes on from a checkpoint, or
    /// with a model that is wrapped anew, as after [`assemble`](crate::train::ParallelModule::assemble), which then
    /// draws what it would have drawn. The same on every rank; shared by all clones.
    pub fn set_random_step(&self, step: u64) {
        self.split.random().set_step(step);
    }

    /// This rank's part of the model, and how it was split: for engines of other strategies.
    pub(crate) fn into_parts(self) -> (M, ModelSplit, SameInputs) {
        (self.local, self.split, self.same_inputs)
    }

    /// Has steps draw the random numbers of replica number `replica` of this model.
    pub(crate) fn draw_as(&self, replica: usize) {
        self.split.random().set_replica(replica as u64);
    }

    /// This model with the rows of its parts that `shards` leaves to this rank.
    ///
    /// # Errors
    /// Those of [`RowShards::distribute`].
    pub(crate) fn divided(self, shards: RowShards) -> Result<Self, Error> {
        let local = shards.distribute(self.local)?;
        let split = self.split.clone().with_shards(shards);
        Ok(Self { local, ..self }.with_split(split))
    }

    /// How the model was split.
    pub(crate) fn split(&self) -> &ModelSplit {
        &self.split
    }

    /// This rank's part of the model.
    pub fn local(&self) -> &M {
        &self.local
    }

    /// What the last captured step was given, for each axis.
    pub(crate) fn shard_reports(&self) -> Vec<ShardReport> {
        lock(&lock(&self.state).reports).clone()
    }

    /// Every parameter with its layout.
    pub fn table(&self) -> &PlanTable {
        self.split.table()
    }
}

impl<M: Module> StepEngine for Sharded<M> {
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
        if renamed.is_empty() {
            return Ok(Self { local, ..self });
        }
        let split = self.split.renamed(&renamed);
        Ok(Self { local, ..self }.with_split(split))
    }

    fn run<I: TensorTree + Clone>(
        &mut self,
        params: &mut FoundParams,
        inputs: I,
        step: StepFn<'_, M, I>,
        unit: Option<f64>,
        sink: &mut dyn GradientSink,
    ) -> Result<MicroBatchResult, Error> {
        let (inputs, rows) = rows_of_step(inputs)?;
        let signature = self.split.of_step(&self.local, params)?;
        let updates = self.checked_optimizers.updates();
        let comparison = self.same_inputs.start(ComparedCall::Step, &inputs, updates)?;
        let mut state = lock(&self.state);
        let captured = Cell::new(false);
        let whole = || {
            captured.set(true);
            self.split.meta_module(&self.local)
        };
        let executor = state.graphs.executor_of(signature, &inputs, step, whole)?;
        if captured.get() {
            // A capture brings running statistics up to date.
            *params = FoundParams::of(&self.local);
        }
        let all_rows = rows.unwrap_or(1);
        self.split.random().set_rows(all_rows);
        let rows = executor.graph().weight.is_none().then_some(rows.unwrap_or(1) as f64);
        let mut units = ScaledGradients::new(rows, unit, sink);
        if let Some(shards) = self.split.shards() {
            shards.begin_micro_batch(unit, units.take_factor())?;
            shards.agree(&self.local, Some(params), &[executor.operations().filter_map(Exchange::of).collect()])?;
        }
        let whole = self.split.shards().map_or(Ok(None), |shards| shards.whole(&self.local, Some(params)))?;
        let given = StepParams { found: Some(params), whole: whole.as_ref() };
        let step = executor.step_given(&self.local, given, inputs, &mut units)?;
        if executor.moves_statistics() {
            params.statistics_move();
        }
        comparison.finish()?;
        if let Some(shards) = self.split.shards() {
            for (id, sum) in shards.end_lending()? {
                units.gradient(id, sum)?;
            }
            shards.end_micro_batch(&[units.items(&step)]);
        }
        self.split.random().advance_rows(all_rows);
        Ok(MicroBatchResult { loss: Some(units.loss(&step)), outputs: vec![step.outputs], run: None })
    }

    fn step_memory<I: TensorTree + Clone>(
        &mut self,
        inputs: I,
        step: StepFn<'_, M, I>,
        keeps: bool,
    ) -> Result<usize, Error> {
        let signature = self.split.of_step(&self.local, &FoundParams::of(&self.local))?;
        let (inputs, _) = rows(inputs)?;
        let whole = || self.split.meta_module(&self.local);
        let mut state = lock(&self.state);
        let executor = state.graphs.executor_of(signature, &inputs, step, whole)?;
        let device = one_device(&self.local, "the memory of a step")?.unwrap_or_else(Device::flex);
        Ok(executor.memory_on(&device, keeps))
    }

    fn forward<I, F, O>(&self, inputs: I, forward: F) -> Result<O, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        let signature = self.split.of_forward(&self.local)?;
        let updates = self.checked_optimizers.updates();
        let comparison = self.same_inputs.start(ComparedCall::Forward, &inputs, updates)?;
        let mut state = lock(&self.state);
        let whole = self.split.shards().map_or(Ok(None), |shards| shards.whole(&self.local, None))?;
        let given = StepParams { whole: whole.as_ref(), ..StepParams::default() };
        let captured = state.graphs.forward_of(signature, &inputs, forward, || self.split.meta_module(&self.local))?;
        let outputs = match self.split.shards() {
            Some(shards) => {
                let own = captured.operations().filter_map(Exchange::of).collect();
                let run = || captured.run_given(&self.local, given, inputs);
                shards.forward(&self.local, &[own], run)?
            }
            None => captured.run(&self.local, inputs)?,
        };
        comparison.finish()?;
        Ok(outputs)
    }

    fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error> {
        Ok(Self { local: self.split.load(self.local, source)?, ..self })
    }

    fn assemble(&self) -> Result<M, Error> {
        self.split.assemble(&self.local)
    }

    fn param_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
        Ok(self.split.param_slices().collect())
    }

    fn random_step(&self) -> u64 {
        self.split.random().step()
    }

    fn set_random_step(&self, step: u64) {
        self.split.random().set_step(step);
    }

    fn random(&self) -> Option<RandomSource> {
        Some(self.split.random().clone())
    }

    fn counters(&self) -> StepCounters {
        let split = self.split.groups().map(|group| self.clipping.beside(group));
        let tensor = split.fold(Counters::default(), |sum, more| sum + more);
        StepCounters {
            tensor,
            norm: self.clipping.counters(),
            skipped: self.clipping.skipped(),
            ..StepCounters::default()
        }
    }

    fn gradient_layout(&self) -> GradientLayout {
        GradientLayout {
            groups: StepEngine::groups(self),
            elsewhere: self.split.counted_elsewhere(),
            rank: self.split.group().world_rank(),
            clipping: self.clipping.clone(),
            ..GradientLayout::default()
        }
    }

    fn split_params(&self) -> Vec<SplitParam> {
        self.split.split_params()
    }

    fn groups(&self) -> Vec<Communicator> {
        self.split.groups().cloned().collect()
    }

    fn clipping(&self) -> &ClipRecord {
        &self.clipping
    }

    fn checked_optimizers(&self) -> &CheckedOptimizers {
        &self.checked_optimizers
    }
}

impl<M: fmt::Debug> fmt::Debug for Sharded<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sharded").field("local", &self.local).field("group", self.split.group()).finish()
    }
}

module_of_field!(Sharded<M: Module>, local, refuse_at_once);

refuse_wrapping!(Sharded: tensor_parallel, parallelize);
