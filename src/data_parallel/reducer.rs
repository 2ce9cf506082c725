//! The reducer: averages the gradients of a step over the group while backward still computes them.
//!
//! # A step
//!
//! The thread that runs backward hands gradients in ([`GradientListener::arrived`]); as soon as all those of a bucket are
//! there, and the buckets before it are on their way, the bucket is started on the communicator's background thread. Every
//! rank starts the same collectives in the same order, whatever the order in which its gradients arrive:
//!
//! 1. the *head*: the weights of all ranks are summed, which gives each rank's factor in the average;
//! 2. the buckets, in order; what a rank has no gradient for counts as zero;
//! 3. the *tail*: the losses are summed; and it is agreed which parameters were used anywhere, so that one that no rank
//!    used gets no gradient at all, as on a single device, and which gradients came late.
//!
//! *Late* is a gradient that arrives after its bucket was started. That takes a parameter that is used in a forward before
//! the last backward and is then used again; it is summed in a collective of its own after the tail.
//!
//! Head and tail go over a communicator of their own, so the counters of the other one are those of the gradients alone.
//!
//! With [sharded](crate::sharding) replicas a bucket is reduce-scattered, and what comes out are the rows of this rank.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use burn::module::{Module, ParamId};
use burn::tensor::Device;

use super::bucket_reduction::reduce_scatter;
use super::config::DataParallelConfig;
use super::hook::GradientListener;
use super::known_params::{KnownParams, head};
use super::loss_weight::LossWeight;
use super::noise_meter::{self, NoiseMeter};
use super::reduction_state::{LATE, ParamProgress, PendingReduction, ReductionState, accumulate};
use super::structure::Structure;
use crate::Error;
use crate::comm::{Communicator, Counters, ReduceOp};
use crate::params::unknown_params;
use crate::sharding::{ShardComms, Sharding};
use crate::step::{NoNoise, NoiseState};
use crate::tensor::{Look, PlainTensor};

/// The averages over the group.
pub(crate) struct Reduced {
    /// Mean loss over everything that made up the step; NaN if nothing did.
    pub loss: f64,
    /// Weight over all ranks.
    pub weight: f64,
    /// Gradient of each parameter that was used on any rank.
    pub gradients: HashMap<usize, PlainTensor>,
    /// How long this rank had nothing to do but wait for them.
    pub waited: Duration,
    /// What the micro-batches of all ranks say of the noise of the gradient.
    pub noise: NoiseState,
}

pub(crate) struct Reducer {
    known: RwLock<KnownParams>,
    /// Carries the buckets.
    pub(super) data: Communicator,
    /// Carries head and tail.
    pub(super) control: Communicator,
    pub(super) config: DataParallelConfig,
    /// Among whom gradients and the state of optimizers are divided, if they are.
    pub(super) shards: Option<ShardComms>,
    /// Where the model was when it was wrapped.
    device: Device,
    step: Mutex<ReductionState>,
}

impl Reducer {
    /// # Errors
    /// Those of [`Communicator::split`].
    pub(super) fn new(
        structure: Structure,
        device: Device,
        group: &Communicator,
        config: DataParallelConfig,
    ) -> Result<Self, Error> {
        let of_its_own = |name| group.split_named(name, 0, group.rank() as i64);
        let (data, control) = (of_its_own("gradients")?, of_its_own("control")?);
        let shards = match config.sharding {
            Sharding::None => None,
            _ if group.size() == 1 => None,
            _ => Some(ShardComms::new(group, config.sharding_ranks)?),
        };
        let known = RwLock::default();
        let reducer = Self { known, data, control, config, shards, device, step: Mutex::default() };
        reducer.learn(|known| *known = KnownParams::new(structure));
        Ok(reducer)
    }

    pub(super) fn known(&self) -> RwLockReadGuard<'_, KnownParams> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns of parameters, between two steps.
    pub(super) fn learn(&self, learn: impl FnOnce(&mut KnownParams)) {
        let count = {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            learn(&mut known);
            known.params.len()
        };
        let buckets = self.divide(&(0..count).rev().collect::<Vec<_>>());
        let unindexed = {
            let mut step = self.lock();
            step.params.resize_with(count, ParamProgress::default);
            (step.buckets, step.observed) = (buckets, false);
            std::mem::take(&mut step.unindexed)
        };
        for (id, gradient) in unindexed {
            if let Some(number) = self.index_of(id) {
                self.add(number, gradient);
            }
        }
    }

