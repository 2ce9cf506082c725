//! Steps in which the gradients of every micro-batch are reduced, so that no rank holds more than its rows of their
//! sum.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Tensor;

use super::Replica;
use super::changes::ForwardState;
use super::known_params::{Next, count_rounds};
use super::loss_weight::LossWeight;
use super::noise_meter;
use super::norm_carrier::NormCarrier;
use super::reducer::Reducer;
use super::reducer_sink::ReducerSink;
use super::reduction::Reduced;
use super::reduction_state::accumulate;
use crate::Error;
use crate::graph::StepEngine;
use crate::sharding::Sharding;
use crate::step::{CarriedNorm, NoiseState, Step, StepFn};
use crate::tensor::{PlainTensor, TensorTree};

impl<E: StepEngine> Replica<E> {
    /// Runs forward and backward on every micro-batch, reduces the gradients of each, and averages over all of them. A
    /// rank with fewer micro-batches than others takes part in the reductions of theirs.
    pub(super) fn run_reducing_each<I: TensorTree + Clone>(
        &mut self,
        reducer: &Arc<Reducer>,
        micro_batches: impl Iterator<Item = I>,
        mut step: StepFn<'_, E::Model, I>,
    ) -> Result<Step, Error> {
        let before = self.counters();
        let mut params = self.admit(reducer, ForwardState::Pending, Next::Rounds)?;
        let micro_batches: Vec<I> = micro_batches.collect();
        let lines = reducer.known().lines.clone();
        let together = (reducer.control(), reducer.agreed());
        let most = count_rounds(micro_batches.len(), &lines, together).inspect_err(|_| reducer.discard())?;
        let rounds = match reducer.says_what_is_gathered() {
            // Nobody follows: ranks without data want nothing.
            true => None,
            false => self.rounds(reducer, micro_batches.len())?,
        };
        // Of several reductions none has the gradients of the step.
        let mut carrier = NormCarrier::of(&self.engine, reducer.shards()).filter(|_| most <= 1);
        let mut micro_batches = micro_batches.into_iter();
        let (mut outputs, mut runs) = (Vec::new(), Vec::new());
        let mut sum = ShardSum::default();
        // Without any data the ranks meet once all the same, to find out that there is none.
        for round in 0..most.max(1) {
            reducer.begin_noise(self.steps, || self.engine.gradient_layout().elsewhere);
            let leader = rounds.as_ref().and_then(|counts| uneven(counts, round));
            let ran = match micro_batches.next() {
                Some(inputs) => {
                    leader.into_iter().for_each(|leader| self.engine.begin_uneven(leader));
                    let mut sink = ReducerSink { reducer, loss_weight: &mut self.loss_weight, last: true };
                    let unit = sink.unit();
                    let gave = self.engine.run(&mut params, inputs, step.again(), unit, &mut sink);
                    let gave = gave.and_then(|gave| self.take(reducer, gave, true, &mut outputs, &mut runs));
                    match leader {
                        Some(_) => gave.and_then(|()| self.engine.end_uneven()),
                        None => gave,
                    }
                }
                None => {
                    reducer.begin(self.loss_weight);
                    leader.map_or(Ok(()), |leader| self.engine.follow(&params, leader))
                }
            };
            let ran = ran.and_then(|()| self.engine.end_gathers(&params));
            self.loss_weight = LossWeight::default();
            let losses = std::mem::take(&mut self.losses);
            let reduced = ran.and_then(|()| reducer.finish(summed(&losses), carrier.take()));
            sum.add(reduced.inspect_err(|_| reducer.discard())?, reducer.non_finite());
        }
        reducer.set_non_finite(sum.non_finite.take());
        let (loss, weight, grads) = self.complete(reducer, &params, sum.mean())?;
        let (norm, counters) = (self.norm.take(), self.counters() - before);
        Ok(Step { outputs, counters, runs, norm, ..Step::new(loss, weight, grads, self.noise) })
    }

    /// How many micro-batches each of the ranks that divide parameters among themselves has, if they do.
    fn rounds(&self, reducer: &Reducer, mine: usize) -> Result<Option<Vec<u64>>, Error> {
        match reducer.shards().filter(|_| reducer.sharding() == Sharding::Parameters) {
            Some(shards) => shards.control().all_gather(vec![mine as u64]).map(Some),
            None => Ok(None),
        }
    }
}

/// The first rank that has a micro-batch in a round, if some of the ranks with these numbers of them have none.
fn uneven(counts: &[u64], round: u64) -> Option<usize> {
    let leader = counts.iter().position(|count| *count > round)?;
    counts.iter().any(|count| *count <= round).then_some(leader)
}

/// The sum of losses, each with its factor.
fn summed(losses: &[(Tensor<1>, f64)]) -> f64 {
    losses.iter().map(|(loss, by)| loss.clone().into_scalar::<f64>() * by).sum()
}

/// The averages of several reductions, added up by their weights.
#[derive(Default)]
struct ShardSum {
    noise: Option<NoiseState>,
    loss: f64,
    weight: f64,
    /// The weight in units of which gradients are added up: that of the first reduction that has one.
    unit: f64,
    gradients: HashMap<usize, PlainTensor>,
    waited: Duration,
    non_finite: Option<Arc<str>>,
    /// Of the only one that there is.
    norm: Option<CarriedNorm>,
}

impl ShardSum {
    fn add(&mut self, reduced: Reduced, non_finite: Option<Arc<str>>) {
        self.waited += reduced.waited;
        self.non_finite = self.non_finite.take().or(non_finite);
        self.norm = reduced.norm;
        self.noise = match (self.noise, reduced.noise) {
            (Some(sum), Some(noise)) => Some(noise_meter::together(sum, noise)),
            (sum, noise) => sum.or(noise),
        };
        // Of no items the mean loss is NaN, and the gradients are those of nothing.
        if reduced.weight > 0.0 {
            self.loss += reduced.loss * reduced.weight;
            self.weight += reduced.weight;
        }
        if self.unit == 0.0 {
            self.unit = reduced.weight;
        }
        let factor = if self.unit > 0.0 { reduced.weight / self.unit } else { 1.0 };
        let (params, gradients): (Vec<usize>, Vec<PlainTensor>) = reduced.gradients.into_iter().unzip();
        for (param, gradient) in params.into_iter().zip(PlainTensor::scale_all(gradients, factor)) {
            let sum = accumulate(self.gradients.remove(&param), gradient);
            self.gradients.insert(param, sum);
        }
    }

    fn mean(self) -> Reduced {
        let factor = if self.weight > 0.0 { self.unit / self.weight } else { 1.0 };
        let (params, sums): (Vec<usize>, Vec<PlainTensor>) = self.gradients.into_iter().unzip();
        let gradients = params.into_iter().zip(PlainTensor::scale_all(sums, factor)).collect();
        let (loss, weight, norm) = (self.loss / self.weight, self.weight, self.norm);
        Reduced { loss, weight, gradients, waited: self.waited, noise: self.noise, norm }
    }
}
