//! How a plan is written down, in TOML, JSON, or whatever else serde speaks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{AxisPlan, InputRule, Plan, Rule};
use crate::forms::{Table, tables};
use crate::layout::Layout;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlanText {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sequence_parallel: Option<usize>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    parameters: Vec<Rule>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "tables")]
    inputs: Vec<InputRule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    axes: BTreeMap<String, AxisPlan>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AxisText {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sequence_parallel: Option<usize>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    parameters: Vec<Rule>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "tables")]
    inputs: Vec<InputRule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

impl From<Plan> for PlanText {
    fn from(Plan { own, axes }: Plan) -> Self {
        let AxisPlan { rules: parameters, inputs, sequence_dim: sequence_parallel, refused } = own;
        Self { sequence_parallel, parameters, inputs, refused, axes }
    }
}

impl From<Table<PlanText>> for Plan {
    fn from(Table(text): Table<PlanText>) -> Self {
        let PlanText { sequence_parallel: sequence_dim, parameters: rules, inputs, refused, axes } = text;
        Self { own: AxisPlan { rules, inputs, sequence_dim, refused }, axes }
    }
}

impl From<AxisPlan> for AxisText {
    fn from(AxisPlan { rules: parameters, inputs, sequence_dim: sequence_parallel, refused }: AxisPlan) -> Self {
        Self { sequence_parallel, parameters, inputs, refused }
    }
}

impl From<Table<AxisText>> for AxisPlan {
    fn from(Table(text): Table<AxisText>) -> Self {
        let AxisText { sequence_parallel: sequence_dim, parameters: rules, inputs, refused } = text;
        Self { rules, inputs, sequence_dim, refused }
    }
}

/// `{ pattern = "*.query.weight", shard = 1 }` or `{ pattern = "*.norm.*", replicate = true }`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleText {
    pattern: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shard: Option<usize>,
    #[serde(default, skip_serializing_if = "is_false")]
    replicate: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    if_present: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    padded: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl From<Rule> for RuleText {
    fn from(Rule { pattern, layout, optional: if_present, padded }: Rule) -> Self {
        let shard = match layout {
            Layout::Sharded(dim) => Some(dim),
            _ => None,
        };
        Self { pattern, shard, replicate: shard.is_none(), if_present, padded }
    }
}

impl TryFrom<Table<RuleText>> for Rule {
    type Error = String;

    fn try_from(Table(text): Table<RuleText>) -> Result<Self, String> {
        let RuleText { pattern, shard, replicate, if_present: optional, padded } = text;
        let layout = match (shard, replicate) {
            (Some(dim), false) => Layout::Sharded(dim),
            (None, true) if padded => {
                return Err(format!("pattern `{pattern}` is not split, and cannot be `padded`"));
            }
            (None, true) => Layout::Replicated,
            _ => {
                return Err(format!(
                    "pattern `{pattern}` needs either `shard`, the number of a dim, or `replicate = true`"
                ));
            }
        };
        Ok(Self { pattern, layout, optional, padded })
    }
}
