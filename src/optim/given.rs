//! A record of burn with states that are given.
//!
//! The fields of burn's record are private. One that is read from a file in memory keeps all of that file as long as
//! one tensor of it is there, though the optimizer has changed them all since. One that an optimizer gives out has
//! memory of its own for each. So the record is that of an optimizer of ours.

use burn::optim::{DynState, OptimizerRecord, StateSink, StateSource};

use super::states_only::{States, states_only};

/// The record with the state of each parameter that `outline` has, where the outline has its number of dims and its
/// path: `give` is told the number of the parameter, and puts the state in.
pub(crate) fn record_of<F>(outline: OptimizerRecord, give: F) -> OptimizerRecord
where
    F: Fn(&str, &mut StateSink) + Send + Sync + 'static,
{
    states_only(Given(give)).load_record(outline).to_record()
}

/// Gives out states as its own.
struct Given<F>(F);

impl<F: Fn(&str, &mut StateSink) + Send + Sync + 'static> States for Given<F> {
    fn give(&self, id: &str, into: &mut StateSink) {
        (self.0)(id, into);
    }

    fn take(&self, rank: usize, _: &str, _: &mut StateSource) -> Option<DynState> {
        Some(DynState::create((), rank))
    }
}
