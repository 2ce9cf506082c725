//! A model that is parallelised by a strategy.

use std::collections::{HashMap, HashSet};
use std::fmt;

use burn::data::dataloader::DataLoader;
use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, ParamId};
use burn::tensor::Device;

use super::module::UpdateShards;
use super::module::sealed::Sealed;
use super::strategy::Chosen;
use super::{ParallelModule, Report, Strategy, same_strategy, unread};
use crate::Error;
use crate::comm::Communicator;
use crate::data_parallel::{DataParallel, Eager, Join, JoinLoader, Replica};
use crate::graph::{CheckedOptimizers, GradientLayout, RandomSource, SplitParam, TensorTree};
use crate::mesh::Mesh;
use crate::nesting::{self, refuse_wrapping};
use crate::params::{ParamSlice, SliceSource};
use crate::pipeline_parallel::{PipelineParallel, Pipelined};
use crate::plan::Plan;
use crate::sharding::ShardComms;
use crate::step::{Loss, Step, StepCounters};
use crate::tensor_parallel::{Sharded, TensorParallel, TensorParallelConfig};

/// Spreads any burn module as a strategy says. Implemented for every [`Module`].
pub trait Parallelize: Module + Sized {
    /// Wraps the model for every axis of the strategy that has more than one rank: split over `tp`, cut over `pp`,
    /// replicated over `dp`. The ranks of `tp` are next to each other, then those of `pp`. Collective over the world:
    /// every rank brings the same model and the same strategy.
    ///
    /// ```
    /// use burn::nn::{Linear, LinearConfig};
    /// use burn::optim::{AdamWConfig, ModuleOptimizer};
    /// use burn::prelude::*;
    /// use burn_parallel::prelude::*;
    ///
    /// launch::threads(4).run(|world| {
    ///     let strategy = Strategy::new().with_tp(2, Plan::new().shard("weight", 1).shard("bias", 0)); // and so dp 2
    ///     let device = world.device().autodiff();
    ///     let model: Linear = LinearConfig::new(4, 6).init(&device); // an ordinary burn model
    ///     let mut model = model.parallelize(&world, &strategy)?;
    ///     let mut optim: ModuleOptimizer = AdamWConfig::new().init();
    ///     let (share, _) = model.replica(); // which of the replicas this rank belongs to
    ///     for _ in 0..3 {
    ///         let x = Tensor::<2>::ones([3 + share, 4], &device);
    ///         let step = model.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?;
    ///         model = model.optimize(&mut optim, 0.01, step)?;
    ///     }
    ///     assert!(model.report().captured);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Strategy`] if the strategy does not fit the world; [`Error::Nesting`] if the module is wrapped already;
    /// those of [`TensorParallel`], [`PipelineParallel`] and [`DataParallel`].
    fn parallelize(self, world: &Communicator, strategy: &Strategy) -> Result<Parallel<Self>, Error> {
        nesting::check(&self, "parallelize")?;
        let [dp, pp, tp] = strategy.axes(world.size())?;
        if let Some(unread) = unread::of_one_replica(&strategy.data).filter(|_| dp == 1 && world.rank() == 0) {
            log::warn!("{unread}");
        }
        let captured = strategy.captured(dp);
        same_strategy::agree(world, [dp, pp, tp], strategy.data.sharding, captured.is_some())?;
        let mesh = Mesh::new(world, [("dp", dp), ("pp", pp), ("tp", tp)])?;
        let (replicas, data) = (mesh.axis("dp")?, strategy.data.clone());
        let (stages, layers) = (mesh.axis("pp")?, mesh.axis("tp")?);
        let tensor = match tp {
            // What a plan says of parameters that are not split need not fit the model.
            1 => TensorParallelConfig { plan: Plan::new(), ..strategy.tensor.clone() },
            _ => strategy.tensor.clone(),
        };
        let wrapped = match (&strategy.pipeline, captured) {
            (_, None) => Wrapper::Eager(self.data_parallel(&replicas, data)?),
            (Some(pipeline), Some(_)) if pp > 1 => {
                let pipelined = match tp {
                    1 => self.pipeline_parallel(&stages, pipeline.clone())?,
                    _ => self.tensor_parallel(&layers, tensor)?.pipeline_parallel(&stages, pipeline.clone())?,
                };
                Wrapper::Pipelined(pipelined.data_parallel(&replicas, data)?)
            }
            (_, Some(_)) => Wrapper::Sharded(self.tensor_parallel(&layers, tensor)?.data_parallel(&replicas, data)?),
        };
        // What is put together over both of these axes takes one collective.
        let together = if pp > 1 && tp > 1 { Some(mesh.joint(&["pp", "tp"])?) } else { None };
        Ok(Parallel { wrapped, mesh, together, eager_would_do: captured == Some(Chosen::ForParameters) })
    }
}

