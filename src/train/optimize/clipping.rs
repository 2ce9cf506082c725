//! burn's clipping of each gradient by itself.

use burn::grad_clipping::GradientClipping;
use burn::optim::ModuleOptimizer;

use super::optimizer_error::optimizer_error;
use crate::Error;
use crate::graph::SplitParam;

/// Refuses to clip parts by their own norm.
///
/// # Errors
/// [`Error::Optimizer`] with the first parameter of which a part would be clipped.
pub(super) fn clips_parts(optim: &ModuleOptimizer, split: &[SplitParam]) -> Result<(), Error> {
    match (optim.grad_clipping(), split.first()) {
        (Some(GradientClipping::Norm(_)), Some(SplitParam { path, .. })) => Err(optimizer_error(format!(
            "it clips the gradient of each parameter by its norm, but of `{path}` each rank sees a part, whose norm is \
             another: clip by value, or all gradients together by their global norm, which is computed over all ranks"
        ))),
        _ => Ok(()),
    }
}
