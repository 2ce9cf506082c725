//! Scatter from one rank of a group, and gather to it.

use burn::tensor::Tensor;

use super::checks::check_dim;
use super::moves::MoveOp;
use super::tape::MovePair;
use crate::Error;
use crate::comm::Communicator;

/// Divides what one rank holds among all, along `dim`.
///
/// ```text
/// forward    y_r = part_r(x_root)                            scatter
/// backward   dx_root = [dy_0, .., dy_(n-1)], dx_other = 0    gather
/// ```
///
/// Every rank brings a tensor of the same rank and dtype; of all but the root, only that counts (`[0; D]` dims will
/// do), and that it is tracked or not as the root's is. The conjugate of [`gather_to_root`].
///
/// # Errors
/// [`Error::InvalidArgument`] if the tensor has no dim of that number; [`Error::NoSuchRank`];
/// [`Error::UnsupportedDType`] for quantized tensors; those of [`Communicator`].
pub fn scatter_from_root<const D: usize>(
    tensor: Tensor<D>,
    dim: usize,
    root: usize,
    comm: &Communicator,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "scatter_from_root";
    check_dim(NAME, dim, D)?;
    check_root(NAME, root, comm)?;
    MovePair { name: NAME, forward: MoveOp::SliceFrom { root, dim }, backward: MoveOp::GatherTo { root, dim } }
        .apply(tensor, comm)
}

/// Puts the parts of all ranks together on one of them, along `dim`. The others get a tensor that is empty along it.
///
/// ```text
/// forward    y_root = [x_0, .., x_(n-1)], y_other = []       gather
/// backward   dx_r = part_r(dy_root)                          scatter
/// ```
///
/// The backward is a collective: the empty tensor of the other ranks must be part of what they run backward from. A sum
/// over it is 0, so the same `loss(y).sum()` will do on all of them. The conjugate of [`scatter_from_root`].
///
/// # Errors
/// [`Error::InvalidArgument`] if the tensor has no dim of that number, or on the root, if what it brings is not its
/// part; [`Error::NoSuchRank`]; [`Error::UnsupportedDType`] for quantized tensors; those of [`Communicator`].
pub fn gather_to_root<const D: usize>(
    tensor: Tensor<D>,
    dim: usize,
    root: usize,
    comm: &Communicator,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "gather_to_root";
    check_dim(NAME, dim, D)?;
    check_root(NAME, root, comm)?;
    MovePair { name: NAME, forward: MoveOp::GatherTo { root, dim }, backward: MoveOp::SliceFrom { root, dim } }
        .apply(tensor, comm)
}

fn check_root(operation: &'static str, root: usize, comm: &Communicator) -> Result<(), Error> {
    match root < comm.size() {
        true => Ok(()),
        false => Err(Error::NoSuchRank { group: comm.group().clone(), rank: root, size: comm.size(), operation }),
    }
}
