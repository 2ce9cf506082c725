//! The configuration of pipeline parallelism.

use burn::config::Config;
use serde::{Deserialize, Deserializer, Serialize};

use super::schedule::Schedule;
use crate::forms::name_or_table;
use crate::graph::GRAPHS;
use crate::pipeline_parallel::cut::Cut;

/// How a model is spread over the ranks of a pipeline, and how they work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PipelineConfig {
    /// How many micro-batches the batch of a step is divided into. The idle share falls with their number.
    pub micro_batches: usize,
    /// In which order the stages take them. 1F1B unless said otherwise.
    #[serde(default, deserialize_with = "schedule")]
    pub schedule: Schedule,
    /// Which stage each parameter belongs to. Stages of equal cost unless said otherwise.
    #[serde(default, deserialize_with = "cut")]
    pub cut: Cut,
    /// Inputs that every micro-batch gets whole, by their place in the inputs.
    #[serde(default)]
    pub whole_inputs: Vec<String>,
    /// The seed of the random numbers that steps draw, dropout above all. That of a model that is split as well stays.
    #[serde(default)]
    pub seed: u64,
    /// How many captured steps, and as many forwards, are kept: those used last, and at least one. 16 unless said
    /// otherwise.
    #[serde(default = "graphs")]
    pub graphs: usize,
    /// Every so many steps ranks make sure that all of them were given the same inputs; see
    /// [`with_check_inputs_every`](Self::with_check_inputs_every).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check_inputs_every: Option<u64>,
    /// Whether steps on the host run groups of element-wise operations as one loop.
    #[serde(default = "fusion")]
    pub fusion: bool,
}

impl Config for PipelineConfig {}

impl PipelineConfig {
    /// This many micro-batches, 1F1B, stages of equal cost, all inputs divided along their first dim, seed 0,
    /// operations fused.
    pub fn new(micro_batches: usize) -> Self {
        Self {
            micro_batches,
            schedule: Schedule::OneForwardOneBackward,
            cut: Cut::default(),
            whole_inputs: Vec::new(),
            seed: 0,
            graphs: GRAPHS,
            check_inputs_every: None,
            fusion: true,
        }
    }

    /// Sets the schedule. An interleaved one cuts the model into several stages for each rank.
    pub fn with_schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets the cut.
    pub fn with_cut(mut self, cut: Cut) -> Self {
        self.cut = cut;
        self
    }

    /// Sets the seed, 0 unless said otherwise. With the same seed and micro-batches, any number of ranks and any
    /// schedule draw the same numbers.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Another number of captured steps, and of forwards, that are kept. A batch of other shapes than these is captured
    /// anew.
    pub fn with_graphs(mut self, graphs: usize) -> Self {
        self.graphs = graphs;
        self
    }

    /// Sets how often the ranks compare the inputs that they were given; 0 for never. In every step on CPUs, and in
    /// every 100th on other devices, where reading inputs means to wait for them, unless said otherwise. For a model
    /// that is split as well, its [`TensorParallelConfig`](crate::tensor_parallel::TensorParallelConfig) says it.
    pub fn with_check_inputs_every(mut self, steps: u64) -> Self {
        self.check_inputs_every = Some(steps);
        self
    }

    /// Sets whether steps on the host run groups of element-wise operations as one loop
    /// ([`CustomOps::with_fusion`](crate::graph::CustomOps::with_fusion)): to compare, or to find which operation
    /// fails.
    pub fn with_fusion(mut self, fusion: bool) -> Self {
        self.fusion = fusion;
        self
    }

    /// Gives an input to every micro-batch as it is, instead of dividing its first dim: a mask for all rows, a table.
    /// `path` is its place in the inputs: `""` if there is a single tensor, `"1"` for the second of a tuple, `"1.0"`
    /// for the first in the second.
    pub fn with_whole_input(mut self, path: impl Into<String>) -> Self {
        self.whole_inputs.push(path.into());
        self
    }
}

fn graphs() -> usize {
    GRAPHS
}

fn fusion() -> bool {
    true
}

fn schedule<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Schedule, D::Error> {
    const FORMS: &str = "`gpipe`, `1f1b`, `zb_h1`, `{ interleaved = { stages_per_rank = 2 } }`, `{ forward_only = { stages_per_rank = \
                         1 } }` or `{ custom = \"..\" }`, a timetable";
    name_or_table(deserializer, FORMS, |name| match name {
        "gpipe" => Ok(Schedule::GPipe),
        "1f1b" => Ok(Schedule::OneForwardOneBackward),
        "zb_h1" => Ok(Schedule::ZeroBubbleH1),
        "interleaved" | "forward_only" => Err(format!("schedule `{name}` lacks how many stages each rank holds")),
        "custom" => Err("schedule `custom` lacks its timetable".into()),
        "zb" | "zbh1" | "zero_bubble" => Err(format!("there is no schedule `{name}`: ZB-H1 is called `zb_h1`")),
        _ => Err(format!("there is no schedule `{name}`")),
    })
}

fn cut<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Cut, D::Error> {
    const FORMS: &str = "`balanced`, `{ before = [\"layers.6.*\"] }`, `{ patterns = [[\"layers.0.*\"], [\"*\"]] }`, `{ listed = [[\"path\", \
                         0], ..] }` or `{ measured = [1.5, ..] }`";
    name_or_table(deserializer, FORMS, |name| match name {
        "balanced" => Ok(Cut::Balanced),
        "before" | "patterns" | "listed" | "measured" => Err(format!("cut `{name}` lacks its list")),
        _ => Err(format!("there is no cut `{name}`")),
    })
}
