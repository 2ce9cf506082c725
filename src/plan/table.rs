//! The table of a plan: every parameter of a model with its layouts.

use std::collections::HashSet;

use burn::module::{Module, ParamId};
use burn::tensor::DType;

use super::axis_plan::{AxisPlan, local_dims, plan_error};
use super::compressed_paths::compress_paths;
use crate::Error;
use crate::layout::Layout;
use crate::params::{ParamRef, Renamed, visit_params};

/// A parameter under a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRow {
    /// Its path; of several places that share one id, the first.
    pub path: String,
    /// burn's id of it.
    pub id: ParamId,
    /// Its dims in the whole model.
    pub dims: Vec<usize>,
    /// These dims with the [padding](super::Plan::shard_padded) that makes all parts equally large.
    pub padded_dims: Vec<usize>,
    /// Its dtype.
    pub dtype: DType,
    /// How it lies over each axis of the table, in order. A dim that two axes split is divided over the first, and each
    /// part over the second.
    pub layouts: Vec<Layout>,
    /// The dims that each rank holds.
    pub local_dims: Vec<usize>,
    /// The bytes that each rank holds.
    pub bytes: usize,
}

/// The share of a model that a plan may leave whole without being asked whether it is the right one.
const MOSTLY: f64 = 0.5;

impl PlanRow {
    /// Its bytes in the whole model.
    fn model_bytes(&self) -> usize {
        self.dims.iter().product::<usize>() * self.dtype.size()
    }

    /// Whether any axis splits it.
    pub fn is_split(&self) -> bool {
        self.layouts.iter().any(|layout| *layout != Layout::Replicated)
    }

    /// The dims that it has once the first `axes` axes have taken their parts.
    pub(crate) fn dims_after(&self, axes: usize, sizes: &[(String, usize)]) -> Vec<usize> {
        let mut dims = self.padded_dims.clone();
        for (layout, (_, size)) in self.layouts.iter().zip(sizes).take(axes) {
            if let Layout::Sharded(dim) = layout {
                dims[*dim] /= size;
            }
        }
        dims
    }
}

/// Every parameter of a model under a plan. Prints as a table, [in short](Self::in_short) as one of few rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanTable {
    axes: Vec<(String, usize)>,
    rows: Vec<PlanRow>,
    /// Whether the plan is to split any parameter.
    splits: bool,
}

impl PlanTable {
    /// Checks the plans of these axes; see [`Plan::table_over`](super::Plan::table_over).
    pub(super) fn of<M: Module>(plans: Vec<AxisPlan>, model: &M, axes: &[(&str, usize)]) -> Result<Self, Error> {
        let mut found = TableRows::default();
        visit_params(model, &mut |param| found.add(&param));
        let TableRows { mut rows, tied, .. } = found;
        for (name, degree) in axes {
            if *degree == 0 {
                return Err(plan_error(format!("axis `{name}` has no ranks: a plan is for at least 1")));
            }
        }
        let ranks = axes.iter().try_fold(1u32, |ranks, (_, degree)| ranks.checked_mul(u32::try_from(*degree).ok()?));
        if ranks.is_none() {
            return Err(plan_error(format!("the axes {axes:?} have more ranks than a model can be split over")));
        }
        let splits = plans.iter().flat_map(|axis| &axis.rules).any(|rule| rule.layout != Layout::Replicated);
        for row in &mut rows {
            let places = plans.iter().zip(axes);
            row.padded_dims = padded_dims(row, places.map(|(of_axis, (_, degree))| (of_axis, *degree)));
            row.local_dims = row.padded_dims.clone();
        }
        for (of_axis, (name, _)) in plans.iter().zip(axes) {
            if let Some(dim) = of_axis.sequence_dim().filter(|dim| *dim > 1) {
                return Err(plan_error(format!(
                    "`sequence_parallel({dim})` over axis `{name}`: the sequence is dim 1 of activations [batch, sequence, width], or dim \
                     0 of [sequence, batch, width]"
                )));
            }
        }
        for (index, of_axis) in plans.into_iter().enumerate() {
            of_axis.check(axes[index].0, &rows, &tied)?;
            for row in &mut rows {
                place(row, of_axis.layout(&row.path), axes[index])?;
            }
        }
        for row in &mut rows {
            row.bytes = row.local_dims.iter().product::<usize>() * row.dtype.size();
        }
        Ok(Self { axes: axes.iter().map(|(name, size)| ((*name).into(), *size)).collect(), rows, splits })
    }

