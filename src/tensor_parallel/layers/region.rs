//! Enters and leaves a tensor-parallel region.

use burn::tensor::Tensor;

use crate::Error;
use crate::comm::Communicator;
use crate::layout;

/// The dim of the sequence: the last but one.
fn sequence_dim<const D: usize>(operation: &'static str) -> Result<usize, Error> {
    D.checked_sub(2).ok_or_else(|| {
        let problem = format!("sequence parallelism needs tensors [.., sequence, features], this one has rank {D}");
        Error::invalid(operation, problem)
    })
}

/// Into the region: *f*, or with sequence parallelism the all-gather whose gradient is a reduce-scatter.
pub(super) fn enter<const D: usize>(
    operation: &'static str,
    input: Tensor<D>,
    sequence_parallel: bool,
    group: &Communicator,
) -> Result<Tensor<D>, Error> {
    match sequence_parallel {
        true => layout::gather_and_copy_to_group(input, sequence_dim::<D>(operation)?, group),
        false => layout::copy_to_group(input, group),
    }
}

/// Out of the region: *g*, or with sequence parallelism the reduce-scatter whose gradient is an all-gather.
pub(super) fn leave<const D: usize>(
    operation: &'static str,
    partial: Tensor<D>,
    sequence_parallel: bool,
    group: &Communicator,
) -> Result<Tensor<D>, Error> {
    match sequence_parallel {
        true => layout::reduce_scatter_to_group(partial, sequence_dim::<D>(operation)?, group),
        false => layout::reduce_from_group(partial, group),
    }
}
