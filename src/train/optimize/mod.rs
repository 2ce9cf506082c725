//! One way to step an optimizer: made sure that it suits parameters that are split.

mod moments;
mod parts;

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::grad_clipping::GradientClipping;
use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::optim::ModuleOptimizer;

use super::ParallelModule;
use crate::Error;
use crate::graph::{SplitParam, panic_text};
use crate::step::Step;

/// See [`ParallelModule::optimize`].
pub(super) fn optimize<P: ParallelModule>(
    model: P,
    optim: &mut ModuleOptimizer,
    lr: ModuleLearningRate,
    step: Step,
) -> Result<P, Error> {
    if !model.trains() {
        return Err(Error::Schedule {
            problem: "it has no backward pass, so its steps give a loss and no gradients, and there is nothing to optimize by: \
                      train with another, as `1f1b`"
                .into(),
        });
    }
    if step.skipped {
        return Ok(model);
    }
    let split = model.split_params();
    clips_parts(optim, &split)?;
    // Costlier, and so once for an optimizer: burn gives it no identity but its place.
    if model.checked_optimizers().is_new(std::ptr::from_ref(optim).addr()) {
        moments::check(optim, model.local())?;
        parts::check(optim, model.local(), &split)?;
    }
    let stepped = catch_unwind(AssertUnwindSafe(|| optim.step(lr, model, step.grads)));
    stepped.map_err(|panic| optimizer_error(format!("it panicked: {}", panic_text(panic))))
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

fn optimizer_error(problem: String) -> Error {
    Error::Optimizer { problem }
}
