//! The trait that all wrappers implement.

use std::collections::{HashMap, HashSet};

use burn::data::dataloader::DataLoader;
use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Module, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer};

use super::Report;
use super::norm::{self, Clip, Clipped};
use super::optimize::{ShardedStep, SplitStep};
use crate::Error;
use crate::comm::Communicator;
use crate::data_parallel::{Join, JoinLoader};
use crate::graph::{CheckedOptimizers, GradientLayout, RandomSource, SplitParam, TensorTree};
use crate::params::{ParamSlice, SliceSource};
use crate::sharding::{ShardComms, ShardParams, UpdatedShards};
use crate::step::{Loss, Step, StepCounters};

/// Takes this rank's rows, and returns those that it has changed.
pub type UpdateShards<'a> = dyn FnMut(ShardParams, &ShardComms) -> Result<UpdatedShards, Error> + 'a;

pub(super) mod sealed {
    pub trait Sealed {}
}

/// A model that is spread over ranks, in whatever way. Implemented by [`Parallel`](super::Parallel),
/// [`Replica`](crate::data_parallel::Replica), [`Sharded`](crate::tensor_parallel::Sharded) and
/// [`Pipelined`](crate::pipeline_parallel::Pipelined); nothing outside this crate can implement it.
///
/// It is a burn [`Module`] with the parameter paths of the model, so optimizers, records and visitors take it as they
/// take the model. Whatever it is spread over, it trains like one device on the whole batch.
///
/// # Who passes what
/// Ranks that share one copy of the model (those of a split, those of a pipeline) all pass the same whole inputs, which
/// is made sure of: in every step on CPUs, in every 100th on other devices. Replicas pass inputs of their own. All
/// calls but [`load`](Self::load), [`replica`](Self::replica), [`counters`](Self::counters) and
/// [`report`](Self::report) are collective.
///
/// # Order
/// A model is split first, then cut into stages, then replicated. Another order does not compile:
///
/// ```compile_fail,E0277
/// # use burn::nn::{Linear, LinearConfig};
/// # use burn_parallel::prelude::*;
/// # fn wrap(model: Linear, group: &Communicator, plan: Plan) -> Result<(), Error> {
/// model.data_parallel(group, DataParallelConfig::new())?.tensor_parallel(group, plan)?;
/// # Ok(())
/// # }
/// ```
///
/// # What is not here
/// [`backward`](crate::data_parallel::Replica::backward) and [`accumulate`](crate::data_parallel::Replica::accumulate)
/// need a loss that the model's own forward has computed: they are methods of replicas of eager models. To accumulate
/// gradients over micro-batches, whatever the model is spread over, is
/// [`step_micro_batches`](Self::step_micro_batches).
pub trait ParallelModule: Module + sealed::Sealed {
    /// The model that closures see.
    type Model: Module;

    /// This rank's part of the model, to look at its parameters. Its own forward is not the model's where layers are
    /// split, cut into stages or divided: that is [`forward_with`](Self::forward_with).
    fn local(&self) -> &Self::Model;

    /// Which of the replicas this rank belongs to, counted from 0, and how many there are: 0 and 1 without replicas. By
    /// this a training loop takes its share of the data, whatever the model is spread over.
    fn replica(&self) -> (usize, usize);

