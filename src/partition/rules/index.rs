//! Operations that read or write at places which another tensor tells.
//!
//! Along any dim but the one that is indexed, every rank finds what it needs in its own part. Along the indexed dim it
//! finds some of it: with indices counted from where its part begins, and zeros for what lies outside, reads give
//! partial tensors, of which one rank's summand is not zero; and each rank adds what falls into its part. That is
//! Megatron-LM's vocabulary-parallel embedding and loss ([arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section
//! 3).

use burn::tensor::{DType, IndexingUpdateOp, Shape};
use burn_ir::{
    EmbeddingBackwardOpIr, EmbeddingOpIr, GatherOpIr, OperationIr, ScalarIr, ScatterOpIr, SelectAssignOpIr, SelectOpIr,
    TensorId, TensorIr,
};

use super::option::{LocalOperation, ShardingOption, each_dim};
use crate::graph::operation::{Form, build};
use crate::layout::Layout::{Partial, Replicated, Sharded};
use crate::partition::indices::looks_at_indices;

pub(super) fn sharding_options(form: Form<'_>) -> Vec<ShardingOption> {
    match form {
        Form::Gather(op) => {
            let mut found = each_dim(&op.tensor.shape, |dim| {
                (dim != op.dim && op.tensor.shape[dim] == op.indices.shape[dim])
                    .then(|| ShardingOption::new([Sharded(dim); 2], Sharded(dim)))
            });
            if !op.tensor.dtype.is_bool() {
                found.push(reads(op.dim));
            }
            found
        }
        Form::Scatter(op) => {
            let mut found = each_dim(&op.tensor.shape, |dim| {
                let (size, indices, values) = (op.tensor.shape[dim], op.indices.shape[dim], op.value.shape[dim]);
                (dim != op.dim && size == indices && size == values)
                    .then(|| ShardingOption::new([Sharded(dim); 3], Sharded(dim)))
            });
            found.extend(writes(op.dim, op.dim, &op.update));
            found
        }
        Form::Select(op) => {
            let mut found = each_dim(&op.tensor.shape, |dim| {
                (dim != op.dim).then(|| ShardingOption::new([Sharded(dim), Replicated], Sharded(dim)))
            });
            found.push(ShardingOption::new([Replicated, Sharded(0)], Sharded(op.dim)));
            if !op.tensor.dtype.is_bool() {
                found.push(ShardingOption::new([Partial, Replicated], Partial));
                found.push(reads(op.dim));
            }
            found
        }
        Form::SelectAssign(op) => {
            let mut found = each_dim(&op.tensor.shape, |dim| {
                (dim != op.dim).then(|| ShardingOption::new([Sharded(dim), Replicated, Sharded(dim)], Sharded(dim)))
            });
            found.extend(writes(op.dim, 0, &op.update));
            found
        }
        Form::Embedding(op) => {
            let last = op.out.shape.num_dims() - 1;
            let mut found = vec![ShardingOption::new([Sharded(1), Replicated], Sharded(last)), reads(0)];
            found.extend((0..last).map(|dim| ShardingOption::new([Replicated, Sharded(dim)], Sharded(dim))));
            found
        }
        // Of the weights only the shape is read. Each rank adds up the rows that its own tokens point at, or those that
        // lie in its part.
        Form::EmbeddingBackward(op) => {
            let last = op.out_grad.shape.num_dims() - 1;
            let mut found = vec![
                ShardingOption::new([Sharded(1), Sharded(last), Replicated], Sharded(1)),
                ShardingOption::new([Sharded(0), Replicated, Replicated], Sharded(0))
                    .done(LocalOperation::Indexed { dim: 0 }),
                ShardingOption::new([Replicated, Partial, Replicated], Partial),
            ];
            found.extend((0..last).map(|dim| ShardingOption::new([Replicated, Sharded(dim), Sharded(dim)], Partial)));
            found
        }
        _ => Vec::new(),
    }
}

/// The tensor and the indices of an operation that looks up, or writes, along a dim, and that dim.
pub(crate) fn looked_up(op: &OperationIr) -> Option<(&TensorIr, &TensorIr, usize)> {
    match Form::of(op) {
        Form::Gather(op) => Some((&op.tensor, &op.indices, op.dim)),
        Form::Scatter(op) => Some((&op.tensor, &op.indices, op.dim)),
        Form::Select(op) => Some((&op.tensor, &op.indices, op.dim)),
        Form::SelectAssign(op) => Some((&op.tensor, &op.indices, op.dim)),
        Form::Embedding(op) => Some((&op.weights, &op.indices, 0)),
        _ => None,
    }
}

/// Indices that are looked at may be split in any way.
pub(super) fn looks(form: Form<'_>) -> Vec<ShardingOption> {
    match form {
        Form::Custom(look) if looks_at_indices(look) => {
            let along = |dim| Some(ShardingOption::new([Sharded(dim)], Sharded(dim)));
            look.outputs.first().map_or_else(Vec::new, |out| each_dim(&out.shape, along))
        }
        _ => Vec::new(),
    }
}

fn reads(dim: usize) -> ShardingOption {
    ShardingOption::new([Sharded(dim), Replicated], Partial).done(LocalOperation::Indexed { dim })
}

/// Values that are added at indices, along the dim that is indexed, and with the values themselves split along it, of
/// which each rank adds its own.
fn writes(dim: usize, of_indices: usize, update: &IndexingUpdateOp) -> Vec<ShardingOption> {
    match update {
        IndexingUpdateOp::Add => vec![
            ShardingOption::new([Sharded(dim), Replicated, Replicated], Sharded(dim))
                .done(LocalOperation::Indexed { dim }),
            ShardingOption::new([Partial, Sharded(of_indices), Sharded(dim)], Partial),
            ShardingOption::new([Partial, Replicated, Partial], Partial),
        ],
        _ => Vec::new(),
    }
}

