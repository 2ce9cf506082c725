//! A model of which each rank holds a part, trained through its captured step.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use crate::Error;
use crate::comm::{Communicator, Counters};
use crate::delegate::module_of_field;
use crate::distribution::ModelSplit;
use crate::graph::{CustomOps, GRAPHS, GraphCache, GraphInputs, StepGraph, StepLoss, StepObserver, StepOutputs};
use crate::params::SliceSource;
use crate::partition::ShardReport;
use crate::plan::{Plan, PlanTable};
use crate::tensor::PlainTensor;

/// A model split over a group: a burn [`Module`] with the paths and ids of the model and this rank's parts of its
/// parameters, so optimizers, records and visitors take it as they take the model. Its own `forward` makes no sense on
/// parts; [`step`](Self::step) runs it.
///
/// A record of another run is loaded into the model before it is wrapped: the parameters take the ids of the record then, by which
/// optimizers know them. [`load`](Self::load) reads values alone.
///
/// Optimizers that look at whole parameters or at all of them (norm clipping, Muon, LAMB) see parts only; element-wise ones
/// as AdamW train exactly as on one device.
#[derive(Clone)]
pub struct Sharded<M> {
    local: M,
    pub(super) split: ModelSplit,
    engine: Arc<Mutex<Engine>>,
}

struct Engine {
    graphs: GraphCache,
    reports: Arc<Mutex<Vec<ShardReport>>>,
}

