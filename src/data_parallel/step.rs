//! What goes into a training step, and what comes out.

use std::ops::Sub;
use std::time::Duration;

use burn::optim::GradientsParams;

use super::reducer::Contribution;
use crate::comm::Counters;

/// What this rank's micro-batches bring into the step.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SoFar {
    pub contribution: Contribution,
    /// Sum of weight times mean loss.
    pub loss: f64,
}

impl SoFar {
    /// Adds a micro-batch whose summed loss is `loss`.
    pub fn add(&mut self, loss: f64, weight: f64) {
        if weight > 0.0 {
            let sum = &mut self.contribution;
            if sum.unit == 0.0 {
                sum.unit = weight;
            }
            sum.weight += weight;
            self.loss += loss;
        }
    }
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
    /// Statistics of synchronised batch norm.
    pub statistics: Counters,
    /// How long this rank had nothing else to do but wait for gradients: communication that nothing hid.
    pub waited: Duration,
}

impl Sub for StepCounters {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            gradients: self.gradients - earlier.gradients,
            control: self.control - earlier.control,
            statistics: self.statistics - earlier.statistics,
            waited: self.waited - earlier.waited,
        }
    }
}