/// The operation on a rank's part of the indexed dim.
pub(super) fn from_part(
    op: OperationIr,
    dim: usize,
    rank: usize,
    fresh: &mut dyn FnMut() -> TensorId,
) -> Vec<OperationIr> {
    match Form::of(&op) {
        Form::Gather(op) => {
            let mut part = LocalIndices::of(&op.tensor, dim, &op.indices, rank, fresh);
            let (indices, read) = (part.indices.clone(), part.like(&op.out));
            part.operations.push(build::gather(GatherOpIr { indices, out: read.clone(), ..op.clone() }));
            part.zero_outside(read, op.out.clone(), None)
        }
        Form::Select(op) => {
            let mut part = LocalIndices::of(&op.tensor, dim, &op.indices, rank, fresh);
            let (indices, read) = (part.indices.clone(), part.like(&op.out));
            part.operations.push(build::select(SelectOpIr { indices, out: read.clone(), ..op.clone() }));
            part.zero_outside(read, op.out.clone(), Some(dim))
        }
        Form::Scatter(op) => {
            let part = LocalIndices::of(&op.tensor, dim, &op.indices, rank, fresh);
            let (mut operations, indices, value) = part.inside(op.value.clone(), None);
            operations.push(build::scatter(ScatterOpIr { indices, value, ..op.clone() }));
            operations
        }
        Form::SelectAssign(op) => {
            let part = LocalIndices::of(&op.tensor, dim, &op.indices, rank, fresh);
            let (mut operations, indices, value) = part.inside(op.value.clone(), Some(dim));
            operations.push(build::select_assign(SelectAssignOpIr { indices, value, ..op.clone() }));
            operations
        }
        Form::Embedding(op) => {
            let mut part = LocalIndices::of(&op.weights, dim, &op.indices, rank, fresh);
            let (indices, read) = (part.indices.clone(), part.like(&op.out));
            part.operations.push(build::embedding(EmbeddingOpIr { indices, out: read.clone(), ..op.clone() }));
            part.zero_outside(read, op.out.clone(), None)
        }
        Form::EmbeddingBackward(op) => {
            let part = LocalIndices::of(&op.weights, dim, &op.indices, rank, fresh);
            let (mut operations, indices, out_grad) = part.inside(op.out_grad.clone(), None);
            operations.push(build::embedding_backward(EmbeddingBackwardOpIr { indices, out_grad, ..op.clone() }));
            operations
        }
        _ => vec![op],
    }
}

/// Indices as a rank sees them, and the operations that make them.
struct LocalIndices<'a> {
    operations: Vec<OperationIr>,
    /// Counted from the beginning of the part; 0 for those outside.
    indices: TensorIr,
    /// Which are outside.
    outside: TensorIr,
    fresh: &'a mut dyn FnMut() -> TensorId,
}

impl<'a> LocalIndices<'a> {
    fn of(
        tensor: &TensorIr,
        dim: usize,
        indices: &TensorIr,
        rank: usize,
        fresh: &'a mut dyn FnMut() -> TensorId,
    ) -> Self {
        let size = tensor.shape[dim];
        let dtype = indices.dtype;
        let mut new = |dtype| TensorIr::uninit(fresh(), indices.shape.clone(), dtype);
        let truth = DType::Bool(burn::tensor::BoolStore::Native);
        let (shifted, before, behind, outside, own) = (new(dtype), new(truth), new(truth), new(truth), new(dtype));
        let (first, size) = ((rank * size) as i64, size as i64);
        let operations = vec![
            build::minus(indices.clone(), first, shifted.clone()),
            build::is_below(shifted.clone(), 0, before.clone()),
            build::is_at_least(shifted.clone(), size, behind.clone()),
            build::either(before, behind, outside.clone()),
            build::mask_fill(shifted, outside.clone(), ScalarIr::Int(0), own.clone()),
        ];
        Self { operations, indices: own, outside, fresh }
    }

    fn like(&mut self, tensor: &TensorIr) -> TensorIr {
        TensorIr { id: (self.fresh)(), ..tensor.clone() }
    }

    /// The mask of what is outside, in as many dims as `tensor`: along `dim` if the indices belong to one, else along
    /// the leading dims.
    fn mask(&mut self, tensor: &TensorIr, dim: Option<usize>) -> TensorIr {
        let rank = tensor.shape.num_dims();
        if self.outside.shape.num_dims() == rank && dim.is_none() {
            return self.outside.clone();
        }
        let mut dims = vec![1; rank];
        match dim {
            Some(dim) => dims[dim] = self.outside.shape[0],
            None => {
                let leading = self.outside.shape.as_slice();
                dims[..leading.len()].copy_from_slice(leading);
            }
        }
        let mask = TensorIr::uninit((self.fresh)(), Shape::from(dims), self.outside.dtype);
        self.operations.push(build::reshape(self.outside.clone(), mask.clone()));
        mask
    }

    /// Gives `read` as `out`, with zeros for what is outside.
    fn zero_outside(mut self, read: TensorIr, out: TensorIr, dim: Option<usize>) -> Vec<OperationIr> {
        let mask = self.mask(&read, dim);
        let value = ScalarIr::new(0i64, &out.dtype);
        self.operations.push(build::mask_fill(read, mask, value, out));
        self.operations
    }

    /// The operations so far, the indices, and the values with zeros for what is outside.
    fn inside(mut self, values: TensorIr, dim: Option<usize>) -> (Vec<OperationIr>, TensorIr, TensorIr) {
        let out = self.like(&values);
        let indices = self.indices.clone();
        (self.zero_outside(values, out.clone(), dim), indices, out)
    }
}
