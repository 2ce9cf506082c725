//! Interleaved 1F1B: several stages on each rank (Narayanan et al. 2021, arXiv:2104.04473).

use std::ops::Range;

use super::{Action, Timetable, Unit, one_forward_one_backward};
use crate::Error;

/// Micro-batches pass in groups, through one stage of a rank after the other. Within this order every rank is as with
/// 1F1B: forwards that fill the pipeline, one forward and one backward in turn, the backwards that are left. With one
/// stage on each rank it is 1F1B.
pub(super) fn timetable(ranks: usize, stages_per_rank: usize, micro_batches: usize) -> Result<Timetable, Error> {
    if stages_per_rank == 1 {
        return one_forward_one_backward::timetable(ranks, micro_batches);
    }
    let groups = groups(ranks, micro_batches);
    let largest = groups.first().map_or(0, |group| group.len());
    let row = |rank| {
        let order = |turns: &[usize]| -> Vec<Unit> {
            let stages = groups.iter().flat_map(|group| turns.iter().map(move |turn| (group, turn * ranks + rank)));
            stages.flat_map(|(group, stage)| group.clone().map(move |index| Unit::new(stage, index))).collect()
        };
        let forwards = order(&(0..stages_per_rank).collect::<Vec<_>>());
        let backwards = order(&(0..stages_per_rank).rev().collect::<Vec<_>>());
        let total = forwards.len();
        // What the last rank has in flight when the first micro-batch reaches the last stage, and a way there and back
        // for each rank in between.
        let warm_up = total.min((stages_per_rank - 1) * largest + 2 * (ranks - 1 - rank));
        let mut row: Vec<Action> = forwards[..warm_up].iter().copied().map(Action::Forward).collect();
        for turn in 0..total - warm_up {
            row.extend([Action::Forward(forwards[warm_up + turn]), Action::Backward(backwards[turn])]);
        }
        row.extend(backwards[total - warm_up..].iter().copied().map(Action::Backward));
        row
    };
    Timetable::new((0..ranks).map(row).collect())
}

/// Groups of as many micro-batches as there are ranks. What is left over makes the first groups larger: a group smaller
/// than the number of ranks would let ranks wait for each other.
fn groups(ranks: usize, micro_batches: usize) -> Vec<Range<usize>> {
    let count = (micro_batches / ranks).max(1);
    let mut groups = Vec::with_capacity(count);
    let mut begin = 0;
    for group in 0..count {
        let end = begin + micro_batches / count + usize::from(group < micro_batches % count);
        groups.push(begin..end);
        begin = end;
    }
    groups
}
