//! Operations that read or write at places which another tensor tells.

use burn_ir::{BaseOperationIr as Base, ModuleOperationIr as Module};

use super::{Strategy, each_dim};
use crate::layout::Layout::{Partial, Replicated, Sharded};

pub(super) fn base(op: &Base) -> Vec<Strategy> {
    match op {
        // Along any dim but the one that is indexed, every rank finds what it needs in its own part.
        Base::Gather(op) => each_dim(&op.tensor.shape, |dim| {
            (dim != op.dim && op.tensor.shape[dim] == op.indices.shape[dim])
                .then(|| Strategy::new([Sharded(dim); 2], Sharded(dim)))
        }),
        Base::Scatter(op) => each_dim(&op.tensor.shape, |dim| {
            let (size, indices, values) = (op.tensor.shape[dim], op.indices.shape[dim], op.value.shape[dim]);
            (dim != op.dim && size == indices && size == values).then(|| Strategy::new([Sharded(dim); 3], Sharded(dim)))
        }),
        Base::Select(op) => {
            let mut found = each_dim(&op.tensor.shape, |dim| {
                (dim != op.dim).then(|| Strategy::new([Sharded(dim), Replicated], Sharded(dim)))
            });
            found.push(Strategy::new([Replicated, Sharded(0)], Sharded(op.dim)));
            if !op.tensor.dtype.is_bool() {
                found.push(Strategy::new([Partial, Replicated], Partial));
            }
            found
        }
        Base::SelectAssign(op) => each_dim(&op.tensor.shape, |dim| {
            (dim != op.dim).then(|| Strategy::new([Sharded(dim), Replicated, Sharded(dim)], Sharded(dim)))
        }),
        _ => Vec::new(),
    }
}

pub(super) fn module(op: &Module) -> Vec<Strategy> {
    match op {
        Module::Embedding(op) => {
            let last = op.out.shape.num_dims() - 1;
            let mut found = vec![Strategy::new([Sharded(1), Replicated], Sharded(last))];
            found.extend((0..last).map(|dim| Strategy::new([Replicated, Sharded(dim)], Sharded(dim))));
            found
        }
        // Of the weights only the shape is read. Each rank adds up the rows that its own tokens point at.
        Module::EmbeddingBackward(op) => {
            let last = op.out_grad.shape.num_dims() - 1;
            let mut found = vec![Strategy::new([Sharded(1), Sharded(last), Replicated], Sharded(1))];
            found.extend((0..last).map(|dim| Strategy::new([Replicated, Sharded(dim), Sharded(dim)], Partial)));
            found
        }
        _ => Vec::new(),
    }
}
