//! Implements `ParallelModule` for the wrappers.

use std::collections::{HashMap, HashSet};

use burn::data::dataloader::DataLoader;
use burn::module::{Module, ParamId};

use super::module::UpdateShards;
use super::module::sealed::Sealed;
use super::report::Reports;
use super::{ParallelModule, Report, unreplicated};
use crate::Error;
use crate::comm::Communicator;
use crate::data_parallel::{DataParallelConfig, Join, JoinLoader, Replica};
use crate::graph::{CheckedOptimizers, GradientLayout, RandomSource, SplitParam, StepEngine, TensorTree};
use crate::params::{ParamSlice, SliceSource};
use crate::pipeline_parallel::{PipelineConfig, Pipelined};
use crate::sharding::ShardComms;
use crate::step::{Loss, Step, StepCounters, StepFn};
use crate::tensor_parallel::Sharded;

impl<E: StepEngine + Reports> Sealed for Replica<E> {}

impl<E: StepEngine + Reports> ParallelModule for Replica<E> {
    type Model = E::Model;

    fn local(&self) -> &E::Model {
        self.engine().local()
    }

    fn replica(&self) -> (usize, usize) {
        (self.group().rank(), self.group().size())
    }

    fn step_micro_batches<I, F, R>(
        &mut self,
        micro_batches: impl IntoIterator<Item = I>,
        mut loss: F,
    ) -> Result<Step, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&E::Model, I) -> R,
        R: Into<Loss>,
    {
        let mut call = |model: &E::Model, inputs: I| loss(model, inputs).into();
        self.run(micro_batches, StepFn::new::<F>(&mut call))
    }

    fn prepare<I, F, R>(&mut self, inputs: I, mut loss: F) -> Result<(), Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&E::Model, I) -> R,
        R: Into<Loss>,
    {
        let mut call = |model: &E::Model, inputs: I| loss(model, inputs).into();
        Replica::prepare(self, inputs, StepFn::new::<F>(&mut call))
    }

    fn step_memory<I, F, R>(&mut self, inputs: I, mut loss: F) -> Result<usize, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&E::Model, I) -> R,
        R: Into<Loss>,
    {
        let mut call = |model: &E::Model, inputs: I| loss(model, inputs).into();
        Replica::step_memory(self, inputs, StepFn::new::<F>(&mut call))
    }

    fn forward_with<I, F, O>(&self, inputs: I, forward: F) -> Result<O, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&E::Model, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        self.engine().forward(inputs, forward)
    }

    fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error> {
        Replica::load(self, source)
    }

    fn assemble(&self) -> Result<E::Model, Error> {
        self.engine().assemble()
    }

    fn sync_buffers(self) -> Result<Self, Error> {
        Replica::sync_buffers(self)
    }

    fn join<B: IntoIterator>(&self, batches: B) -> Join<B::IntoIter> {
        Join::new(batches.into_iter(), Some(self.control().clone()))
    }

    fn join_loader<'a, O>(&self, loader: &'a dyn DataLoader<O>) -> JoinLoader<'a, O> {
        JoinLoader::new(loader, Some(self.control().clone()))
    }

    fn counters(&self) -> StepCounters {
        Replica::counters(self)
    }

    fn report(&self) -> Report {
        Report { replicas: self.group().size(), sharding: self.sharding(), ..self.engine().report() }
    }

    fn param_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
        self.engine().param_slices()
    }

    fn held_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
        self.engine().held_slices()
    }

    fn moments_restored(&self, params: &HashSet<ParamId>) {
        self.engine().moments_restored(params);
    }

    fn steps_restored(&mut self, steps: u64) {
        Replica::steps_restored(self, steps);
    }

    fn random_step(&self) -> u64 {
        self.engine().random_step()
    }

    fn set_random_step(&self, step: u64) {
        self.engine().set_random_step(step);
    }

    fn random(&self) -> Option<RandomSource> {
        self.engine().random()
    }

    fn split_params(&self) -> Vec<SplitParam> {
        self.engine().split_params()
    }

    fn groups(&self) -> Vec<Communicator> {
        self.engine().groups().into_iter().chain([self.control().clone()]).collect()
    }

    /// Replicas hold the same gradients, bit for bit, and each measures its own; sharded ones hold rows of them.
    fn gradient_layout(&self) -> GradientLayout {
        let averaged = Some((self.control().clone(), self.non_finite_param()));
        let mut layout = GradientLayout { averaged, ..self.engine().gradient_layout() };
        let rows = self.shards().map(|shards| shards.between().clone());
        layout.groups = rows.into_iter().chain(layout.groups).collect();
        layout.step = self.steps();
        layout
    }

    fn shards(&self) -> Option<ShardComms> {
        Replica::shards(self)
    }

    fn holds_rows(&self, id: ParamId) -> bool {
        Replica::holds_rows(self, id)
    }

    fn update_shards(self, update: &mut UpdateShards<'_>) -> Result<Self, Error> {
        Replica::update_shards(self, update)
    }

    fn trains(&self) -> bool {
        self.engine().trains()
    }

    fn checked_optimizers(&self) -> &CheckedOptimizers {
        self.engine().checked_optimizers()
    }
}

