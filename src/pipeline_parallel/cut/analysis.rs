//! Classifies the operations of a step for a cut.

use std::collections::{HashMap, HashSet};

use burn_ir::{OperationIr, TensorId, TensorIr};

use crate::graph::operation::{cast, drawn, is_cheap, is_view};
use crate::graph::step::{ParamBinding, Rename};

/// What an operation is to a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CutRole {
    /// No result depends on it.
    Dead,
    /// Every stage that needs its output can make it: it reads inputs and constants only, and is cheap, or it is a view
    /// of a parameter.
    Free,
    /// An operation of the backward pass that computes a tensor of the forward pass once more: gradient checkpointing.
    Again,
    /// All others: they run on one stage.
    Placed,
}

/// Where the value of a tensor comes from, once views and copies are seen through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueSource {
    /// Inputs and constants, which every stage has.
    Anywhere,
    /// The parameter of this index.
    Param(usize),
    /// The operation of this index, which is [`CutRole::Placed`].
    Op(usize),
}

/// The operations of a step as a cut sees them.
#[derive(Debug)]
pub(super) struct Analysis<'a> {
    pub operations: &'a [OperationIr],
    pub forward_len: usize,
    pub roles: Vec<CutRole>,
    /// Of tensors that operations make: the operation.
    makers: HashMap<TensorId, usize>,
    origins: HashMap<TensorId, ValueSource>,
    /// Of tensors that are computed again: the tensor of the forward pass.
    twins: HashMap<TensorId, TensorId>,
}

impl<'a> Analysis<'a> {
    pub(super) fn new(
        operations: &'a [OperationIr],
        forward_len: usize,
        params: &[ParamBinding],
        results: &HashSet<TensorId>,
    ) -> Self {
        let mut analysis = Self {
            operations,
            forward_len,
            roles: vec![CutRole::Dead; operations.len()],
            makers: HashMap::new(),
            origins: params
                .iter()
                .enumerate()
                .map(|(index, param)| (param.tensor.id, ValueSource::Param(index)))
                .collect(),
            twins: HashMap::new(),
        };
        let alive = alive(operations, results);
        let mut known = ForwardValues::default();
        for (index, op) in operations.iter().enumerate().filter(|(index, _)| alive[*index]) {
            analysis.makers.extend(op.outputs().map(|out| (out.id, index)));
            analysis.roles[index] = analysis.add(index, op, &mut known);
        }
        analysis
    }

    fn add(&mut self, index: usize, op: &OperationIr, known: &mut ForwardValues) -> CutRole {
        if drawn(op).is_none() {
            let text = known.text(op, &self.twins);
            if self.is_forward(index) {
                known.0.entry(text).or_insert(index);
            } else if let Some(forward) = known.0.get(&text) {
                let twins = op.outputs().map(|t| t.id).zip(self.operations[*forward].outputs().map(|t| t.id));
                self.twins.extend(twins.collect::<Vec<_>>());
                return CutRole::Again;
            }
        }
        let origins: Vec<ValueSource> = op.inputs().map(|input| self.origin(input.id)).collect();
        let anywhere = origins.iter().all(|origin| *origin == ValueSource::Anywhere) && is_cheap(op);
        let origin = match origins.first() {
            _ if anywhere => ValueSource::Anywhere,
            Some(param @ ValueSource::Param(_)) if is_view(op) || cast(op).is_some() => *param,
            _ => ValueSource::Op(index),
        };
        self.origins.extend(op.outputs().map(|out| (out.id, origin)));
        if origin == ValueSource::Op(index) { CutRole::Placed } else { CutRole::Free }
    }

    pub(super) fn is_forward(&self, op: usize) -> bool {
        op < self.forward_len
    }

    /// The operations that run on one stage.
    pub(super) fn placed(&self) -> impl DoubleEndedIterator<Item = usize> {
        (0..self.operations.len()).filter(|index| self.roles[*index] == CutRole::Placed)
    }

    pub(super) fn maker(&self, tensor: TensorId) -> Option<usize> {
        self.makers.get(&tensor).copied()
    }

    /// The tensor of the forward pass that this one computes again.
    pub(super) fn twin(&self, tensor: TensorId) -> Option<TensorId> {
        self.twins.get(&tensor).copied()
    }

    pub(super) fn origin(&self, tensor: TensorId) -> ValueSource {
        let tensor = self.twin(tensor).unwrap_or(tensor);
        self.origins.get(&tensor).copied().unwrap_or(ValueSource::Anywhere)
    }

    /// Where the inputs of an operation come from.
    pub(super) fn origins(&self, op: usize) -> impl Iterator<Item = (ValueSource, &TensorIr)> {
        self.operations[op].inputs().map(|input| (self.origin(input.id), input))
    }
}

fn alive(operations: &[OperationIr], results: &HashSet<TensorId>) -> Vec<bool> {
    let mut needed = results.clone();
    let mut alive = vec![false; operations.len()];
    for (index, op) in operations.iter().enumerate().rev() {
        if op.outputs().any(|out| needed.contains(&out.id)) {
            needed.extend(op.inputs().map(|input| input.id));
            alive[index] = true;
        }
    }
    alive
}

/// Operations of the forward pass by what they compute.
#[derive(Default)]
struct ForwardValues(HashMap<String, usize>);

impl ForwardValues {
    /// Two operations of the same text compute the same: the operation on the twins of its inputs, whatever its outputs
    /// are called.
    fn text(&self, op: &OperationIr, twins: &HashMap<TensorId, TensorId>) -> String {
        let outputs: Vec<TensorId> = op.outputs().map(|out| out.id).collect();
        let mut op = op.clone();
        op.visit_mut(&mut Rename(|id| match outputs.iter().position(|out| *out == id) {
            Some(place) => TensorId::new(u64::MAX - place as u64),
            None => twins.get(&id).copied().unwrap_or(id),
        }));
        format!("{op:?}")
    }
}