    /// Keeps the gradient of a parameter that has no number yet.
    pub(super) fn add_unindexed(&self, id: ParamId, gradient: PlainTensor) {
        let mut step = self.lock();
        step.noise.iter_mut().for_each(NoiseMeter::add_unknown);
        let sum = accumulate(step.unindexed.remove(&id), gradient);
        step.unindexed.insert(id, sum);
    }

    /// The number of a parameter among those that are trained.
    pub fn index_of(&self, id: ParamId) -> Option<usize> {
        self.known().indices.get(&id).copied()
    }

    /// The numbers of all parameters that are trained.
    pub fn indices(&self) -> HashMap<ParamId, usize> {
        self.known().indices.clone()
    }

    /// The float parameters of the module that are not known, with their paths.
    pub fn unknown_params<M: Module>(&self, module: &M) -> Vec<(ParamId, String)> {
        let known = self.known();
        unknown_params(module, &|id| known.ids.contains(&id))
    }

    /// Learns the ids that a record of another run has brought into the module: its parameters are still those of these paths.
    /// Those that were not known `before` it was loaded are no part of this.
    pub fn recognise<M: Module>(&self, module: &M, before: &[(ParamId, String)]) {
        let mut unknown = self.unknown_params(module);
        unknown.retain(|(_, path)| before.iter().all(|(_, new)| new != path));
        if !unknown.is_empty() {
            self.known.write().unwrap_or_else(PoisonError::into_inner).recognise(unknown);
        }
    }

    /// Among whom gradients and the state of optimizers are divided, if they are.
    pub fn shards(&self) -> Option<&ShardComms> {
        self.shards.as_ref()
    }

    /// The bytes of this rank's rows of all gradients.
    pub fn gradient_rows(&self) -> usize {
        let bytes: usize = self.known().params.iter().map(|param| param.elements * param.dtype.size()).sum();
        bytes.div_ceil(self.shards.as_ref().map_or(1, ShardComms::ranks))
    }

    /// What the replicas divide among themselves.
    pub fn sharding(&self) -> Sharding {
        self.shards.as_ref().map_or(Sharding::None, |_| self.config.sharding)
    }

    /// Whether ranks may use different parameters, and say so before they gather any.
    pub fn says_what_is_gathered(&self) -> bool {
        self.sharding() == Sharding::Parameters && self.config.allow_unused_parameters
    }

    /// What gradients have cost in communication.
    pub fn gradient_counters(&self) -> Counters {
        let shards = self.shards.as_ref().map(ShardComms::gradient_counters).unwrap_or_default();
        self.data.counters() + shards
    }

    /// What gathered parameters have cost in communication.
    pub fn parameter_counters(&self) -> Counters {
        self.shards.as_ref().map(|shards| shards.parameters().counters()).unwrap_or_default()
    }

    /// What the few numbers beside them have cost in communication.
    pub fn control_counters(&self) -> Counters {
        let shards = self.shards.as_ref().map(|shards| shards.control().counters()).unwrap_or_default();
        self.control.counters() + shards
    }

    /// How many bytes of parameters or gradients go into one collective.
    pub fn bucket_bytes(&self) -> usize {
        self.config.bucket_bytes
    }

    pub fn data(&self) -> &Communicator {
        &self.data
    }

    pub fn control(&self) -> &Communicator {
        &self.control
    }

    /// The path of the first parameter of which this rank brought a gradient to the last step that has an element that is NaN or
    /// infinite: the average does not show which rank it came from. Gradients that are not in host memory are not checked.
    pub fn non_finite(&self) -> Option<Arc<str>> {
        self.lock().last_non_finite.clone()
    }

    /// Says of whose gradient [`non_finite`](Self::non_finite) tells, where a step has several reductions.
    pub fn set_non_finite(&self, path: Option<Arc<str>>) {
        self.lock().last_non_finite = path;
    }

