//! Gradients as they come, from hooks and without.

use std::collections::HashSet;

use burn::module::ParamId;

use super::hook::GradientListener;
use super::noise_meter::{self, NoiseMeter};
use super::reducer::Reducer;
use super::reduction_state::accumulate;
use crate::step::NoNoise;
use crate::tensor::{Look, PlainTensor};

impl Reducer {
    /// Takes a gradient that did not come through a hook.
    pub fn add(&self, param: usize, gradient: PlainTensor) {
        let mut step = self.lock();
        let step = &mut *step;
        let measures = step.noise.is_some();
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

    /// Whether a step measures the noise of its gradient that has so many before it; or why not.
    pub fn noise_turn(&self, before: u64) -> Result<(), NoNoise> {
        noise_meter::turn(self.config.noise_scale_every, before)
    }

    /// Measures the gradients of the micro-batches that come now, if it is the turn of a step that has so many before
    /// it: of all parameters but those that another rank counts.
    pub fn begin_noise(&self, before: u64, elsewhere: impl FnOnce() -> HashSet<ParamId>) {
        if self.noise_turn(before).is_ok() {
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

    /// Keeps the gradient of a parameter that has no number yet.
    pub(super) fn add_unindexed(&self, id: ParamId, gradient: PlainTensor) {
        let mut step = self.lock();
        step.noise.iter_mut().for_each(NoiseMeter::add_unknown);
        let sum = accumulate(step.unindexed.remove(&id), gradient);
        step.unindexed.insert(id, sum);
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