impl<M: Module> Parallelize for M {}

/// A model that is spread as a [`Strategy`] says: one type, whatever the strategy. It is trained by [`ParallelModule`].
#[derive(Clone)]
pub struct Parallel<M> {
    wrapped: Wrapper<M>,
    mesh: Mesh,
    /// Joins the ranks that share the model, where these lie along several axes.
    together: Option<Communicator>,
    /// Whether steps are captured though nobody asked for it.
    eager_would_do: bool,
}

#[derive(Clone)]
enum Wrapper<M> {
    Eager(Replica<Eager<M>>),
    Sharded(Replica<Sharded<M>>),
    Pipelined(Replica<Pipelined<M>>),
}

/// Calls a method of what the model is wrapped in.
macro_rules! with {
    ($wrapped:expr, $model:ident => $call:expr) => {
        match $wrapped {
            Wrapper::Eager($model) => $call,
            Wrapper::Sharded($model) => $call,
            Wrapper::Pipelined($model) => $call,
        }
    };
}

/// Calls a method that gives what the model is wrapped in anew.
macro_rules! renew {
    ($self:ident, $model:ident => $call:expr) => {
        Parallel {
            wrapped: match $self.wrapped {
                Wrapper::Eager($model) => Wrapper::Eager($call),
                Wrapper::Sharded($model) => Wrapper::Sharded($call),
                Wrapper::Pipelined($model) => Wrapper::Pipelined($call),
            },
            mesh: $self.mesh.clone(),
            together: $self.together.clone(),
            eager_would_do: $self.eager_would_do,
        }
    };
}

impl<M: Module> Parallel<M> {
    /// The axes `dp`, `pp` and `tp`, also those of size 1.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// What became of a step or a forward that was captured. If it could not be, and nobody has asked for that, the
    /// error says what else there is.
    fn captured<T>(eager_would_do: bool, outcome: Result<T, Error>) -> Result<T, Error> {
        outcome.map_err(|error| match error {
            Error::Graph { problem } if eager_would_do => Error::Graph {
                problem: format!(
                    "{problem}; steps are captured because the replicas divide the parameters (`sharding` is \"parameters\"): \
                     `engine` \"eager\" runs the model's own forward, on a device with gradient checkpointing"
                ),
            },
            error => error,
        })
    }
}

impl<M: Module> Sealed for Parallel<M> {}

impl<M: Module> ParallelModule for Parallel<M> {
    type Model = M;

    fn local(&self) -> &M {
        with!(&self.wrapped, model => model.local())
    }

    fn replica(&self) -> (usize, usize) {
        with!(&self.wrapped, model => ParallelModule::replica(model))
    }

    fn step_micro_batches<I, F, R>(
        &mut self,
        micro_batches: impl IntoIterator<Item = I>,
        loss: F,
    ) -> Result<Step, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> R,
        R: Into<Loss>,
    {
        let ran = with!(&mut self.wrapped, model => model.step_micro_batches(micro_batches, loss));
        Self::captured(self.eager_would_do, ran)
    }

    fn prepare<I, F, R>(&mut self, inputs: I, loss: F) -> Result<(), Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> R,
        R: Into<Loss>,
    {
        let prepared = with!(&mut self.wrapped, model => ParallelModule::prepare(model, inputs, loss));
        Self::captured(self.eager_would_do, prepared)
    }

    fn step_memory<I, F, R>(&mut self, inputs: I, loss: F) -> Result<usize, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> R,
        R: Into<Loss>,
    {
        with!(&mut self.wrapped, model => ParallelModule::step_memory(model, inputs, loss))
    }

