//! Cutting a captured step into the stages of a pipeline.
//!
//! [`cut`] is a pure function: from a step and a stage for each parameter ([`Cut`]) to what each stage runs, and what
//! crosses between them.
//!
//! - An operation that reads a parameter runs on the parameter's stage. All others run where the fewest bytes cross: at
//!   the minimum cut between what they read and who reads them, forward and backward pass taken together, and as late
//!   as that allows.
//! - In the forward pass tensors go to later stages only, directly to each stage that needs them, however many lie
//!   between; in the backward pass to earlier ones. A tensor of the forward pass that the backward pass of a later
//!   stage needs is sent along in the forward pass.
//! - Inputs, constants, and what is cheaply computed from them alone (masks, positions, targets) never cross: each
//!   stage makes its own.
//! - A parameter that several stages read is held by all of them. Each gives its part of the gradient; the sum of the
//!   parts is the gradient.
//! - With gradient checkpointing a stage computes again what it has computed itself; what another one has computed is
//!   kept.
//! - The backward pass of a stage is split in two: what earlier stages wait for, and the rest, gradients of its
//!   parameters, which a schedule may delay (Qi et al. 2023, [arXiv:2401.10241](https://arxiv.org/abs/2401.10241)).
//!
//! A batch norm sees one micro-batch at a time, as with gradient accumulation on one device: its statistics are those
//! of the micro-batch, and its running statistics take a step for each of them.

mod analysis;
mod assign;
mod balance;
mod cost;
mod flow;
mod measure;
mod passes;
mod placement;
mod program;
mod report;
mod run;
mod split;
mod tied;

pub use assign::Cut;
pub use cost::operation_cost;
pub use measure::measure_operations;
pub use passes::{StageForward, Tensors};
pub use report::{Crossing, CutReport, StageShare};
pub use run::StageRun;
pub use split::{Route, StageGraph};

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use burn_ir::OperationIr;

use self::analysis::{Analysis, ValueSource};
use self::placement::{Bounds, StageResult, place};
use self::split::{Placement, pinned_results, split};
use self::tied::{gradient_parts, ids};
use crate::Error;
use crate::graph::operation::bytes;
use crate::graph::origin::Origins;
use crate::graph::{StepGraph, graph_error};

/// A step cut into stages.
#[derive(Clone, Debug)]
pub struct CutGraph {
    /// What each stage runs.
    pub stages: Vec<StageGraph>,
    /// The stages that hold each parameter of the graph: first its own, then others that read it.
    pub holders: Vec<Vec<usize>>,
    /// What it costs.
    pub report: CutReport,
    /// The stage of each operation.
    placement: Vec<usize>,
}

impl CutGraph {
    /// A hash of all that the stages must agree on: which parameters each holds, and what crosses between them.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.holders.hash(&mut hasher);
        for route in self.stages.iter().flat_map(|stage| &stage.sends) {
            (route.from, route.to).hash(&mut hasher);
            for tensor in &route.tensors {
                (&tensor.shape, tensor.dtype).hash(&mut hasher);
            }
        }
        hasher.finish()
    }
}

/// Cuts a step into `stages` stages; `homes` is the stage of each parameter and running statistic, in the order of the
/// graph's.
///
/// # Errors
/// [`Error::Plan`] if a parameter is given to a stage that does not exist, or to an earlier one than the only ones
/// where the operations that read it can run; [`Error::Graph`] if the number of homes is wrong.
pub fn cut(graph: &StepGraph, homes: &[usize], stages: usize) -> Result<CutGraph, Error> {
    cut_like(graph, homes, stages, None)
}

