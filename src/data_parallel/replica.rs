//! A model that is one of several replicas.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};

use super::changes::Forward;
use super::hook::{AttachHooks, detach};
use super::join::Join;
use super::loss::Loss;
use super::reducer::{Reduced, Reducer};
use super::step::{SoFar, Step, StepCounters};
use super::sync_batch_norm::SyncBatchNorm;
use crate::Error;
use crate::graph::GraphInputs;
use crate::tensor::PlainTensor;

/// A model that is one of several replicas of a group. Dereferences to the model and is itself a burn [`Module`] with the
/// same parameter paths, so optimizers, records and visitors take it as they take the model.
///
/// Between two optimizer steps, call either [`step`](Self::step), or [`backward`](Self::backward), preceded by any number
/// of [`accumulate`](Self::accumulate)s. Every rank makes the same number of `backward`s; not of `accumulate`s.
#[derive(Clone)]
pub struct Replica<M> {
    pub(super) module: M,
    pub(super) reducer: Arc<Reducer>,
    /// The micro-batches of the step so far.
    so_far: SoFar,
    waited: Duration,
    /// The captured steps with synchronised batch norm, once there are any.
    synchronized: Arc<Mutex<Option<SyncBatchNorm>>>,
}

impl<M: Module> Replica<M> {
    pub(super) fn new(module: M, reducer: Arc<Reducer>) -> Self {
        Self { module, reducer, so_far: SoFar::default(), synchronized: Arc::default(), waited: Duration::ZERO }
    }

    /// This replica of a changed model.
    pub(super) fn change(self, change: impl FnOnce(M) -> M) -> Self {
        Self { module: change(self.module), ..self }
    }

    /// Another replica, of another state of the model.
    pub(super) fn with(&self, module: M) -> Self {
        Self { module, reducer: self.reducer.clone(), synchronized: self.synchronized.clone(), ..*self }
    }

