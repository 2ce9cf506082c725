//! What a rank holds of the model, its gradients and the optimizer's state, in bytes.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::Tensor;
use burn_pack::Reader;
use burn_parallel::Error;
use serde::Serialize;

/// What a rank holds between two steps, and what a step gives it.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Memory {
    /// Parameters and buffers.
    pub parameters: usize,
    /// The gradients that the optimizer is given.
    pub gradients: usize,
    /// The tensors of the optimizer's state.
    pub optimizer: usize,
}

impl Memory {
    /// Counts what a model holds, and the gradients of a step.
    pub fn of_step<M: Module>(model: &M, grads: &GradientsParams) -> Self {
        let mut count = Count { grads, memory: Self::default() };
        model.visit(&mut count);
        count.memory
    }

    /// Counts the state of the optimizer.
    pub fn with_optimizer(self, optim: &ModuleOptimizer) -> Result<Self, Error> {
        let state = Reader::from_bytes(optim.into_bytes().map_err(Error::user)?).map_err(Error::user)?;
        let mut optimizer = 0;
        for tensor in state.into_tensors().map_err(Error::user)? {
            let (.., bytes) = tensor.into_parts().map_err(Error::user)?;
            optimizer += bytes.len();
        }
        Ok(Self { optimizer, ..self })
    }
}

struct Count<'a> {
    grads: &'a GradientsParams,
    memory: Memory,
}

impl ModuleVisitor for Count<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let bytes = |tensor: &Tensor<D>| tensor.shape().num_elements() * tensor.dtype().size();
        self.memory.parameters += bytes(&param.base());
        self.memory.gradients += self.grads.get::<D>(param.id).as_ref().map_or(0, bytes);
    }
}