    /// The averages over a group of one: nothing to communicate, and nothing to compute but for accumulated gradients.
    fn finish_alone(&self, loss: f64) -> Reduced {
        let mut step = self.lock();
        let LossWeight { weight, unit } = step.alone;
        let factor = if unit == weight || weight == 0.0 { 1.0 } else { unit / weight };
        let taken =
            step.params.iter_mut().enumerate().filter_map(|(place, param)| Some((place, param.gradient.take()?)));
        let gradients = taken.map(|(place, gradient)| (place, gradient.scale(factor))).collect();
        let noise = step.noise.take();
        step.reset();
        drop(step);
        let noise = noise.map_or(NoiseState::None(NoNoise::Off), |noise| noise_meter::of_sums(&noise.numbers()));
        Reduced { loss: loss / weight, weight, gradients, waited: Duration::ZERO, noise }
    }

    /// Whether the replicas are to be compared after this many steps.
    pub fn compares(&self, steps: u64) -> bool {
        self.data.size() > 1 && self.config.compare_every > 0 && steps.is_multiple_of(self.config.compare_every)
    }

    /// Number of buckets, each one collective a step.
    pub fn buckets(&self) -> usize {
        self.lock().buckets.len()
    }

    /// Starts the reduction: what arrives from now on completes the step.
    pub fn begin(&self, loss_weight: LossWeight) {
        if self.data.size() == 1 {
            self.lock().alone = loss_weight;
            return;
        }
        let factor = Arc::new(OnceLock::new());
        let (control, set, lines) = (self.control.clone(), factor.clone(), self.known().lines.clone());
        let head = self.data.start(move |_| {
            let weight = head(loss_weight.weight, &lines, &control)?;
            let _ = set.set(if weight > 0.0 { loss_weight.unit / weight } else { 0.0 });
            Ok(weight)
        });
        self.lock().pending = Some(PendingReduction { head, factor, buckets: Vec::new() });
        if self.config.overlap {
            self.start_complete();
        }
    }

    /// Starts what is left and waits for everything. `loss` is this rank's sum of weight times mean loss.
    ///
    /// # Errors
    /// The error of the world; the step is then void.
    pub fn finish(&self, loss: f64) -> Result<Reduced, Error> {
        if self.data.size() == 1 {
            return Ok(self.finish_alone(loss));
        }
        let began = Instant::now();
        let mut step = self.lock();
        while self.start_next(&mut step, true) {}
        let Some(pending) = step.pending.take() else {
            return Err(Error::invalid("DataParallel::backward", "the reduction was not open"));
        };
        let mut tail: Vec<f64> = step.params.iter().map(ParamProgress::mark).collect();
        let params = tail.len();
        let noise = step.noise.take();
        let layout = step.buckets.clone();
        let completed = std::mem::take(&mut step.completed);
        let mut late: HashMap<usize, PlainTensor> =
            step.params.iter_mut().enumerate().filter_map(|(place, param)| Some((place, param.late.take()?))).collect();
        let device = self.device(&step);
        let observed = std::mem::replace(&mut step.observed, true);
        step.last_non_finite = step.non_finite.map(|param| self.known().params[param].path.clone());
        step.reset();
        drop(step);

        tail.push(loss);
        tail.extend(noise.into_iter().flat_map(NoiseMeter::numbers));
        let control = self.control.clone();
        let tail = self.data.start(move |_| control.all_reduce(tail, ReduceOp::Sum));
        let weight = pending.head.wait()?;
        let mut gradients = HashMap::new();
        for (params, bucket) in layout.iter().zip(pending.buckets) {
            gradients.extend(params.iter().copied().zip(bucket.wait()?));
        }
        let tail = tail.wait()?;
        let (marks, sums) = tail.split_at(params);
        let (loss, noise) = match sums {
            [loss] => (loss / weight, NoiseState::None(NoNoise::Off)),
            [loss, noise @ ..] => (loss / weight, noise_meter::of_sums(noise)),
            [] => {
                return Err(Error::invalid("DataParallel::backward", "the sums of the replicas came back incomplete"));
            }
        };
        let late_params: Vec<usize> = (0..marks.len()).filter(|param| marks[*param] >= LATE).collect();
        if !late_params.is_empty() {
            let factor = pending.factor.get().copied().unwrap_or_default();
            let extra = late_params
                .iter()
                .map(|param| late.remove(param).unwrap_or_else(|| self.zeros(*param, &device)))
                .collect();
            let extra = match &self.shards {
                None => self.data.all_reduce_coalesced(extra, ReduceOp::PreMulSum(factor))?,
                Some(shards) => reduce_scatter(extra, factor, None, shards)?,
            };
            for (param, extra) in late_params.into_iter().zip(extra) {
                let sum = accumulate(gradients.remove(&param), extra);
                gradients.insert(param, sum);
            }
        }
        gradients.retain(|param, _| marks[*param] > 0.0);
        if !observed {
            self.follow(completed)?;
        }
        Ok(Reduced { loss, weight, gradients, waited: began.elapsed(), noise })
    }

