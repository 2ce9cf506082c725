//! A replica of a model: runs micro-batches through an engine, and averages over the group.

use std::sync::Arc;
use std::time::Duration;

use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::changes::ForwardState;
use super::config::DataParallelConfig;
use super::fingerprint;
use super::hook::{AttachHooks, HookGroup};
use super::known_params::Next;
use super::loss_weight::LossWeight;
use super::norm_carrier::NormCarrier;
use super::reducer::Reducer;
use super::reducer_sink::ReducerSink;
use super::reduction::Reduced;
use super::register::register;
use super::replicate::replicate;
use crate::Error;
use crate::comm::Communicator;
use crate::distribution::RowShards;
use crate::graph::{MicroBatchResult, StepEngine};
use crate::params::{FoundParams, SliceSource};
use crate::sharding::Sharding;
use crate::step::{CarriedNorm, LossValue, NoNoise, NoiseState, RunReport, Step, StepCounters, StepFn};
use crate::tensor::{PlainTensor, TensorTree};

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
    waited: Duration,
    /// What the last reduction told of the noise of the gradient.
    pub(super) noise: NoiseState,
    /// The norm of the gradient, if the last reduction has brought it.
    pub(super) norm: Option<CarriedNorm>,
    /// How many steps there were.
    pub(super) steps: u64,
    /// By which an eager model tells of its gradients.
    hooks: Option<HookGroup>,
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
                parameters: shards.comms().parameters().counters(),
                control: shards.replicas().counters() + self.engine.clipping().beside(shards.comms().control()),
                waited: shards.waited() + of_engine.waited,
                ..of_engine
            };
        }
        match self.reducer() {
            None => of_engine,
            Some(reducer) => StepCounters {
                gradients: reducer.gradient_counters(),
                parameters: reducer.parameter_counters() + of_engine.parameters,
                control: match self.shards() {
                    Some(shards) => {
                        reducer.control_counters() + of_engine.control - self.engine.clipping().of(shards.control())
                    }
                    None => reducer.control_counters(),
                },
                waited: self.waited + of_engine.waited,
                ..of_engine
            },
        }
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
        self.steps += 1;
        if reducer.compares(self.steps) {
            fingerprint::compare(&self.engine, reducer.control())?;
        }
        Ok((LossValue::known(reduced.loss), reduced.weight, grads))
    }

    /// Gives everything that is not trained the values of the first replica.
    pub(crate) fn sync_buffers(self) -> Result<Self, Error> {
        let (control, shards) = (self.control().clone(), self.row_shards().cloned());
        let divided = |id| shards.as_ref().is_some_and(|shards| shards.divides(id));
        self.try_change(|engine| super::structure::broadcast_buffers(engine, &control, &divided))
    }
}
