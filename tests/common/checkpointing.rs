//! Models and inputs on a device with burn's gradient checkpointing, which eager replicas demand that gather parameters
//! for a pass.

use burn::backend::{DispatchAutodiffContext, DispatchTensor, GradientCheckpointingStrategy};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use burn_parallel::Error;
use burn_parallel::graph::{TensorMapper, TensorTree};
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use super::reference::own;

/// A CPU on which burn computes views again in backward.
pub fn checkpointing() -> Device {
    Device::flex().autodiff().gradient_checkpointing()
}

/// Whether eager replicas with these settings demand such a device.
pub fn is_demanded(data: &DataParallelConfig) -> bool {
    data.sharding == Sharding::Parameters && data.keep == Keep::Pass
}

/// A copy for eager replicas with these settings, on a device on which they go.
pub fn own_for<M: Module>(model: &M, data: &DataParallelConfig) -> M {
    let own = own(model);
    if is_demanded(data) { on_checkpointing(own) } else { own }
}

/// A copy to be parallelized by a strategy, on a device on which that goes.
pub fn own_by<M: Module>(model: &M, strategy: &Strategy) -> M {
    match strategy.engine {
        Engine::Eager => own_for(model, &strategy.data),
        Engine::Auto | Engine::Captured => own(model),
    }
}

/// The model on a device with gradient checkpointing. Makes what is lazy.
pub fn on_checkpointing<M: Module>(model: M) -> M {
    struct Put;
    impl ModuleMapper for Put {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (id, value, mapper) = param.consume();
            let trained = value.is_require_grad();
            let value = value.inner().autodiff();
            let value = value.with_gradient_checkpointing_strategy(GradientCheckpointingStrategy::Balanced);
            Param::from_mapped_value(id, value.set_require_grad(trained), mapper).set_require_grad(trained)
        }
    }
    model.map(&mut Put)
}

/// Inputs on the device of a model: with gradient checkpointing where it has that.
pub fn beside<M: Module, I: TensorTree>(model: &M, inputs: I) -> I {
    struct Find(Option<GradientCheckpointingStrategy>);
    impl ModuleVisitor for Find {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 = self.0.or(param.base().gradient_checkpointing_strategy());
        }
    }
    struct Put(GradientCheckpointingStrategy);
    impl TensorMapper for Put {
        fn map(&mut self, mut tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
            if tensor.autodiff != DispatchAutodiffContext::Disabled {
                tensor.autodiff = DispatchAutodiffContext::Enabled(self.0);
            }
            Ok(tensor)
        }

        fn enter(&mut self, _: usize) {}

        fn exit(&mut self) {}
    }
    let mut find = Find(None);
    model.visit(&mut find);
    match find.0 {
        Some(strategy) => inputs.map_tensors(&mut Put(strategy)).expect("inputs of a model"),
        None => inputs,
    }
}
