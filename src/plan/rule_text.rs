//! How a rule of a plan is written down.

use serde::{Deserialize, Serialize};

/// `{ pattern = "*.query.weight", shard = 1 }` or `{ pattern = "*.norm.*", replicate = true }`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleText {
    pub(super) pattern: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) shard: Option<usize>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) replicate: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) if_present: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) padded: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
}
