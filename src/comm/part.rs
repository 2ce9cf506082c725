//! How `n` ranks share a number of rows evenly.

use std::fmt;
use std::ops::Range;

use super::Communicator;
use crate::Error;

/// The rows of `total` that belong to `rank` of `size`: consecutive, in rank order, as equal as can be. When `size`
/// does not divide `total`, the first `total % size` ranks have one row more; with fewer rows than ranks the last ones
/// have none. A rank that is not among them has none either.
///
/// ```
/// use burn_parallel::comm::part;
/// assert_eq!((0..3).map(|rank| part(7, 3, rank)).collect::<Vec<_>>(), [0..3, 3..5, 5..7]);
/// ```
pub fn part(total: usize, size: usize, rank: usize) -> Range<usize> {
    if rank >= size {
        return total..total;
    }
    let (share, extra) = (total / size, total % size);
    let start = rank * share + rank.min(extra);
    start..start + share + usize::from(rank < extra)
}

/// Demands that what `rank` brought along a dim, `brought` of `total`, is its part of the whole. The world fails if
/// not: peers may not be able to tell.
///
/// # Errors
/// [`Error::InvalidArgument`], on all ranks.
pub(crate) fn check_part(
    name: &'static str,
    comm: &Communicator,
    rank: usize,
    (brought, total): (usize, usize),
    dim: impl fmt::Display,
) -> Result<(), Error> {
    let (group, size) = (comm.group(), comm.size());
    let due = part(total, size, rank).len();
    if brought == due {
        return Ok(());
    }
    let problem = format!(
        "rank {rank} of group `{group}` brings {brought} of the {total} rows that its {size} ranks have along {dim}, but its \
         part is {due}; divide tensors as `comm::part` does"
    );
    Err(comm.fail_with(Error::invalid(name, problem)))
}

#[cfg(test)]
mod tests {
    use super::part;

    #[test]
    fn ranks_beyond_the_group_have_nothing() {
        assert_eq!(part(6, 3, 2), 4..6);
        assert_eq!(part(6, 3, 3), 6..6);
        assert_eq!(part(6, 3, usize::MAX), 6..6);
        assert_eq!(part(7, 0, 0), 7..7);
        assert_eq!(part(usize::MAX, 2, 1), usize::MAX.div_ceil(2)..usize::MAX);
    }
}
