//! Finds which layers feed each other in a captured step.

use std::collections::{BTreeSet, HashMap};

use burn_ir::{OperationIr, TensorId, TensorIr};

use crate::graph::StepGraph;
use crate::graph::operation::{is_elementwise, only_moves, reduces_last};

/// Pairs of parameters, by their places, of which the second is multiplied with what comes from the first by way of
/// operations that could keep it split along its last dim: activations, reshapes, attention, but no norm.
pub(super) fn feeds(graph: &StepGraph) -> BTreeSet<(usize, usize)> {
    let mut flow = Flow { weights: HashMap::new(), from: HashMap::new(), pairs: BTreeSet::new() };
    for (place, param) in graph.params.iter().enumerate() {
        flow.weights.insert(param.tensor.id, place);
    }
    for op in &graph.operations[..graph.forward_len] {
        flow.step(op);
    }
    flow.pairs
}

struct Flow {
    /// Parameters, and what only moves their elements.
    weights: HashMap<TensorId, usize>,
    /// The parameters that activations come from. Of none, if they were added up along the last dim.
    from: HashMap<TensorId, BTreeSet<usize>>,
    pairs: BTreeSet<(usize, usize)>,
}

impl Flow {
    fn step(&mut self, op: &OperationIr) {
        let inputs: Vec<&TensorIr> = op.inputs().collect();
        let weight = inputs.iter().find_map(|input| self.weights.get(&input.id).map(|place| (*place, input.id)));
        if let (Some((place, _)), [_]) = (weight, inputs.as_slice())
            && only_moves(op)
        {
            self.weights.extend(op.outputs().map(|out| (out.id, place)));
            return;
        }
        let given: Vec<&BTreeSet<usize>> = inputs.iter().filter_map(|input| self.from.get(&input.id)).collect();
        let from = match weight {
            // A bias or the gain of a norm goes with what it is added to.
            Some((place, _)) if !is_elementwise(op) => {
                let pairs = given.iter().flat_map(|given| given.iter().map(|from| (*from, place)));
                self.pairs.extend(pairs);
                BTreeSet::from([place])
            }
            _ if reduces_last(op) || (is_elementwise(op) && given.iter().any(|given| given.is_empty())) => {
                BTreeSet::new()
            }
            _ => given.into_iter().flatten().copied().collect(),
        };
        let reached = weight.is_some() || inputs.iter().any(|input| self.from.contains_key(&input.id));
        if reached {
            self.from.extend(op.outputs().map(|out| (out.id, from.clone())));
        }
    }
}
