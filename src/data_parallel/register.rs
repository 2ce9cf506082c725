//! Hands averaged gradients to burn's optimizers.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::reducer::{Reduced, Reducer};
use crate::Error;

/// Hands the reduced gradients to burn, on the devices of their parameters.
///
/// # Errors
/// [`Error::Graph`] if a gradient has another rank than its parameter.
pub(crate) fn register<M: Module>(
    reducer: &Reducer,
    reduced: &mut Reduced,
    module: &M,
) -> Result<GradientsParams, Error> {
    let mut register = Register { reducer, reduced, grads: GradientsParams::new(), error: None };
    module.visit(&mut register);
    register.error.map_or(Ok(register.grads), Err)
}

struct Register<'a> {
    reducer: &'a Reducer,
    reduced: &'a mut Reduced,
    grads: GradientsParams,
    error: Option<Error>,
}

impl ModuleVisitor for Register<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let number = self.reducer.index_of(param.id);
        let Some(gradient) = number.and_then(|number| self.reduced.gradients.remove(&number)) else { return };
        match gradient.moved_to(&param.base().device().inner()).float::<D>() {
            Ok(gradient) => self.grads.register(param.id, gradient),
            Err(error) => self.error = Some(error),
        }
    }
}