    /// The table of a model whose float parameters are divided by rows, with padding, over one axis. Running statistics
    /// are not, and parameters without elements are left out, unless `later` says which dims they will have.
    pub(crate) fn by_rows<M: Module>(
        model: &M,
        axis: &str,
        ranks: usize,
        later: &dyn Fn(ParamId) -> Option<Vec<usize>>,
    ) -> Self {
        let mut found = TableRows::default();
        visit_params(model, &mut |param| found.add(&param));
        let mut rows = found.rows;
        for row in &mut rows {
            if row.dims.contains(&0) {
                row.dims = later(row.id).unwrap_or_default();
                (row.padded_dims, row.local_dims) = (row.dims.clone(), row.dims.clone());
            }
        }
        rows.retain(|row| !row.dims.is_empty() && !row.dims.contains(&0));
        for row in &mut rows {
            let running = row.path.ends_with("running_mean") || row.path.ends_with("running_var");
            let divided = row.dtype.is_float() && !running;
            row.layouts.push(if divided { Layout::Sharded(0) } else { Layout::Replicated });
            if divided {
                row.padded_dims[0] = row.dims[0].next_multiple_of(ranks);
                row.local_dims[0] = row.padded_dims[0] / ranks;
            }
            row.bytes = row.local_dims.iter().product::<usize>() * row.dtype.size();
        }
        Self { axes: vec![(axis.into(), ranks)], rows, splits: true }
    }

    /// The table in which no axis divides anything.
    pub(crate) fn whole(&self) -> Self {
        let mut table = self.clone();
        for row in &mut table.rows {
            row.layouts.fill(Layout::Replicated);
            (row.padded_dims, row.local_dims) = (row.dims.clone(), row.dims.clone());
            row.bytes = row.model_bytes();
        }
        table
    }

    /// The parameters, in the order in which a visitor meets them.
    pub fn rows(&self) -> &[PlanRow] {
        &self.rows
    }

    /// Names and sizes of the axes.
    pub fn axes(&self) -> &[(String, usize)] {
        &self.axes
    }

    /// The number of ranks over which the model is split, over all axes.
    pub fn degree(&self) -> usize {
        self.axes.iter().map(|axis| axis.1).product()
    }

    /// The bytes of parameters that each rank holds.
    pub fn bytes(&self) -> usize {
        self.rows.iter().map(|row| row.bytes).sum()
    }

    /// The bytes of the whole model, without padding.
    pub fn model_bytes(&self) -> usize {
        self.rows.iter().map(PlanRow::model_bytes).sum()
    }

    /// The share of these bytes that no axis splits, from 0 to 1: what every rank holds all of. 0 for a model of none.
    ///
    /// ```
    /// use burn::{nn::{Linear, LinearConfig}, prelude::*};
    /// use burn_parallel::plan::Plan;
    ///
    /// let model: Linear = LinearConfig::new(3, 2).init(&Device::flex());
    /// let table = Plan::new().shard("weight", 1).table(&model, 2)?;
    /// assert_eq!(table.whole_share(), 0.25);
    /// # Ok::<(), burn_parallel::Error>(())
    /// ```
    pub fn whole_share(&self) -> f64 {
        let whole = self.rows.iter().filter(|row| !row.is_split()).map(PlanRow::model_bytes).sum::<usize>();
        whole as f64 / self.model_bytes().max(1) as f64
    }

    /// In words, which parameters make up most of what is left whole, if that is most of the model's bytes and
    /// something was to be split.
    pub(crate) fn mostly_whole(&self) -> Option<String> {
        let share = self.whole_share();
        if !self.splits || self.degree() < 2 || share <= MOSTLY {
            return None;
        }
        let mut whole: Vec<&PlanRow> = self.rows.iter().filter(|row| !row.is_split()).collect();
        whole.sort_by_key(|row| std::cmp::Reverse(row.model_bytes()));
        let (mut so_far, all) = (0, whole.iter().map(|row| row.model_bytes()).sum::<usize>());
        let largest = whole.into_iter().take_while(|row| {
            so_far += row.model_bytes();
            so_far - row.model_bytes() < all * 9 / 10
        });
        let mut paths: Vec<&str> = largest.map(|row| row.path.as_str()).collect();
        paths.sort_unstable();
        Some(format!(
            "the plan leaves {:.1} % of the model's {} bytes whole on every rank, above all {}: do its patterns fit the \
             names of this model?",
            100.0 * share,
            self.model_bytes(),
            compress_paths(paths)
        ))
    }

    /// The table of parameters of other ids.
    pub(crate) fn renamed(&self, renamed: &Renamed) -> Self {
        let mut table = self.clone();
        table.rows.iter_mut().for_each(|row| row.id = renamed.id(row.id));
        table
    }

