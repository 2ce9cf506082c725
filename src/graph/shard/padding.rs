//! Embeddings of a number of rows that the degree does not divide.

use std::collections::HashSet;

use burn_ir::{
    IrVisitorMut, ModuleOperationIr as Module, NumericOperationIr as Numeric, OperationIr, TensorId, TensorIr,
};

use super::options::PartitionOptions;
use crate::graph::StepGraph;
use crate::layout::Layout;

/// The step with such embeddings padded to the next multiple of the degree, as far as they are split along their rows and
/// nothing but lookups reads them: rows that no index points at have no influence, and the gradient 0.
pub(super) fn padded(graph: &StepGraph, params: &[Layout], options: &PartitionOptions) -> StepGraph {
    let mut graph = graph.clone();
    for (place, layout) in params.iter().enumerate() {
        let tensor = &graph.params[place].tensor;
        let rows = tensor.shape.as_slice().first().copied().unwrap_or(0);
        if *layout != Layout::Sharded(0) || tensor.shape.num_dims() != 2 || rows.is_multiple_of(options.degree) {
            continue;
        }
        let Some(tables) = tables(&graph, place) else { continue };
        let mut pad = Pad { tables, rows: rows.next_multiple_of(options.degree) };
        graph.operations.iter_mut().for_each(|op| op.visit_mut(&mut pad));
        let binding = &mut graph.params[place];
        pad.visit_tensor_mut(&mut binding.tensor);
        binding.gradient.iter_mut().for_each(|gradient| pad.visit_tensor_mut(gradient));
    }
    graph
}

/// The parameter and its gradients, if it is read by lookups only.
fn tables(graph: &StepGraph, param: usize) -> Option<HashSet<TensorId>> {
    let binding = &graph.params[param];
    let mut tables = HashSet::from([binding.tensor.id]);
    for op in &graph.operations {
        let read: Vec<bool> = op.inputs().map(|input| tables.contains(&input.id)).collect();
        match (op, read.as_slice()) {
            (_, read) if !read.contains(&true) => {}
            (OperationIr::Module(Module::Embedding(_)), [true, false]) => {}
            (OperationIr::Module(Module::EmbeddingBackward(op)), [true, false, false]) => {
                tables.insert(op.out.id);
            }
            (OperationIr::NumericFloat(_, Numeric::Add(op)), [true, true]) => {
                tables.insert(op.out.id);
            }
            _ => return None,
        }
    }
    let others = graph.loss.iter().chain(&graph.weight).chain(&graph.outputs);
    let others = others
        .chain(graph.params.iter().enumerate().filter(|(place, _)| *place != param).flat_map(|(_, p)| &p.gradient));
    let gradient = binding.gradient.as_ref().is_none_or(|gradient| tables.contains(&gradient.id));
    (gradient && !others.into_iter().any(|result| tables.contains(&result.id))).then_some(tables)
}

struct Pad {
    tables: HashSet<TensorId>,
    rows: usize,
}

impl IrVisitorMut for Pad {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        if self.tables.contains(&tensor.id) {
            tensor.shape[0] = self.rows;
        }
    }
}
