//! What moves demand of dims.

use crate::Error;

/// Refuses a dim that a tensor of this rank does not have.
pub(super) fn check_dim(name: &'static str, dim: usize, rank: usize) -> Result<(), Error> {
    match dim < rank {
        true => Ok(()),
        false => Err(Error::invalid(name, format!("dim {dim} does not exist in a tensor of rank {rank}"))),
    }
}