    /// Takes a gradient that did not come through a hook.
    pub fn add(&self, param: usize, gradient: PlainTensor) {
        let measures = self.config.noise_scale;
        let mut step = self.lock();
        let step = &mut *step;
        step.device = Some(gradient.device());
        let progress = &mut step.params[param];
        progress.used = true;
        progress.arrived += 1;
        let place = if progress.started { &mut progress.late } else { &mut progress.gradient };
        if measures || self.data.size() > 1 {
            // One of several parts counts by their sum.
            let wanted = measures && progress.uses <= 1;
            let looks = wanted || self.data.size() > 1;
            let (sum, look) = match place.take() {
                Some(sum) if looks => sum.add_and_look(&gradient, wanted),
                // Now, while it is in the cache.
                None if looks => (gradient.clone(), gradient.look_on_host(wanted)),
                sum => (accumulate(sum, gradient.clone()), Look::default()),
            };
            *place = Some(sum);
            if self.data.size() > 1 && look.finite == Some(false) {
                step.non_finite = Some(step.non_finite.map_or(param, |first| first.min(param)));
            }
            if let Some(noise) = &mut step.noise {
                noise.add(param, (progress.uses, progress.arrived), &gradient, look.squares);
            }
        } else {
            *place = Some(accumulate(place.take(), gradient));
        }
        if progress.arrived >= progress.uses {
            step.completed.push(param);
        }
    }

    /// Forgets the uses of a forward whose backward has run, or that will have none; its gradients stay with the step.
    pub fn forget_uses(&self) {
        self.lock().forget_uses();
    }

    /// Measures the gradients of the micro-batches that come now, if that was asked for: of all parameters but those that another
    /// rank counts.
    pub fn begin_noise(&self, elsewhere: impl FnOnce() -> HashSet<ParamId>) {
        if self.config.noise_scale {
            let elsewhere = elsewhere().into_iter().filter_map(|id| self.index_of(id)).collect();
            self.lock().noise = Some(NoiseMeter::new(elsewhere));
        }
    }

    /// The micro-batch that runs counts for so many items, and its gradients are in units of so many.
    pub fn weigh(&self, weight: f64, unit: f64) {
        self.lock().noise.iter_mut().for_each(|noise| noise.weigh(weight, unit));
    }

    /// All gradients of a micro-batch have come.
    pub fn end_micro_batch(&self) {
        self.lock().noise.iter_mut().for_each(NoiseMeter::end_micro_batch);
    }

    /// Throws away everything that was accumulated.
    pub fn discard(&self) {
        self.lock().reset();
    }

    pub(super) fn zeros(&self, param: usize, device: &Device) -> PlainTensor {
        let known = self.known();
        PlainTensor::zeros(known.params[param].shape.clone(), known.params[param].dtype, device)
    }

    /// Where gradients are: with those that have come last, or where the model was when it was wrapped.
    pub(super) fn device(&self, step: &ReductionState) -> Device {
        step.device.clone().unwrap_or_else(|| self.device.clone())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ReductionState> {
        self.step.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl GradientListener for Reducer {
    fn used(&self, param: usize) -> usize {
        let mut step = self.lock();
        step.params[param].uses += 1;
        step.uses += 1;
        step.uses
    }

    fn arrived(&self, param: usize, gradient: PlainTensor) {
        self.add(param, gradient);
        if self.config.overlap {
            self.start_complete();
        }
    }

    fn passed(&self, param: usize) {
        let uses = &mut self.lock().params[param].uses;
        *uses = uses.saturating_sub(1);
    }
}