impl Engine {
    fn of(split: &ModelSplit, graphs: usize) -> Self {
        let reports = Arc::<Mutex<Vec<ShardReport>>>::default();
        let mut ops = CustomOps::new();
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

/// What [`Sharded::step`] gives.
#[derive(Debug)]
pub struct Step {
    /// The loss that one device would compute, on every rank, without autodiff.
    pub loss: Tensor<1>,
    /// The number of items that the loss is the mean over, if the closure gave a [`TokenLoss`](crate::graph::TokenLoss);
    /// else 1.
    pub weight: f64,
    /// The gradients of this rank's parts, for burn's optimizers.
    pub grads: GradientsParams,
    /// The extra outputs of the loss closure, whole on every rank.
    pub outputs: Vec<PlainTensor>,
}

impl<M: Module> Sharded<M> {
    pub(super) fn new(model: M, axes: &[(&str, &Communicator)], plan: &Plan) -> Result<Self, Error> {
        let (local, split) = ModelSplit::distribute(model, axes, plan)?;
        Ok(Self { local, engine: Arc::new(Mutex::new(Engine::of(&split, GRAPHS))), split })
    }

    /// Sets the seed of the random numbers that steps draw, dropout above all: the same on every rank of the split, which
    /// then draw what one device would. 0 by default. Forgets the captured steps, not the [number](Self::random_step) of the
    /// step.
    pub fn with_seed(self, seed: u64) -> Self {
        let split = self.split.with_seed(seed);
        let graphs = lock(&self.engine).graphs.most();
        Self { engine: Arc::new(Mutex::new(Engine::of(&split, graphs))), split, local: self.local }
    }

    /// Sets how many captured steps, and as many forwards, are kept: those used last, and at least one, the same on every rank
    /// of the split. 16 by default; a batch of other shapes than these is captured anew. Forgets the captured steps.
    pub fn with_graphs(self, graphs: usize) -> Self {
        Self { engine: Arc::new(Mutex::new(Engine::of(&self.split, graphs))), ..self }
    }

    /// How many captured steps and forwards there are.
    pub fn graphs(&self) -> usize {
        lock(&self.engine).graphs.len()
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

    /// Has the next step draw the random numbers of step number `step`: when training goes on from a checkpoint, or with a
    /// model that is wrapped anew, as after [`assemble`](Self::assemble), which then draws what it would have drawn. The same
    /// on every rank; shared by all clones.
    pub fn set_random_step(&self, step: u64) {
        self.split.random().set_step(step);
    }

    /// This rank's part of the model, and how it was split: for engines of other strategies.
    pub(crate) fn into_parts(self) -> (M, ModelSplit) {
        (self.local, self.split)
    }

    /// Has steps draw the random numbers of replica number `replica` of this model.
    pub(crate) fn draw_as(&self, replica: usize) {
        self.split.random().set_replica(replica as u64);
    }

    /// How the model was split.
    pub(crate) fn split(&self) -> &ModelSplit {
        &self.split
    }

    /// This rank's part of the model.
    pub fn local(&self) -> &M {
        &self.local
    }

    /// Every parameter with its layout.
    pub fn table(&self) -> &PlanTable {
        self.split.table()
    }

    /// What the last captured step was given in collectives over the axis that the plan speaks of, and what of it could not
    /// be split.
    pub fn report(&self) -> ShardReport {
        self.reports().into_iter().next().unwrap_or_default()
    }

    /// As [`report`](Self::report), for every axis.
    pub fn reports(&self) -> Vec<ShardReport> {
        lock(&lock(&self.engine).reports).clone()
    }

    /// What steps have communicated on this rank so far over all axes, with the distribution of the parameters and the
    /// comparisons.
    pub fn counters(&self) -> Counters {
        self.split.groups().map(Communicator::counters).fold(Counters::default(), |sum, more| sum + more)
    }

    /// Gives all parameters the values that a store has under their paths. Each rank asks for its own parts only, and lazy
    /// parameters are never made whole: so a model is loaded that no rank could hold. Not collective; every rank has the
    /// same store.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the source lacks a parameter, or has it with other dims than the whole one has; those
    /// of the source.
    pub fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error> {
        Ok(Self { local: self.split.load(self.local, source)?, ..self })
    }

    /// The whole model, on every rank. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub fn assemble(&self) -> Result<M, Error> {
        self.split.assemble(&self.local)
    }

    /// Runs a training step: `loss` on `inputs`, forward and backward.
    ///
    /// `loss` sees the model with the dims that it has as a whole. It is recorded when inputs of these shapes come for the
    /// first time, as [`graph`](crate::graph) tells, which also says what cannot be; later it is not called again (see
    /// [`GraphCache`] for what counts as the same closure). Collective: every rank passes the same whole inputs.
    ///
    /// # Errors
    /// [`Error::Graph`] if the step cannot be recorded; [`Error::Plan`] if an input cannot be split as planned;
    /// [`Error::InvalidArgument`] if a record has brought other parameters; those of [`Communicator`].
    pub fn step<I, F, R>(&mut self, inputs: I, loss: F) -> Result<Step, Error>
    where
        I: GraphInputs + Clone,
        F: FnOnce(&M, I) -> R,
        R: StepLoss,
    {
        let signature = self.split.of_step(&self.local)?;
        let mut engine = lock(&self.engine);
        let whole = || self.split.outline(&self.local);
        let executor = engine.graphs.executor_of(signature, &inputs, loss, whole)?;
        let result = executor.step(&self.local, inputs)?;
        self.split.random().advance();
        Ok(Step { loss: result.loss, weight: result.weight, grads: result.gradients, outputs: result.outputs })
    }

    /// As [`step`](Self::step), but tells an observer of the number of items and of each gradient as soon as they are there,
    /// while the rest of the backward pass is still to run. Gradients are those of this rank's parts, and of the sum if the
    /// closure gives a [`TokenLoss`](crate::graph::TokenLoss).
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
        F: FnOnce(&M, I) -> R,
        R: StepLoss,
    {
        let signature = self.split.of_step(&self.local)?;
        let mut engine = lock(&self.engine);
        let whole = || self.split.outline(&self.local);
        let executor = engine.graphs.executor_of(signature, &inputs, loss, whole)?;
        let step = executor.step_observed(&self.local, inputs, observer)?;
        self.split.random().advance();
        Ok(step)
    }

    /// Runs a forward pass for evaluation: what `forward` gives, whole on every rank, without autodiff.
    ///
    /// The model is in evaluation mode, as after [`Module::valid`]: no dropout, running statistics in batch norms. Outputs
    /// are a tensor or a structure of tensors. Recorded like [`step`](Self::step). Collective: every rank passes the same
    /// whole inputs.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn forward_with<I, F, O>(&self, inputs: I, forward: F) -> Result<O, Error>
    where
        I: GraphInputs + Clone,
        F: FnOnce(&M, I) -> O,
        O: GraphInputs + Clone + Send + 'static,
    {
        let signature = self.split.of_forward(&self.local)?;
        let mut engine = lock(&self.engine);
        let whole = || self.split.outline(&self.local);
        engine.graphs.forward_of(signature, &inputs, forward, whole)?.run(&self.local, inputs)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M: fmt::Debug> fmt::Debug for Sharded<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sharded").field("local", &self.local).field("group", self.split.group()).finish()
    }
}

module_of_field!(Sharded<M: Module>, local);
