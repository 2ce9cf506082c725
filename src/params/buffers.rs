//! Gives a module running statistics of its own, which burn shares among clones.

use std::any::Any;
use std::collections::HashMap;

use burn::backend::GradientCheckpointingStrategy;
use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::Tensor;

use super::leaf::LazyParam;
use super::walk::visit_floats;

/// Gives the module running statistics of its own. burn's are shared by all clones of a module, forks included, and
/// averaged over the threads that use them: replicas on threads would mix theirs, and a mapper that gives them other
/// dims would do so in all clones. Lazy parameters stay lazy.
pub(crate) fn own_buffers<M: Module>(module: M) -> M {
    // burn makes the buffers anew on the way through validation, which also makes lazy parameters: they are kept aside.
    let mut lazy = KeepLazy { kept: HashMap::new() };
    let module = module.map(&mut lazy);
    let mut strategies = HashMap::new();
    visit_floats(&module, &mut |param| {
        strategies.extend(param.checkpointing().map(|strategy| (param.id(), strategy)));
    });
    let valid = module.valid();
    let module = if strategies.is_empty() { valid } else { valid.train() };
    module.map(&mut PutBack { kept: lazy.kept, strategies })
}

struct KeepLazy {
    kept: HashMap<ParamId, Box<dyn Any>>,
}

impl ModuleMapper for KeepLazy {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if param.is_initialized() {
            return param;
        }
        let LazyParam { placeholder, .. } = LazyParam::of(&param);
        self.kept.insert(param.id, Box::new(param));
        placeholder
    }
}

/// Validation forgets how autodiff treats checkpoints.
struct PutBack {
    kept: HashMap<ParamId, Box<dyn Any>>,
    strategies: HashMap<ParamId, GradientCheckpointingStrategy>,
}

impl ModuleMapper for PutBack {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if let Some(lazy) = self.kept.get(&param.id).and_then(|kept| kept.downcast_ref::<Param<Tensor<D>>>()) {
            return lazy.clone();
        }
        match self.strategies.get(&param.id) {
            Some(strategy) => param.map(|value| match value.is_autodiff() {
                true => value.with_gradient_checkpointing_strategy(*strategy),
                false => value,
            }),
            None => param,
        }
    }
}
