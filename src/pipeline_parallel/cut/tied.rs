//! Splits the gradient sums of parameters that several stages hold.
//!
//! Autodiff adds up the gradients of all uses of a parameter. For a parameter on several stages those sums are taken
//! apart, so that each stage adds up its own uses; what the stages have is summed once a step, outside the graph.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn_ir::{OperationIr, TensorId, TensorIr};

use super::analysis::{Analysis, ValueSource};
use super::placement::{Bounds, StageResult};
use crate::graph::step::Uses;
use crate::graph::{StepGraph, operation};

/// The gradient of a parameter, or one stage's part of it.
#[derive(Clone, Debug)]
pub(super) struct GradientPart {
    pub param: usize,
    pub wanted: StageResult,
}

/// Where gradients are wanted. Sums over stages are taken apart in `graph`, which gets other additions for them.
pub(super) fn gradient_parts(graph: &mut StepGraph, analysis: &Analysis<'_>, bounds: &Bounds) -> Vec<GradientPart> {
    let uses = Uses::of(&graph.operations);
    let mut results: HashMap<TensorId, usize> = HashMap::new();
    graph.results().for_each(|tensor| *results.entry(tensor.id).or_default() += 1);
    // A part of the sum that another operation reads must stay.
    let read_once = |tensor: TensorId| uses.readers(tensor).len() + results.get(&tensor).copied().unwrap_or(0) <= 1;
    let mut parts = Vec::new();
    for param in 0..graph.params.len() {
        let Some(gradient) = graph.params[param].gradient.clone() else { continue };
        let stage = |tensor: &TensorIr| match analysis.origin(tensor.id) {
            ValueSource::Op(op) if !analysis.is_forward(op) => {
                bounds.holder(param, bounds.bound[op]).unwrap_or(bounds.holders[param][0])
            }
            _ => bounds.holders[param][0],
        };
        if bounds.holders[param].len() == 1 {
            parts.push(GradientPart { param, wanted: StageResult { stage: stage(&gradient), tensor: gradient } });
            continue;
        }
        let mut by_stage: BTreeMap<usize, Vec<TensorIr>> = BTreeMap::new();
        for term in terms(gradient, &graph.operations, &uses, &read_once) {
            by_stage.entry(stage(&term)).or_default().push(term);
        }
        for (stage, terms) in by_stage {
            if let Some(tensor) = sum(graph, terms) {
                parts.push(GradientPart { param, wanted: StageResult { tensor, stage } });
            }
        }
    }
    parts
}

/// The terms of a sum, in order.
fn terms(
    sum: TensorIr,
    operations: &[OperationIr],
    uses: &Uses,
    read_once: &dyn Fn(TensorId) -> bool,
) -> Vec<TensorIr> {
    let mut terms = Vec::new();
    let mut left = vec![sum];
    while let Some(tensor) = left.pop() {
        match uses.maker(tensor.id).and_then(|maker| operation::sum(&operations[maker])) {
            Some(add) if read_once(tensor.id) && [&add.lhs, &add.rhs].iter().all(|term| term.shape == tensor.shape) => {
                left.extend([add.rhs.clone(), add.lhs.clone()]);
            }
            _ => terms.push(tensor),
        }
    }
    terms
}

fn sum(graph: &mut StepGraph, terms: Vec<TensorIr>) -> Option<TensorIr> {
    terms.into_iter().reduce(|lhs, rhs| {
        let out = TensorIr::uninit(graph.fresh_id(), lhs.shape.clone(), lhs.dtype);
        graph.operations.push(operation::build::add(lhs, rhs, out.clone()));
        out
    })
}

/// The ids of wanted tensors.
pub(super) fn ids<'a>(wanted: impl IntoIterator<Item = &'a StageResult>) -> HashSet<TensorId> {
    wanted.into_iter().map(|wanted| wanted.tensor.id).collect()
}
