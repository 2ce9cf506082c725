//! burn's own step of an optimizer.

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer};

use super::panicked::Updated;
use crate::Error;
use crate::comm::panic_message;
use crate::error::catch_quietly;

/// Updates the parameters. A panic of the optimizer becomes an error. `updated` are those parameters, if it is not
/// known yet whether it suits them.
///
/// # Errors
/// [`Error::Optimizer`] with what the panic said, and the parameter if that is known.
pub(in crate::train) fn update<P: Module>(
    model: P,
    optim: &mut ModuleOptimizer,
    lr: ModuleLearningRate,
    grads: GradientsParams,
    updated: Option<Updated>,
) -> Result<P, Error> {
    let stepped = catch_quietly(|_| true, || optim.step(lr, model, grads));
    stepped.map_err(|panic| updated.unwrap_or_default().error(optim, &panic_message(&*panic)))
}
