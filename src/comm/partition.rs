//! How `n` ranks share a number of rows.

use std::ops::Range;

/// The rows of `total` that belong to `rank` of `size`: consecutive, in rank order, as equal as can be. When `size` does
/// not divide `total`, the first `total % size` ranks have one row more; with fewer rows than ranks the last ones have
/// none.
///
/// ```
/// use burn_parallel::comm::part;
/// assert_eq!((0..3).map(|rank| part(7, 3, rank)).collect::<Vec<_>>(), [0..3, 3..5, 5..7]);
/// ```
pub fn part(total: usize, size: usize, rank: usize) -> Range<usize> {
    let (share, extra) = (total / size, total % size);
    let start = rank * share + rank.min(extra);
    start..start + share + usize::from(rank < extra)
}
