//! Stages whose parameters and gradients replicas divide by rows.

use std::collections::HashMap;

use burn::tensor::Shape;
use burn_ir::OperationIr;

use super::Stage;
use super::graph_stage::GraphStage;
use super::schedule::Action;
use crate::distribution::RowShards;
use crate::graph::StepGraph;
use crate::partition::{Exchanges, Parts, rewrite};
use crate::pipeline_parallel::cut::StageGraph;

/// What a stage runs on what this rank holds, and the step that it is of. Each pass gathers for itself: between them
/// other micro-batches run.
pub(super) fn divided(graph: &StepGraph, part: &StageGraph, shards: &RowShards) -> (StepGraph, StageGraph) {
    let (mut graph, mut part) = (graph.clone(), part.clone());
    let gathering = shards.gathering();
    let (mut params, mut places) = (Vec::new(), HashMap::new());
    for (place, param) in graph.params.iter_mut().enumerate() {
        let Some(rows) = shards.in_rows(param.id) else { continue };
        places.insert(place, params.len());
        params.push((param.tensor.clone(), rows.clone()));
        if gathering.gathers {
            param.tensor.shape = Shape::from(rows.dims);
        }
    }
    let next_id = next_id(&graph, &part);
    let StageGraph { forward, backward_input, backward_weight, gradients, outputs, loss, weight, .. } = &mut part;
    let gradients = gradients.iter_mut().filter_map(|(param, tensor)| Some((*places.get(param)?, tensor))).collect();
    let results = outputs.iter_mut().map(|(_, tensor)| tensor).chain(loss).chain(weight).collect();
    let passes = vec![forward, backward_input, backward_weight];
    graph.next_id = rewrite(Parts { passes, params, gradients, results }, next_id, gathering);
    (graph, part)
}

/// An id that no tensor of a stage has: the cut has made some of its own.
fn next_id(graph: &StepGraph, part: &StageGraph) -> u64 {
    let operations = part.forward.iter().chain(&part.backward_input).chain(&part.backward_weight);
    let ids = |op: &OperationIr| op.inputs().chain(op.outputs()).map(|tensor| tensor.id.value() + 1).max();
    operations.filter_map(ids).max().unwrap_or(0).max(graph.next_id)
}

/// What a rank with these stages exchanges with its replicas in a step, by the actions of its row of the timetable.
pub(super) fn exchanges(stages: &[GraphStage], row: &[Action]) -> Exchanges {
    let passes = |action: &Action| match action {
        Action::Forward(_) => 0..1,
        Action::Backward(_) => 1..3,
        Action::BackwardInput(_) => 1..2,
        Action::BackwardWeight(_) => 2..3,
        Action::Send(..) | Action::Receive(..) => 0..0,
    };
    let of_action = |action: &Action| {
        let unit = action.unit();
        let stage = stages.iter().find(|stage| stage.index() == unit.stage);
        let of_pass = |pass| stage.map(|stage| stage.exchanges(unit.micro_batch, pass)).unwrap_or_default();
        passes(action).flat_map(of_pass).collect()
    };
    row.iter().map(of_action).collect()
}