    pub(crate) fn row(&self, id: ParamId) -> Option<&PlanRow> {
        self.rows.iter().find(|row| row.id == id)
    }
}

impl AxisPlan {
    /// Finds rules that decide nothing, and parameters about which two rules disagree.
    fn check(&self, axis: &str, rows: &[PlanRow], tied: &[TiedPath]) -> Result<(), Error> {
        if let Some(refused) = &self.refused {
            return Err(plan_error(refused.clone()));
        }
        for (index, rule) in self.rules.iter().enumerate().filter(|(_, rule)| !rule.optional) {
            let mut matched = rows.iter().filter(|row| rule.matches(&row.path)).peekable();
            let Some(first) = matched.peek().copied() else {
                return Err(unmatched(&format!("pattern `{}` matches", rule.pattern), rows));
            };
            let earlier = |row: &PlanRow| self.rules[..index].iter().find(|earlier| earlier.matches(&row.path));
            if let Some(claimed) = earlier(first)
                && matched.all(|row| earlier(row).is_some())
            {
                return Err(plan_error(format!(
                    "parameter `{}` is claimed twice on axis `{axis}`: the pattern `{}` comes first and says {}, the \
                     pattern `{}` is to make it {} and decides nothing else; put the narrower pattern first, or drop one",
                    first.path, claimed.pattern, claimed.layout, rule.pattern, rule.layout
                )));
            }
        }
        let any = |row: &PlanRow| self.rules.iter().any(|rule| rule.matches(&row.path));
        if !self.rules.is_empty() && !rows.iter().any(any) {
            return Err(unmatched("the patterns of the plan match", rows));
        }
        for TiedPath { first, other } in tied {
            let (a, b) = (self.layout(first), self.layout(other));
            // A plan need not name both places; if it does, it must give them the same layout.
            if a != b && self.rules.iter().any(|rule| rule.matches(other)) {
                return Err(plan_error(format!(
                    "one parameter is claimed twice on axis `{axis}`: it is `{first}`, which is {a}, and also `{other}`, \
                     which is {b}; give both paths the same layout"
                )));
            }
        }
        Ok(())
    }
}

/// The dims of a parameter, of which those that may be padded are multiples of the ranks that they are divided over.
fn padded_dims<'a>(row: &PlanRow, axes: impl Iterator<Item = (&'a AxisPlan, usize)>) -> Vec<usize> {
    let mut dims = row.dims.clone();
    let (mut over, mut pads) = (vec![1; dims.len()], vec![false; dims.len()]);
    for (axis, degree) in axes {
        if let Layout::Sharded(dim) = axis.layout(&row.path)
            && dim < dims.len()
        {
            over[dim] *= degree;
            pads[dim] |= axis.pads(&row.path);
        }
    }
    for ((size, over), pads) in dims.iter_mut().zip(over).zip(pads) {
        if pads {
            *size = size.next_multiple_of(over);
        }
    }
    dims
}

fn place(row: &mut PlanRow, layout: Layout, (axis, degree): (&str, usize)) -> Result<(), Error> {
    if !row.dtype.is_float() && layout != Layout::Replicated {
        return Err(plan_error(format!("parameter `{}` is {:?}, but only float is split", row.path, row.dtype)));
    }
    let name = format!("parameter `{}`", row.path);
    row.local_dims = local_dims(&name, &row.local_dims, layout, axis, degree)?;
    row.layouts.push(layout);
    Ok(())
}

fn unmatched(what: &str, rows: &[PlanRow]) -> Error {
    let paths = compress_paths(rows.iter().map(|row| row.path.as_str()));
    plan_error(format!(
        "{what} none of the parameters {paths}; `*` stands for any characters, and `Plan::suggest_for` writes a plan for any names"
    ))
}

/// A parameter that is met again at another path.
struct TiedPath {
    first: String,
    other: String,
}

#[derive(Default)]
struct TableRows {
    rows: Vec<PlanRow>,
    tied: Vec<TiedPath>,
    seen: HashSet<ParamId>,
}

impl TableRows {
    fn add(&mut self, param: &ParamRef<'_>) {
        let (id, path, dims, dtype) = (param.id(), param.path(), param.dims(), param.dtype());
        if self.seen.insert(id) {
            let local_dims = dims.clone();
            let padded_dims = dims.clone();
            self.rows.push(PlanRow { path, id, dims, padded_dims, dtype, layouts: Vec::new(), local_dims, bytes: 0 });
        } else if let Some(row) = self.rows.iter().find(|row| row.id == id) {
            self.tied.push(TiedPath { first: row.path.clone(), other: path });
        }
    }
}
