//! The move from any layout to any other.

use burn::tensor::Tensor;

use super::checks::check_dim;
use super::kind::Layout;
use super::moves::MoveOp;
use super::pairs::{all_to_all, gather_from_group, reduce_from_group, reduce_scatter_to_group, scatter_to_group};
use super::tape::MovePair;
use crate::Error;
use crate::comm::Communicator;

/// Moves a tensor from one layout to another, and its gradient back.
///
/// | from | to | done by |
/// |---|---|---|
/// | replicated | sharded | [`scatter_to_group`] |
/// | replicated | partial | rank 0 keeps it, the others hold zeros; `dx = dy` |
/// | sharded | replicated | [`gather_from_group`] |
/// | sharded | sharded along another dim | [`all_to_all`] |
/// | sharded | partial | gathered, then as from replicated |
/// | partial | replicated | [`reduce_from_group`] |
/// | partial | sharded | [`reduce_scatter_to_group`] |
///
/// Equal layouts leave the tensor as it is. The gradient of a replicated tensor is taken to be replicated here; follow
/// up with [`copy_to_group`](super::copy_to_group) where the ranks then do different things with it.
///
/// # Errors
///
/// [`Error::InvalidArgument`] if the tensor has no dim of that number, or this rank's is not its part; those of
/// [`Communicator`].
pub fn redistribute<const D: usize>(
    tensor: Tensor<D>,
    from: Layout,
    to: Layout,
    comm: &Communicator,
) -> Result<Tensor<D>, Error> {
    use Layout::{Partial, Replicated, Sharded};
    for layout in [from, to] {
        if let Sharded(dim) = layout {
            check_dim("redistribute", dim, D)?;
        }
    }
    match (from, to) {
        (Replicated, Replicated) | (Partial, Partial) => Ok(tensor),
        (Replicated, Sharded(dim)) => scatter_to_group(tensor, dim, comm),
        (Replicated, Partial) => {
            MovePair { name: "redistribute", forward: MoveOp::KeepOnFirst, backward: MoveOp::Keep }.apply(tensor, comm)
        }
        (Sharded(dim), Replicated) => gather_from_group(tensor, dim, comm),
        (Sharded(from), Sharded(to)) => all_to_all(tensor, from, to, comm),
        (Sharded(dim), Partial) => redistribute(gather_from_group(tensor, dim, comm)?, Replicated, Partial, comm),
        (Partial, Replicated) => reduce_from_group(tensor, comm),
        (Partial, Sharded(dim)) => reduce_scatter_to_group(tensor, dim, comm),
    }
}
