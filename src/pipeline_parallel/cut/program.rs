//! Makes programs of what a stage runs, which free each tensor after its last use.

use std::collections::{HashMap, HashSet};

use burn_ir::{OperationIr, TensorId, TensorIr, TensorStatus};

use super::split::StageGraph;
use crate::graph::StepGraph;
use crate::graph::fused::{Kernels, fuse};
use crate::graph::instruction::{Instruction, Item};
use crate::graph::liveness::with_lifetimes;
use crate::graph::operation::{bytes, is_view};
use crate::graph::plan_memory::plan_memory;

/// The three passes of a stage as programs, and the kernels that they run if groups of operations are to be fused.
pub(super) fn sections(graph: &StepGraph, part: &StageGraph, fusion: bool) -> ([Vec<Instruction>; 3], Kernels) {
    let keep: HashSet<TensorId> = graph.constants.keys().copied().collect();
    let mut forward: HashMap<TensorId, TensorIr> = HashMap::new();
    let mut backward: HashMap<TensorId, TensorIr> = HashMap::new();
    for route in &part.sends {
        let give = if route.to > part.stage { &mut forward } else { &mut backward };
        give.extend(route.tensors.iter().map(|tensor| (tensor.id, tensor.clone())));
    }
    let named = part.outputs.iter().chain(&part.updates).map(|(_, tensor)| tensor);
    let results = part.loss.iter().chain(&part.weight).chain(named);
    forward.extend(results.map(|tensor| (tensor.id, tensor.clone())));
    let mut gradients: HashMap<TensorId, TensorIr> =
        part.gradients.iter().map(|(_, tensor)| (tensor.id, tensor.clone())).collect();
    gradients.retain(|id, _| !backward.contains_key(id));
    let first = give_each(&part.forward, forward);
    // What the input half makes is given there, though the weight half may be the one that is asked for it.
    let made: HashSet<TensorId> = part.backward_input.iter().flat_map(|op| op.outputs().map(|out| out.id)).collect();
    let (early, late): (HashMap<_, _>, HashMap<_, _>) = gradients.into_iter().partition(|(id, _)| made.contains(id));
    backward.extend(early);
    let second = give_each(&part.backward_input, backward);
    let third = give_each(&part.backward_weight, late);
    let passes = [first, second, third];
    if !fusion {
        return (with_lifetimes(passes, &keep), Kernels::default());
    }
    let (passes, kernels) = fuse(passes);
    let mut passes = with_lifetimes(passes, &keep);
    // Several micro-batches are under way at once, so that their tensors have no places: kernels are told what they
    // take.
    plan_memory(&mut passes, &kernels);
    (passes, kernels)
}

/// The operations, each followed by what it makes of what is wanted; what none of them makes comes first.
fn give_each(operations: &[OperationIr], mut wanted: HashMap<TensorId, TensorIr>) -> Vec<Item> {
    let mut items = Vec::with_capacity(operations.len() + wanted.len());
    for op in operations {
        items.push(Item::Run(Box::new(op.clone())));
        items.extend(op.outputs().filter_map(|out| wanted.remove(&out.id)).map(Item::Output));
    }
    let mut first: Vec<TensorIr> = wanted.into_values().collect();
    first.sort_by_key(|tensor| tensor.id);
    first.into_iter().map(Item::Output).chain(items).collect()
}

/// Bytes that a micro-batch leaves between its forward and its backward pass, beside parameters, inputs and constants.
pub(super) fn saved_bytes(graph: &StepGraph, part: &StageGraph) -> u64 {
    let received = part.receives.iter().filter(|route| route.from < part.stage).flat_map(|route| &route.tensors);
    let mut alive: HashMap<TensorId, u64> = received.map(|tensor| (tensor.id, bytes(tensor))).collect();
    let ([forward, ..], _) = sections(graph, part, false);
    for action in &forward {
        match action {
            Instruction::Run(op) => {
                for input in op.inputs().filter(|input| input.status == TensorStatus::ReadWrite) {
                    alive.remove(&input.id);
                }
                // A view shares the memory of what it looks at.
                let size = |out: &TensorIr| if is_view(op) { 0 } else { bytes(out) };
                alive.extend(op.outputs().map(|out| (out.id, size(out))));
            }
            Instruction::Free(tensor) => drop(alive.remove(&tensor.id)),
            Instruction::Output(tensor) if tensor.status == TensorStatus::ReadWrite => drop(alive.remove(&tensor.id)),
            Instruction::Output(_) => {}
        }
    }
    alive.into_values().sum()
}