macro_rules! without_replicas {
    ($($wrapper:ident),*) => {$(
        impl<M: Module> Sealed for $wrapper<M> {}

        impl<M: Module> ParallelModule for $wrapper<M> {
            type Model = M;

            fn local(&self) -> &M {
                StepEngine::local(self)
            }

            fn replica(&self) -> (usize, usize) {
                (0, 1)
            }

            fn step_micro_batches<I, F, R>(
                &mut self,
                micro_batches: impl IntoIterator<Item = I>,
                mut loss: F,
            ) -> Result<Step, Error>
            where
                I: TensorTree + Clone,
                F: FnMut(&M, I) -> R,
                R: Into<Loss>,
            {
                let mut call = |model: &M, inputs: I| loss(model, inputs).into();
                unreplicated::step(self, micro_batches, StepFn::new::<F>(&mut call))
            }

            fn prepare<I, F, R>(&mut self, inputs: I, mut loss: F) -> Result<(), Error>
            where
                I: TensorTree + Clone,
                F: FnMut(&M, I) -> R,
                R: Into<Loss>,
            {
                let mut call = |model: &M, inputs: I| loss(model, inputs).into();
                match self.is_prepared() {
                    true => Ok(()),
                    false => self.settle_alone(inputs, StepFn::new::<F>(&mut call)),
                }
            }

            fn step_memory<I, F, R>(&mut self, inputs: I, mut loss: F) -> Result<usize, Error>
            where
                I: TensorTree + Clone,
                F: FnMut(&M, I) -> R,
                R: Into<Loss>,
            {
                let mut call = |model: &M, inputs: I| loss(model, inputs).into();
                StepEngine::step_memory(self, inputs, StepFn::new::<F>(&mut call), true)
            }

            fn forward_with<I, F, O>(&self, inputs: I, forward: F) -> Result<O, Error>
            where
                I: TensorTree + Clone,
                F: FnMut(&M, I) -> O,
                O: TensorTree + Clone + Send + 'static,
            {
                StepEngine::forward(self, inputs, forward)
            }

            fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error> {
                StepEngine::load(self, source)
            }

            fn assemble(&self) -> Result<M, Error> {
                StepEngine::assemble(self)
            }

            fn sync_buffers(self) -> Result<Self, Error> {
                Ok(self)
            }

            fn join<B: IntoIterator>(&self, batches: B) -> Join<B::IntoIter> {
                Join::new(batches.into_iter(), None)
            }

            fn join_loader<'a, O>(&self, loader: &'a dyn DataLoader<O>) -> JoinLoader<'a, O> {
                JoinLoader::new(loader, None)
            }

            fn counters(&self) -> StepCounters {
                StepEngine::counters(self)
            }

            fn report(&self) -> Report {
                Reports::report(self)
            }

            fn param_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
                StepEngine::param_slices(self)
            }

            fn held_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
                StepEngine::held_slices(self)
            }

            fn moments_restored(&self, params: &HashSet<ParamId>) {
                StepEngine::moments_restored(self, params);
            }

            fn random_step(&self) -> u64 {
                StepEngine::random_step(self)
            }

            fn set_random_step(&self, step: u64) {
                StepEngine::set_random_step(self, step);
            }

            fn random(&self) -> Option<RandomSource> {
                StepEngine::random(self)
            }

            fn split_params(&self) -> Vec<SplitParam> {
                StepEngine::split_params(self)
            }

            fn groups(&self) -> Vec<Communicator> {
                StepEngine::groups(self)
            }

            fn gradient_layout(&self) -> GradientLayout {
                StepEngine::gradient_layout(self)
            }

            fn trains(&self) -> bool {
                StepEngine::trains(self)
            }

            fn checked_optimizers(&self) -> &CheckedOptimizers {
                StepEngine::checked_optimizers(self)
            }
        }
    )*};
}
without_replicas!(Sharded, Pipelined);

