//! Options of a partition.

use burn::config::Config;
use serde::{Deserialize, Serialize};

/// The mesh axis over which [`partition`](super::partition) splits a step, and how.
///
/// ```
/// use burn_parallel::partition::PartitionOptions;
///
/// let options = PartitionOptions::new("tp", 4, 1).with_sequence_dim(1);
/// assert_eq!((options.degree, options.sequence_dim), (4, Some(1)));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionOptions {
    /// Name of the axis, which the ids of the collectives begin with: `tp.all_reduce`.
    pub axis: String,
    /// Ranks along the axis.
    pub degree: usize,
    /// The rank, among these, that is to run the graph.
    pub rank: usize,
    /// Sequence parallelism: the dim along which activations stay split between the parts of the model that are split
    /// otherwise. `None` leaves them whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence_dim: Option<usize>,
}

impl Config for PartitionOptions {}

impl PartitionOptions {
    /// The axis of this name and degree, seen from one of its ranks.
    pub fn new(axis: impl Into<String>, degree: usize, rank: usize) -> Self {
        Self { axis: axis.into(), degree, rank, sequence_dim: None }
    }

    /// Sequence parallelism ([arXiv:2205.05198](https://arxiv.org/abs/2205.05198)): activations `[batch, sequence,
    /// features]`, told by their three dims, are split along `dim`, 0 or 1, wherever that costs no more than to have
    /// them whole. Partial sums become theirs by reduce-scatter; a layer that is split by columns gathers its input;
    /// norms, dropout and residual sums run on the split sequence.
    ///
    /// Activations whose `dim` the degree does not divide stay whole.
    #[must_use]
    pub fn with_sequence_dim(mut self, dim: usize) -> Self {
        self.sequence_dim = Some(dim);
        self
    }
}
