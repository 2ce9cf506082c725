//! What moves demand of dims and parts; an error on one rank fails the world.

use crate::Error;
use crate::comm::{Communicator, part};

/// Refuses a dim that a tensor of this rank does not have.
pub(super) fn check_dim(name: &'static str, dim: usize, rank: usize) -> Result<(), Error> {
    match dim < rank {
        true => Ok(()),
        false => Err(Error::invalid(name, format!("dim {dim} does not exist in a tensor of rank {rank}"))),
    }
}

/// Sees to it that what this rank brought is its part of the whole. The world fails if not: peers may not be able to
/// tell.
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
