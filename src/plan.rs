//! Which parameters and inputs of a model are split, and along which dims: patterns of paths, checked against the model.
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

use std::collections::HashSet;
use std::fmt;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Int, Tensor};

use crate::Error;
use crate::layout::Layout;

/// Which parameters and inputs are split over the ranks of one group, and along which dims.
///
/// An ordered list of rules, a pattern of parameter paths and a [`Layout`] each; the first whose pattern matches counts, and
/// a parameter that none matches is replicated. Dims are those of burn: the weight of a `Linear` is `[inputs, outputs]`.
/// Any plan gives the numbers of one device: a plan decides about memory, work and communication only.
///
/// # Patterns
/// A pattern is a path in which `*` stands for any characters, none included, dots included: `*.mha.query.weight` matches
/// `encoder.layers.0.mha.query.weight`. Everything else matches itself, and the pattern must match the whole path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    rules: Vec<Rule>,
    inputs: Vec<(String, Layout)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    pattern: String,
    layout: Layout,
    /// Whether it may match nothing.
    optional: bool,
}

impl Plan {
    /// A plan that splits nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Splits the parameters that match along `dim`.
    pub fn shard(self, pattern: impl Into<String>, dim: usize) -> Self {
        self.rule(pattern.into(), Layout::Sharded(dim), false)
    }

    /// Splits the parameters that match along `dim`; it is no error if there is none.
    pub fn shard_if_present(self, pattern: impl Into<String>, dim: usize) -> Self {
        self.rule(pattern.into(), Layout::Sharded(dim), true)
    }

    /// Leaves the parameters that match whole on every rank, whatever later rules say.
    pub fn replicate(self, pattern: impl Into<String>) -> Self {
        self.rule(pattern.into(), Layout::Replicated, false)
    }

    fn rule(mut self, pattern: String, layout: Layout, optional: bool) -> Self {
        self.rules.push(Rule { pattern, layout, optional });
        self
    }

    /// Splits an input of the step along `dim`, told by its place in the inputs: `""` if there is a single tensor, `"1"` for
    /// the second of a tuple, `"1.0"` for the first in the second. Every rank still passes the whole input.
    ///
    /// Splitting all inputs along the batch, and no parameter, is data parallelism.
    pub fn shard_input(mut self, path: impl Into<String>, dim: usize) -> Self {
        self.inputs.push((path.into(), Layout::Sharded(dim)));
        self
    }

    /// Megatron-LM's plan ([arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3) for burn's `TransformerEncoder`,
    /// `TransformerDecoder`, and `MultiHeadAttention` and `PositionWiseFeedForward` in other models: projections to query,
    /// key, value and the inner layer by columns, the projections back by rows.
    ///
    /// It goes by burn's field names: `query`, `key`, `value`, `linear_inner`, `linear_outer`; and `output` in fields whose
    /// names end in `mha`, `attn` or `attention`. `SwiGlu` has fields of the same names, both of which are best split by
    /// columns: give it rules of its own. The degree should divide the number of heads: otherwise heads are
    /// gathered, which is right but slow.
    pub fn megatron() -> Self {
        let mut plan = Self::new();
        for column in ["query", "key", "value", "linear_inner"] {
            plan = plan.shard_if_present(format!("*{column}.weight"), 1);
            plan = plan.shard_if_present(format!("*{column}.bias"), 0);
        }
        for row in ["mha.output", "attn.output", "attention.output", "linear_outer"] {
            plan = plan.shard_if_present(format!("*{row}.weight"), 0);
        }
        plan
    }

    /// The layout of a parameter.
    pub fn layout(&self, path: &str) -> Layout {
        self.rules.iter().find(|rule| matches(&rule.pattern, path)).map_or(Layout::Replicated, |rule| rule.layout)
    }

