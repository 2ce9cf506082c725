//! Plans: which parameters and inputs of a model are split, and along which dims, by patterns of paths.
//!
//! ```
//! use burn::{nn::{Linear, LinearConfig}, prelude::*};
//! use burn_parallel::plan::Plan;
//!
//! let model: Linear = LinearConfig::new(4, 6).init(&Device::flex());
//! let plan = Plan::new().shard("*weight", 1).shard("*bias", 0);
//! let table = plan.table(&model, 2)?;
//! assert_eq!(table.rows()[0].local_dims, [4, 3]);
//! println!("{table}");
//! # Ok::<(), burn_parallel::Error>(())
//! ```
//!
//! # As text
//! A [`Plan`] is serde's `Serialize` and `Deserialize`. In TOML:
//!
//! ```
//! use burn_parallel::plan::Plan;
//!
//! let plan: Plan = toml::from_str(r#"
//!     sequence_parallel = 1
//!     parameters = [
//!         { pattern = "*.up.weight", shard = 1 },
//!         { pattern = "*.up.bias", shard = 0, if_present = true },
//!         { pattern = "*.norm.*", replicate = true },
//!     ]
//!
//!     [axes.dp]
//!     inputs = [{ path = "0", shard = 0 }]
//! "#).unwrap();
//! let same = Plan::new()
//!     .shard("*.up.weight", 1)
//!     .shard_if_present("*.up.bias", 0)
//!     .replicate("*.norm.*")
//!     .sequence_parallel(1)
//!     .on("dp", Plan::new().shard_input("0", 0));
//! assert_eq!(plan, same);
//! ```

mod axis_plan;
mod compressed_paths;
mod cost;
mod from_layouts;
mod pattern;
mod presets;
mod rule_text;
mod show;
mod suggest;
mod table;
mod text;

use std::collections::BTreeMap;

use burn::module::Module;
use serde::{Deserialize, Serialize};

pub(crate) use axis_plan::AxisPlan;
pub use cost::PlanCost;
pub(crate) use cost::{must_split, warn_of_nothing_split};
pub(crate) use from_layouts::{from_layouts, like};
pub use table::{PlanRow, PlanTable};

use self::axis_plan::{InputRule, ParamRule, plan_error};
pub(crate) use self::compressed_paths::compress_paths;
pub(crate) use self::pattern::{captures, matches};
use self::text::PlanText;
use crate::Error;
use crate::forms::Table;
use crate::layout::Layout;
use crate::nesting;
use crate::params::visit_params;

/// Which parameters and inputs are split over the ranks of a group, and along which dims.
///
/// An ordered list of rules, a pattern of parameter paths and a [`Layout`] each; the first whose pattern matches
/// counts, and a parameter that none matches is replicated. Dims are those of burn: the weight of a `Linear` is
/// `[inputs, outputs]`. Any plan gives the numbers of one device: a plan decides about memory, work and communication
/// only.
///
/// # Patterns
/// A pattern is a path in which `*` stands for any characters, none included, dots included: `*.mha.query.weight`
/// matches `encoder.layers.0.mha.query.weight`. Everything else matches itself, and the pattern must match the whole
/// path.
///
/// A parameter is *claimed twice*, which is an error, when a rule decides nothing because earlier rules take all that
/// it matches, and when a parameter that the module holds at two paths gets two layouts.
///
/// # Axes
/// A plan describes one axis, that over which the model is wrapped. For a model that is wrapped over several axes of a
/// [`Mesh`](crate::mesh::Mesh), [`on`](Self::on) adds what another axis does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "PlanText", from = "Table<PlanText>")]
pub struct Plan {
    own: AxisPlan,
    axes: BTreeMap<String, AxisPlan>,
}

impl Plan {
    /// A plan that splits nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Splits the parameters that match along `dim`.
    pub fn shard(self, pattern: impl Into<String>, dim: usize) -> Self {
        self.rule(ParamRule { pattern: pattern.into(), layout: Layout::Sharded(dim), optional: false, padded: false })
    }

    /// Splits the parameters that match along `dim`, padded with zeros to the next size that the ranks divide evenly:
    /// for vocabularies, and the widths of layers that are not cut in a way that the model itself knows of, as heads
    /// are.
    ///
    /// Each rank holds as much as the first; the last ones hold zeros, which stay zeros in training, and neither the
    /// loss nor a gradient knows of them. Checkpoints and whole models have the dims that the model has. Whether the
    /// step can go on with padding shows when it is captured: a linear layer, an embedding and what is computed element
    /// by element from them can, with sums, means and the softmax over the padded dim; other activations are gathered,
    /// and a parameter that is read in another way is an error then.
    pub fn shard_padded(self, pattern: impl Into<String>, dim: usize) -> Self {
        self.rule(ParamRule { pattern: pattern.into(), layout: Layout::Sharded(dim), optional: false, padded: true })
    }

    /// Splits the parameters that match along `dim`; it is no error if there is none, or if earlier rules take them
    /// all.
    pub fn shard_if_present(self, pattern: impl Into<String>, dim: usize) -> Self {
        self.rule(ParamRule { pattern: pattern.into(), layout: Layout::Sharded(dim), optional: true, padded: false })
    }

    /// Leaves the parameters that match whole on every rank, whatever later rules say.
    pub fn replicate(self, pattern: impl Into<String>) -> Self {
        self.rule(ParamRule { pattern: pattern.into(), layout: Layout::Replicated, optional: false, padded: false })
    }

    fn rule(mut self, rule: ParamRule) -> Self {
        self.own.rules.push(rule);
        self
    }

