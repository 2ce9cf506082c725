//! How long gathered parameters are kept.

use serde::{Deserialize, Serialize};

/// How long gathered parameters are kept with [`Sharding::Parameters`](super::Sharding::Parameters): less memory, or
/// fewer gathers.
///
/// In a file: `"pass"`, `"micro_batch"`, `"step"`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// For the use in one pass: they are gathered for forward and once more for backward. A step of `m` micro-batches
    /// gathers them `2 m` times, and a rank holds two groups of them at most. With the model's own forward that takes a
    /// device with gradient checkpointing (`device.autodiff().gradient_checkpointing()`): on another, burn keeps from
    /// forward to backward what layers have made of a weight by an operation, a view above all, and wrapping is an
    /// error. Small vectors (biases, norms) are kept as well then, and burn keeps the table of its `Embedding`.
    #[default]
    Pass,
    /// From forward to backward of a micro-batch: gathered `m` times, held whole while a micro-batch is under way. Not
    /// in a pipeline, where several are under way at once: there it is an error.
    MicroBatch,
    /// For the step: gathered once, held whole until its end.
    Step,
}