    fn forward_with<I, F, O>(&self, inputs: I, forward: F) -> Result<O, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        let ran = with!(&self.wrapped, model => model.forward_with(inputs, forward));
        Self::captured(self.eager_would_do, ran)
    }

    fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error> {
        Ok(renew!(self, model => model.load(source)?))
    }

    fn assemble(&self) -> Result<M, Error> {
        with!(&self.wrapped, model => model.assemble())
    }

    fn sync_buffers(self) -> Result<Self, Error> {
        Ok(renew!(self, model => model.sync_buffers()?))
    }

    fn join<B: IntoIterator>(&self, batches: B) -> Join<B::IntoIter> {
        with!(&self.wrapped, model => model.join(batches))
    }

    fn join_loader<'a, O>(&self, loader: &'a dyn DataLoader<O>) -> JoinLoader<'a, O> {
        with!(&self.wrapped, model => model.join_loader(loader))
    }

    fn counters(&self) -> StepCounters {
        with!(&self.wrapped, model => ParallelModule::counters(model))
    }

    fn report(&self) -> Report {
        with!(&self.wrapped, model => ParallelModule::report(model))
    }

    fn param_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
        with!(&self.wrapped, model => ParallelModule::param_slices(model))
    }

    fn held_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
        with!(&self.wrapped, model => ParallelModule::held_slices(model))
    }

    fn moments_restored(&self, params: &HashSet<ParamId>) {
        with!(&self.wrapped, model => ParallelModule::moments_restored(model, params));
    }

    fn steps_restored(&mut self, steps: u64) {
        with!(&mut self.wrapped, model => ParallelModule::steps_restored(model, steps));
    }

    fn random_step(&self) -> u64 {
        with!(&self.wrapped, model => ParallelModule::random_step(model))
    }

    fn set_random_step(&self, step: u64) {
        with!(&self.wrapped, model => ParallelModule::set_random_step(model, step));
    }

    fn random(&self) -> Option<RandomSource> {
        with!(&self.wrapped, model => ParallelModule::random(model))
    }

    fn split_params(&self) -> Vec<SplitParam> {
        with!(&self.wrapped, model => ParallelModule::split_params(model))
    }

    fn groups(&self) -> Vec<Communicator> {
        with!(&self.wrapped, model => ParallelModule::groups(model))
    }

    fn gradient_layout(&self) -> GradientLayout {
        let layout = with!(&self.wrapped, model => ParallelModule::gradient_layout(model));
        let Some(together) = &self.together else { return layout };
        let shards = self.shards().map(|shards| shards.between().clone());
        GradientLayout { groups: shards.into_iter().chain([together.clone()]).collect(), ..layout }
    }

    fn shards(&self) -> Option<ShardComms> {
        with!(&self.wrapped, model => ParallelModule::shards(model))
    }

    fn holds_rows(&self, id: ParamId) -> bool {
        with!(&self.wrapped, model => ParallelModule::holds_rows(model, id))
    }

    fn update_shards(self, update: &mut UpdateShards<'_>) -> Result<Self, Error> {
        Ok(renew!(self, model => ParallelModule::update_shards(model, update)?))
    }

    fn trains(&self) -> bool {
        with!(&self.wrapped, model => ParallelModule::trains(model))
    }

    fn checked_optimizers(&self) -> &CheckedOptimizers {
        with!(&self.wrapped, model => ParallelModule::checked_optimizers(model))
    }
}

impl<M: Module> Module for Parallel<M> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        with!(&self.wrapped, model => model.collect_devices(devices))
    }

    fn fork(self, device: &Device) -> Self {
        renew!(self, model => model.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        renew!(self, model => model.to_device(device))
    }

    fn train(self) -> Self {
        renew!(self, model => model.train())
    }

    fn valid(&self) -> Self {
        let model = self.clone();
        renew!(model, model => model.valid())
    }

    fn materialize(self) -> Self {
        renew!(self, model => model.materialize())
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        nesting::visited("Parallel");
        with!(&self.wrapped, model => model.visit(visitor));
    }

    fn map<V: ModuleMapper>(self, mapper: &mut V) -> Self {
        renew!(self, model => model.map(mapper))
    }
}

impl<M: Module + fmt::Debug> fmt::Debug for Parallel<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        with!(&self.wrapped, model => fmt::Debug::fmt(model, f))
    }
}

impl<M: fmt::Display> fmt::Display for Parallel<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        with!(&self.wrapped, model => fmt::Display::fmt(model, f))
    }
}

refuse_wrapping!(Parallel: tensor_parallel, pipeline_parallel, data_parallel, parallelize);
