//! Interleaved 1F1B: several stages on each rank (Narayanan et al. 2021, arXiv:2104.04473).

use super::{Action, Timetable, Unit, one_forward_one_backward};
use crate::Error;

/// Micro-batches pass in groups of as many as there are ranks, through one stage of a rank after the other; the last group
/// may be smaller. Within this order every rank is as with 1F1B: forwards that fill the pipeline, one forward and one
/// backward in turn, the backwards that are left. With one stage on each rank it is 1F1B.
pub(super) fn timetable(ranks: usize, stages_per_rank: usize, micro_batches: usize) -> Result<Timetable, Error> {
    if stages_per_rank == 1 {
        return one_forward_one_backward::timetable(ranks, micro_batches);
    }
    let row = |rank| {
        let forwards = passes(ranks, rank, micro_batches, || 0..stages_per_rank);
        let backwards = passes(ranks, rank, micro_batches, || (0..stages_per_rank).rev());
        let total = forwards.len();
        // What the last rank has under way when the first micro-batch reaches the last stage, and a way there and back for
        // each rank in between.
        let warm_up = total.min((stages_per_rank - 1) * ranks.min(micro_batches) + 2 * (ranks - 1 - rank));
        let mut row: Vec<Action> = forwards[..warm_up].iter().copied().map(Action::Forward).collect();
        for turn in 0..total - warm_up {
            row.extend([Action::Forward(forwards[warm_up + turn]), Action::Backward(backwards[turn])]);
        }
        row.extend(backwards[total - warm_up..].iter().copied().map(Action::Backward));
        row
    };
    Timetable::new((0..ranks).map(row).collect())
}

/// The order in which a rank takes micro-batches through its stages, which `turns` gives in the order of the direction.
fn passes<S: Iterator<Item = usize>>(
    ranks: usize,
    rank: usize,
    micro_batches: usize,
    turns: impl Fn() -> S,
) -> Vec<Unit> {
    let mut order = Vec::new();
    for first in (0..micro_batches).step_by(ranks) {
        for turn in turns() {
            let group = first..micro_batches.min(first + ranks);
            order.extend(group.map(|micro_batch| Unit::new(turn * ranks + rank, micro_batch)));
        }
    }
    order
}
