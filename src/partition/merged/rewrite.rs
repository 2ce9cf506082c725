//! Rewrites operations for dims that are not merged.

use std::collections::HashMap;

use burn::tensor::Slice;
use burn_ir::{OperationIr, TensorId, TensorIr};

use super::merge::MergedDim;
use super::relate::related;
use crate::graph::operation::{
    Form, Reduction, ReductionDims, ReductionKind, build, ranges_mut, renumber_dims, replace_tensors,
};
use crate::graph::random::draw_apart;
use crate::graph::{StepGraph, operation};

pub(super) struct Rewrite<'a> {
    source: &'a StepGraph,
    merges: &'a HashMap<TensorId, MergedDim>,
    local: StepGraph,
    /// Tensors that are apart.
    apart: HashMap<TensorId, TensorIr>,
    /// Tensors of one place along a merged dim, with several dims of one place there.
    thin: HashMap<(TensorId, usize, usize), TensorIr>,
}

impl<'a> Rewrite<'a> {
    pub(super) fn new(source: &'a StepGraph, merges: &'a HashMap<TensorId, MergedDim>) -> Self {
        let local = StepGraph { operations: Vec::new(), forward_len: 0, ..source.clone() };
        Self { source, merges, local, apart: HashMap::new(), thin: HashMap::new() }
    }

    pub(super) fn run(mut self) -> StepGraph {
        let source = self.source;
        for (place, op) in source.operations.iter().enumerate() {
            let merge = op.inputs().chain(op.outputs()).find_map(|tensor| self.merges.get(&tensor.id));
            match merge {
                Some(merge) if self.takes_part(op) => self.step(op.clone(), &merge.clone()),
                _ => self.local.operations.push(op.clone()),
            }
            if place < source.forward_len {
                self.local.forward_len = self.local.operations.len();
            }
        }
        self.local
    }

    /// Whether an operation can run on dims that are apart: all that read them can, some that make them cannot.
    fn takes_part(&self, op: &OperationIr) -> bool {
        let made = |out: &TensorIr| self.merges.get(&out.id).is_some_and(|merge| related(op, out.id, merge).is_some());
        op.inputs().any(|input| self.merges.contains_key(&input.id)) || op.outputs().any(made)
    }

    fn step(&mut self, op: OperationIr, merge: &MergedDim) {
        let inputs: Vec<TensorIr> = op.inputs().cloned().collect();
        let outputs: Vec<TensorIr> = op.outputs().cloned().collect();
        let rank = outputs.first().map_or(0, |out| out.shape.num_dims());
        let reshapes = operation::reshape(&op).is_some();
        let mut now = HashMap::new();
        for input in &inputs {
            let local = match self.merges.get(&input.id) {
                Some(_) => self.input(input),
                None if reshapes => input.clone(),
                None => {
                    // Shorter tensors are spread over more dims in front.
                    let at = (merge.at + input.shape.num_dims()).checked_sub(rank);
                    at.map_or_else(|| input.clone(), |at| self.thin(input, at, merge.factors.len()))
                }
            };
            now.insert(input.id, local);
        }
        for out in &outputs {
            if let Some(merge) = self.merges.get(&out.id) {
                let local = merge.apart(out);
                self.apart.insert(out.id, local.clone());
                now.insert(out.id, local);
            }
        }
        // The place of the merge in what is read, if it is.
        let read = inputs.iter().find_map(|input| self.merges.get(&input.id)).unwrap_or(merge).clone();
        let mut local = op;
        replace_tensors(&mut local, &now);
        if let Form::Reduction(Reduction { by: ReductionKind::Sum, over, .. }) = Form::of(&local) {
            let axes = match over {
                ReductionDims::One(axis) if axis == read.at => vec![axis],
                ReductionDims::Several(axes) if axes.contains(&read.at) => axes.to_vec(),
                _ => Vec::new(),
            };
            if !axes.is_empty() {
                return self.sum(&local, &axes, &read);
            }
        }
        renumber(&mut local, &read);
        draw_apart(&mut local, read.at, &read.factors);
        self.local.operations.push(local);
    }

    /// The tensor apart, taken so here if what made it could not.
    fn input(&mut self, tensor: &TensorIr) -> TensorIr {
        if let Some(apart) = self.apart.get(&tensor.id) {
            return apart.clone();
        }
        let out = TensorIr { id: self.local.fresh_id(), ..self.merges[&tensor.id].apart(tensor) };
        self.reshape(tensor.clone(), out.clone());
        self.apart.insert(tensor.id, out.clone());
        out
    }

    fn thin(&mut self, tensor: &TensorIr, at: usize, places: usize) -> TensorIr {
        if let Some(thin) = self.thin.get(&(tensor.id, at, places)) {
            return thin.clone();
        }
        let ones = MergedDim { at, factors: vec![1; places] };
        let out = TensorIr { id: self.local.fresh_id(), ..ones.apart(tensor) };
        self.reshape(tensor.clone(), out.clone());
        self.thin.insert((tensor.id, at, places), out.clone());
        out
    }

    fn reshape(&mut self, input: TensorIr, out: TensorIr) {
        self.local.operations.push(build::reshape(input, out));
    }

    /// A sum over the merged dim, and over others, as sums over the dims that it was made of.
    fn sum(&mut self, op: &OperationIr, axes: &[usize], merge: &MergedDim) {
        let (Some(input), Some(out)) = (op.inputs().next().cloned(), op.outputs().next().cloned()) else { return };
        let parts = axes.iter().flat_map(|axis| match *axis == merge.at {
            true => merge.at..=merge.at + merge.more(),
            false => merge.shift(*axis)..=merge.shift(*axis),
        });
        let mut so_far = input;
        for axis in parts {
            let mut next = TensorIr { id: self.local.fresh_id(), ..so_far.clone() };
            next.shape[axis] = 1;
            self.local.operations.push(build::sum_dim(so_far, axis, next.clone()));
            so_far = next;
        }
        self.reshape(so_far, out);
    }
}

/// Numbers the dims of an operation anew whose tensors are apart already; `read` is the merge in what it reads.
fn renumber(op: &mut OperationIr, read: &MergedDim) {
    let permuted = match Form::of(op) {
        Form::SwapDims(swap) if swap.dim1 == read.at || swap.dim2 == read.at => {
            let rank = swap.input.shape.num_dims() - read.more();
            let mut axes: Vec<usize> = (0..rank).collect();
            axes.swap(swap.dim1, swap.dim2);
            Some(build::permute(swap.input.clone(), apart(&axes, read), swap.out.clone()))
        }
        Form::Permute(permute) => {
            Some(build::permute(permute.input.clone(), apart(&permute.axes, read), permute.out.clone()))
        }
        _ => None,
    };
    if let Some(permuted) = permuted {
        *op = permuted;
    } else if let Some((ranges, _)) = ranges_mut(op) {
        if ranges.len() > read.at {
            let all = read.factors.iter().map(|size| Slice::new(0, Some(*size as isize), 1));
            ranges.splice(read.at..=read.at, all);
        }
    } else {
        renumber_dims(op, &|dim| read.shift(dim));
    }
}

/// The axes of a permutation, with those that one was made of in its place.
fn apart(axes: &[usize], read: &MergedDim) -> Vec<usize> {
    let parts = |axis: &usize| match *axis == read.at {
        true => read.at..=read.at + read.more(),
        false => read.shift(*axis)..=read.shift(*axis),
    };
    axes.iter().flat_map(parts).collect()
}
