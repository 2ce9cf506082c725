//! A plan for a model that was never seen, by the cost of the step that results.

use std::collections::BTreeMap;

use burn::module::Module;
use burn_ir::{FloatOperationIr, OperationIr, TensorId, TensorIr};

use crate::Error;
use crate::graph::{GraphInputs, StepGraph, capture_step, counted_random};
use crate::layout::Layout;
use crate::params;
use crate::partition::{CollectiveKind, PartitionOptions, ShardReport, partition};
use crate::plan::{Plan, PlanCost, concise, like, must_split};
use crate::step::Loss;

/// How often the search goes over all parameters after the first time, at most.
const SWEEPS: usize = 3;

impl Plan {
    /// What this plan costs in a training step: `loss` on `inputs`, which give shapes and dtypes only. Nothing is run, and no
    /// lazy parameter is made.
    ///
    /// # Errors
    /// [`Error::Plan`] as [`table`](Self::table); [`Error::Graph`] if the step cannot be captured.
    pub fn cost<M, I, F, R>(&self, model: &M, degree: usize, inputs: I, loss: F) -> Result<PlanCost, Error>
    where
        M: Module,
        I: GraphInputs,
        F: FnOnce(&M, I) -> R,
        R: Into<Loss>,
    {
        let table = self.table(model, degree)?;
        let step = Candidate::capture(model, degree, inputs, loss)?;
        let layout = |id| table.row(id).map_or(Layout::Replicated, |row| row.layouts[0]);
        step.cost(&step.graph.params.iter().map(|param| layout(param.id)).collect::<Vec<_>>())
    }

    /// A good plan for splitting a model over `degree` ranks that train it with `loss` on such `inputs`. Nothing is run:
    /// the step is captured, and candidate layouts are compared by the collectives, the work and the bytes of the graph
    /// that each rank would get ([`cost`](Self::cost)).
    ///
    /// Like parameters of repeated layers get like layouts. Those that hold nine tenths of the bytes are split whatever it
    /// costs, if the degree divides one of their dims; the others where that is cheaper. The search begins once with
    /// nothing split and once with [`suggest`](Self::suggest), and changes one layout at a time while that helps. The same
    /// model and shapes give the same plan, on every rank.
    ///
    /// ```
    /// use burn::{nn::{Linear, LinearConfig}, prelude::*};
    /// use burn_parallel::plan::Plan;
    ///
    /// #[derive(Module, Debug)]
    /// struct Mlp { up: Linear, down: Linear }
    ///
    /// let device = Device::flex().autodiff();
    /// let model = Mlp {
    ///     up: LinearConfig::new(64, 256).init(&device),
    ///     down: LinearConfig::new(256, 64).init(&device),
    /// };
    /// let x = Tensor::<2>::zeros([32, 64], &device);
    /// let loss = |model: &Mlp, x: Tensor<2>| model.down.forward(model.up.forward(x).tanh()).powi_scalar(2).mean();
    /// let plan = Plan::suggest_for(&model, 2, x.clone(), loss)?;
    /// // Columns, then rows with one all-reduce is what the field does: nothing that costs more is suggested.
    /// let by_hand = Plan::new().shard("up.weight", 1).shard("up.bias", 0).shard("down.weight", 0);
    /// let suggested = plan.cost(&model, 2, x.clone(), loss)?;
    /// assert!(suggested.total() <= by_hand.cost(&model, 2, x, loss)?.total());
    /// assert_eq!(suggested.parameter_bytes, 4.0 * (64.0 * 256.0 * 2.0 + 256.0 + 64.0) / 2.0);
    /// # Ok::<(), burn_parallel::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if the step cannot be captured or split.
    pub fn suggest_for<M, I, F, R>(model: &M, degree: usize, inputs: I, loss: F) -> Result<Self, Error>
    where
        M: Module,
        I: GraphInputs,
        F: FnOnce(&M, I) -> R,
        R: Into<Loss>,
    {
        let step = Candidate::capture(model, degree, inputs, loss)?;
        let groups = step.groups();
        let whole = vec![Layout::Replicated; step.graph.params.len()];
        let guess = Self::suggest(model, degree);
        let guessed: Vec<Layout> = step.graph.params.iter().map(|param| guess.layout(&param.path)).collect();
        let from_nothing = step.improve(&groups, whole)?;
        let from_guess = step.improve(&groups, guessed)?;
        let (_, best) = if from_guess.0 < from_nothing.0 { from_guess } else { from_nothing };
        let paths = step.graph.params.iter().map(|param| param.path.clone());
        Ok(concise(&paths.zip(best).collect::<Vec<_>>()))
    }
}

/// A captured step that is tried with several layouts.
struct Candidate {
    graph: StepGraph,
    degree: usize,
}

/// Like parameters of repeated layers, by their place among the parameters of the graph.
struct Group {
    members: Vec<usize>,
    bytes: usize,
    /// What they may be.
    choices: Vec<Layout>,
}