    /// The plan, checked against a model and a number of ranks. Lazy parameters stay lazy.
    ///
    /// # Errors
    /// [`Error::Plan`] if a pattern matches no parameter, or no rule at all does; if a rule splits a dim that a parameter
    /// does not have or that the degree does not divide, or a parameter that is not float.
    pub fn table<M: Module>(&self, model: &M, degree: usize) -> Result<PlanTable, Error> {
        let mut rows = Rows::default();
        model.visit(&mut rows);
        let rows = rows.rows;
        for rule in self.rules.iter().filter(|rule| !rule.optional) {
            if !rows.iter().any(|row| matches(&rule.pattern, &row.path)) {
                return Err(unmatched(&format!("pattern `{}` matches", rule.pattern), &rows));
            }
        }
        let any = |row: &PlanRow| self.rules.iter().any(|rule| matches(&rule.pattern, &row.path));
        if !self.rules.is_empty() && !rows.iter().any(any) {
            return Err(unmatched("the patterns of the plan match", &rows));
        }
        let rows: Result<_, Error> = rows.into_iter().map(|row| self.place(row, degree)).collect();
        Ok(PlanTable { degree, rows: rows? })
    }

    fn place(&self, row: PlanRow, degree: usize) -> Result<PlanRow, Error> {
        let layout = self.layout(&row.path);
        if !row.dtype.is_float() && layout != Layout::Replicated {
            return Err(plan_error(format!("parameter `{}` is {:?}, but only float is split", row.path, row.dtype)));
        }
        let local_dims = local_dims(&format!("parameter `{}`", row.path), &row.dims, layout, degree)?;
        let bytes = local_dims.iter().product::<usize>() * row.dtype.size();
        Ok(PlanRow { layout, local_dims, bytes, ..row })
    }

    /// The layouts of the inputs at these paths, with their dims.
    pub(crate) fn input_layouts<'a>(
        &self,
        inputs: impl Iterator<Item = (&'a str, &'a [usize])>,
        degree: usize,
    ) -> Result<Vec<Layout>, Error> {
        let inputs: Vec<_> = inputs.collect();
        if let Some((path, _)) = self.inputs.iter().find(|(path, _)| !inputs.iter().any(|input| input.0 == path)) {
            let paths: Vec<&str> = inputs.iter().map(|input| input.0).collect();
            return Err(plan_error(format!("the step has no input `{path}`, but {paths:?}")));
        }
        let layout = |(path, dims): (&str, &[usize])| {
            let layout = self.inputs.iter().find(|input| input.0 == path).map_or(Layout::Replicated, |input| input.1);
            local_dims(&format!("input `{path}`"), dims, layout, degree).map(|_| layout)
        };
        inputs.into_iter().map(layout).collect()
    }
}

fn plan_error(problem: String) -> Error {
    Error::Plan { problem }
}

fn unmatched(what: &str, rows: &[PlanRow]) -> Error {
    let paths: Vec<&str> = rows.iter().map(|row| row.path.as_str()).collect();
    plan_error(format!("{what} none of the parameters {paths:?}; `*` stands for any characters"))
}

fn local_dims(name: &str, dims: &[usize], layout: Layout, degree: usize) -> Result<Vec<usize>, Error> {
    if degree == 0 {
        return Err(plan_error("a plan is for at least 1 rank, not 0".into()));
    }
    let mut local = dims.to_vec();
    if let Layout::Sharded(dim) = layout {
        let size = local.get_mut(dim).ok_or_else(|| {
            plan_error(format!("{name} of dims {dims:?} is to be {layout} over {degree} ranks, but has no dim {dim}"))
        })?;
        if !size.is_multiple_of(degree) {
            return Err(plan_error(format!(
                "{name} of dims {dims:?} is to be {layout} over {degree} ranks, but {degree} does not divide {size}: \
                 choose another dim or degree, or replicate it"
            )));
        }
        *size /= degree;
    }
    Ok(local)
}

