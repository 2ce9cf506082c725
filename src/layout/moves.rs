//! The linear operations that a move between layouts is made of, on the tensor of one rank.

use super::dim_order::{first, inverse};
use super::exchange::exchange;
use crate::Error;
use crate::comm::{Communicator, ReduceOp, check_part, part};
use crate::tensor::PlainTensor;

/// What a move does in one direction. Every step is linear in the tensors of all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum MoveOp {
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

impl MoveOp {
    /// Takes the step: a collective over `comm`, for those that need one. `name` is the function that errors name.
    pub fn take(self, name: &'static str, tensor: PlainTensor, comm: &Communicator) -> Result<PlainTensor, Error> {
        match self {
            Self::Keep => Ok(tensor),
            Self::KeepOnFirst if comm.rank() == 0 => Ok(tensor),
            Self::KeepOnFirst => Ok(PlainTensor::zeros(tensor.shape(), tensor.dtype(), &tensor.device())),
            Self::Sum => comm.all_reduce(tensor, ReduceOp::Sum),
            Self::Slice { dim } => {
                let own = part(tensor.shape()[dim], comm.size(), comm.rank());
                // A copy of the part, so that the whole need not stay.
                tensor.narrow(dim, own).packed()
            }
            Self::Gather { dim } => along(dim, tensor, |rows| {
                let brought = rows.shape()[0];
                let all = comm.all_gather(rows)?;
                check_part(name, comm, comm.rank(), (brought, all.shape()[0]), format_args!("dim {dim}"))?;
                Ok(all)
            }),
            Self::SumSlice { dim } => along(dim, tensor, |rows| comm.reduce_scatter(rows, ReduceOp::Sum)),
            Self::Exchange { split, join } => exchange(name, tensor, split, join, comm),
            Self::GatherTo { root, dim } => along(dim, tensor, |rows| {
                let (mut dims, dtype, device) = (rows.shape().to_vec(), rows.dtype(), rows.device());
                let brought = std::mem::take(&mut dims[0]);
                let Some(all) = comm.gather(rows, root)? else {
                    return Ok(PlainTensor::zeros(dims, dtype, &device));
                };
                check_part(name, comm, comm.rank(), (brought, all.shape()[0]), format_args!("dim {dim}"))?;
                Ok(all)
            }),
            Self::SliceFrom { root, dim } => along(dim, tensor, |rows| {
                let rank = rows.rank();
                let own = comm.scatter_alike(rows, root)?;
                match own.rank() {
                    found if found == rank => Ok(own),
                    found => {
                        let own = comm.rank();
                        let problem = format!("rank {own} has a tensor of rank {rank}, the root one of rank {found}");
                        Err(comm.fail_with(Error::invalid(name, problem)))
                    }
                }
            }),
        }
    }
}

/// Works on a tensor with `dim` as its first dim. On the way back the strides move, not the elements.
fn along(
    dim: usize,
    tensor: PlainTensor,
    work: impl FnOnce(PlainTensor) -> Result<PlainTensor, Error>,
) -> Result<PlainTensor, Error> {
    if dim == 0 {
        return work(tensor);
    }
    let order = first([dim], tensor.rank());
    let rows = tensor.permute(&order);
    Ok(work(rows)?.permute(&inverse(&order)))
}
