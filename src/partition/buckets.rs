//! Puts many small reductions into few collectives.

use std::collections::HashSet;

use burn::tensor::DType;
use burn_ir::{CustomOpIr, OperationIr, TensorId};

use super::collectives::{CollectiveKind, CollectiveOp};
use super::order::{behind_inputs, early};
use super::products::ProductOp;
use crate::graph::StepGraph;
use crate::graph::operation::only_moves;
use crate::graph::step::Uses;

/// Reduces gradients together: all-reduces over one axis of one dtype, whose results nothing but the optimizer reads,
/// become one collective until `bucket_bytes` are full. Returns how many are left of how many.
///
/// Gradients go into buckets in the order in which the backward pass makes them, as in PyTorch's
/// `DistributedDataParallel` ([arXiv:2006.15704](https://arxiv.org/abs/2006.15704)), and a bucket is reduced where its
/// last gradient is made. Run it after all partitions.
pub fn bucket_reductions(graph: &mut StepGraph, bucket_bytes: usize) -> (usize, usize) {
    move_up(graph);
    let mut axes: Vec<String> = Vec::new();
    for (op, _) in graph.operations.iter().filter_map(CollectiveOp::of) {
        if !axes.iter().any(|axis| axis == op.axis) {
            axes.push(op.axis.into());
        }
    }
    let mut counts = (0, 0);
    for axis in axes {
        let (left, all) = bucket_axis(graph, &axis, bucket_bytes);
        counts = (counts.0 + left, counts.1 + all);
    }
    counts
}

/// Moves collectives, with the products that are fused with them, up to where their inputs are made, and so what only
/// moves elements on the way there.
pub(super) fn move_up(graph: &mut StepGraph) {
    let travels = |op: &OperationIr| CollectiveOp::of(op).is_some() || ProductOp::of(op).is_some();
    if !graph.operations.iter().any(travels) {
        return;
    }
    let uses = Uses::of(&graph.operations);
    let results: HashSet<TensorId> = graph.results().map(|result| result.id).collect();
    let mut movable: HashSet<TensorId> = HashSet::new();
    for op in graph.operations.iter().rev() {
        let Some(out) = op.outputs().next().map(|out| out.id) else { continue };
        let mut readers = uses.readers(out).iter();
        let mut on_the_way = || {
            only_moves(op)
                && (results.contains(&out) || !uses.readers(out).is_empty())
                && readers.all(|reader| graph.operations[*reader].outputs().any(|out| movable.contains(&out.id)))
        };
        if travels(op) || on_the_way() {
            movable.insert(out);
        }
    }
    early(graph, |op| op.outputs().next().is_some_and(|out| movable.contains(&out.id)));
}

fn bucket_axis(graph: &mut StepGraph, axis: &str, bucket_bytes: usize) -> (usize, usize) {
    let gradients: HashSet<TensorId> = graph.params.iter().filter_map(|p| p.gradient.as_ref()).map(|g| g.id).collect();
    let uses = Uses::of(&graph.operations);
    let of = |index: usize| CollectiveOp::of(&graph.operations[index]);
    let ends = |id: TensorId| ends(graph, &uses, &gradients, axis, id);
    let mut buckets: Vec<ReductionBucket> = Vec::new();
    let mut found = 0;
    for index in graph.forward_len..graph.operations.len() {
        let Some((collective, op)) = of(index) else { continue };
        if collective.axis != axis
            || collective.kind != CollectiveKind::AllReduce
            || !op.outputs.iter().all(|out| ends(out.id))
        {
            continue;
        }
        found += 1;
        let bytes: usize = op.outputs.iter().map(|out| out.shape.num_elements() * out.dtype.size()).sum();
        let dtype = op.outputs[0].dtype;
        match buckets.iter_mut().rev().find(|bucket| bucket.dtype == dtype) {
            Some(bucket) if bucket.bytes < bucket_bytes => {
                bucket.members.push(index);
                bucket.bytes += bytes;
            }
            _ => buckets.push(ReductionBucket { dtype, bytes, members: vec![index] }),
        }
    }
    let left = buckets.len();
    let mut removed = HashSet::new();
    for ReductionBucket { members, .. } in buckets {
        let Some((last, others)) = members.split_last() else { continue };
        let mut folded: Option<CustomOpIr> = None;
        for index in &members {
            let OperationIr::Custom(op) = &graph.operations[*index] else { continue };
            match &mut folded {
                None => folded = Some(op.clone()),
                Some(folded) => {
                    folded.inputs.extend(op.inputs.iter().cloned());
                    folded.outputs.extend(op.outputs.iter().cloned());
                }
            }
        }
        if let Some(folded) = folded {
            graph.operations[*last] = OperationIr::Custom(folded);
            removed.extend(others.iter().copied());
        }
    }
    let mut index = 0;
    graph.operations.retain(|_| {
        index += 1;
        !removed.contains(&(index - 1))
    });
    behind_inputs(graph);
    (left, found)
}

/// Whether a tensor is a gradient and nothing else, at once or after it was reduced over another axis too.
pub(super) fn ends(graph: &StepGraph, uses: &Uses, gradients: &HashSet<TensorId>, axis: &str, id: TensorId) -> bool {
    let readers = uses.readers(id);
    let goes_on = |reader: &usize| {
        CollectiveOp::of(&graph.operations[*reader]).is_some_and(|(collective, op)| {
            collective.axis != axis
                && collective.kind == CollectiveKind::AllReduce
                && op.outputs.iter().all(|out| ends(graph, uses, gradients, axis, out.id))
        })
    };
    readers.iter().all(goes_on) && (gradients.contains(&id) || !readers.is_empty())
}

struct ReductionBucket {
    dtype: DType,
    bytes: usize,
    members: Vec<usize>,
}
