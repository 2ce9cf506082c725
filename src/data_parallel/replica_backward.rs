//! Steps of a replica whose own forward runs: `backward`, `accumulate`, and steps with synchronised batch norm.

use std::sync::Arc;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::changes::ForwardState;
use super::eager::Eager;
use super::known_params::Next;
use super::reducer::Reducer;
use super::reducer_sink::ReducerSink;
use super::replica::Replica;
use crate::Error;
use crate::graph::StepEngine;
use crate::params::FoundParams;
use crate::step::{Loss, Step};
use crate::tensor::TensorTree;

impl<M: Module> Replica<Eager<M>> {
    /// Runs backward and returns the gradients of the mean loss over the group and over what was
    /// [accumulated](Self::accumulate) before. Buckets are reduced while backward still runs. A bare tensor counts for
    /// 1 on each rank: there are no inputs here whose rows could be counted, see [`Loss`].
    ///
    /// Gradients that another backward through this model's parameters gives (one without the replica, or that of
    /// another replica which has its loss computed by this one, as in a GAN) stay with that.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`], the same on all ranks, if the model has changed in different ways, or has new layers
    /// of unequal values; [`Error::Graph`] if parameters of one id have different values; the error of the world.
    pub fn backward(&mut self, loss: impl Into<Loss>) -> Result<GradientsParams, Error> {
        let reducer = self.ready()?;
        let params = self.admit(&reducer, ForwardState::Done, Next::Head)?;
        let ran = self.run_backward(&reducer, &params, loss.into(), true);
        self.finish(&reducer, &params, ran, None).map(|(_, _, grads)| grads)
    }

    /// Takes part in the `backward` of the others, on a rank that has no data left.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if parameters are divided
    /// ([`Sharding::Parameters`](crate::sharding::Sharding::Parameters)) without
    /// [`allow_unused_parameters`](super::DataParallelConfig::with_allow_unused_parameters); the error of the world.
    pub fn backward_without_data(&mut self) -> Result<GradientsParams, Error> {
        let reducer = self.ready()?;
        if self.engine.gathers() && !reducer.says_what_is_gathered() {
            return Err(self.refuse_gathers(
                "backward_without_data",
                "a rank without data cannot know which parameters the forwards of the others use: set `allow_unused_parameters`, \
                 with which they say so, or take steps by `step_micro_batches`, with no micro-batch on this rank",
            ));
        }
        let params = self.admit(&reducer, ForwardState::Done, Next::Head)?;
        reducer.begin(self.loss_weight);
        self.finish(&reducer, &params, Ok(()), None).map(|(_, _, grads)| grads)
    }

    /// Runs backward on a micro-batch that is not the last of its step. Communicates nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the weight of the loss is negative or not finite.
    pub fn accumulate(&mut self, loss: impl Into<Loss>) -> Result<(), Error> {
        let reducer = self.ready()?;
        let params = FoundParams::of(self.engine.local());
        self.run_backward(&reducer, &params, loss.into(), false)?;
        reducer.forget_uses();
        Ok(())
    }

    /// A step of micro-batches with **synchronised batch norm**: every burn `BatchNorm` takes its
    /// statistics over the rows of all ranks, as on one device with the whole batch, and updates its running statistics
    /// with them (PyTorch's `SyncBatchNorm`; Peng et al. 2018, arXiv:1711.07240). The model is not edited: the step is
    /// captured as a [graph](crate::graph) once per shape of its inputs, and collectives are put into it.
    ///
    /// Each micro-batch comes with its weight, the number of items that `forward` averages its loss over. What a
    /// captured step cannot do is said in [`graph`](crate::graph): above all, `forward` must not read tensors on the
    /// host. It is run only to capture; what it decides is the same in every step.
    ///
    /// # Errors
    ///
    /// [`Error::Graph`] if the step cannot be captured; [`Error::InvalidArgument`], on every rank, if the ranks bring
    /// different numbers of micro-batches or one of no weight, since they meet inside of each; the error of the world.
    pub fn step_sync_batch_norm<I: TensorTree + Clone>(
        &mut self,
        micro_batches: Vec<(I, f64)>,
        forward: impl FnMut(&M, I) -> Tensor<1>,
    ) -> Result<Step, Error> {
        let reducer = self.ready()?;
        if self.engine.gathers() {
            return Err(self.refuse_gathers(
                "step_sync_batch_norm",
                "the captured step does not gather the parameters that the replicas divide: set `sharding` to \"gradients\"",
            ));
        }
        let before = self.counters();
        let params = self.admit(&reducer, ForwardState::Pending, Next::Head)?;
        let ran = self.engine.run_sync_batch_norm(&reducer, &params, micro_batches, forward).map(|losses| {
            self.losses = losses;
        });
        let (loss, weight, grads) = self.finish(&reducer, &params, ran, None)?;
        let counters = self.counters() - before;
        Ok(Step { counters, ..Step::new(loss, weight, grads, self.noise) })
    }

    /// Fails the world because of a call that does not go together with parameters that are gathered.
    fn refuse_gathers(&self, operation: &'static str, problem: &str) -> Error {
        let error = Error::invalid(operation, problem);
        self.control().fail(error.clone());
        error
    }

    fn ready(&self) -> Result<Arc<Reducer>, Error> {
        self.reducer().cloned().ok_or_else(|| Error::invalid("Replica", "it has not been made one of several"))
    }

    fn run_backward(&mut self, reducer: &Reducer, params: &FoundParams, loss: Loss, last: bool) -> Result<(), Error> {
        let mut sink = ReducerSink { reducer, loss_weight: &mut self.loss_weight, last };
        let unit = sink.unit();
        let gave = self.engine.backward(params, loss, None, unit, &mut sink)?;
        self.losses.extend(gave.loss);
        Ok(())
    }
}
