//! A pipelined model: each rank holds some stages, and trains them through a captured step.

use std::sync::{Arc, Mutex};

use burn::module::Module;

use super::PipelineConfig;
use super::schedule::Timetable;
use super::state::PipelineState;
use crate::Error;
use crate::comm::Communicator;
use crate::distribution::{ModelSplit, RowShards};
use crate::graph::{CheckedOptimizers, ClipRecord, SameInputs, TensorTree};
use crate::lock::lock;
use crate::partition::ShardReport;
use crate::pipeline_parallel::cut::CutReport;
use crate::step::{Loss, StepFn};

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
