//! How a model is spread over a pipeline.

use super::schedule::Schedule;
use crate::graph::GRAPHS;
use crate::pipeline_parallel::cut::Cut;

/// How a model is spread over the ranks of a pipeline, and how they work.
#[derive(Debug, Clone)]
pub struct PipelineConfig {
    /// How many micro-batches the batch of a step is divided into. The idle share falls with their number.
    pub micro_batches: usize,
    /// In which order the stages take them. 1F1B unless said otherwise.
    pub schedule: Schedule,
    /// Which stage each parameter belongs to. Stages of equal cost unless said otherwise.
    pub cut: Cut,
    /// Inputs that every micro-batch gets whole, by their place in the inputs.
    pub whole_inputs: Vec<String>,
    /// The seed of the random numbers that steps draw, dropout above all. That of a model that is split as well stays.
    pub seed: u64,
    /// How many captured steps, and as many forwards, are kept: those used last, and at least one. 16 unless said otherwise.
    pub graphs: usize,
}

impl PipelineConfig {
    /// This many micro-batches, 1F1B, stages of equal cost, all inputs divided along their first dim, seed 0.
    pub fn new(micro_batches: usize) -> Self {
        Self {
            micro_batches,
            schedule: Schedule::OneForwardOneBackward,
            cut: Cut::default(),
            whole_inputs: Vec::new(),
            seed: 0,
            graphs: GRAPHS,
        }
    }

    /// Another schedule. An interleaved one cuts the model into several stages for each rank.
    pub fn with_schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Another cut.
    pub fn with_cut(mut self, cut: Cut) -> Self {
        self.cut = cut;
        self
    }

    /// Another seed than 0. With the same seed and micro-batches, any number of ranks and any schedule draw the same numbers.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Another number of captured steps, and of forwards, that are kept. A batch of other shapes than these is captured anew.
    pub fn with_graphs(mut self, graphs: usize) -> Self {
        self.graphs = graphs;
        self
    }

    /// Gives an input to every micro-batch as it is, instead of dividing its first dim: a mask for all rows, a table. `path` is
    /// its place in the inputs: `""` if there is a single tensor, `"1"` for the second of a tuple, `"1.0"` for the first in
    /// the second.
    pub fn with_whole_input(mut self, path: impl Into<String>) -> Self {
        self.whole_inputs.push(path.into());
        self
    }
}
