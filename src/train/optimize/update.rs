//! burn's own step of an optimizer.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer};

use super::optimizer_error::optimizer_error;
use crate::Error;
use crate::comm::panic_message;

/// Updates the parameters. A panic of the optimizer becomes an error.
///
/// # Errors
/// [`Error::Optimizer`] with what the panic said.
pub(in crate::train) fn update<P: Module>(
    model: P,
    optim: &mut ModuleOptimizer,
    lr: ModuleLearningRate,
    grads: GradientsParams,
) -> Result<P, Error> {
    let updated = catch_unwind(AssertUnwindSafe(|| optim.step(lr, model, grads)));
    updated.map_err(|panic| optimizer_error(format!("it panicked: {}", panic_message(&*panic))))
}
