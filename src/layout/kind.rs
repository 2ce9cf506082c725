//! The layouts, and the move from any to any.

use std::fmt;

use burn::tensor::Tensor;

use super::moves::MoveOp;
use super::tape::MovePair;
use super::{all_to_all, gather_from_group, reduce_from_group, reduce_scatter_to_group, scatter_to_group};
use crate::Error;
use crate::comm::{Communicator, part};

/// How a logical tensor lies over the ranks of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Every rank holds all of it.
    Replicated,
    /// Every rank holds its [part](crate::comm::part) along this dim.
    Sharded(usize),
    /// Every rank holds a tensor of the full shape; the logical one is their sum, still to be made.
    Partial,
}

impl Layout {
    /// Dims of what `rank` of `size` holds of a tensor of these dims.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the tensor does not have the sharded dim.
    ///
    /// ```
    /// use burn_parallel::layout::Layout;
    /// assert_eq!(Layout::Sharded(1).local_dims(&[8, 7], 3, 0)?, [8, 3]);
    /// assert_eq!(Layout::Sharded(1).local_dims(&[8, 7], 3, 2)?, [8, 2]);
    /// # Ok::<(), burn_parallel::Error>(())
    /// ```
    pub fn local_dims(self, dims: &[usize], size: usize, rank: usize) -> Result<Vec<usize>, Error> {
        let mut local = dims.to_vec();
        if let Self::Sharded(dim) = self {
            check_dim("local_dims", dim, dims.len())?;
            if rank >= size {
                return Err(Error::invalid("local_dims", format!("there is no rank {rank} among {size}")));
            }
            local[dim] = part(dims[dim], size, rank).len();
        }
        Ok(local)
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replicated => f.write_str("replicated"),
            Self::Sharded(dim) => write!(f, "sharded along dim {dim}"),
            Self::Partial => f.write_str("partial"),
        }
    }
}

/// Refuses a dim that a tensor of this rank does not have.
pub(super) fn check_dim(name: &'static str, dim: usize, rank: usize) -> Result<(), Error> {
    match dim < rank {
        true => Ok(()),
        false => Err(Error::invalid(name, format!("dim {dim} does not exist in a tensor of rank {rank}"))),
    }
}

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
/// Equal layouts leave the tensor as it is. The gradient of a replicated tensor is taken to be replicated here; follow up
/// with [`copy_to_group`](super::copy_to_group) where the ranks then do different things with it.
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
