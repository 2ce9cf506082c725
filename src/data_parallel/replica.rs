//! A replica of a model: what runs it, what averages over the group, and what is known of its steps.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Tensor;

use super::config::DataParallelConfig;
use super::hook::HookGroup;
use super::loss_weight::LossWeight;
use super::reducer::Reducer;
use super::replicate::replicate;
use crate::Error;
use crate::comm::{Communicator, Counters};
use crate::distribution::RowShards;
use crate::graph::StepEngine;
use crate::params::SliceSource;
use crate::sharding::{ShardComms, Sharding};
use crate::step::{CarriedNorm, NoNoise, NoiseState, StepCounters, StepFn};
use crate::tensor::TensorTree;

/// One of several replicas of a model, each with its share of the batch. `E` says what runs it: [`Eager`](super::Eager)
/// a model that every rank holds whole, [`Sharded`](crate::tensor_parallel::Sharded) or
/// [`Pipelined`](crate::pipeline_parallel::Pipelined) one that is split itself.
///
/// Dereferences to what runs it (and so, if that is eager, to the model), and is a burn
/// [`Module`](burn::module::Module) with the same parameter paths, so optimizers, records and visitors take it as they
/// take the model. It trains by [`ParallelModule::step`](crate::train::ParallelModule::step).
///
/// A replica of an eager model is also trained by its own forward: between two optimizer steps, call either `step`, or
/// [`backward`](Self::backward), preceded by any number of [`accumulate`](Self::accumulate)s. Every rank makes the same
/// number of `backward`s; not of `accumulate`s.
#[derive(Clone)]
pub struct Replica<E> {
    pub(super) engine: E,
    pub(super) averaging: Averaging,
    /// What the micro-batches of the step bring so far: their weight, and their losses, each with its factor.
    pub(super) loss_weight: LossWeight,
    pub(super) losses: Vec<(Tensor<1>, f64)>,
    pub(super) waited: Duration,
    /// What the last reduction told of the noise of the gradient.
    pub(super) noise: NoiseState,
    /// The norm of the gradient, if the last reduction has brought it.
    pub(super) norm: Option<CarriedNorm>,
    /// How many steps there were.
    pub(super) steps: u64,
    /// By which an eager model tells of its gradients.
    pub(super) hooks: Option<HookGroup>,
}

/// What averages over the replicas.
#[derive(Clone)]
pub(super) enum Averaging {
    Ready(Arc<Reducer>),
    /// Nothing yet: the first step finds out which parameters this rank holds.
    Deferred(Communicator, DataParallelConfig),
    /// Captured steps themselves, which gather parameters and leave this rank its rows of the gradients, and of which
    /// one of so many measures their noise.
    ByRows {
        shards: RowShards,
        noise_scale_every: u64,
    },
}

impl<E: StepEngine> Replica<E> {
    /// A replica whose engine tells the reducer of its gradients through hooks, if there are any.
    pub(super) fn of(engine: E, reducer: Arc<Reducer>, hooks: Option<HookGroup>) -> Self {
        Self { hooks, ..Self::with(engine, Averaging::Ready(reducer)) }
    }

    /// A replica of a model that is split itself.
    ///
    /// # Errors
    /// Those of [`replicate`].
    pub(crate) fn new(engine: E, group: &Communicator, config: DataParallelConfig) -> Result<Self, Error> {
        config.check()?;
        if !engine.is_settled() {
            return Ok(Self::with(engine, Averaging::Deferred(group.clone(), config)));
        }
        let (engine, reducer) = replicate(engine, group, config, E::share_ids)?;
        Ok(Self::of(engine, Arc::new(reducer), None))
    }

    pub(super) fn with(engine: E, averaging: Averaging) -> Self {
        if let Averaging::Ready(reducer) = &averaging {
            reducer.compare_updates(engine.checked_optimizers().updates());
        }
        let (loss_weight, losses) = (LossWeight::default(), Vec::new());
        let noise = NoiseState::None(NoNoise::Off);
        Self {
            engine,
            averaging,
            loss_weight,
            losses,
            waited: Duration::ZERO,
            noise,
            norm: None,
            steps: 0,
            hooks: None,
        }
    }

    /// What was wrapped, as it was before but for its values. If an eager model has adapters (LoRA) or other
    /// reparameterizations of its own, its parameters keep a hook that does nothing once all clones of the replica are
    /// gone.
    pub fn into_inner(self) -> E::Wrapped {
        let reducer = self.reducer().cloned();
        let wrapped = self.engine.into_wrapped();
        if let Some(reducer) = reducer {
            // Burn looks at the parameters to take the hooks away.
            reducer.forget_uses();
        }
        wrapped
    }

    /// Number of buckets in which gradients are reduced: collectives a step. It may change after the first step, when
    /// the order is known in which backward completes the gradients. 0 before the first step of a pipeline that it
    /// cuts.
    pub fn buckets(&self) -> usize {
        self.reducer().map_or(0, |reducer| reducer.buckets())
    }

    pub(super) fn reducer(&self) -> Option<&Arc<Reducer>> {
        match &self.averaging {
            Averaging::Ready(reducer) => Some(reducer),
            Averaging::Deferred(..) | Averaging::ByRows { .. } => None,
        }
    }

    /// The group of the replicas.
    pub(crate) fn group(&self) -> &Communicator {
        match &self.averaging {
            Averaging::Ready(reducer) => reducer.data(),
            Averaging::Deferred(group, _) => group,
            Averaging::ByRows { shards, .. } => shards.replicas(),
        }
    }

