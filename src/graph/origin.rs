//! Which layer of the model an operation belongs to, for messages and reports.
//!
//! burn does not say when a module is entered in a forward pass. But parameters have paths: an operation that reads one
//! belongs to the layer that holds it, and any other to the layer from which the latest of what it reads came.

use std::collections::HashMap;
use std::sync::Arc;

use burn_ir::{OperationIr, TensorId};

use super::operation::{only_moves, op_name};
use super::step::{ParamBinding, StepGraph};

/// The layers of the operations of a step, by what these make.
#[derive(Debug, Clone, Default)]
pub(crate) struct Origins {
    /// Parameters, and what only moves their elements.
    held: HashMap<TensorId, Arc<str>>,
    /// When it was made, and in which layer.
    made: HashMap<TensorId, (usize, Arc<str>)>,
}

impl Origins {
    pub(crate) fn of(graph: &StepGraph) -> Self {
        Self::new(&graph.params, &graph.operations, graph.forward_len)
    }

    fn new(params: &[ParamBinding], operations: &[OperationIr], forward_len: usize) -> Self {
        let mut origins = Self::default();
        for param in params {
            let layer = layer(&param.path);
            origins.held.insert(param.tensor.id, layer.clone());
            for result in param.gradient.iter().chain(&param.update) {
                origins.made.insert(result.id, (usize::MAX, layer.clone()));
            }
        }
        // What gradients are before their elements are moved.
        for op in operations.iter().rev().filter(|op| only_moves(op)) {
            let known = op.outputs().find_map(|out| origins.made.get(&out.id)).cloned();
            let input = op.inputs().next().map(|input| input.id);
            if let (Some(known), Some(input)) = (known, input) {
                origins.made.entry(input).or_insert(known);
            }
        }
        for (place, op) in operations.iter().enumerate() {
            origins.step(place, op, place < forward_len);
        }
        origins
    }

    fn step(&mut self, place: usize, op: &OperationIr, forward: bool) {
        let read = op.inputs().find_map(|input| self.held.get(&input.id)).cloned();
        if let Some(layer) = read.clone().filter(|_| only_moves(op)) {
            self.held.extend(op.outputs().map(|out| (out.id, layer.clone())));
        }
        // A gradient belongs to the layer whose activations it is computed from, if it is from any.
        let inputs = op.inputs().filter_map(|input| self.made.get(&input.id));
        let latest = inputs.max_by_key(|(made, _)| if *made == usize::MAX { 0 } else { *made });
        let layer = read.or_else(|| latest.map(|(_, layer)| layer.clone()));
        if let Some(layer) = layer {
            let made = if forward { place + 1 } else { 0 };
            for out in op.outputs() {
                self.made.entry(out.id).or_insert_with(|| (made, layer.clone()));
            }
        }
    }

    /// The path of the layer that a tensor was made in or is a parameter of.
    pub(crate) fn layer(&self, tensor: TensorId) -> Option<&str> {
        self.made.get(&tensor).map(|(_, layer)| layer).or_else(|| self.held.get(&tensor)).map(|layer| &**layer)
    }

    /// The path of the layer of an operation.
    pub(crate) fn layer_of(&self, op: &OperationIr) -> Option<&str> {
        op.outputs().find_map(|out| self.layer(out.id))
    }

    /// An operation in words: `operation NumericFloat.Mul at \`layers.0.norm\``.
    pub(crate) fn describe(&self, op: &OperationIr) -> String {
        at(op_name(op), self.layer_of(op).unwrap_or_default())
    }
}

/// What happens, and at which layer, if that is known.
pub(crate) fn at(what: String, layer: &str) -> String {
    if layer.is_empty() { what } else { format!("{what} at `{layer}`") }
}

/// The path of what holds a parameter; of a parameter that nothing does, its own.
fn layer(path: &str) -> Arc<str> {
    path.rsplit_once('.').map_or(path, |(layer, _)| layer).into()
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::prelude::*;

    use super::super::capture_step;
    use super::*;

    #[derive(Module, Debug)]
    struct Pair {
        first: Linear,
        second: Linear,
    }

    #[test]
    fn operations_are_at_layers() {
        let device = Device::flex().autodiff();
        let linear = |takes, gives| LinearConfig::new(takes, gives).init(&device);
        let model = Pair { first: linear(3, 4), second: linear(4, 2) };
        let x = Tensor::<2>::ones([5, 3], &device);
        let loss = |m: &Pair, x: Tensor<2>| m.second.forward(m.first.forward(x).tanh()).powi_scalar(2).mean();
        let graph = capture_step(&model, x, loss).unwrap();
        let origins = Origins::of(&graph);
        let all: Vec<String> = graph.operations.iter().map(|op| origins.describe(op)).collect();
        let named = |part: &str| all.iter().filter(|said| said.contains(part)).cloned().collect::<Vec<_>>();
        assert_eq!(named("Float.Tanh")[0], "operation Float.Tanh at `first`");
        assert!(named("NumericFloat.Mean ").iter().all(|said| said.ends_with("at `second`")), "{all:?}");
        for param in &graph.params {
            let gradient = param.gradient.as_ref().unwrap();
            assert_eq!(origins.layer(gradient.id), Some(&*layer(&param.path)));
        }
    }
}
