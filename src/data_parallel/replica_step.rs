//! The step of a replica: its micro-batches through the engine, and what they bring averaged over the group. Replicas
//! that reduce each micro-batch (`each.rs`), divide the parameters of captured steps (`by_rows.rs`), or whose own
//! forward runs (`replica_backward.rs`) have steps of their own, made of the same parts.

use std::sync::Arc;

use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::changes::ForwardState;
use super::fingerprint;
use super::hook::AttachHooks;
use super::known_params::Next;
use super::loss_weight::LossWeight;
use super::norm_carrier::NormCarrier;
use super::reducer::Reducer;
use super::reducer_sink::ReducerSink;
use super::reduction::Reduced;
use super::register::register;
use super::replica::{Averaging, Replica};
use crate::Error;
use crate::graph::{MicroBatchResult, StepEngine};
use crate::params::FoundParams;
use crate::sharding::Sharding;
use crate::step::{LossValue, NoNoise, NoiseState, RunReport, Step, StepFn};
use crate::tensor::{PlainTensor, TensorTree};

impl<E: StepEngine> Replica<E> {
    /// Runs forward and backward on every micro-batch and averages over all of them and over the group.
    pub(crate) fn run<I: TensorTree + Clone>(
        &mut self,
        micro_batches: impl IntoIterator<Item = I>,
        mut step: StepFn<'_, E::Model, I>,
    ) -> Result<Step, Error> {
        if let Some(shards) = self.row_shards().cloned() {
            return self.run_by_rows(&shards, micro_batches, step);
        }
        let mut micro_batches = micro_batches.into_iter().peekable();
        if matches!(self.averaging, Averaging::Deferred(..)) {
            let Some(first) = micro_batches.peek().cloned() else {
                let problem = "the first step cuts the model into stages: every replica must bring a micro-batch to it, or \
                               the model be cut by paths";
                return Err(Error::Pipeline { problem: problem.into() });
            };
            self.prepare(first, step.again())?;
        }
        let Some(reducer) = self.reducer().cloned() else { unreachable!("replicas by rows run above") };
        if reducer.sharding() >= Sharding::Gradients {
            return self.run_reducing_each(&reducer, micro_batches, step);
        }
        let before = self.counters();
        let mut params = self.admit(&reducer, ForwardState::Pending, Next::Head)?;
        reducer.begin_noise(self.steps, || self.engine.gradient_layout().elsewhere);
        let (mut outputs, mut runs) = (Vec::new(), Vec::new());
        let mut ran = Ok(());
        let mut begun = false;
        while let Some(inputs) = micro_batches.next() {
            begun = micro_batches.peek().is_none();
            let mut sink = ReducerSink { reducer: &reducer, loss_weight: &mut self.loss_weight, last: begun };
            let unit = sink.unit();
            let gave = self.engine.run(&mut params, inputs, step.again(), unit, &mut sink);
            ran = gave.and_then(|gave| self.take(&reducer, gave, begun, &mut outputs, &mut runs));
            if ran.is_err() {
                break;
            }
        }
        if ran.is_ok() && !begun {
            reducer.begin(self.loss_weight);
        }
        let carrier = NormCarrier::of(&self.engine, reducer.shards());
        let (loss, weight, grads) = self.finish(&reducer, &params, ran, carrier)?;
        let (norm, counters) = (self.norm.take(), self.counters() - before);
        Ok(Step { outputs, counters, runs, norm, ..Step::new(loss, weight, grads, self.noise) })
    }

    /// Registers everything that the model trains now with the reduction. Returns the parameters of the step.
    pub(super) fn admit(
        &mut self,
        reducer: &Arc<Reducer>,
        forward: ForwardState,
        next: Next,
    ) -> Result<FoundParams, Error> {
        reducer.begin_step(self.steps.saturating_add(1));
        self.try_to_admit(reducer, forward, next).inspect_err(|_| {
            self.loss_weight = LossWeight::default();
            self.losses.clear();
            reducer.discard();
        })
    }

    fn try_to_admit(
        &mut self,
        reducer: &Arc<Reducer>,
        forward: ForwardState,
        next: Next,
    ) -> Result<FoundParams, Error> {
        let params = self.engine.find_params()?;
        self.engine.end_gathers(&params)?;
        let Some(engine) = reducer.admit(&self.engine, &params, forward, next)? else { return Ok(params) };
        self.engine = match self.hooks.filter(|_| reducer.data().size() > 1) {
            Some(hooks) => {
                let mut indices = reducer.indices();
                indices.retain(|id, _| engine.shard_rows(*id).is_none());
                engine.apply_reparameterization(AttachHooks::new(reducer, hooks, &indices))
            }
            None => engine,
        };
        self.engine.find_params()
    }

    pub(super) fn take(
        &mut self,
        reducer: &Reducer,
        gave: MicroBatchResult,
        last: bool,
        outputs: &mut Vec<Vec<PlainTensor>>,
        runs: &mut Vec<RunReport>,
    ) -> Result<(), Error> {
        self.losses.extend(gave.loss);
        outputs.extend(gave.outputs);
        runs.extend(gave.run);
        reducer.end_micro_batch();
        if !last {
            reducer.forget_uses();
        }
        Ok(())
    }

    /// Waits for the reduction and hands it to burn.
    pub(super) fn finish(
        &mut self,
        reducer: &Reducer,
        params: &FoundParams,
        ran: Result<(), Error>,
        carrier: Option<NormCarrier>,
    ) -> Result<(LossValue, f64, GradientsParams), Error> {
        self.loss_weight = LossWeight::default();
        let losses = std::mem::take(&mut self.losses);
        let alone = reducer.data().size() == 1;
        // Replicas reduce the sum on the host; a single one need not wait for the device.
        let sum =
            |losses: &[(Tensor<1>, f64)]| losses.iter().map(|(loss, by)| loss.clone().into_scalar::<f64>() * by).sum();
        let ran = ran.and_then(|()| self.engine.end_gathers(params));
        let reduced = ran.and_then(|()| reducer.finish(if alone { 0.0 } else { sum(&losses) }, carrier));
        let outcome = reduced.and_then(|reduced| {
            let (known, weight, grads) = self.complete(reducer, params, reduced)?;
            Ok((if alone { LossValue::mean(losses, weight) } else { known }, weight, grads))
        });
        outcome.inspect_err(|_| reducer.discard())
    }

    /// Hands what was reduced in a step to burn.
    pub(super) fn complete(
        &mut self,
        reducer: &Reducer,
        params: &FoundParams,
        mut reduced: Reduced,
    ) -> Result<(LossValue, f64, GradientsParams), Error> {
        self.waited += reduced.waited;
        // A step with synchronised batch norm has its turn, and measures nothing.
        let why = || reducer.noise_turn(self.steps).err().unwrap_or(NoNoise::BatchNorm);
        self.noise = reduced.noise.unwrap_or_else(|| NoiseState::None(why()));
        let grads = register(reducer, &mut reduced, params)?;
        self.norm = reduced.norm;
        self.steps = self.steps.saturating_add(1);
        if reducer.compares(self.steps) {
            fingerprint::compare(&self.engine, reducer.control())?;
        }
        Ok((LossValue::known(reduced.loss), reduced.weight, grads))
    }
}
