//! What a rank of a pipeline needs of memory in a step.

use std::collections::HashMap;

use burn::tensor::Device;

use super::Stage;
use super::graph_stage::GraphStage;
use super::schedule::{Action, Direction};
use crate::graph::liveness::Alive;

/// The most bytes that are alive at once while a rank with these stages goes through its row of the timetable on a
/// device: what its passes make and receive, and the sums of its gradients. Messages on their way are not in it.
pub(super) fn peak(stages: &[GraphStage], row: &[Action], device: &Device) -> usize {
    let gradients: usize = stages.iter().map(GraphStage::gradient_bytes).sum();
    let mut alive: HashMap<(usize, usize), Alive> = HashMap::new();
    let mut peak = 0;
    for action in row {
        let (passes, direction) = match action {
            Action::Forward(_) => (0..1, Some(Direction::Forward)),
            Action::Backward(_) => (1..3, Some(Direction::Backward)),
            Action::BackwardInput(_) => (1..2, Some(Direction::Backward)),
            Action::BackwardWeight(_) => (2..3, None),
            Action::Send(..) | Action::Receive(..) => continue,
        };
        let unit = action.unit();
        let Some(stage) = stages.iter().find(|stage| stage.index() == unit.stage) else { continue };
        let key = (unit.stage, unit.micro_batch);
        let mut own = alive.remove(&key).unwrap_or_else(Alive::giving);
        let others: usize = alive.values().map(Alive::bytes).sum();
        direction.into_iter().for_each(|from| own.bind(&stage.received(unit.micro_batch, from)));
        for pass in passes.clone() {
            peak = peak.max(others + own.run(stage.program(unit.micro_batch, pass, device)));
        }
        // After its last pass nothing of a micro-batch is left.
        if passes.end < 3 {
            alive.insert(key, own);
        }
    }
    peak + gradients
}
