//! The layouts that a logical tensor can have over a group.

use std::fmt;

use super::checks::check_dim;
use crate::Error;
use crate::comm::part;

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