/// Whether `pattern`, in which `*` stands for any characters, matches all of `path`.
pub(crate) fn matches(pattern: &str, path: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == path };
    let Some(mut path) = path.strip_prefix(first) else { return false };
    let (between, last) = rest.rsplit_once('*').map_or((None, rest), |(between, last)| (Some(between), last));
    // The earliest place for each piece leaves most for the others.
    for piece in between.into_iter().flat_map(|between| between.split('*')) {
        match path.find(piece) {
            Some(place) => path = &path[place + piece.len()..],
            None => return false,
        }
    }
    path.ends_with(last)
}

/// A parameter under a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRow {
    /// Its path; of several places that share one id, the first.
    pub path: String,
    /// burn's id of it.
    pub id: ParamId,
    /// Its dims in the whole model.
    pub dims: Vec<usize>,
    /// Its dtype.
    pub dtype: DType,
    /// How it lies over the group.
    pub layout: Layout,
    /// The dims that each rank holds.
    pub local_dims: Vec<usize>,
    /// The bytes that each rank holds.
    pub bytes: usize,
}

/// Every parameter of a model under a plan. Prints as a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanTable {
    degree: usize,
    rows: Vec<PlanRow>,
}

impl PlanTable {
    /// The parameters, in the order in which a visitor meets them.
    pub fn rows(&self) -> &[PlanRow] {
        &self.rows
    }

    /// The number of ranks.
    pub fn degree(&self) -> usize {
        self.degree
    }

    /// The bytes of parameters that each rank holds.
    pub fn bytes(&self) -> usize {
        self.rows.iter().map(|row| row.bytes).sum()
    }

    pub(crate) fn row(&self, id: ParamId) -> Option<&PlanRow> {
        self.rows.iter().find(|row| row.id == id)
    }
}

impl fmt::Display for PlanTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |row: &PlanRow| {
            let (dims, local) = (format!("{:?}", row.dims), format!("{:?}", row.local_dims));
            [row.path.clone(), dims, row.layout.to_string(), local, row.bytes.to_string()]
        };
        let head = ["parameter", "dims", "layout", "local dims", "bytes"].map(String::from);
        let lines: Vec<[String; 5]> = std::iter::once(head).chain(self.rows.iter().map(line)).collect();
        let widths: [usize; 5] =
            std::array::from_fn(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0));
        for [path, dims, layout, local, bytes] in &lines {
            let [a, b, c, d, e] = widths;
            writeln!(f, "{path:a$}  {dims:b$}  {layout:c$}  {local:d$}  {bytes:>e$}")?;
        }
        write!(f, "{} bytes on each of {} ranks", self.bytes(), self.degree)
    }
}

#[derive(Default)]
struct Rows {
    rows: Vec<PlanRow>,
    seen: HashSet<ParamId>,
    path: Vec<String>,
}

impl Rows {
    fn add(&mut self, id: ParamId, dims: Vec<usize>, dtype: DType) {
        if self.seen.insert(id) {
            let path = self.path.join(".");
            let local_dims = dims.clone();
            self.rows.push(PlanRow { path, id, dims, dtype, layout: Layout::Replicated, local_dims, bytes: 0 });
        }
    }
}

impl ModuleVisitor for Rows {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let dtype = match param.is_initialized() {
            true => param.val().dtype(),
            false => param.lazy_device().settings().float_dtype.into(),
        };
        self.add(param.id, param.lazy_shape().to_vec(), dtype);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.add(param.id, param.val().shape().to_vec(), param.val().dtype());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.add(param.id, param.val().shape().to_vec(), param.val().dtype());
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        for (pattern, path, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("*", "", true),
            ("*.weight", "a.0.weight", true),
            ("*weight", "weight", true),
            ("a*a", "a", false),
            ("a.*.c.*.e", "a.b.c.d.e", true),
            ("a.*.c.*.e", "a.c.e", false),
            ("*mha*weight", "layers.0.mha.query.weight", true),
            ("*mha*weight", "layers.0.mha.query.bias", false),
            ("**b**", "abc", true),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
    }
}
