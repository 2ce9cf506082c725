//! What the ranks compare of a call of `optimize`.

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;

use super::moments::MomentDigests;
use crate::error::catch_quietly;
use crate::graph::Update;

/// Of a call with this learning rate. `new` are the moments of a new optimizer that other ranks have too.
pub(super) fn update_of(lr: &ModuleLearningRate, new: Option<&MomentDigests>) -> Update {
    // It panics if there is none.
    let rate = catch_quietly(|_| true, || lr.base()).unwrap_or(f64::NAN);
    Update { rate, new_moments: new.map(MomentDigests::all) }
}
