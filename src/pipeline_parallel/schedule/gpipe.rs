//! Fill and drain: GPipe (Huang et al. 2018, arXiv:1811.06965).

use super::{Action, Timetable, Unit};
use crate::Error;

/// Every rank: all forwards, then all backwards in the same order.
pub(super) fn timetable(ranks: usize, micro_batches: usize) -> Result<Timetable, Error> {
    let row = |rank| {
        let units = move || (0..micro_batches).map(move |micro_batch| Unit::new(rank, micro_batch));
        units().map(Action::Forward).chain(units().map(Action::Backward)).collect()
    };
    Timetable::new((0..ranks).map(row).collect())
}
