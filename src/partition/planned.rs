//! Delays tensors that can be made in any layout until it is known in which they are read.
//!
//! A mask of random numbers, the ones from which the backward pass of a mean spreads a gradient, zeros into which a
//! gradient is scattered: what needs nothing, or only small tensors that every rank has, can be made by every rank in
//! any layout. Made at first sight it would be whole, and as large as what it goes with is split to avoid.

use burn_ir::{OperationIr, TensorId, TensorIr};

use super::logical_tensor::{LogicalTensor, TensorState};
use super::pass::Pass;
use super::rules::{ShardingOption, creates, sharding_options};
use crate::graph::operation::{is_elementwise, only_moves, writes_at};
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

impl Pass<'_> {
    /// Puts off an operation that can run anywhere in any layout.
    pub(super) fn plan(&mut self, op: &OperationIr) -> bool {
        let mut outputs = op.outputs();
        let (Some(out), None) = (outputs.next(), outputs.next()) else { return false };
        let creates = creates(op);
        let spreads = is_elementwise(op) || only_moves(op) || writes_at(op).is_some();
        let planned = op.inputs().any(|input| self.tensors[&input.id].is_planned());
        let small = |input: &TensorIr| {
            let tensor = &self.tensors[&input.id];
            tensor.is_planned()
                || (tensor.version(Replicated).is_some()
                    && tensor.global.shape.num_elements() < out.shape.num_elements())
        };
        let anywhere = creates || (spreads && planned && op.inputs().all(small));
        if !anywhere {
            return false;
        }
        self.tensors.insert(out.id, LogicalTensor::planned(out.clone(), op.clone()));
        // A gradient goes where that is whose gradient it is.
        if let Some((_, indices, dim)) = writes_at(op)
            && let Some(layout) = self.indexed.get(&(indices.id, dim)).copied()
        {
            self.make(out.id, layout);
            if let Some(tensor) = self.tensors.get_mut(&out.id)
                && let Some(local) = tensor.version(layout)
            {
                tensor.state = TensorState::Made;
                tensor.prefer(layout, local);
            }
        }
        true
    }

    /// Runs a planned operation in a layout.
    pub(super) fn make(&mut self, id: TensorId, want: Layout) -> TensorIr {
        let tensor = &self.tensors[&id];
        let degree = self.options.degree;
        let TensorState::Planned(op) = tensor.state.clone() else { return self.get(id, want) };
        // Zeros on every rank add up to zeros.
        let made_as = if want == Partial { Replicated } else { want };
        let fitting = sharding_options(&op, degree)
            .into_iter()
            .find(|option| option.output == made_as && option.inputs.iter().all(|input| *input != Partial));
        let option = match (made_as, fitting, tensor.version(Replicated)) {
            (Sharded(dim), _, Some(whole)) => {
                let from = tensor.local(Replicated, whole, degree);
                let to = TensorIr { id: self.fresh(), ..self.tensors[&id].local(want, id, degree) };
                self.take_part(from, to.clone(), dim);
                self.note(id, want, to.id);
                return to;
            }
            (Sharded(_), Some(option), None) => option,
            (Sharded(_), None, None) => {
                self.make(id, Replicated);
                return self.make(id, want);
            }
            _ => ShardingOption::replicated(&op),
        };
        let local = if want == Replicated { id } else { self.fresh() };
        self.emit_as(*op, &option, &[local]);
        self.note(id, want, local);
        self.tensors[&id].local(want, local, degree)
    }

    fn note(&mut self, id: TensorId, layout: Layout, local: TensorId) {
        if let Some(tensor) = self.tensors.get_mut(&id) {
            tensor.add(layout, local);
        }
    }
}
