//! A model that is one of several replicas.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use burn::backend::flex::FlexTensor;
use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Gradients, Tensor};

use super::join::Join;
use super::loss::Loss;
use super::reducer::{Contribution, Reduced, Reducer};
use crate::Error;
use crate::comm::{Counters, Payload};

/// A model that is one of several replicas of a group. Dereferences to the model and is itself a burn [`Module`] with the
/// same parameter paths, so optimizers, records and visitors take it as they take the model.
///
/// Between two optimizer steps, call either [`step`](Self::step), or [`backward`](Self::backward), preceded by any number
/// of [`accumulate`](Self::accumulate)s. Every rank makes the same number of `backward`s; not of `accumulate`s.
#[derive(Clone)]
pub struct Replica<M> {
    module: M,
    reducer: Arc<Reducer>,
    /// Contribution of the micro-batches accumulated so far.
    accumulated: Contribution,
}

/// What a training step gave.
#[derive(Debug)]
pub struct Step {
    /// Mean loss over everything that all ranks brought; NaN if nobody brought anything.
    pub loss: f64,
    /// Weight (number of items) over all ranks.
    pub weight: f64,
    /// Gradients of that mean loss, for burn's optimizers; bit-identical on all ranks.
    pub grads: GradientsParams,
    /// What the step cost in communication on this rank.
    pub counters: StepCounters,
}

/// What a step cost in communication on one rank.
#[derive(Debug, Clone, Default)]
pub struct StepCounters {
    /// The buckets: one collective for each.
    pub gradients: Counters,
    /// The few numbers that go with them: weights, losses, which parameters were used.
    pub control: Counters,
    /// Time for which the step was held up, after its backward, by reductions that were not finished. The times in the
    /// other two count the communication itself, most of it in the background of the backward.
    pub waited: Duration,
}

impl<M: Module> Replica<M> {
    pub(super) fn new(module: M, reducer: Arc<Reducer>) -> Self {
        Self { module, reducer, accumulated: Contribution::default() }
    }

    /// The model. Its hooks do nothing once the replica is gone.
    pub fn into_inner(self) -> M {
        self.module
    }

    /// Number of buckets in which gradients are reduced: collectives a step. It may change after the first step, when the
    /// order is known in which backward completes the gradients.
    pub fn buckets(&self) -> usize {
        self.reducer.buckets()
    }

    /// What this replica has communicated since it was made.
    pub fn counters(&self) -> StepCounters {
        StepCounters {
            gradients: self.reducer.data().counters(),
            control: self.reducer.control().counters(),
            waited: self.reducer.waited(),
        }
    }

    /// Runs forward and backward on this rank's share of the batch and averages over the group.
    ///
    /// # Errors
    /// The error of the world, or the one `forward` returns.
    pub fn step<I, L: Into<Loss>>(&mut self, input: I, forward: impl FnOnce(&M, I) -> L) -> Result<Step, Error> {
        let mut forward = Some(forward);
        self.step_micro_batches([input], |module, input| match forward.take() {
            Some(forward) => forward(module, input).into(),
            None => unreachable!("there is one input"),
        })
    }

    /// Runs forward and backward on every micro-batch and averages over all of them and over the group. Nothing is
    /// communicated before the last one. Ranks may bring different numbers of micro-batches, also none.
    ///
    /// # Errors
    /// The error of the world.
    pub fn step_micro_batches<I, L: Into<Loss>>(
        &mut self,
        micro_batches: impl IntoIterator<Item = I>,
        mut forward: impl FnMut(&M, I) -> L,
    ) -> Result<Step, Error> {
        let before = self.counters();
        let mut micro_batches = micro_batches.into_iter().peekable();
        let mut last = None;
        while let Some(input) = micro_batches.next() {
            let loss = forward(&self.module, input).into();
            if micro_batches.peek().is_none() {
                last = Some(loss);
            } else {
                self.accumulate(loss)?;
            }
        }
        let (reduced, grads) = self.reduce(last)?;
        let now = self.counters();
        let counters = StepCounters {
            gradients: now.gradients - before.gradients,
            control: now.control - before.control,
            waited: now.waited - before.waited,
        };
        Ok(Step { loss: reduced.loss, weight: reduced.weight, grads, counters })
    }

    /// Runs backward and returns the gradients of the mean loss over the group and over what was
    /// [accumulated](Self::accumulate) before. Buckets are reduced while backward still runs.
    ///
    /// # Errors
    /// The error of the world.
    pub fn backward(&mut self, loss: impl Into<Loss>) -> Result<GradientsParams, Error> {
        self.reduce(Some(loss.into())).map(|(_, grads)| grads)
    }

    /// Takes part in the `backward` of the others, on a rank that has no data left.
    ///
    /// # Errors
    /// The error of the world.
    pub fn backward_without_data(&mut self) -> Result<GradientsParams, Error> {
        self.reduce(None).map(|(_, grads)| grads)
    }

    /// Runs backward on a micro-batch that is not the last of its step. Communicates nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the weight of the loss is negative or not finite.
    pub fn accumulate(&mut self, loss: impl Into<Loss>) -> Result<(), Error> {
        let unheard = self.run_backward(loss.into(), false)?;
        for (param, gradient) in unheard {
            self.reducer.keep(param, gradient);
        }
        self.reducer.end_micro_batch();
        Ok(())
    }

