//! Counters of communication of steps.

use std::ops::Sub;
use std::time::Duration;

use crate::comm::Counters;

/// What steps cost in communication on one rank: one of them, or all so far.
#[derive(Debug, Clone, Default)]
pub struct StepCounters {
    /// Data parallelism, the buckets of gradients: one collective for each, or two where rows are divided among some of
    /// the replicas only. Of [sharded](crate::sharding) replicas gradients of 1 MiB and more go by themselves.
    pub gradients: Counters,
    /// Sharded replicas: parameters that were gathered, for use or after their update.
    pub parameters: Counters,
    /// Data parallelism, the few numbers that go with them: weights, losses, which parameters were used.
    pub control: Counters,
    /// The statistics of synchronised batch norm.
    pub statistics: Counters,
    /// Tensor parallelism, over all axes that a model is split over.
    pub tensor: Counters,
    /// Pipeline parallelism: what goes from stage to stage, and parameters that several stages hold: their values when
    /// these are shared, and the sums of their gradients.
    pub pipeline: Counters,
    /// The norm of the gradient, over the ranks that share the model: what
    /// [`clip_grad_norm`](super::Step::clip_grad_norm) takes.
    pub norm: Counters,
    /// Steps that were skipped because their gradient was not finite.
    pub skipped: u64,
    /// How long this rank had nothing else to do but wait for gradients, and with [sharded](crate::sharding) replicas
    /// for parameters that are gathered: communication that nothing hid.
    pub waited: Duration,
}

impl StepCounters {
    /// Everything together.
    pub fn total(&self) -> Counters {
        let parts = [&self.parameters, &self.control, &self.statistics, &self.tensor, &self.pipeline, &self.norm];
        parts.into_iter().fold(self.gradients.clone(), |sum, more| sum + more.clone())
    }
}

impl Sub for StepCounters {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            gradients: self.gradients - earlier.gradients,
            parameters: self.parameters - earlier.parameters,
            control: self.control - earlier.control,
            statistics: self.statistics - earlier.statistics,
            tensor: self.tensor - earlier.tensor,
            pipeline: self.pipeline - earlier.pipeline,
            norm: self.norm - earlier.norm,
            skipped: self.skipped - earlier.skipped,
            waited: self.waited - earlier.waited,
        }
    }
}
