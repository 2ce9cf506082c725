//! A record of burn with states that are given.
//!
//! The fields of burn's record are private. One that is read from a file in memory keeps all of that file as long as
//! one tensor of it is there, though the optimizer has changed them all since. One that an optimizer gives out has
//! memory of its own for each. So the record is that of an optimizer of ours.

use burn::module::ParamGroup;
use burn::optim::{DynOptimizer, DynState, LearningRate, ModuleOptimizer, OptimizerRecord, SgdConfig};
use burn::optim::{StateSink, StateSource};
use burn::tensor::Device;
use burn::tensor::kind::BridgeTensor;

/// The record with the state of each parameter that `outline` has, where the outline has its number of dims and its path:
/// `give` is told the number of the parameter, and puts the state in.
pub(crate) fn record_of<F>(outline: OptimizerRecord, give: F) -> OptimizerRecord
where
    F: Fn(&str, &mut StateSink) + Send + Sync + 'static,
{
    let optimizer: ModuleOptimizer = SgdConfig::new().init();
    optimizer.with_group(ParamGroup::all(), Given(give), None).load_record(outline).to_record()
}

/// An optimizer that gives out states as its own.
struct Given<F>(F);

impl<F: Fn(&str, &mut StateSink) + Send + Sync> DynOptimizer for Given<F> {
    fn step_dyn(
        &self,
        _: usize,
        _: LearningRate,
        tensor: BridgeTensor,
        _: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        (tensor, state)
    }

    fn to_device_dyn(&self, state: DynState, _: &Device) -> DynState {
        state
    }

    fn state_flatten(&self, prefix: &str, _: &DynState, into: &mut StateSink) {
        (self.0)(prefix, into);
    }

    fn state_unflatten(&self, rank: usize, _: &str, _: &mut StateSource, _: &Device) -> Option<DynState> {
        Some(DynState::create((), rank))
    }
}
