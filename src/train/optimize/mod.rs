//! Checks that an optimizer suits parameters that are split, and updates them.

mod clipping;
mod moments;
mod optimizer_error;
mod parts;
mod sharded;
mod update;
mod whole;
mod whole_owners;

use burn::module::Module;
use burn::optim::ModuleOptimizer;

use self::clipping::clips_parts;
pub(super) use self::sharded::ShardedStep;
pub(super) use self::update::update;
pub(crate) use self::whole_owners::whole_owners;
use crate::Error;
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
