//! 1F1B: PipeDream-Flush (Narayanan et al. 2020, arXiv:2006.09503).

use super::{Action, Timetable, Unit};
use crate::Error;

/// Every rank: as many forwards as there are ranks behind it, then one forward and one backward in turn, then the
/// backwards that are left.
pub(super) fn timetable(ranks: usize, micro_batches: usize) -> Result<Timetable, Error> {
    let row = |rank| {
        let warm_up = micro_batches.min(ranks - 1 - rank);
        let forward = |micro_batch| Action::Forward(Unit::new(rank, micro_batch));
        let backward = |micro_batch| Action::Backward(Unit::new(rank, micro_batch));
        let mut row: Vec<Action> = (0..warm_up).map(forward).collect();
        for micro_batch in warm_up..micro_batches {
            row.extend([forward(micro_batch), backward(micro_batch - warm_up)]);
        }
        row.extend((micro_batches - warm_up..micro_batches).map(backward));
        row
    };
    Timetable::new((0..ranks).map(row).collect())
}