    /// Splits an input of the step along `dim`, told by its place in the inputs: `""` if there is a single tensor,
    /// `"1"` for the second of a tuple, `"1.0"` for the first in the second. Every rank still passes the whole input.
    ///
    /// Splitting all inputs along the batch, and no parameter, is data parallelism.
    pub fn shard_input(mut self, path: impl Into<String>, dim: usize) -> Self {
        self.own.inputs.push(InputRule { path: path.into(), shard: dim });
        self
    }

    /// Splits the activations between the split layers along `dim`, that of the sequence: 1 in `[batch, sequence,
    /// width]`, 0 in `[sequence, batch, width]`. Another dim is an error when the plan meets a model.
    ///
    /// Sequence parallelism (Korthikanti et al. 2022, [arXiv:2205.05198](https://arxiv.org/abs/2205.05198)): each
    /// all-reduce becomes a reduce-scatter and an all-gather of the same bytes, and norms, dropouts and residual sums
    /// in between are computed, and kept for the backward pass, for each rank's part of the sequence only.
    pub fn sequence_parallel(mut self, dim: usize) -> Self {
        self.own.sequence_dim = Some(dim);
        self
    }

    /// Adds what another axis, of this name, does. Of `plan` the rules, inputs and sequence of its own axis are taken.
    pub fn on(mut self, axis: impl Into<String>, plan: Self) -> Self {
        self.axes.insert(axis.into(), plan.own);
        self
    }

    /// Adds the rules and inputs of another plan behind those of this one, for each axis.
    pub fn then(mut self, more: Self) -> Self {
        self.own.extend(more.own);
        for (axis, more) in more.axes {
            self.axes.entry(axis).or_default().extend(more);
        }
        self
    }

    /// The same plan without the rules that match no parameter of a model, as most of those of a
    /// [preset](Self::hugging_face) do: what it says of this model, to be printed.
    pub fn only_for<M: Module>(mut self, model: &M) -> Self {
        let mut paths = Vec::new();
        visit_params(model, &mut |param| paths.push(param.path()));
        for plan in std::iter::once(&mut self.own).chain(self.axes.values_mut()) {
            plan.rules.retain(|rule| paths.iter().any(|path| rule.matches(path)));
        }
        self
    }

    /// The layout of a parameter over the plan's own axis.
    pub fn layout(&self, path: &str) -> Layout {
        self.own.layout(path)
    }

    /// The plan, checked against a model and a number of ranks. Lazy parameters stay lazy.
    ///
    /// # Errors
    /// As [`table_over`](Self::table_over).
    pub fn table<M: Module>(&self, model: &M, degree: usize) -> Result<PlanTable, Error> {
        self.table_over(model, &[(DEFAULT_AXIS, degree)])
    }

    /// The plan over several axes, given by names and sizes, checked against a model: the plan's own axis, then
    /// others, for which it says something by [`on`](Self::on) or which split nothing. Lazy parameters stay lazy.
    ///
    /// # Errors
    /// [`Error::Plan`] if the plan was given an empty name of a field, or names an axis that is not given; if a pattern
    /// matches no parameter, or no rule of an axis does; if a parameter is claimed twice; if a rule splits a dim that a
    /// parameter does not have, or that the degree does not divide and is not to be [padded](Self::shard_padded), or a
    /// parameter that is not float; if a [sequence](Self::sequence_parallel) is along another dim than 0 or 1; or if
    /// the model is wrapped already, so that a rank may hold parts of its parameters alone.
    pub fn table_over<M: Module>(&self, model: &M, axes: &[(&str, usize)]) -> Result<PlanTable, Error> {
        if let Some(wrapper) = nesting::wrapper(model) {
            return Err(plan_error(format!(
                "the model is, or holds, a `{wrapper}`, of which a rank may have parts: make the table before it is wrapped"
            )));
        }
        PlanTable::of(self.over(axes.iter().map(|axis| axis.0))?, model, axes)
    }

    /// What the plan says of each of these axes, the first of which is its own.
    pub(crate) fn over<'a>(&self, axes: impl Iterator<Item = &'a str>) -> Result<Vec<AxisPlan>, Error> {
        let axes: Vec<&str> = axes.collect();
        if let Some(unknown) = self.axes.keys().find(|name| !axes.iter().skip(1).any(|axis| axis == name)) {
            return Err(plan_error(format!(
                "the plan says what axis `{unknown}` does beside its own, but the model is wrapped over {axes:?}"
            )));
        }
        let named = |name: &&str| self.axes.get(*name).cloned().unwrap_or_default();
        Ok(std::iter::once(self.own.clone()).chain(axes.iter().skip(1).map(named)).take(axes.len()).collect())
    }
}

/// What an axis is called where the caller has no name for it.
pub(crate) const DEFAULT_AXIS: &str = "tp";

impl From<Plan> for PlanText {
    fn from(Plan { own, axes }: Plan) -> Self {
        let AxisPlan { rules: parameters, inputs, sequence_dim: sequence_parallel, refused } = own;
        let axes = axes.into_iter().map(|(name, axis)| (name, axis.into())).collect();
        Self { sequence_parallel, parameters, inputs, refused, axes }
    }
}

impl From<Table<PlanText>> for Plan {
    fn from(Table(text): Table<PlanText>) -> Self {
        let PlanText { sequence_parallel: sequence_dim, parameters: rules, inputs, refused, axes } = text;
        let axes = axes.into_iter().map(|(name, axis)| (name, axis.into())).collect();
        Self { own: AxisPlan { rules, inputs, sequence_dim, refused }, axes }
    }
}
