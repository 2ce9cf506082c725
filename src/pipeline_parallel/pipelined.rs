//! A pipelined model: each rank holds some stages, and trains them through a captured step.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use burn::module::{Module, ParamId};
use burn::tensor::Device;

use super::PipelineConfig;
use super::schedule::Timetable;
use super::state::PipelineState;
use crate::Error;
use crate::comm::{Communicator, Counters};
use crate::distribution::{ModelSplit, RowShards};
use crate::graph::{
    CheckedOptimizers, ClipRecord, ComparedCall, GradientLayout, GradientSink, MicroBatchResult, RandomSource,
    SameInputs, SplitParam, StepEngine, TensorTree, read_params,
};
use crate::lock::lock;
use crate::nesting::refuse_wrapping;
use crate::params::{self, FoundParams, ParamSlice, SliceSource, one_device};
use crate::partition::ShardReport;
use crate::pipeline_parallel::cut::CutReport;
use crate::step::{Loss, StepCounters, StepFn, Weight};
use crate::tensor::PlainTensor;

/// A model cut into the stages of a pipeline: a burn [`Module`] with the paths and ids of the model, in which the
/// parameters of other ranks' stages have no elements. Optimizers, records and visitors take it as they take the model.
/// Its own `forward` makes no sense on one rank; [`ParallelModule::step`](crate::train::ParallelModule::step) runs it:
/// the rows of its inputs are divided into micro-batches, which go through the stages as the schedule says.
///
/// A record of another run is loaded into the model before it is wrapped: the parameters take the ids of the record
/// then, by which optimizers know them. [`load`](crate::train::ParallelModule::load) reads values alone.
///
/// Optimizers that look at all parameters see those of this rank only; those that look at one at a time train exactly
/// as on one device. Running statistics of batch norms are kept up to date on the rank of their stage, and take a step
/// for each micro-batch.
#[derive(Clone)]
pub struct Pipelined<M> {
    pub(super) local: M,
    pub(super) group: Communicator,
    pub(super) state: Arc<Mutex<PipelineState>>,
    pub(super) same_inputs: SameInputs,
    pub(super) clipping: ClipRecord,
    pub(super) checked_optimizers: CheckedOptimizers,
}

impl<M: Module> Pipelined<M> {
    pub(crate) fn new(
        model: M,
        split: Option<(ModelSplit, SameInputs)>,
        group: &Communicator,
        config: PipelineConfig,
    ) -> Result<Self, Error> {
        let every = config.check_inputs_every;
        let (split, same_inputs) = split.unzip();
        let (state, model) = PipelineState::new(model, split, group, config)?;
        let same_inputs = match same_inputs {
            Some(same_inputs) => same_inputs.and(group)?,
            None => SameInputs::new(std::iter::once(group), every)?,
        };
        let local = state.hold(model);
        Ok(Self {
            local,
            group: state.group.clone(),
            state: Arc::new(Mutex::new(state)),
            same_inputs,
            clipping: ClipRecord::default(),
            checked_optimizers: CheckedOptimizers::default(),
        })
    }

    /// This model with the rows of its parts that `shards` leaves to this rank.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if gathered parameters are to be kept for a micro-batch; those of
    /// [`RowShards::distribute`].
    pub(crate) fn divided(self, shards: RowShards) -> Result<Self, Error> {
        if shards.gathering().keeps {
            let problem = "`keep` is \"micro_batch\", but several micro-batches are under way in a pipeline, each of which would keep \
                           parameters of its own: take \"step\", which keeps one copy for all, or \"pass\"";
            return Err(Error::invalid("data_parallel", problem));
        }
        let local = shards.distribute(self.local)?;
        lock(&self.state).divide(shards);
        Ok(Self { local, ..self })
    }

    /// This rank's part of the model.
    pub fn local(&self) -> &M {
        &self.local
    }

    /// Who does what when.
    pub fn timetable(&self) -> Timetable {
        lock(&self.state).timetable.clone()
    }

