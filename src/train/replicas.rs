//! Several engines of one kind, each with its share of the batch, and one gradient.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use burn::module::ParamId;
use burn::optim::GradientsParams;

use super::GraphEngine;
use crate::Error;
use crate::comm::Communicator;
use crate::data_parallel::{
    Contribution, DataParallelConfig, Forward, GradientListener, Reduced, Reducer, StepCounters, register, replicate,
};
use crate::graph::{GraphInputs, StepLoss, StepObserver};
use crate::tensor::PlainTensor;

/// One of several replicas of a model that is split itself, by tensor or pipeline parallelism. Dereferences to the engine,
/// and is a burn [`Module`](burn::module::Module) with the same parameter paths.
///
/// Loss and gradients are averages over everything that the micro-batches of all replicas bring:
/// `sum(losses) / sum(counts)` where the closure gives a [`TokenLoss`](crate::graph::TokenLoss), else the mean of the means,
/// each counting for 1.
#[derive(Clone)]
pub struct Replicas<E> {
    pub(super) engine: E,
    pub(super) reducer: Arc<Reducer>,
    pub(super) waited: Duration,
}

/// What [`Replicas::step`] gives.
#[derive(Debug)]
pub struct Step {
    /// Mean loss over everything that all replicas brought; NaN if nobody brought anything.
    pub loss: f64,
    /// Number of items over all replicas; of micro-batches, where losses are means.
    pub weight: f64,
    /// Gradients of that mean loss, for burn's optimizers; bit-identical on all replicas.
    pub grads: GradientsParams,
    /// The extra outputs of the closure for each micro-batch of this replica.
    pub outputs: Vec<Vec<PlainTensor>>,
    /// What averaging over the replicas cost on this rank.
    pub counters: StepCounters,
}

impl<E: GraphEngine> Replicas<E> {
    pub(super) fn new(engine: E, group: &Communicator, config: DataParallelConfig) -> Result<Self, Error> {
        let (engine, reducer) = replicate(engine, group, config)?;
        Ok(Self { engine, reducer: Arc::new(reducer), waited: Duration::ZERO })
    }

    /// The engine alone, out of the group of replicas.
    pub fn into_inner(self) -> E {
        self.engine
    }

    /// What averaging over the replicas has cost on this rank so far.
    pub fn averaging(&self) -> StepCounters {
        StepCounters {
            gradients: self.reducer.data().counters(),
            control: self.reducer.control().counters(),
            waited: self.waited,
            ..StepCounters::default()
        }
    }

    /// Runs forward and backward on this replica's share of the batch and averages over the replicas.
    ///
    /// # Errors
    /// Those of the engine; the error of the world.
    pub fn step<I, F, R>(&mut self, inputs: I, loss: F) -> Result<Step, Error>
    where
        I: GraphInputs + Clone,
        F: FnMut(&E::Model, I) -> R,
        R: StepLoss,
    {
        self.step_micro_batches([inputs], loss)
    }

    /// Runs forward and backward on every micro-batch and averages over all of them and over the replicas. Gradients are
    /// reduced while the backward pass of the last one still runs. Replicas may bring different numbers of micro-batches,
    /// also none.
    ///
    /// # Errors
    /// Those of the engine; the error of the world.
    pub fn step_micro_batches<I, F, R>(
        &mut self,
        micro_batches: impl IntoIterator<Item = I>,
        mut loss: F,
    ) -> Result<Step, Error>
    where
        I: GraphInputs + Clone,
        F: FnMut(&E::Model, I) -> R,
        R: StepLoss,
    {
        let before = self.averaging();
        if let Some(engine) = self.reducer.admit(&self.engine, Forward::Ahead)? {
            self.engine = engine;
        }
        let ran = self.run(micro_batches, &mut loss);
        let reduced = ran.and_then(|(loss, outputs)| self.reducer.close(loss).map(|reduced| (reduced, outputs)));
        let (mut reduced, outputs) = reduced.inspect_err(|_| self.reducer.discard())?;
        self.waited += reduced.waited;
        let grads = register(&self.reducer, &mut reduced, &self.engine)?;
        let Reduced { loss, weight, .. } = reduced;
        Ok(Step { loss, weight, grads, outputs, counters: self.averaging() - before })
    }

    /// The sum of this replica's losses, and its outputs.
    fn run<I, F, R>(
        &mut self,
        micro_batches: impl IntoIterator<Item = I>,
        loss: &mut F,
    ) -> Result<(f64, Vec<Vec<PlainTensor>>), Error>
    where
        I: GraphInputs + Clone,
        F: FnMut(&E::Model, I) -> R,
        R: StepLoss,
    {
        let mut observer = Average { reducer: &self.reducer, weight: 0.0, last: false };
        let (mut sum, mut outputs) = (0.0, Vec::new());
        let mut micro_batches = micro_batches.into_iter().peekable();
        while let Some(inputs) = micro_batches.next() {
            observer.last = micro_batches.peek().is_none();
            let step = self.engine.step_observed(inputs, &mut *loss, &mut observer)?;
            sum += step.loss.into_scalar::<f64>();
            outputs.push(step.outputs);
        }
        if outputs.is_empty() {
            self.reducer.open(Contribution::default());
        }
        Ok((sum, outputs))
    }
}

/// Hands what a micro-batch gives to the reducer. Gradients are added up as they come, in units of one item.
struct Average<'a> {
    reducer: &'a Reducer,
    /// Of all micro-batches so far.
    weight: f64,
    last: bool,
}

impl StepObserver for Average<'_> {
    fn expect(&mut self, gradients: &[ParamId]) -> Result<(), Error> {
        self.reducer.forget_uses();
        for param in gradients.iter().filter_map(|id| self.reducer.number(*id)) {
            self.reducer.used(param);
        }
        Ok(())
    }

    fn weight(&mut self, weight: f64) -> Result<(), Error> {
        self.weight += weight;
        if self.last {
            self.reducer.open(Contribution { weight: self.weight, unit: 1.0 });
        }
        Ok(())
    }

    fn gradient(&mut self, id: ParamId, gradient: PlainTensor) -> Result<(), Error> {
        if let Some(param) = self.reducer.number(id) {
            self.reducer.arrived(param, gradient);
        }
        Ok(())
    }
}

impl<E> Deref for Replicas<E> {
    type Target = E;

    fn deref(&self) -> &E {
        &self.engine
    }
}