    /// The model as it was before it was wrapped, but for its values. If it has adapters (LoRA) or other reparameterizations of
    /// its own, parameters keep a hook that does nothing once all clones of the replica are gone.
    pub fn into_inner(self) -> M {
        let module = detach(self.module);
        // Burn looks at the parameters to take the hooks away.
        self.reducer.forget_uses();
        module
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
            statistics: self.lock_synchronized().as_ref().map(SyncBatchNorm::counters).unwrap_or_default(),
            waited: self.waited,
        }
    }

    /// Runs forward and backward on this rank's share of the batch and averages over the group. Layers that were put in since
    /// the last step get the values of rank 0 before.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`], the same on all ranks, if the model has changed in different ways; [`Error::Graph`] if
    /// parameters of one id have different values; the error of the world.
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
    /// As [`step`](Self::step).
    pub fn step_micro_batches<I, L: Into<Loss>>(
        &mut self,
        micro_batches: impl IntoIterator<Item = I>,
        mut forward: impl FnMut(&M, I) -> L,
    ) -> Result<Step, Error> {
        let before = self.counters();
        self.admit(Forward::Ahead)?;
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
        Ok(Step { loss: reduced.loss, weight: reduced.weight, grads, counters: self.counters() - before })
    }

    /// Runs backward and returns the gradients of the mean loss over the group and over what was
    /// [accumulated](Self::accumulate) before. Buckets are reduced while backward still runs.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`], the same on all ranks, if the model has changed in different ways, or has new layers of unequal
    /// values; [`Error::Graph`] if parameters of one id have different values; the error of the world.
    pub fn backward(&mut self, loss: impl Into<Loss>) -> Result<GradientsParams, Error> {
        self.admit(Forward::Done)?;
        self.reduce(Some(loss.into())).map(|(_, grads)| grads)
    }

    /// Takes part in the `backward` of the others, on a rank that has no data left.
    ///
    /// # Errors
    /// The error of the world.
    pub fn backward_without_data(&mut self) -> Result<GradientsParams, Error> {
        self.admit(Forward::Done)?;
        self.reduce(None).map(|(_, grads)| grads)
    }

    /// Runs backward on a micro-batch that is not the last of its step. Communicates nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the weight of the loss is negative or not finite.
    pub fn accumulate(&mut self, loss: impl Into<Loss>) -> Result<(), Error> {
        self.run_backward(loss.into(), false)?;
        self.reducer.forget_uses();
        Ok(())
    }

    /// [`step_micro_batches`](Self::step_micro_batches) with **synchronised batch norm**: every burn `BatchNorm` takes its
    /// statistics over the rows of all ranks, as on one device with the whole batch, and updates its running statistics
    /// with them (PyTorch's `SyncBatchNorm`; Peng et al. 2018, arXiv:1711.07240). The model is not edited: the step is
    /// captured as a [graph](crate::graph) once per shape of its inputs, and collectives are put into it.
    ///
    /// Each micro-batch comes with its weight, the number of items that `forward` averages its loss over. What a captured
    /// step cannot do is said in [`graph`](crate::graph): above all, `forward` must not read tensors on the host. It is run
    /// only to capture; what it decides is the same in every step.
    ///
    /// # Errors
    ///
    /// [`Error::Graph`] if the step cannot be captured; [`Error::InvalidArgument`], on every rank, if the ranks bring
    /// different numbers of micro-batches or one of no weight, since they meet inside of each; the error of the world.
    pub fn step_sync_batch_norm<I: GraphInputs + Clone>(
        &mut self,
        micro_batches: Vec<(I, f64)>,
        forward: impl Fn(&M, I) -> Tensor<1>,
    ) -> Result<Step, Error> {
        let before = self.counters();
        self.admit(Forward::Ahead)?;
        let synchronized = self.synchronized.clone();
        let mut synchronized = synchronized.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let steps = match &mut *synchronized {
            Some(steps) => steps,
            none => none.insert(SyncBatchNorm::new(self.reducer.data())?),
        };
        let loss = steps.run(&self.module, &self.reducer, micro_batches, forward);
        drop(synchronized);
        let (reduced, grads) = self.finish(loss)?;
        Ok(Step { loss: reduced.loss, weight: reduced.weight, grads, counters: self.counters() - before })
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

    /// Makes sure that everything that the model trains now takes part in the step.
    fn admit(&mut self, forward: Forward) -> Result<(), Error> {
        let admitted = self.reducer.admit(&self.module, forward).inspect_err(|_| {
            self.so_far = SoFar::default();
            self.reducer.discard();
        })?;
        if let Some(module) = admitted
            && self.reducer.data().size() > 1
        {
            let numbers = self.reducer.numbers();
            self.module = module.apply_reparameterization(AttachHooks::new(&self.reducer, &numbers));
        }
        Ok(())
    }

    fn reduce(&mut self, last: Option<Loss>) -> Result<(Reduced, GradientsParams), Error> {
        let backward = match last {
            Some(loss) => self.run_backward(loss, true),
            None => {
                self.reducer.open(self.so_far.contribution);
                Ok(())
            }
        };
        self.finish(backward.map(|()| self.so_far.loss))
    }

    /// Waits for the reduction and hands it to burn, after a backward that brought this sum of losses.
    fn finish(&mut self, loss: Result<f64, Error>) -> Result<(Reduced, GradientsParams), Error> {
        self.so_far = SoFar::default();
        let outcome = loss.and_then(|loss| self.reducer.close(loss)).and_then(|mut reduced| {
            self.waited += reduced.waited;
            register(&self.reducer, &mut reduced, &self.module).map(|grads| (reduced, grads))
        });
        outcome.inspect_err(|_| self.reducer.discard())
    }

    /// Backward of one micro-batch; the reduction is opened first if it is the `last`.
    fn run_backward(&mut self, loss: Loss, last: bool) -> Result<(), Error> {
        if !loss.weight.is_finite() || loss.weight < 0.0 {
            let problem = format!("its weight is {}, it must be finite and not negative", loss.weight);
            return Err(self.reducer.refuse("Loss", problem));
        }
        if loss.weight > 0.0 && !loss.value.is_tracked() {
            let problem = "it depends on no parameter that is trained: was it computed on a device without autodiff, or \
                           with every parameter frozen?";
            return Err(self.reducer.refuse("Loss", problem.into()));
        }
        let elements = loss.value.dims()[0];
        if elements != 1 {
            let problem =
                format!("it must have one element, but it has {elements}: reduce it with `.mean()` or `.sum()`");
            return Err(self.reducer.refuse("Loss", problem));
        }
        let (value, weight, summed) = (loss.value.clone().inner(), loss.weight, loss.summed);
        self.so_far.add(0.0, weight);
        let contribution = self.so_far.contribution;
        if last {
            self.reducer.open(contribution);
        }
        if loss.weight == 0.0 {
            return Ok(());
        }
        let factor = loss.factor(contribution.unit);
        let scaled = if factor == 1.0 { loss.value } else { loss.value.mul_scalar(factor) };
        let mut grads = scaled.backward();
        self.module.visit(&mut Collect { reducer: &self.reducer, grads: &mut grads });
        // Not before: a device would have to finish the forward first, with nothing else to do meanwhile.
        let value = value.into_scalar::<f64>();
        self.so_far.loss += if summed { value } else { value * weight };
        Ok(())
    }

    fn lock_synchronized(&self) -> MutexGuard<'_, Option<SyncBatchNorm>> {
        self.synchronized.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Takes the gradients that stayed with burn: of parameters without a hook, or on a device that is not known here.
struct Collect<'a> {
    reducer: &'a Reducer,
    grads: &'a mut Gradients,
}

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = param.base().grad_remove(self.grads) else { return };
        match self.reducer.number(param.id) {
            Some(number) => self.reducer.add(number, PlainTensor::from(gradient)),
            None => self.reducer.add_unnumbered(param.id, PlainTensor::from(gradient)),
        }
    }
}

/// Hands the reduced gradients to burn, on the devices of their parameters.
///
/// # Errors
/// [`Error::Graph`] if a gradient has another rank than its parameter.
pub(crate) fn register<M: Module>(
    reducer: &Reducer,
    reduced: &mut Reduced,
    module: &M,
) -> Result<GradientsParams, Error> {
    let mut register = Register { reducer, reduced, grads: GradientsParams::new(), error: None };
    module.visit(&mut register);
    register.error.map_or(Ok(register.grads), Err)
}

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
        match gradient.moved_to(&param.base().device().inner()).float::<D>() {
            Ok(gradient) => self.grads.register(param.id, gradient),
            Err(error) => self.error = Some(error),
        }
    }
}
