//! The serialised form of a plan.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::axis_plan::{AxisPlan, InputRule, ParamRule};
use crate::forms::{tables, tables_by_name};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlanText {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) sequence_parallel: Option<usize>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) parameters: Vec<ParamRule>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "tables")]
    pub(super) inputs: Vec<InputRule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) refused: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "tables_by_name")]
    pub(super) axes: BTreeMap<String, AxisText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AxisText {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) sequence_parallel: Option<usize>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) parameters: Vec<ParamRule>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "tables")]
    pub(super) inputs: Vec<InputRule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) refused: Option<String>,
}

impl From<AxisPlan> for AxisText {
    fn from(AxisPlan { rules: parameters, inputs, sequence_dim: sequence_parallel, refused }: AxisPlan) -> Self {
        Self { sequence_parallel, parameters, inputs, refused }
    }
}

impl From<AxisText> for AxisPlan {
    fn from(AxisText { sequence_parallel: sequence_dim, parameters: rules, inputs, refused }: AxisText) -> Self {
        Self { rules, inputs, sequence_dim, refused }
    }
}