    /// Runs a training step, forward and backward, on this replica's share of the batch, and averages over the
    /// replicas.
    ///
    /// `loss` sees the model with the dims that it has as a whole, and returns a [`Loss`] or what becomes one: a bare
    /// tensor is the mean over the rows of the inputs. With a model that is split or cut, the step is recorded when
    /// inputs of these shapes come for the first time, as [`graph`](crate::graph) tells, which also says what cannot
    /// be; after that `loss` is called again only if it captures something ([`GraphCache`](crate::graph::GraphCache)
    /// says why). A pipeline divides the rows of the inputs into its micro-batches.
    ///
    /// # Errors
    /// [`Error::Graph`] if the step cannot be recorded; [`Error::Plan`] if an input cannot be split or the model not be
    /// cut as planned; [`Error::Pipeline`] if the inputs cannot be divided; [`Error::Stage`] on all ranks, if a stage
    /// fails on one; [`Error::InvalidArgument`] if the loss is not one number, ranks that share the model were given
    /// different inputs, or a record has brought other parameters; the error of the world.
    fn step<I, F, R>(&mut self, inputs: I, loss: F) -> Result<Step, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&Self::Model, I) -> R,
        R: Into<Loss>,
    {
        self.step_micro_batches([inputs], loss)
    }

    /// As [`step`](Self::step), on every micro-batch, and averages over all of them and over the replicas. Nothing is
    /// communicated for that before the last one, whose backward the reduction overlaps with. Replicas may bring
    /// different numbers of micro-batches, also none. (Each goes through a pipeline as a batch of its own.)
    ///
    /// # Errors
    /// As [`step`](Self::step).
    fn step_micro_batches<I, F, R>(
        &mut self,
        micro_batches: impl IntoIterator<Item = I>,
        loss: F,
    ) -> Result<Step, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&Self::Model, I) -> R,
        R: Into<Loss>;

    /// Finds out which rank holds which parameters, where the first step would: a pipeline is cut for a micro-batch of
    /// these inputs, and nothing is run. Before a model is [loaded](Self::load), saved or
    /// [restored](crate::checkpoint), unless the cut is given by paths; and before a pipeline is
    /// [evaluated](Self::forward_with) that has not been trained yet. Else it does nothing. Collective.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    fn prepare<I, F, R>(&mut self, inputs: I, loss: F) -> Result<(), Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&Self::Model, I) -> R,
        R: Into<Loss>;

    /// The most bytes that a step of one micro-batch of such inputs has alive on this rank, beside parameters, inputs
    /// and the state of optimizers, as far as that is known without running it: of the step as it is captured,
    /// partitioned, cut and scheduled, in which each tensor is freed after its last use, with gathered parameters and
    /// gradients. Nothing is run but what [`prepare`](Self::prepare) does; captured steps are kept for when they are.
    /// An eager step needs as much or more. Collective.
    ///
    /// # Errors
    /// As [`step`](Self::step); [`Error::Graph`] also if an eager step cannot be captured.
    fn step_memory<I, F, R>(&mut self, inputs: I, loss: F) -> Result<usize, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&Self::Model, I) -> R,
        R: Into<Loss>;

    /// Runs a forward pass for evaluation: what `forward` gives, without autodiff, whole on every rank that shares the
    /// model. Replicas evaluate each for itself, unless they [divide the
    /// parameters](crate::sharding::Sharding::Parameters): then each calls this as often as the others, with inputs of
    /// its own.
    ///
    /// The model is in evaluation mode, as after [`Module::valid`]: no dropout, running statistics in batch norms.
    /// Outputs are a tensor or a structure of tensors. Recorded like [`step`](Self::step); a pipeline puts the outputs
    /// of its micro-batches together along their first dim.
    ///
    /// # Errors
    /// As [`step`](Self::step); [`Error::Pipeline`] if a pipeline is not cut yet.
    fn forward_with<I, F, O>(&self, inputs: I, forward: F) -> Result<O, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&Self::Model, I) -> O,
        O: TensorTree + Clone + Send + 'static;

    /// Updates the parameters with the gradients of a step: every optimizer of burn gives the update that it gives on
    /// one device.
    ///
    /// The first time that it meets an optimizer it makes sure that the optimizer has moments for no other parameters,
    /// and of their dims; and, where parameters are split or [divided by rows](crate::sharding), it tries out on small
    /// matrices whether the update of a part is the part of the update. Element-wise optimizers (SGD, Adam, AdamW, ...)
    /// update parts. What is not updated so (by Muon, LAMB, Adafactor, or where burn clips each gradient by its norm)
    /// is joined, each parameter on one of the ranks that hold parts of it, which updates it and sends the others
    /// theirs; its state is whole there. Collective then, and with sharded replicas, which gather each other's rows;
    /// and the first time, when ranks that hold different parts make sure that none has the moments of another. An
    /// optimizer that is put in the place of another between two calls (`optim = ..`), or was given another state, is
    /// met for the first time, on all ranks alike.
    ///
    /// A [`skipped`](Step::skipped) step leaves parameters and moments as they are.
    ///
    /// # The same on all ranks
    /// The learning rate and the optimizer, with its settings and its state, must be the same on all ranks (of a state
    /// that is divided each has its part), and a new optimizer takes the place of the old one on all of them after the
    /// same step; and so must be how the gradient was [clipped](Step::clip_grad_norm). Rates, states, clipping, and
    /// when an optimizer is new, are compared: the next step is an [`Error::Optimizer`] on all ranks if they differ,
    /// which names the ranks: the next of all for replicas; for the ranks of a split or a pipeline, the next in which
    /// they compare inputs. Of rates by groups of parameters that is compared which parameters of no group have;
    /// settings are not.
    ///
    /// # Errors
    /// [`Error::Optimizer`], which names a parameter if the optimizer was tried on one by itself; [`Error::Schedule`]
    /// if the schedule of the pipeline has no backward pass. The model is lost with it: keep a clone of one that is to
    /// live on. If the optimizer panics in an update, or has moments that do not fit, the world fails as well, since
    /// the other ranks may have updated theirs; so it does if an optimizer is refused before, but where the ranks that
    /// hold parts or rows of the parameters are all that there are, and all refuse it.
    fn optimize(
        self,
        optim: &mut ModuleOptimizer,
        lr: impl Into<ModuleLearningRate>,
        mut step: Step,
    ) -> Result<Self, Error> {
        if !self.trains() {
            return Err(Error::Schedule {
                problem: "it has no backward pass, so its steps give a loss and no gradients, and there is nothing to optimize by: \
                          train with another, as `1f1b`"
                    .into(),
            });
        }
        if step.skipped {
            return Ok(self);
        }
        // It holds the gradients, which are updated in place.
        drop(step.norm.take());
        let (lr, asked, grads) = (lr.into(), step.asked, step.grads);
        let (checked, split, groups) = (self.checked_optimizers().clone(), self.split_params(), self.groups());
        if self.shards().is_some() {
            let mut step = Some(ShardedStep { optim, lr, asked, grads, checked, split, groups });
            return self.update_shards(&mut |shards, comms| match step.take() {
                Some(step) => step.run(shards, comms),
                None => Ok(UpdatedShards::default()),
            });
        }
        SplitStep { optim, lr, asked, grads, checked, split, groups }.run(self, Self::local)
    }

    /// Gives all parameters the values that a store has under their paths. Each rank asks for what it holds only, and
    /// lazy parameters are never made whole: so a model is loaded that no rank could hold. Not collective; every rank
    /// has the same store. A pipeline that was not [prepared](crate::pipeline_parallel::Pipelined::prepare) reads the
    /// rest in its first step: what several stages share.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the source lacks a parameter, or has it with other dims than the whole one has;
    /// those of the source; [`Error::Pipeline`] if a pipeline is not cut yet:
    /// [`prepare`](crate::pipeline_parallel::Pipelined::prepare) it, or cut it by paths.
    fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error>;

    /// The whole model, on every rank.
    ///
    /// # Errors
    /// The error of the world.
    fn assemble(&self) -> Result<Self::Model, Error>;

    /// Gives everything that is not trained, running statistics above all, the values of the first replica: before
    /// saving or evaluating, when replicas have seen different data. Without replicas it does nothing.
    ///
    /// # Errors
    /// The error of the world.
    fn sync_buffers(self) -> Result<Self, Error>;

    /// Iterates over this rank's batches until every replica has run out, so that replicas with different numbers of
    /// batches finish together: `Some(batch)`, then `None` while others still have one, to be given to
    /// [`step_micro_batches`](Self::step_micro_batches) as no micro-batch. Without replicas it ends with the batches.
    /// Over a dataloader of burn use [`join_loader`](Self::join_loader).
    ///
    /// ```
    /// # use burn::nn::LinearConfig;
    /// # use burn::tensor::Tensor;
    /// # use burn_parallel::prelude::*;
    /// # launch::threads(2).run(|rank| {
    /// # let device = rank.device().autodiff();
    /// # let mut model = LinearConfig::new(3, 1).init(&device).data_parallel(&rank, DataParallelConfig::new())?;
    /// let batches = vec![Tensor::<2>::ones([4, 3], &device); 2 + rank.rank()]; // 2 on rank 0, 3 on rank 1
    /// let mut steps = 0;
    /// for batch in model.join(batches) {
    ///     let step = model.step_micro_batches(batch?, |model, input| model.forward(input).mean())?;
    ///     steps += 1;
    /// }
    /// assert_eq!(steps, 3);
    /// # Ok(()) }).unwrap();
    /// ```
    fn join<B: IntoIterator>(&self, batches: B) -> Join<B::IntoIter>;

    /// As [`join`](Self::join), over an epoch of one of burn's dataloaders: the items are batches, not `Result`s of the
    /// dataset, whose errors are errors on all ranks. So is a loader that ends before it has given all its items, as it
    /// does when one of its worker threads panics: `join(loader.iter())` would take that for the end of the epoch.
    fn join_loader<'a, O>(&self, loader: &'a dyn DataLoader<O>) -> JoinLoader<'a, O>;

    /// What this rank has communicated since it was wrapped.
    fn counters(&self) -> StepCounters;

    /// How the model is run, and what its captured steps were given.
    fn report(&self) -> Report;

    /// Measures gradients over all ranks, and clips them: those of
    /// [`Replica::backward`](crate::data_parallel::Replica::backward), for example. For those of a step there is
    /// [`Step::clip_grad_norm`].
    ///
    /// # Errors
    /// As [`Step::clip_grad_norm`].
    fn clip_grad_norm(&self, grads: GradientsParams, clip: impl Into<Clip>) -> Result<Clipped, Error> {
        norm::clip(self, grads, &self.gradient_layout(), clip.into())
    }

    /// The number of the step whose random numbers are drawn next, where steps are captured; 0 where they are eager,
    /// and draw from burn's own generator. Part of a [checkpoint](crate::checkpoint).
    fn random_step(&self) -> u64;

    /// Has the next captured step draw the random numbers of step number `step`: when training goes on. The same on
    /// every rank; shared by all clones.
    fn set_random_step(&self, step: u64);

    /// Has the next captured step draw random numbers by the places of its rows in the global batch: those of step
    /// number `step`, of rows number `first`, `first + stride` and so on. Dropout then is the same on any mesh and with
    /// any micro-batches, as if one device had the whole batch. To be called before each step, with a number of its own
    /// for each; shared by all clones.
    ///
    /// A replica whose share is the rows `a..b` passes `(step, a, 1)`; one that takes every n-th, as
    /// [`DistributedSampler`](crate::data_parallel::DistributedSampler) deals them out, `(step, replica, n)`. All ranks
    /// of a replica pass the same. Without this call numbers go by replica and micro-batch. It holds for what has the
    /// batch as its outermost dim; what else a step draws (with the batch in another place, or without one) depends on
    /// the mesh as before. Eager steps draw from burn's own generator, whatever is passed here.
    ///
    /// ```
    /// use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig};
    /// use burn::prelude::*;
    /// use burn_parallel::prelude::*;
    /// use burn_parallel::train::Engine;
    ///
    /// #[derive(Module, Debug)]
    /// struct Net { linear: Linear, dropout: Dropout }
    ///
    /// let losses = |replicas: usize| launch::threads(replicas).run(|world| {
    ///     let device = world.device().autodiff();
    ///     let linear = LinearConfig::new(4, 3).with_initializer(burn::nn::Initializer::Ones).init(&device);
    ///     let net = Net { linear, dropout: DropoutConfig::new(0.5).init() };
    ///     let mut model = net.parallelize(&world, &Strategy::new().with_engine(Engine::Captured))?;
    ///     let rows = 6 / replicas;
    ///     model.draw_rows(0, (world.rank() * rows) as u64, 1);
    ///     let x = Tensor::<2>::ones([rows, 4], &device);
    ///     let step = model.step(x, |net, x| net.dropout.forward(net.linear.forward(x)).mean())?;
    ///     Ok(step.loss.item())
    /// });
    /// let (one, three) = (losses(1)?[0], losses(3)?[0]);
    /// assert!((one - three).abs() < 1e-6);
    /// # Ok::<(), Error>(())
    /// ```
    fn draw_rows(&self, step: u64, first: u64, stride: u64) {
        if let Some(random) = self.random() {
            random.draw_rows(step, first, stride);
        }
    }

    #[doc(hidden)]
    fn random(&self) -> Option<RandomSource>;

    #[doc(hidden)]
    fn gradient_layout(&self) -> GradientLayout;

    #[doc(hidden)]
    fn param_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error>;

    #[doc(hidden)]
    fn held_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error>;

    #[doc(hidden)]
    fn moments_restored(&self, params: &HashSet<ParamId>);

    /// Goes on after so many steps, by which those count that measure or compare.
    #[doc(hidden)]
    fn steps_restored(&mut self, _steps: u64) {}

    #[doc(hidden)]
    fn split_params(&self) -> Vec<SplitParam>;

    /// The groups whose other ranks hold replicas or other parts of the model.
    #[doc(hidden)]
    fn groups(&self) -> Vec<Communicator>;

    #[doc(hidden)]
    fn trains(&self) -> bool;

    #[doc(hidden)]
    fn checked_optimizers(&self) -> &CheckedOptimizers;

    /// Among whom replicas divide the rows of what they hold, if they do.
    #[doc(hidden)]
    fn shards(&self) -> Option<ShardComms> {
        None
    }

    /// Whether this replica holds its rows of a parameter only, and not the whole, of which it updates its rows.
    #[doc(hidden)]
    fn holds_rows(&self, _id: ParamId) -> bool {
        false
    }

    /// Hands this rank's rows of the parameters that are trained to `update`, and gives all replicas those that it
    /// returns.
    #[doc(hidden)]
    fn update_shards(self, _update: &mut UpdateShards<'_>) -> Result<Self, Error> {
        Ok(self)
    }
}
