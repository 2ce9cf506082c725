//! What the ranks compare of a call of `optimize`.

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;

use super::moments::MomentDigests;
use crate::error::catch_quietly;
use crate::graph::Update;
use crate::step::AskedNorm;

/// Of a call with this learning rate, and a step whose norm was asked for like this. `new` are the moments of a new
/// optimizer that other ranks have too.
pub(super) fn update_of(lr: &ModuleLearningRate, asked: Option<AskedNorm>, new: Option<&MomentDigests>) -> Update {
    // It panics if there is none.
    let rate = catch_quietly(|_| true, || lr.base()).unwrap_or(f64::NAN);
    Update { rate, asked, new_moments: new.map(MomentDigests::all) }
}