    /// How captured steps divide the parameters over the replicas, if they do.
    pub(super) fn row_shards(&self) -> Option<&RowShards> {
        match &self.averaging {
            Averaging::ByRows { shards, .. } => Some(shards),
            Averaging::Ready(_) | Averaging::Deferred(..) => None,
        }
    }

    /// Carries what is not gradients.
    pub(crate) fn control(&self) -> &Communicator {
        match &self.averaging {
            Averaging::Ready(reducer) => reducer.control(),
            Averaging::Deferred(group, _) => group,
            Averaging::ByRows { shards, .. } => shards.replicas(),
        }
    }

    /// What the replicas divide among themselves.
    pub fn sharding(&self) -> Sharding {
        match &self.averaging {
            Averaging::Ready(reducer) => reducer.sharding(),
            Averaging::Deferred(group, config) if group.size() > 1 => config.sharding,
            Averaging::Deferred(..) => Sharding::None,
            Averaging::ByRows { .. } => Sharding::Parameters,
        }
    }

    /// The path of the first parameter of which this rank brought a gradient to the last step that was not finite.
    pub(crate) fn non_finite_param(&self) -> Option<Arc<str>> {
        match self.row_shards() {
            Some(shards) => shards.non_finite(),
            None => self.reducer().and_then(|reducer| reducer.non_finite()),
        }
    }

    pub(crate) fn engine(&self) -> &E {
        &self.engine
    }

    /// This replica with another state of the engine.
    pub(super) fn change(self, change: impl FnOnce(E) -> E) -> Self {
        Self { engine: change(self.engine), ..self }
    }

    /// As [`change`](Self::change), if that goes well.
    pub(crate) fn try_change(self, change: impl FnOnce(E) -> Result<E, Error>) -> Result<Self, Error> {
        Ok(Self { engine: change(self.engine)?, ..self })
    }

    pub(crate) fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error> {
        self.try_change(|engine| engine.load(source))
    }

    pub(crate) fn counters(&self) -> StepCounters {
        let of_engine = self.engine.counters();
        if let Some(shards) = self.row_shards() {
            return StepCounters {
                gradients: shards.comms().gradient_counters(),
                parameters: shards.comms().parameter_counters() - self.norm_counters(shards.comms()),
                control: shards.replicas().counters() + shards.comms().control().counters(),
                waited: shards.waited() + of_engine.waited,
                ..of_engine
            };
        }
        match self.reducer() {
            None => of_engine,
            Some(reducer) => StepCounters {
                gradients: reducer.gradient_counters(),
                parameters: match reducer.shards() {
                    Some(shards) => shards.parameter_counters() + of_engine.parameters - self.norm_counters(shards),
                    None => of_engine.parameters,
                },
                control: reducer.control_counters() + of_engine.control,
                waited: self.waited + of_engine.waited,
                ..of_engine
            },
        }
    }

    /// What norms have cost where updates meet.
    fn norm_counters(&self, shards: &ShardComms) -> Counters {
        self.engine.clipping().of(shards.between())
    }

    /// How many steps there were.
    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    /// Goes on after so many steps.
    pub(crate) fn steps_restored(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// Finds out which parameters this rank holds, and which of them with others, if a step would.
    pub(crate) fn prepare<I: TensorTree + Clone>(
        &mut self,
        inputs: I,
        step: StepFn<'_, E::Model, I>,
    ) -> Result<(), Error> {
        match &self.averaging {
            Averaging::Deferred(group, config) => {
                let (group, config) = (group.clone(), config.clone());
                self.engine.settle(inputs, step, &group)?;
                let (engine, reducer) = replicate(self.engine.clone(), &group, config, E::share_ids)?;
                reducer.compare_updates(engine.checked_optimizers().updates());
                (self.engine, self.averaging) = (engine, Averaging::Ready(Arc::new(reducer)));
            }
            _ if self.engine.is_prepared() => {}
            Averaging::ByRows { shards, .. } if !self.engine.is_settled() => {
                let replicas = shards.replicas().clone();
                self.engine.settle(inputs, step, &replicas)?;
            }
            // Replicas have nothing left to agree on.
            _ => self.engine.settle_alone(inputs, step)?,
        }
        Ok(())
    }

    /// The most bytes that a step of such inputs has alive on this rank beside parameters and inputs. Collective.
    pub(crate) fn step_memory<I: TensorTree + Clone>(
        &mut self,
        inputs: I,
        mut step: StepFn<'_, E::Model, I>,
    ) -> Result<usize, Error> {
        self.prepare(inputs.clone(), step.again())?;
        // Replicas that divide gradients scatter them as they come, and keep their rows.
        let rows = self.reducer().filter(|reducer| reducer.sharding() >= Sharding::Gradients);
        let rows = rows.map(|reducer| reducer.gradient_rows());
        Ok(self.engine.step_memory(inputs, step, rows.is_none())? + rows.unwrap_or(0))
    }

    /// Gives everything that is not trained the values of the first replica.
    pub(crate) fn sync_buffers(self) -> Result<Self, Error> {
        let (control, shards) = (self.control().clone(), self.row_shards().cloned());
        let divided = |id| shards.as_ref().is_some_and(|shards| shards.divides(id));
        self.try_change(|engine| super::structure::broadcast_buffers(engine, &control, &divided))
    }
}
