//! Checks that an optimizer suits parameters that are split, and updates them.

mod moments;
mod optimizer_error;
mod parts;

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::grad_clipping::GradientClipping;
use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer};

use self::optimizer_error::optimizer_error;
use crate::Error;
use crate::comm::panic_message;
use crate::graph::{CheckedOptimizers, SplitParam};

/// Demands that an optimizer suits the parameters, the first time that it is met: `local` are those of this rank, `split` tells
/// which of them are parts.
///
/// # Errors
/// [`Error::Optimizer`], which names a parameter.
pub(super) fn check<M: Module>(
    optim: &ModuleOptimizer,
    checked: &CheckedOptimizers,
    local: &M,
    split: &[SplitParam],
) -> Result<(), Error> {
    clips_parts(optim, split)?;
    // Costlier, and so once for an optimizer: burn gives it no identity but its place.
    if !checked.is_new(std::ptr::from_ref(optim).addr()) {
        return Ok(());
    }
    moments::check(optim, local)?;
    parts::check(optim, local, split)
}

/// Updates the parameters. A panic of the optimizer becomes an error.
///
/// # Errors
/// [`Error::Optimizer`] with what the panic said.
pub(super) fn update<P: Module>(
    model: P,
    optim: &mut ModuleOptimizer,
    lr: ModuleLearningRate,
    grads: GradientsParams,
) -> Result<P, Error> {
    let updated = catch_unwind(AssertUnwindSafe(|| optim.step(lr, model, grads)));
    updated.map_err(|panic| optimizer_error(format!("it panicked: {}", panic_message(&*panic))))
}

/// Refuses to clip parts by their own norm.
fn clips_parts(optim: &ModuleOptimizer, split: &[SplitParam]) -> Result<(), Error> {
    match (optim.grad_clipping(), split.first()) {
        (Some(GradientClipping::Norm(_)), Some(SplitParam { path, .. })) => Err(optimizer_error(format!(
            "it clips the gradient of each parameter by its norm, but of `{path}` each rank sees a part, whose norm is \
             another: clip by value, or all gradients together by their global norm, which is computed over all ranks"
        ))),
        _ => Ok(()),
    }
}
