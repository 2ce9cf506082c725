//! Schedules of forward passes alone, for evaluation.

use super::{Action, Timetable, Unit};
use crate::Error;

/// Micro-batches pass in groups of as many as there are ranks, through one stage of a rank after the other, so that
/// every rank is busy all the time when it holds several stages. `stage_ranks` is the rank of each stage.
pub(crate) fn timetable(stage_ranks: &[usize], ranks: usize, micro_batches: usize) -> Result<Timetable, Error> {
    let mut rows = vec![Vec::new(); ranks];
    for first in (0..micro_batches).step_by(ranks.max(1)) {
        for (stage, rank) in stage_ranks.iter().enumerate() {
            let group = first..micro_batches.min(first + ranks);
            rows[*rank].extend(group.map(|micro_batch| Action::Forward(Unit::new(stage, micro_batch))));
        }
    }
    Timetable::new(rows)
}
