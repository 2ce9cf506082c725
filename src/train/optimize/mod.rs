//! Checks that an optimizer suits parameters that are split, and updates them.

mod clipping;
mod moments;
mod optimizer_error;
mod parts;
mod recognise;
mod sharded;
mod update;
mod whole;

use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer};

use self::clipping::clips_parts;
use self::recognise::Met;
pub(super) use self::sharded::ShardedStep;
pub(super) use self::update::update;
use crate::Error;
use crate::graph::{CheckedOptimizers, SplitParam};

/// Demands that an optimizer suits the parameters, the first time that it is met: `local` are those of this rank,
/// `split` tells which of them are parts. It is to be [remembered](Met::remember) after its step.
///
/// # Errors
/// [`Error::Optimizer`], which names a parameter.
pub(super) fn check<M: Module>(
    optim: &ModuleOptimizer,
    checked: &CheckedOptimizers,
    local: &M,
    split: &[SplitParam],
    grads: &GradientsParams,
) -> Result<Met, Error> {
    clips_parts(optim, split)?;
    // Costlier, and so not in every step.
    let met = Met::new(optim, checked);
    if !met.known {
        moments::check(optim, local)?;
        parts::check(optim, local, split)?;
    }
    Ok(met.with_witness(local, grads))
}
