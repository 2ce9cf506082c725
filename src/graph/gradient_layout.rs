//! How the gradients of a model lie over ranks, for their norm.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use burn::module::ParamId;

use crate::comm::Communicator;

/// How the parameters of a model lie over ranks.
#[derive(Debug, Default)]
pub struct GradientLayout {
    /// The groups over which parts lie, one along each axis.
    pub groups: Vec<Communicator>,
    /// The parameters that this rank holds and another one counts.
    pub elsewhere: HashSet<ParamId>,
    /// This rank in the world.
    pub rank: usize,
    /// The group over which gradients were averaged, and the path of the first parameter of which this rank brought a gradient
    /// that was not finite.
    pub averaged: Option<(Communicator, Option<Arc<str>>)>,
    /// Whether the caller has said how layers that are split by hand lie.
    pub by_hand: bool,
    /// Where skipped steps are counted.
    pub skipped_steps: SkippedSteps,
}

/// How many steps of a model were skipped. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct SkippedSteps(Arc<AtomicU64>);

impl SkippedSteps {
    /// Counts one more.
    pub fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.0.load(Relaxed)
    }
}
