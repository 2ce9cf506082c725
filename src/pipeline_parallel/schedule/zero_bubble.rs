//! Zero bubble with the memory of 1F1B: ZB-H1 (Qi et al. 2023, arXiv:2401.10241).

use super::{Action, Timetable, Unit};
use crate::Error;

/// 1F1B with the backward split. What the next rank waits for, the gradients of the inputs, comes at once; rank `r`
/// delays the gradients of the weights of `r` micro-batches, to fill what 1F1B leaves idle at the end.
pub(super) fn timetable(ranks: usize, micro_batches: usize) -> Result<Timetable, Error> {
    let row = |rank| {
        let unit = |micro_batch| Unit::new(rank, micro_batch);
        let warm_up = micro_batches.min(ranks - 1 - rank);
        let mut row: Vec<Action> = (0..warm_up).map(|micro_batch| Action::Forward(unit(micro_batch))).collect();
        for micro_batch in 0..micro_batches {
            if micro_batch + warm_up < micro_batches {
                row.push(Action::Forward(unit(micro_batch + warm_up)));
            }
            row.push(Action::BackwardInput(unit(micro_batch)));
            if let Some(put_off) = micro_batch.checked_sub(rank) {
                row.push(Action::BackwardWeight(unit(put_off)));
            }
        }
        let left = micro_batches.saturating_sub(rank)..micro_batches;
        row.extend(left.map(|micro_batch| Action::BackwardWeight(unit(micro_batch))));
        row
    };
    Timetable::new((0..ranks).map(row).collect())
}
