//! The report of one run of a pipeline.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::comm::Counters;

/// What a run of a pipeline cost on one rank.
#[derive(Debug, Clone, Default)]
pub struct RunReport {
    /// Actions of this rank: passes, sends and receives.
    pub actions: usize,
    /// From the first action to the loss.
    pub elapsed: Duration,
    /// Time in the passes of this rank's stages.
    pub busy: Duration,
    /// Time spent waiting for tensors of other ranks, and at the end for the loss.
    pub waited: Duration,
    /// The share of the time, over all ranks, that was not spent in passes: the bubble, and all that the pipeline
    /// itself costs. The same on every rank but for how long each says that the run took.
    pub idle_share: f64,
    /// For how many micro-batches each stage of this rank kept activations at most.
    pub peak_activations: BTreeMap<usize, usize>,
    /// The same over all stages of this rank at once.
    pub peak_activations_of_rank: usize,
    /// Messages and their bytes, by operation: `send` and `recv`.
    pub counters: Counters,
}
