//! Reorders operations where data dependencies leave a choice.

use std::collections::{HashMap, HashSet};

use burn_ir::{OperationIr, TensorId};

use crate::graph::StepGraph;

/// Moves operations up to right behind those that make their inputs, in the pass, forward or backward, that they are
/// in.
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use burn::tensor::{DType, Shape};
    use burn_ir::TensorIr;

    use super::*;
    use crate::graph::operation::build::scale;

    /// Operations that make one tensor of another, by their numbers.
    fn graph(pairs: &[(u64, u64)], forward_len: usize) -> StepGraph {
        let tensor = |id| TensorIr::uninit(TensorId::new(id), Shape::from(vec![1]), DType::F32);
        let op = |(from, to): &(u64, u64)| scale(tensor(*from), 2.0, tensor(*to));
        StepGraph {
            operations: pairs.iter().map(op).collect(),
            forward_len,
            params: Vec::new(),
            inputs: Vec::new(),
            constants: BTreeMap::new(),
            loss: None,
            weight: None,
            outputs: Vec::new(),
            batch_norms: Vec::new(),
            unpadded: HashMap::new(),
            next_id: 100,
        }
    }

    fn made(graph: &StepGraph) -> Vec<u64> {
        graph.operations.iter().flat_map(|op| op.outputs().map(|out| out.id.value())).collect()
    }

    #[test]
    fn what_moves_up_stays_in_its_pass() {
        let mut step = graph(&[(0, 1), (1, 2), (2, 3), (0, 4), (1, 5), (5, 6)], 2);
        early(&mut step, |op| op.outputs().any(|out| [2, 5, 6].contains(&out.id.value())));
        assert_eq!(made(&step), [1, 2, 3, 5, 6, 4]);
    }

    #[test]
    fn what_was_moved_down_takes_its_readers_along() {
        let mut step = graph(&[(3, 4), (4, 5), (0, 1), (0, 2), (2, 3)], 0);
        behind_inputs(&mut step);
        assert_eq!(made(&step), [1, 2, 3, 4, 5]);
    }
}
