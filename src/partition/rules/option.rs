//! One way to run an operation on split inputs, and what rules make such options with.

use burn::tensor::Shape;
use burn_ir::OperationIr;

use crate::layout::Layout;
use crate::partition::collectives::CollectiveKind;

/// One way to run an operation: given inputs in these layouts, in the order of [`OperationIr::inputs`], the local
/// operation gives all its outputs in that layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShardingOption {
    pub(crate) inputs: Vec<Layout>,
    pub(crate) output: Layout,
    pub(crate) how: LocalOperation,
}

/// What the local operation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LocalOperation {
    /// The operation as it is, on local tensors.
    Locally,
    /// The operation, divided by the number of ranks: a mean of which each rank has an equal share.
    Averaged,
    /// The operation with indices counted from the beginning of this rank's part of a dim. What lies outside reads or
    /// adds zeros.
    Indexed {
        /// The dim that is indexed and split.
        dim: usize,
    },
    /// The operation, then a collective that reduces what the ranks got.
    Reduced(CollectiveKind),
}

impl ShardingOption {
    pub(super) fn new<const N: usize>(inputs: [Layout; N], output: Layout) -> Self {
        Self::of(inputs.into(), output)
    }

    pub(super) fn of(inputs: Vec<Layout>, output: Layout) -> Self {
        Self { inputs, output, how: LocalOperation::Locally }
    }

    pub(super) fn done(self, how: LocalOperation) -> Self {
        Self { how, ..self }
    }

    /// All inputs whole, and so the outputs: right for every operation that draws no random numbers.
    pub(crate) fn replicated(op: &OperationIr) -> Self {
        Self::of(op.inputs().map(|_| Layout::Replicated).collect(), Layout::Replicated)
    }
}

/// A sharding option for every dim of a shape for which `of` has one.
pub(super) fn each_dim(shape: &Shape, of: impl FnMut(usize) -> Option<ShardingOption>) -> Vec<ShardingOption> {
    (0..shape.num_dims()).filter_map(of).collect()
}
