//! The configuration of tensor parallelism.

use burn::config::Config;
use serde::{Deserialize, Deserializer, Serialize};

use crate::forms::name_or_table;
use crate::plan::Plan;

/// How a model is split over a group: settings of
/// [`TensorParallel::tensor_parallel`](super::TensorParallel::tensor_parallel). A [`Plan`] alone is taken for one with
/// the defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TensorParallelConfig {
    /// Which parameters and inputs are split, and along which dims. In a file its rules, or the name of a ready plan:
    /// `"megatron"` or `"hugging_face"`.
    #[serde(deserialize_with = "ready_or_rules")]
    pub plan: Plan,
    /// What the random numbers of captured steps follow from, dropout above all.
    pub seed: u64,
    /// Every so many steps ranks make sure that all of them were given the same inputs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check_inputs_every: Option<u64>,
    /// Whether captured steps on the host run groups of element-wise operations as one loop.
    pub fusion: bool,
}

impl Default for TensorParallelConfig {
    fn default() -> Self {
        Self { plan: Plan::default(), seed: 0, check_inputs_every: None, fusion: true }
    }
}

impl Config for TensorParallelConfig {}

impl TensorParallelConfig {
    /// This plan, seed 0, inputs compared in every step on CPUs and in every 100th on other devices, operations fused.
    pub fn new(plan: Plan) -> Self {
        Self { plan, ..Self::default() }
    }

    /// Sets the seed of the random numbers that steps draw, dropout above all: the same on every rank of the split,
    /// which then draw what one device would.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets how often the ranks of the split compare the inputs that they were given; 0 for never. The comparison reads
    /// the inputs, which on a device means to wait for them.
    pub fn with_check_inputs_every(mut self, steps: u64) -> Self {
        self.check_inputs_every = Some(steps);
        self
    }

    /// Sets whether captured steps on the host run groups of element-wise operations as one loop
    /// ([`CustomOps::with_fusion`](crate::graph::CustomOps::with_fusion)): to compare, or to find which operation
    /// fails.
    pub fn with_fusion(mut self, fusion: bool) -> Self {
        self.fusion = fusion;
        self
    }
}

impl From<Plan> for TensorParallelConfig {
    fn from(plan: Plan) -> Self {
        Self::new(plan)
    }
}

impl From<&Plan> for TensorParallelConfig {
    fn from(plan: &Plan) -> Self {
        Self::new(plan.clone())
    }
}

fn ready_or_rules<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Plan, D::Error> {
    const FORMS: &str = "`megatron`, `hugging_face`, or a table of the plan's rules with the keys `parameters`, `inputs`, \
                         `sequence_parallel` and `axes`";
    name_or_table(deserializer, FORMS, |name| match name {
        "megatron" => Ok(Plan::megatron()),
        "hugging_face" => Ok(Plan::hugging_face()),
        _ => Err(format!("there is no ready plan `{name}`")),
    })
}