/// As [`cut`], with every operation on the stage that it has in a cut of the same step for a batch of another size.
pub(crate) fn cut_like(
    graph: &StepGraph,
    homes: &[usize],
    stages: usize,
    model: Option<&CutGraph>,
) -> Result<CutGraph, Error> {
    if homes.len() != graph.params.len() {
        let (params, homes) = (graph.params.len(), homes.len());
        return Err(graph_error(format!("a graph of {params} parameters was given stages for {homes}")));
    }
    if let Some((param, home)) = graph.params.iter().zip(homes).find(|(_, home)| **home >= stages) {
        let path = &param.path;
        let problem = format!("parameter `{path}` is given to pipeline stage {home}, but there are {stages} stages");
        return Err(Error::Plan { problem });
    }
    let mut graph = graph.clone();
    let results = graph.results().map(|tensor| tensor.id).collect();
    let operations = graph.operations.clone();
    let analysis = Analysis::new(&operations, graph.forward_len, &graph.params, &results);
    let bounds = Bounds::new(&analysis, &graph.params, homes, stages)?;
    let gradients = gradient_parts(&mut graph, &analysis, &bounds);

    // Once more, with the sums of tied parameters taken apart.
    let mut results: HashSet<_> = ids(gradients.iter().map(|part| &part.wanted));
    let updates = graph.params.iter().filter_map(|param| param.update.as_ref());
    results.extend(updates.chain(&graph.outputs).chain(&graph.loss).chain(&graph.weight).map(|tensor| tensor.id));
    let operations = graph.operations.clone();
    let analysis = Analysis::new(&operations, graph.forward_len, &graph.params, &results);
    let bounds = Bounds::new(&analysis, &graph.params, homes, stages)?;
    let mut wanted: Vec<StageResult> = gradients.iter().map(|part| part.wanted.clone()).collect();
    wanted.extend(pinned_results(&graph, &bounds.holders));
    let stage = match model.filter(|model| model.placement.len() == operations.len()) {
        Some(model) => model.placement.clone(),
        None => place(&analysis, &bounds, &wanted, stages),
    };
    check(&graph, &analysis, &bounds, &stage)?;

    let placement = Placement { analysis, stage, holders: bounds.holders, gradients };
    let parts = split(&graph, &placement, stages);
    let report = report(&graph, &parts, &placement.holders);
    Ok(CutGraph { stages: parts, holders: placement.holders, report, placement: placement.stage })
}

/// Checks that tensors of the forward pass go to later stages and those of the backward pass to earlier ones.
fn check(graph: &StepGraph, analysis: &Analysis<'_>, bounds: &Bounds, stage: &[usize]) -> Result<(), Error> {
    for op in analysis.placed() {
        let wrong = |why: &str| {
            let name = Origins::of(graph).describe(&analysis.operations[op]);
            Err(graph_error(format!("{name} cannot be placed: it would run on stage {}, {why}", stage[op])))
        };
        if bounds.pinned[op].is_some_and(|pinned| pinned != stage[op]) {
            return wrong("where its parameter is not");
        }
        for (origin, _) in analysis.origins(op) {
            let ValueSource::Op(maker) = origin else { continue };
            match (analysis.is_forward(maker), analysis.is_forward(op)) {
                (true, true) if stage[maker] > stage[op] => return wrong("before its inputs are there"),
                (false, _) if stage[maker] < stage[op] => return wrong("after the gradients that it needs"),
                _ => {}
            }
        }
    }
    Ok(())
}

fn report(graph: &StepGraph, parts: &[StageGraph], holders: &[Vec<usize>]) -> CutReport {
    let cost = |operations: &[OperationIr]| operations.iter().map(operation_cost).sum::<u64>();
    let costs: Vec<u64> = parts
        .iter()
        .map(|part| cost(&part.forward) + cost(&part.backward_input) + cost(&part.backward_weight))
        .collect();
    let all = costs.iter().sum::<u64>().max(1) as f64;
    let stages = parts.iter().zip(costs).map(|(part, cost)| StageShare {
        params: part.params.len(),
        param_bytes: part.params.iter().map(|param| bytes(&graph.params[*param].tensor)).sum(),
        cost: cost as f64 / all,
        saved_bytes: program::saved_bytes(graph, part),
    });
    let crossings = parts.iter().flat_map(|part| &part.sends).map(|route| Crossing {
        from: route.from,
        to: route.to,
        tensors: route.tensors.iter().map(|tensor| tensor.shape.to_vec()).collect(),
        bytes: route.tensors.iter().map(bytes).sum(),
    });
    let tied = graph.params.iter().zip(holders).filter(|(_, holders)| holders.len() > 1);
    CutReport {
        stages: stages.collect(),
        crossings: crossings.collect(),
        tied: tied.map(|(param, holders)| (param.path.clone(), holders.clone())).collect(),
    }
}
