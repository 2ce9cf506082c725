//! Optimizers that update nothing: what they give out and take are the states of a record, whose fields burn keeps
//! private.

use burn::module::ParamGroup;
use burn::optim::{DynOptimizer, DynState, LearningRate, ModuleOptimizer, SgdConfig, StateSink, StateSource};
use burn::tensor::Device;
use burn::tensor::kind::BridgeTensor;

/// What is done with the states of a record.
pub(super) trait States: Send + Sync + 'static {
    /// Puts the state of the parameter of this number into a record that is made.
    fn give(&self, id: &str, into: &mut StateSink);

    /// Takes the state of the parameter of this number, of `rank` dims, out of a record that is loaded. Of a parameter
    /// for which this returns something, [`give`](Self::give) is asked for the state.
    fn take(&self, rank: usize, id: &str, from: &mut StateSource) -> Option<DynState>;
}

/// An optimizer of all parameters that only does this.
pub(super) fn states_only(states: impl States) -> ModuleOptimizer {
    let optimizer: ModuleOptimizer = SgdConfig::new().init();
    optimizer.with_group(ParamGroup::all(), StatesOnly(states), None)
}

struct StatesOnly<S>(S);

impl<S: States> DynOptimizer for StatesOnly<S> {
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
        self.0.give(prefix, into);
    }

    fn state_unflatten(&self, rank: usize, prefix: &str, from: &mut StateSource, _: &Device) -> Option<DynState> {
        self.0.take(rank, prefix, from)
    }
}
