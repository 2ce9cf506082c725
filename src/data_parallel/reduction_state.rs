//! The state of the reduction of one step: which gradients have arrived, and which buckets are in flight.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use burn::module::ParamId;
use burn::tensor::Device;

use super::loss_weight::LossWeight;
use super::noise_meter::NoiseMeter;
use crate::comm::Pending;
use crate::tensor::PlainTensor;

#[derive(Default)]
pub(super) struct ReductionState {
    pub params: Vec<ParamProgress>,
    /// Gradients of parameters that have come after wrapping, and have no number yet.
    pub unindexed: HashMap<ParamId, PlainTensor>,
    /// Parameters of each bucket, in the order in which buckets are started.
    pub buckets: Vec<Vec<usize>>,
    /// Whether the buckets follow the order in which backward completes gradients, or still the guess at it.
    pub observed: bool,
    /// Order in which gradients were completed.
    pub completed: Vec<usize>,
    /// Uses since the last backward.
    pub uses: usize,
    /// What the only rank of a group of one brought.
    pub alone: LossWeight,
    /// The reduction in flight, during the backward of the last micro-batch.
    pub pending: Option<PendingReduction>,
    /// Where the last gradient was.
    pub device: Option<Device>,
    /// The first parameter of which this rank has brought a gradient that is not finite.
    pub non_finite: Option<usize>,
    /// The path of the one of the step before.
    pub last_non_finite: Option<Arc<str>>,
    /// The number on which calls of this step agree.
    pub agreed: u64,
    /// Measures the gradients of micro-batches, if that was asked for.
    pub noise: Option<NoiseMeter>,
}

#[derive(Default)]
pub(super) struct ParamProgress {
    /// Uses in the graph, and those whose gradient has arrived.
    pub uses: usize,
    pub arrived: usize,
    pub gradient: Option<PlainTensor>,
    pub used: bool,
    pub started: bool,
    pub late: Option<PlainTensor>,
}

pub(super) struct PendingReduction {
    pub head: Pending<f64>,
    pub factor: Arc<OnceLock<f64>>,
    pub buckets: Vec<Pending<Vec<PlainTensor>>>,
}

/// What the mark of a parameter, added up over the ranks, is at least if any gradient came late: more than there are
/// ranks.
pub(super) const LATE: f64 = (1u64 << 32) as f64;

impl ParamProgress {
    /// 1 if the parameter was used, and [`LATE`] more if it has a late gradient.
    pub fn mark(&self) -> f64 {
        f64::from(u8::from(self.used)) + if self.late.is_some() { LATE } else { 0.0 }
    }
}

impl ReductionState {
    pub fn forget_uses(&mut self) {
        self.uses = 0;
        self.completed.clear();
        for param in &mut self.params {
            (param.uses, param.arrived) = (0, 0);
        }
    }

    pub fn reset(&mut self) {
        self.forget_uses();
        self.pending = None;
        self.unindexed.clear();
        self.non_finite = None;
        self.noise = None;
        self.params.iter_mut().for_each(|param| *param = ParamProgress::default());
    }
}

/// The sum of the gradients of several uses.
pub(super) fn accumulate(sum: Option<PlainTensor>, gradient: PlainTensor) -> PlainTensor {
    match sum {
        Some(sum) => sum.add(gradient),
        None => gradient,
    }
}
