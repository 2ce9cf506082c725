//! What a plan says of one axis: rules for parameters and inputs.

use serde::{Deserialize, Deserializer, Serialize};

use super::pattern::matches;
use super::rule_text::RuleText;
use crate::Error;
use crate::forms::table_as;
use crate::layout::Layout;

/// What a plan says of one axis.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct AxisPlan {
    pub(super) rules: Vec<ParamRule>,
    pub(super) inputs: Vec<InputRule>,
    pub(super) sequence_dim: Option<usize>,
    /// Why no model can be split so.
    pub(super) refused: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(into = "RuleText")]
pub(super) struct ParamRule {
    pub(super) pattern: String,
    pub(super) layout: Layout,
    /// Whether it may match nothing.
    pub(super) optional: bool,
    /// Whether a dim that the degree does not divide is padded.
    pub(super) padded: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InputRule {
    pub(super) path: String,
    pub(super) shard: usize,
}

impl ParamRule {
    pub(super) fn matches(&self, path: &str) -> bool {
        matches(&self.pattern, path)
    }
}

impl AxisPlan {
    pub(super) fn extend(&mut self, more: Self) {
        self.rules.extend(more.rules);
        self.inputs.extend(more.inputs);
        self.sequence_dim = more.sequence_dim.or(self.sequence_dim);
        self.refused = self.refused.take().or(more.refused);
    }

    pub(crate) fn layout(&self, path: &str) -> Layout {
        self.rules.iter().find(|rule| rule.matches(path)).map_or(Layout::Replicated, |rule| rule.layout)
    }

    /// Whether the dim along which a parameter is split may be padded.
    pub(super) fn pads(&self, path: &str) -> bool {
        self.rules.iter().find(|rule| rule.matches(path)).is_some_and(|rule| rule.padded)
    }

    pub(crate) fn sequence_dim(&self) -> Option<usize> {
        self.sequence_dim
    }

    /// The layouts of the inputs at these paths, with their dims.
    pub(crate) fn input_layouts<'a>(
        &self,
        inputs: impl Iterator<Item = (&'a str, &'a [usize])>,
        (axis, degree): (&str, usize),
    ) -> Result<Vec<Layout>, Error> {
        let inputs: Vec<_> = inputs.collect();
        if let Some(rule) = self.inputs.iter().find(|rule| !inputs.iter().any(|input| input.0 == rule.path)) {
            let paths: Vec<&str> = inputs.iter().map(|input| input.0).collect();
            return Err(plan_error(format!("the step has no input `{}`, but {paths:?}", rule.path)));
        }
        let layout = |(path, dims): (&str, &[usize])| {
            let rule = self.inputs.iter().find(|rule| rule.path == path);
            let layout = rule.map_or(Layout::Replicated, |rule| Layout::Sharded(rule.shard));
            local_dims(&format!("input `{path}`"), dims, layout, axis, degree).map(|_| layout)
        };
        inputs.into_iter().map(layout).collect()
    }
}

pub(super) fn plan_error(problem: String) -> Error {
    Error::Plan { problem }
}

pub(super) fn local_dims(
    name: &str,
    dims: &[usize],
    layout: Layout,
    axis: &str,
    degree: usize,
) -> Result<Vec<usize>, Error> {
    let mut local = dims.to_vec();
    if let Layout::Sharded(dim) = layout {
        let wanted = || format!("{name} of dims {dims:?} is to be {layout} over the {degree} ranks of axis `{axis}`");
        let Some(size) = local.get_mut(dim) else {
            return Err(plan_error(format!("{}, but has no dim {dim}", wanted())));
        };
        if !size.is_multiple_of(degree) {
            return Err(plan_error(format!(
                "{}, but {degree} does not divide {size}: choose another dim or degree, replicate it, or, \
                 if it may be padded, say so by `shard_padded`, in a file `padded = true`",
                wanted()
            )));
        }
        *size /= degree;
    }
    Ok(local)
}

impl From<ParamRule> for RuleText {
    fn from(ParamRule { pattern, layout, optional: if_present, padded }: ParamRule) -> Self {
        let shard = match layout {
            Layout::Sharded(dim) => Some(dim),
            _ => None,
        };
        Self { pattern, shard, replicate: shard.is_none(), if_present, padded }
    }
}

impl<'de> Deserialize<'de> for ParamRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        table_as::<RuleText, Self, D>(deserializer)
    }
}

impl TryFrom<RuleText> for ParamRule {
    type Error = String;

    fn try_from(text: RuleText) -> Result<Self, String> {
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
