//! The order in which operations run, where they leave a choice.

use std::collections::{HashMap, HashSet};

use burn_ir::{OperationIr, TensorId};

use crate::graph::StepGraph;

/// Moves operations up to right behind those that make their inputs, in the pass, forward or backward, that they are in.
pub(super) fn early(graph: &mut StepGraph, movable: impl Fn(&OperationIr) -> bool) {
    let (mut made, mut keys) = (HashMap::<TensorId, usize>::new(), Vec::with_capacity(graph.operations.len()));
    for (place, op) in graph.operations.iter().enumerate() {
        let behind = op.inputs().filter_map(|input| made.get(&input.id).copied()).max();
        let first = if place < graph.forward_len { 0 } else { graph.forward_len };
        let key = match behind {
            Some(behind) if movable(op) => behind.max(first),
            _ => place,
        };
        made.extend(op.outputs().map(|out| (out.id, key)));
        keys.push(key);
    }
    sort(graph, keys);
}

/// Moves operations down behind those that make their inputs.
pub(super) fn behind_inputs(graph: &mut StepGraph) {
    let mut maker: HashMap<TensorId, usize> = HashMap::new();
    for (place, op) in graph.operations.iter().enumerate() {
        maker.extend(op.outputs().map(|out| (out.id, place)));
    }
    let mut keys: Vec<usize> = (0..graph.operations.len()).collect();
    loop {
        let before = keys.clone();
        for (place, op) in graph.operations.iter().enumerate() {
            let behind = op.inputs().filter_map(|input| maker.get(&input.id)).map(|maker| before[*maker]).max();
            keys[place] = keys[place].max(behind.unwrap_or(0));
        }
        if keys == before {
            break;
        }
    }
    // Of those with one key the makers come first: the key is the place of one that was not moved.
    let moved: HashSet<usize> = (0..keys.len()).filter(|place| keys[*place] != *place).collect();
    let pairs = keys.into_iter().enumerate().map(|(place, key)| 2 * key + usize::from(moved.contains(&place)));
    sort(graph, pairs.collect());
}

fn sort(graph: &mut StepGraph, keys: Vec<usize>) {
    let mut operations: Vec<(usize, OperationIr)> =
        keys.into_iter().zip(std::mem::take(&mut graph.operations)).collect();
    operations.sort_by_key(|(key, _)| *key);
    graph.operations = operations.into_iter().map(|(_, op)| op).collect();
}
