//! A step from layout to layout as data, and how it is taken on the tensor of one rank.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;

use super::exchange::exchange;
use crate::Error;
use crate::comm::{Communicator, Operation, ReduceOp, part};

/// What a move does in one direction. Every step is linear in the tensors of all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Step {
    /// `y = x`.
    Keep,
    /// `y = x` on rank 0, `y = 0` on the others.
    KeepOnFirst,
    /// `y = sum over r of x_r`.
    Sum,
    /// `y` = this rank's part of `x` along a dim.
    Slice { dim: usize },
    /// `y` = the parts of all ranks, one behind the other along a dim.
    Gather { dim: usize },
    /// `y` = this rank's part, along a dim, of the sum over the ranks.
    SumSlice { dim: usize },
    /// `y` = this rank's part along `split` of what lies in parts along `join`, which becomes whole.
    Exchange { split: usize, join: usize },
    /// `y` = on the root, what `Gather` gives; on the others, nothing: size 0 along the dim.
    GatherTo { root: usize, dim: usize },
    /// `y` = this rank's part, along a dim, of what the root holds.
    SliceFrom { root: usize, dim: usize },
}

impl Step {
    /// Takes the step: a collective over `comm`, for those that need one. `name` is the function that errors speak of.
    pub fn take(self, name: &'static str, tensor: FlexTensor, comm: &Communicator) -> Result<FlexTensor, Error> {
        match self {
            Self::Keep => Ok(tensor),
            Self::KeepOnFirst if comm.rank() == 0 => Ok(tensor),
            Self::KeepOnFirst => Ok(FlexTensor::zeros(tensor.shape(), tensor.dtype())),
            Self::Sum => comm.all_reduce_host(tensor, ReduceOp::Sum),
            Self::Slice { dim } => {
                let own = part(tensor.shape()[dim], comm.size(), comm.rank());
                // A copy of the part, so that the whole need not stay.
                Ok(tensor.narrow(dim, own.start, own.len()).to_contiguous())
            }
            Self::Gather { dim } => along(dim, tensor, |rows| {
                let brought = rows.shape()[0];
                let all = comm.through(Operation::AllGather, Some(rows), None)?;
                check_part(name, comm, dim, brought, all.shape()[0])?;
                Ok(all)
            }),
            Self::SumSlice { dim } => {
                along(dim, tensor, |rows| comm.through(Operation::ReduceScatter(ReduceOp::Sum), Some(rows), None))
            }
            Self::Exchange { split, join } => exchange(name, tensor, split, join, comm),
            Self::GatherTo { root, dim } => along(dim, tensor, |rows| {
                let brought = rows.shape()[0];
                let nothing = rows.narrow(0, 0, 0);
                let all = comm.through(Operation::Gather { root }, Some(rows), None)?;
                if comm.rank() != root {
                    return Ok(nothing.to_contiguous());
                }
                check_part(name, comm, dim, brought, all.shape()[0])?;
                Ok(all)
            }),
            Self::SliceFrom { root, dim } => along(dim, tensor, |rows| {
                let (dtype, rank) = (rows.dtype(), rows.layout().num_dims());
                let brought = (comm.rank() == root).then_some(rows);
                let own = comm.through(Operation::Scatter { root }, brought, Some(dtype))?;
                match own.layout().num_dims() {
                    found if found == rank => Ok(own),
                    found => fail(
                        comm,
                        Error::invalid(
                            name,
                            format!("rank {} has a tensor of rank {rank}, the root one of rank {found}", comm.rank()),
                        ),
                    ),
                }
            }),
        }
    }
}

/// Works on a tensor with `dim` as its first dim. On the way back the strides move, not the elements.
fn along(
    dim: usize,
    tensor: FlexTensor,
    work: impl FnOnce(FlexTensor) -> Result<FlexTensor, Error>,
) -> Result<FlexTensor, Error> {
    if dim == 0 {
        return work(tensor);
    }
    let order = first([dim], tensor.layout().num_dims());
    let rows = tensor.permute(&order);
    drop(tensor);
    Ok(work(rows)?.permute(&inverse(&order)))
}

/// The dims `0..rank` in an order that begins with `leading`.
pub(super) fn first<const N: usize>(leading: [usize; N], rank: usize) -> Vec<usize> {
    leading.into_iter().chain((0..rank).filter(|dim| !leading.contains(dim))).collect()
}

/// The order that undoes `order`.
pub(super) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, &dim)| inverse[dim] = place);
    inverse
}

/// Sees to it that what this rank brought is its part of the whole. The world fails if not: peers may not be able to tell.
pub(super) fn check_part(
    name: &'static str,
    comm: &Communicator,
    dim: usize,
    brought: usize,
    total: usize,
) -> Result<(), Error> {
    let due = part(total, comm.size(), comm.rank()).len();
    if brought == due {
        return Ok(());
    }
    let (group, rank, size) = (comm.group(), comm.rank(), comm.size());
    let problem = format!(
        "rank {rank} of group `{group}` brings {brought} of the {total} rows that its {size} ranks have along dim {dim}, \
         but its part is {due}; divide tensors as `comm::part` does"
    );
    fail(comm, Error::invalid(name, problem))
}

/// Fails the world with an error that this rank has found. Gives back the one that counts: the first.
pub(super) fn fail<T>(comm: &Communicator, error: Error) -> Result<T, Error> {
    comm.fail(error.clone());
    Err(comm.failure().unwrap_or(error))
}