    /// What each stage has, and what the last captured step of a model that is split as well was given.
    pub(crate) fn reports(&self) -> (Option<CutReport>, Vec<ShardReport>) {
        let state = lock(&self.state);
        (state.cut.as_ref().map(|cut| cut.report.clone()), state.shards.clone())
    }

    /// Whether it is known which rank holds what, and the rest is dropped.
    pub fn is_cut(&self) -> bool {
        lock(&self.state).holders.is_some()
    }

    /// How many captured steps and forwards there are, see [`PipelineConfig::graphs`].
    pub fn graphs(&self) -> usize {
        let state = lock(&self.state);
        state.steps.len() + state.forwards.len()
    }

    /// Demands that the ranks of a group along another axis hold the same parts, if the model is split as well.
    ///
    /// # Errors
    /// Those of [`ModelSplit::same_parts`].
    pub(crate) fn same_parts(&self, group: &Communicator) -> Result<(), Error> {
        let split = lock(&self.state).split.clone();
        split.map_or(Ok(()), |split| split.same_parts(group))
    }

    /// Has steps draw the random numbers of replica number `replica` of this pipeline.
    pub(crate) fn draw_as(&self, replica: usize) {
        lock(&self.state).random.set_replica(replica as u64);
    }

    /// The number of the micro-batch whose random numbers are drawn next: how many this model has trained on. Part of a
    /// checkpoint, with the seed of the [`PipelineConfig`].
    pub fn random_step(&self) -> u64 {
        lock(&self.state).random.step()
    }

    /// Has the next step draw random numbers from those of micro-batch number `step` on: when training goes on from a
    /// checkpoint, or with a model that is wrapped anew, as after [`assemble`](crate::train::ParallelModule::assemble),
    /// which then draws what it would have drawn. The same on every rank; shared by all clones.
    pub fn set_random_step(&self, step: u64) {
        lock(&self.state).random.set_step(step);
    }

    /// Seconds that each operation of this step takes on this rank alone, for
    /// [`Cut::Measured`](crate::pipeline_parallel::cut::Cut): where an operation takes much longer or shorter than its
    /// shapes let one expect, stages are balanced better by this. `inputs` are those of
    /// [`step`](crate::train::ParallelModule::step), `runs` is how often each operation runs. Nothing is cut, no
    /// parameter is made; see [`measure_operations`](crate::pipeline_parallel::cut::measure_operations).
    ///
    /// All ranks that cut the same step, those of replicas too, must be given the costs of one of them:
    ///
    /// ```
    /// # use burn::nn::LinearConfig;
    /// # use burn::prelude::*;
    /// # use burn_parallel::prelude::*;
    /// # launch::threads(2).run(|rank| {
    /// # let device = rank.device().autodiff();
    /// # let model: Vec<_> = (0..4).map(|_| LinearConfig::new(8, 8).init(&device)).collect();
    /// # let batch = Tensor::<2>::ones([16, 8], &device);
    /// # let loss = |model: &Vec<burn::nn::Linear>, rows: Tensor<2>| {
    /// #     model.iter().fold(rows, |x, layer| layer.forward(x)).mean()
    /// # };
    /// let config = PipelineConfig::new(4);
    /// let costs = model.clone().pipeline_parallel(&rank, config.clone())?.measure(batch.clone(), loss, 5)?;
    /// let costs = rank.broadcast(costs, 0)?; // `rank` is the world
    /// let mut model = model.pipeline_parallel(&rank, config.with_cut(Cut::Measured(costs)))?;
    /// model.step(batch, loss)?;
    /// # Ok(())
    /// # })?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// Collective only if the model is split as well: over the groups of the split.
    ///
    /// # Errors
    /// [`Error::Graph`] if the step cannot be recorded; [`Error::Pipeline`] if the inputs cannot be divided.
    pub fn measure<I, F, R>(&self, inputs: I, mut loss: F, runs: usize) -> Result<Vec<f64>, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> R,
        R: Into<Loss>,
    {
        let mut call = |model: &M, inputs: I| loss(model, inputs).into();
        lock(&self.state).measure(&self.local, inputs, StepFn::new::<F>(&mut call), runs)
    }
}

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
