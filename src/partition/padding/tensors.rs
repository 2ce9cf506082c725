//! Adds padding to tensors and takes it off.

use std::collections::HashMap;

use burn::tensor::{DType, Shape, Slice, TensorData};
use burn_ir::{OperationIr, ScalarIr, TensorId, TensorIr};

use super::content::Content::{self, Lowest, Zero};
use super::content::{can_be_larger, of_creation, of_elementwise};
use super::{Padded, PaddingPass};
use crate::graph::operation::{build, replace_tensors};
use crate::partition::rules::creates;

impl PaddingPass<'_> {
    /// Pads a tensor that is not yet: made larger from the beginning if it can be, else with zeros behind.
    pub(super) fn enlarge(&mut self, tensor: &TensorIr, dim: usize, size: usize) {
        if self.padded.contains_key(&tensor.id) {
            return;
        }
        let padded = match self.made_larger(tensor, dim, size) {
            Some(padded) => padded,
            None => {
                let mut zeros = TensorIr { id: self.local.fresh_id(), ..tensor.clone() };
                zeros.shape[dim] = size - tensor.shape[dim];
                let mut out = TensorIr { id: self.local.fresh_id(), ..tensor.clone() };
                out.shape[dim] = size;
                let tensors = vec![tensor.clone(), zeros.clone()];
                self.local.operations.extend([build::zeros(zeros), build::cat(tensors, dim, out.clone())]);
                Padded { tensor: out, dim, real: tensor.shape[dim], content: Zero }
            }
        };
        self.note(tensor.id, padded);
    }

    /// Runs again what made a tensor from nothing, or from what is spread over the dim.
    fn made_larger(&mut self, tensor: &TensorIr, dim: usize, size: usize) -> Option<Padded> {
        let op = &self.source.operations[self.uses.maker(tensor.id)?];
        if !self.can_run_larger(op, tensor, dim) {
            return None;
        }
        let full: Vec<TensorIr> = op.inputs().filter(|input| is_full(input, tensor, dim)).cloned().collect();
        for input in &full {
            self.enlarge(input, dim, size);
        }
        let mut now: HashMap<TensorId, TensorIr> =
            full.iter().map(|input| (input.id, self.padded[&input.id].tensor.clone())).collect();
        let contents: Vec<Option<Content>> =
            op.inputs().map(|input| now.contains_key(&input.id).then(|| self.padded[&input.id].content)).collect();
        let content = if creates(op) { of_creation(op) } else { of_elementwise(op, &contents) };
        let mut out = TensorIr { id: self.local.fresh_id(), ..tensor.clone() };
        out.shape[dim] = size;
        now.insert(tensor.id, out.clone());
        let mut local = op.clone();
        replace_tensors(&mut local, &now);
        self.local.operations.push(local);
        Some(Padded { tensor: out, dim, real: tensor.shape[dim], content })
    }

    /// Whether what made a tensor makes a larger one of its inputs, made larger where they are as large along the dim.
    fn can_run_larger(&self, op: &OperationIr, tensor: &TensorIr, dim: usize) -> bool {
        let can_be = |input: &TensorIr| match self.padded.get(&input.id) {
            Some(padded) => padded.dim == dim && is_full(input, tensor, dim),
            None if is_full(input, tensor, dim) => {
                self.uses.maker(input.id).is_some_and(|op| self.can_run_larger(&self.source.operations[op], input, dim))
            }
            None => true,
        };
        can_be_larger(op)
            && op.inputs().all(|input| input.shape.num_dims() == tensor.shape.num_dims() && can_be(input))
            && (creates(op) || op.inputs().any(|input| is_full(input, tensor, dim)))
    }

    /// Overwrites the padding of a tensor.
    pub(super) fn overwrite(&mut self, id: TensorId, content: Content) {
        let Padded { tensor, dim, real, content: have } = self.padded[&id].clone();
        if have == content {
            return;
        }
        let mut dims = vec![1; tensor.shape.num_dims()];
        dims[dim] = tensor.shape[dim];
        let constant = self.mask(real, tensor.shape[dim]);
        let mask = TensorIr::uninit(self.local.fresh_id(), Shape::from(dims), constant.dtype);
        let value = match (content, tensor.dtype) {
            (Lowest, DType::F16) => -3e4,
            (Lowest, _) => -1e30,
            _ => 0.0,
        };
        let value = if tensor.dtype.is_float() { ScalarIr::Float(value) } else { ScalarIr::Int(0) };
        let out = TensorIr { id: self.local.fresh_id(), ..tensor.clone() };
        self.local
            .operations
            .extend([build::reshape(constant, mask.clone()), build::mask_fill(tensor, mask, value, out.clone())]);
        self.note(id, Padded { tensor: out, dim, real, content });
    }

    fn mask(&mut self, real: usize, size: usize) -> TensorIr {
        if let Some(mask) = self.masks.get(&(real, size)) {
            return mask.clone();
        }
        let data = TensorData::new((0..size).map(|place| place >= real).collect::<Vec<bool>>(), [size]);
        let mask = TensorIr::uninit(self.local.fresh_id(), Shape::from([size]), data.dtype());
        self.local.constants.insert(mask.id, data);
        self.masks.insert((real, size), mask.clone());
        mask
    }

    /// A padded tensor without its padding.
    pub(super) fn without(&mut self, tensor: &TensorIr) -> TensorIr {
        if let Some(whole) = self.whole.get(&tensor.id) {
            return whole.clone();
        }
        let padded = self.padded[&tensor.id].tensor.clone();
        let out = TensorIr { id: self.local.fresh_id(), ..tensor.clone() };
        let ranges = tensor.shape.as_slice().iter().map(|size| Slice::new(0, Some(*size as isize), 1)).collect();
        self.local.operations.push(build::slice(padded, ranges, out.clone()));
        self.whole.insert(tensor.id, out.clone());
        out
    }
}

fn is_full(input: &TensorIr, tensor: &TensorIr, dim: usize) -> bool {
    input.shape.get(dim) == tensor.shape.get(dim)
}