    /// Iterates over this rank's batches until every rank has run out, so that ranks with different numbers of batches
    /// finish together: `Some(batch)`, then `None` while others still have one, to be given to
    /// [`step_micro_batches`](Self::step_micro_batches) as no micro-batch.
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
    pub fn join<I: IntoIterator>(&self, batches: I) -> Join<I::IntoIter> {
        Join::new(batches.into_iter(), self.reducer.control().clone())
    }

    /// Gives everything that is not trained, running statistics above all, the values of rank 0. Before saving or
    /// evaluating, when ranks have seen different data. Collective.
    ///
    /// # Errors
    /// The error of the world.
    pub fn sync_buffers(self) -> Result<Self, Error> {
        let module = super::structure::broadcast_buffers(self.module, self.reducer.control())?;
        Ok(Self { module, ..self })
    }

    fn reduce(&mut self, last: Option<Loss>) -> Result<(Reduced, GradientsParams), Error> {
        let outcome = self.try_reduce(last);
        self.accumulated = Contribution::default();
        if outcome.is_err() {
            self.reducer.discard();
        }
        outcome
    }

    fn try_reduce(&mut self, last: Option<Loss>) -> Result<(Reduced, GradientsParams), Error> {
        let unheard = match last {
            Some(loss) => self.run_backward(loss, true)?,
            None => {
                self.reducer.open(self.accumulated);
                Vec::new()
            }
        };
        let mut reduced = self.reducer.close(unheard)?;
        let mut register =
            Register { reducer: &self.reducer, reduced: &mut reduced, grads: GradientsParams::new(), error: None };
        self.module.visit(&mut register);
        match register.error.take() {
            Some(error) => Err(error),
            None => {
                let grads = register.grads;
                Ok((reduced, grads))
            }
        }
    }

    /// Backward of one micro-batch; the reduction is opened first if it is the `last`. Returns the gradients that no hook
    /// has heard of.
    fn run_backward(&mut self, loss: Loss, last: bool) -> Result<Vec<(usize, FlexTensor)>, Error> {
        if !loss.weight.is_finite() || loss.weight < 0.0 {
            let error =
                Error::invalid("Loss", format!("its weight is {}, it must be finite and not negative", loss.weight));
            self.reducer.control().fail(error.clone());
            return Err(error);
        }
        let value = loss.value.clone().inner().into_scalar::<f64>();
        let mut sum = self.accumulated;
        if loss.weight > 0.0 {
            if sum.unit == 0.0 {
                sum.unit = loss.weight;
            }
            sum.weight += loss.weight;
            sum.loss += if loss.summed { value } else { value * loss.weight };
        }
        self.accumulated = sum;
        if last {
            self.reducer.open(sum);
        }
        if loss.weight == 0.0 {
            return Ok(Vec::new());
        }
        let factor = loss.factor(sum.unit);
        let scaled = if factor == 1.0 { loss.value } else { loss.value.mul_scalar(factor) };
        let mut grads = scaled.backward();
        let mut collect = Collect { reducer: &self.reducer, grads: &mut grads, found: Vec::new(), error: None };
        self.module.visit(&mut collect);
        match collect.error {
            Some(error) => Err(error),
            None => Ok(collect.found),
        }
    }
}

/// Takes the gradients that stayed with burn: of parameters without a hook, or on another device.
struct Collect<'a> {
    reducer: &'a Reducer,
    grads: &'a mut Gradients,
    found: Vec<(usize, FlexTensor)>,
    error: Option<Error>,
}

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(number) = self.reducer.number(param.id) else { return };
        let Some(gradient) = param.base().grad_remove(self.grads) else { return };
        match gradient.into_host() {
            Ok((gradient, _)) => self.found.push((number, gradient)),
            Err(error) => self.error = Some(error),
        }
    }
}

/// Hands the reduced gradients to burn, on the devices of their parameters.
struct Register<'a> {
    reducer: &'a Reducer,
    reduced: &'a mut Reduced,
    grads: GradientsParams,
    error: Option<Error>,
}

impl ModuleVisitor for Register<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let number = self.reducer.number(param.id);
        let Some(gradient) = number.and_then(|number| self.reduced.gradients.remove(&number)) else { return };
        let home = crate::comm::TensorHome::plain(param.base().device().inner());
        match Tensor::<D>::from_host(gradient, &home) {
            Ok(gradient) => self.grads.register(param.id, gradient),
            Err(error) => self.error = Some(error),
        }
    }
}

impl<M> Deref for Replica<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.module
    }
}

impl<M> DerefMut for Replica<M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.module
    }
}

impl<M: fmt::Debug> fmt::Debug for Replica<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica").field("module", &self.module).field("group", self.reducer.data()).finish()
    }
}

impl<M: fmt::Display> fmt::Display for Replica<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.module.fmt(f)
    }
}

impl<M: Module> Replica<M> {
    fn with(&self, module: M) -> Self {
        Self { module, reducer: self.reducer.clone(), accumulated: self.accumulated }
    }
}

/// A replica is seen through: paths and parameters are those of the model.
impl<M: Module> Module for Replica<M> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.module.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self { module: self.module.fork(device), ..self }
    }

    fn to_device(self, device: &Device) -> Self {
        Self { module: self.module.to_device(device), ..self }
    }

    fn train(self) -> Self {
        Self { module: self.module.train(), ..self }
    }

    fn valid(&self) -> Self {
        self.with(self.module.valid())
    }

    fn materialize(self) -> Self {
        Self { module: self.module.materialize(), ..self }
    }

    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        self.module.visit(visitor);
    }

    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        Self { module: self.module.map(mapper), ..self }
    }
}
