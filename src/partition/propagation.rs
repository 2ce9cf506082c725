//! Partitions a step, given the layouts of its parameters and inputs, into the step of one rank.

use std::borrow::Cow;

use burn_ir::TensorIr;

use super::collectives::CollectiveOp;
use super::merged::unmerged;
use super::options::PartitionOptions;
use super::padding::{Larger, pad};
use super::pass::Pass;
use super::report::ShardReport;
use super::rows::unflattened;
use crate::Error;
use crate::graph::operation::{drawn, op_name};
use crate::graph::{StepGraph, graph_error};
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

/// Splits a step over the ranks of one mesh axis: the graph that one of them runs, and what was put in.
///
/// `params` and `inputs` are the layouts in the order of the graph's bindings. The result takes the local part of split
/// parameters, and gives gradients and updates in the layout of their parameter. Inputs are given whole: the graph
/// takes its part itself. Loss and extra outputs come out whole on every rank.
///
/// A dim of a parameter that the degree does not divide, as that of a vocabulary, is padded to the next size that it
/// does, so that every rank has as much as the first. What is given for the parameter must be padded with zeros in the
/// same way, and its gradient comes so, zeros again; element-wise optimizers leave the padding alone. It is followed
/// through lookups, linear layers, element-wise operations, sums, means and the softmax. An activation that is read in
/// another way is gathered and goes on without.
///
/// For several axes, partition the result again over the next axis; shapes and layouts are then those of what the first
/// left local. A dim that is split by both is divided over the first axis and each part over the second.
///
/// # Errors
/// [`Error::Graph`] if the number of layouts is wrong, a layout is partial, the degree does not divide a dim of an
/// input that is to be split, or of a parameter that an operation without a rule for padding reads, the graph is
/// partitioned over this axis already, or the step draws random numbers otherwise than with
/// [`counter_based_rng`](crate::graph::counter_based_rng) (and the degree is more than 1).
pub fn partition(
    graph: &StepGraph,
    params: &[Layout],
    inputs: &[Layout],
    options: &PartitionOptions,
) -> Result<(StepGraph, ShardReport), Error> {
    let PartitionOptions { axis, degree, rank, .. } = options;
    if *degree == 0 || rank >= degree {
        return Err(graph_error(format!("there is no rank {rank} among the {degree} of axis `{axis}`")));
    }
    if params.len() != graph.params.len() || inputs.len() != graph.inputs.len() {
        return Err(graph_error(format!(
            "a graph of {} parameters and {} inputs was given {} and {} layouts",
            graph.params.len(),
            graph.inputs.len(),
            params.len(),
            inputs.len()
        )));
    }
    let larger: Vec<Larger> = params
        .iter()
        .enumerate()
        .filter_map(|(place, layout)| {
            let Sharded(dim) = *layout else { return None };
            let size = *graph.params[place].tensor.shape.as_slice().get(dim)?;
            let padded = size.next_multiple_of(*degree);
            (size != padded).then_some(Larger { param: place, dim, size: padded })
        })
        .collect();
    let padded = if larger.is_empty() { Cow::Borrowed(graph) } else { Cow::Owned(pad(graph, &larger)?) };
    let graph = padded.as_ref();
    let named_params = graph.params.iter().map(|p| (format!("parameter `{}`", p.path), &p.tensor)).zip(params);
    let named_inputs = graph.inputs.iter().map(|i| (format!("input `{}`", i.path), &i.tensor)).zip(inputs);
    for ((name, tensor), layout) in named_params.chain(named_inputs) {
        check(&name, tensor, *layout, options)?;
    }
    if axis.is_empty() || graph.operations.iter().filter_map(CollectiveOp::of).any(|(op, _)| op.axis == axis) {
        return Err(graph_error(format!("the step is partitioned over an axis `{axis}` already, or that is no name")));
    }
    if *degree == 1 {
        return Ok((graph.clone(), ShardReport { axis: axis.clone(), ..ShardReport::default() }));
    }
    if let Some(op) = graph.operations.iter().find(|op| drawn(op).is_some()) {
        return Err(graph_error(format!(
            "the step draws random numbers ({}) that {degree} ranks cannot share out: run `counter_based_rng` on the graph \
             before the partition",
            op_name(op)
        )));
    }
    if let Some(dim) = options.sequence_dim.filter(|dim| *dim > 1) {
        return Err(graph_error(format!(
            "sequence dim {dim} was asked for: the sequence is dim 1 of activations [batch, sequence, width], or dim 0 of \
             [sequence, batch, width]"
        )));
    }
    let apart = unmerged(graph);
    let graph = apart.as_ref().unwrap_or(graph);
    match options.sequence_dim {
        None => Ok(Pass::new(graph, params, options).run(graph, params, inputs)),
        Some(_) => {
            let graph = unflattened(graph);
            Ok(Pass::new(&graph, params, options).run(&graph, params, inputs))
        }
    }
}

fn check(name: &str, tensor: &TensorIr, layout: Layout, options: &PartitionOptions) -> Result<(), Error> {
    let PartitionOptions { axis, degree, .. } = options;
    let problem = match layout {
        Sharded(dim) if dim >= tensor.shape.num_dims() => "which does not exist",
        Sharded(dim) if !tensor.shape[dim].is_multiple_of(*degree) => "which the degree does not divide",
        Partial => "but only results of the step can be partial",
        Sharded(_) | Replicated => return Ok(()),
    };
    let dims = tensor.shape.as_slice();
    Err(graph_error(format!(
        "{name} of dims {dims:?} is to be {layout} over the {degree} ranks of `{axis}`, {problem}"
    )))
}
