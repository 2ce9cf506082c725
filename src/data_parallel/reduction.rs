//! The reduction of a step.
//!
//! # A step
//!
//! The thread that runs backward hands gradients in
//! ([`GradientListener::arrived`](super::hook::GradientListener::arrived)); as soon as all those of a bucket are there,
//! and the buckets before it are on their way, the bucket is started on the communicator's background thread. Every
//! rank starts the same collectives in the same order, whatever the order in which its gradients arrive:
//!
//! 1. the *head*: the weights of all ranks are summed, which gives each rank's factor in the average; and it is made
//!    sure that all have updated the model alike;
//! 2. the buckets, in order; what a rank has no gradient for counts as zero;
//! 3. the *tail*: the losses are summed; and it is agreed which parameters were used anywhere, so that one that no rank
//!    used gets no gradient at all, as on a single device, and which gradients came late. With sharded replicas it has
//!    the norm as well, if it is likely to be asked for ([`NormCarrier`]).
//!
//! *Late* is a gradient that arrives after its bucket was started. That takes a parameter that is used in a forward
//! before the last backward and is then used again; it is summed in a collective of its own after the tail.
//!
//! Head and tail go over a communicator of their own, so the counters of the other one are those of the gradients
//! alone.
//!
//! With [sharded](crate::sharding) replicas a bucket is reduce-scattered, and what comes out are the rows of this rank.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::bucket_reduction::reduce_scatter;
use super::known_params::head;
use super::loss_weight::LossWeight;
use super::noise_meter::{self, NoiseMeter};
use super::norm_carrier::NormCarrier;
use super::reducer::Reducer;
use super::reduction_state::{LATE, ParamProgress, PendingReduction, accumulate};
use crate::Error;
use crate::comm::ReduceOp;
use crate::step::{CarriedNorm, NoiseState};
use crate::tensor::PlainTensor;

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
    /// What the micro-batches of all ranks say of the noise of the gradient, if they were measured.
    pub noise: Option<NoiseState>,
    /// The norm of the gradients, if it was measured.
    pub norm: Option<CarriedNorm>,
}

impl Reducer {
    /// Starts the reduction: what arrives from now on completes the step.
    pub fn begin(&self, loss_weight: LossWeight) {
        if self.data.size() == 1 {
            self.lock().alone = loss_weight;
            return;
        }
        let factor = Arc::new(OnceLock::new());
        let (control, set, lines) = (self.control.clone(), factor.clone(), self.known().lines.clone());
        let (updates, agreed) = (self.updates.get().cloned().unwrap_or_default(), self.agreed());
        let head = self.data.start(move |_| {
            let weight = head(loss_weight.weight, &lines, &updates, (&control, agreed))?;
            let _ = set.set(if weight > 0.0 { loss_weight.unit / weight } else { 0.0 });
            Ok(weight)
        });
        self.lock().pending = Some(PendingReduction { head, factor, buckets: Vec::new() });
        if self.config.overlap {
            self.start_complete();
        }
    }

    /// Starts what is left and waits for everything. `loss` is this rank's sum of weight times mean loss. With a
    /// `carrier` the tail has the norm of the averages, and so waits for them.
    ///
    /// # Errors
    /// The error of the world; the step is then void.
    pub fn finish(&self, loss: f64, carrier: Option<NormCarrier>) -> Result<Reduced, Error> {
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
        let numbers = tail.len();
        let tell = |tail| {
            let control = self.control.clone();
            self.data.start(move |_| control.all_reduce(tail, ReduceOp::Sum))
        };
        let told = if carrier.is_none() { Some(tell(std::mem::take(&mut tail))) } else { None };
        let weight = pending.head.wait()?;
        let mut gradients = HashMap::new();
        for (params, bucket) in layout.iter().zip(pending.buckets) {
            gradients.extend(params.iter().copied().zip(bucket.wait()?));
        }
        if let Some(carrier) = &carrier {
            let elsewhere: HashSet<usize> = carrier.elsewhere.iter().filter_map(|id| self.index_of(*id)).collect();
            // In an order that is the same in every run.
            let params = gradients.keys().copied().collect::<BTreeSet<usize>>().into_iter();
            let measured = params.map(|param| (&gradients[&param], !elsewhere.contains(&param)));
            tail.extend(carrier.numbers(&measured.collect::<Vec<_>>()));
        }
        let tail = told.unwrap_or_else(|| tell(tail)).wait()?;
        let (tail, sizes) = tail.split_at(numbers);
        // The gradients join it where their parameters are known.
        let norm = carrier.and_then(|carrier| carrier.of_sums(sizes, 1.0, HashMap::new()));
        let (marks, sums) = tail.split_at(params);
        let (loss, noise) = match sums {
            [loss] => (loss / weight, None),
            [loss, noise @ ..] => (loss / weight, Some(noise_meter::of_sums(noise))),
            [] => {
                return Err(Error::invalid("DataParallel::backward", "the sums of the replicas came back incomplete"));
            }
        };
        let late_params: Vec<usize> = (0..marks.len()).filter(|param| marks[*param] >= LATE).collect();
        // What came late is no part of what was measured.
        let norm = norm.filter(|_| late_params.is_empty());
        if !late_params.is_empty() {
            let factor = pending.factor.get().copied().unwrap_or_default();
            let extra = late_params
                .iter()
                .map(|param| late.remove(param).unwrap_or_else(|| self.zeros(*param, &device)))
                .collect();
            let extra = match &self.shards {
                None => self.data.all_reduce_coalesced(extra, ReduceOp::PreMulSum(factor))?,
                Some(shards) => reduce_scatter(extra, factor, None, (shards, &self.sums))?,
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
        Ok(Reduced { loss, weight, gradients, waited: began.elapsed(), noise, norm })
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
        let noise = noise.map(|noise| noise_meter::of_sums(&noise.numbers()));
        Reduced { loss: loss / weight, weight, gradients, waited: Duration::ZERO, noise, norm: None }
    }

    /// Throws away everything that was accumulated.
    pub fn discard(&self) {
        self.lock().reset();
    }
}