impl<M: Module> Pipelined<M> {
    /// Joins this pipeline with its replicas along another axis: each trains on a batch of its own, and gradients are
    /// averaged over `group` once the pipeline has drained. Collective over `group`, in which every rank holds the same
    /// stages: the axis of a [`Mesh`](crate::mesh::Mesh) that is not that of the pipeline.
    ///
    /// All replicas take the values and ids of the first, and draw different random numbers: now, if the model is cut
    /// already (by paths, or after [`prepare`](Self::prepare)), or in the first step, which cuts it, and to which every
    /// replica brings a micro-batch then. Lazy parameters of this rank's stages are made then; if the replicas [divide
    /// the parameters](crate::sharding::Sharding::Parameters), they stay lazy, and all of this is done now, but for the
    /// cut.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`] if the ranks of `group` hold different stages; those of [`Communicator`].
    pub fn data_parallel(self, group: &Communicator, config: DataParallelConfig) -> Result<Replica<Self>, Error> {
        self.same_parts(group)?;
        self.draw_as(group.rank());
        Replica::of_parts(self, group, config, Self::divided)
    }
}

impl<M: Module> Sharded<M> {
    /// Cuts this split model into the stages of a pipeline along another axis: every rank holds its parts of the
    /// parameters of its stages. Collective over `group`, in which every rank holds the same parts: the axis of a
    /// [`Mesh`](crate::mesh::Mesh) that is not that of the split.
    ///
    /// # Errors
    /// Those of [`PipelineParallel::pipeline_parallel`](crate::pipeline_parallel::PipelineParallel::pipeline_parallel);
    /// [`Error::ModelMismatch`] if the ranks of `group` hold different parts.
    pub fn pipeline_parallel(self, group: &Communicator, config: PipelineConfig) -> Result<Pipelined<M>, Error> {
        self.split().same_parts(group)?;
        let (local, split, same_inputs) = self.into_parts();
        Pipelined::new(local, Some((split, same_inputs)), group, config)
    }

    /// Joins this split model with its replicas along another axis: each trains on inputs of its own, and gradients are
    /// averaged over `group` while the backward pass still runs. Collective over `group`, in which every rank holds the
    /// same parts: the axis of a [`Mesh`](crate::mesh::Mesh) that is not the one of the split.
    ///
    /// All replicas take the values and ids of the first. Lazy parameters are made now, unless the replicas
    /// [divide the parameters](crate::sharding::Sharding::Parameters). They draw different random numbers, all of the
    /// same [seed](Sharded::seed), from the [step](Sharded::random_step) on that this model has reached.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`] if the ranks of `group` hold different parts; those of [`Communicator`].
    pub fn data_parallel(self, group: &Communicator, config: DataParallelConfig) -> Result<Replica<Self>, Error> {
        self.split().same_parts(group)?;
        self.draw_as(group.rank());
        Replica::of_parts(self, group, config, Self::divided)
    }
}
