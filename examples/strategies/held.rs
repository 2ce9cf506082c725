//! The bytes that a rank holds.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::Tensor;
use burn_pack::Reader;
use burn_parallel::Error;

/// Bytes of parameters, and of the gradients that the optimizer is given.
pub fn of_step<M: Module>(model: &M, grads: &GradientsParams) -> [usize; 2] {
    struct Count<'a>(&'a GradientsParams, [usize; 2]);
    impl ModuleVisitor for Count<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let bytes = |tensor: &Tensor<D>| tensor.shape().num_elements() * tensor.dtype().size();
            self.1[0] += bytes(&param.base());
            self.1[1] += self.0.get::<D>(param.id).as_ref().map_or(0, bytes);
        }
    }
    let mut count = Count(grads, [0; 2]);
    model.visit(&mut count);
    count.1
}

/// Bytes of the state of an optimizer.
pub fn of_optimizer(optim: &ModuleOptimizer) -> Result<usize, Error> {
    let state = Reader::from_bytes(optim.into_bytes().map_err(Error::user)?).map_err(Error::user)?;
    let mut bytes = 0;
    for tensor in state.into_tensors().map_err(Error::user)? {
        let (.., data) = tensor.into_parts().map_err(Error::user)?;
        bytes += data.len();
    }
    Ok(bytes)
}