impl Candidate {
    fn capture<M, I, F, R>(model: &M, degree: usize, inputs: I, loss: F) -> Result<Self, Error>
    where
        M: Module,
        I: GraphInputs,
        F: FnOnce(&M, I) -> R,
        R: Into<Loss>,
    {
        // Only lazy parameters become hollow.
        let mut graph = capture_step(&params::outline(model, &|_, _| None), inputs, loss)?;
        counted_random(&mut graph);
        Ok(Self { graph, degree })
    }

    fn cost(&self, layouts: &[Layout]) -> Result<PlanCost, Error> {
        let inputs = vec![Layout::Replicated; self.graph.inputs.len()];
        let options = PartitionOptions::new("tp", self.degree, 0);
        let (local, report) = partition(&self.graph, layouts, &inputs, &options)?;
        Ok(PlanCost {
            collectives: report.collectives.len(),
            collective_bytes: sent(&report, self.degree as f64),
            parameter_bytes: local.params.iter().map(|param| bytes(&param.tensor) as f64).sum(),
            work: local.operations.iter().map(work).sum(),
        })
    }

    /// The groups, the largest first. Those that must be split have no choice but how.
    fn groups(&self) -> Vec<Group> {
        let mut found: BTreeMap<(String, Vec<usize>), Group> = BTreeMap::new();
        let norms = self.graph.batch_norms.iter().flat_map(|norm| [norm.running_mean, norm.running_var]);
        let running: Vec<TensorId> = norms.collect();
        for (place, param) in self.graph.params.iter().enumerate() {
            let dims = param.tensor.shape.to_vec();
            let may = param.tensor.dtype.is_float() && !running.contains(&param.tensor.id);
            let divided = |dim: &usize| may && dims[*dim].is_multiple_of(self.degree);
            let choices: Vec<Layout> = (0..dims.len()).filter(divided).map(Layout::Sharded).collect();
            let group = found.entry((like(&param.path), dims)).or_insert(Group { members: vec![], bytes: 0, choices });
            group.members.push(place);
            group.bytes += bytes(&param.tensor);
        }
        let mut groups: Vec<Group> = found.into_values().filter(|group| !group.choices.is_empty()).collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.bytes));
        let must = must_split(&groups.iter().map(|group| group.bytes).collect::<Vec<_>>());
        for (group, _) in groups.iter_mut().zip(must).filter(|(_, must)| !must) {
            group.choices.push(Layout::Replicated);
        }
        groups
    }

    /// Changes the layout of one group at a time to the best there is, until nothing helps.
    fn improve(&self, groups: &[Group], mut layouts: Vec<Layout>) -> Result<(f64, Vec<Layout>), Error> {
        let mut least = f64::INFINITY;
        for _ in 0..=SWEEPS {
            let before = layouts.clone();
            for group in groups {
                let mut best = None;
                for choice in &group.choices {
                    let mut tried = layouts.clone();
                    group.members.iter().for_each(|place| tried[*place] = *choice);
                    let cost = self.cost(&tried)?.total();
                    if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                        best = Some((cost, tried));
                    }
                }
                if let Some(best) = best {
                    (least, layouts) = best;
                }
            }
            if layouts == before {
                break;
            }
        }
        Ok((least, layouts))
    }
}

fn bytes(tensor: &TensorIr) -> usize {
    tensor.shape.num_elements() * tensor.dtype.size()
}

/// Bytes that each of `n` ranks sends.
fn sent(report: &ShardReport, n: f64) -> f64 {
    let each = |kind: CollectiveKind| match kind {
        CollectiveKind::AllGather | CollectiveKind::ReduceScatter => (n - 1.0) / n,
        CollectiveKind::AllToAll => (n - 1.0) / (n * n),
        _ => 2.0 * (n - 1.0) / n,
    };
    let elements = |dims: &[usize]| dims.iter().product::<usize>() as f64;
    report.collectives.iter().map(|collective| 4.0 * each(collective.kind) * elements(&collective.dims)).sum()
}

/// Floating-point operations of one operation.
fn work(op: &OperationIr) -> f64 {
    let elements = |tensor: &TensorIr| tensor.shape.num_elements() as f64;
    let out = op.outputs().next().map_or(0.0, elements);
    let mut inputs = op.inputs();
    match (op, inputs.next(), inputs.next()) {
        // Of [m, k] x [k, n] -> [m, n] the root of the three sizes is m k n, each of a batch counted for itself.
        (OperationIr::Float(_, FloatOperationIr::Matmul(product)), Some(a), Some(b)) => {
            let dims = product.out.shape.as_slice();
            let batch = dims[..dims.len().saturating_sub(2)].iter().product::<usize>() as f64;
            2.0 * (elements(a) * elements(b) * out / batch.max(1.0)).sqrt()
        }
        (OperationIr::Module(_), Some(a), Some(b)) => 2.0 * (elements(a) * elements(b) * out).sqrt(),
        _ => out,
    }
}
