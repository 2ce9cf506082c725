//! The result of one run of a pipeline.

use std::collections::BTreeMap;

use crate::pipeline_parallel::LossSum;
use crate::pipeline_parallel::schedule::Unit;
use crate::step::RunReport;
use crate::tensor::PlainTensor;

/// What a run of a pipeline gave.
#[derive(Debug)]
pub struct PipelineRun {
    /// The loss over all micro-batches, the same on every rank.
    pub loss: LossSum,
    /// The weight of the loss of each micro-batch, the same on every rank.
    pub weights: Vec<f64>,
    /// What the gradients that the stages hold are to be multiplied by to be those of the mean loss; 0 if nothing
    /// had any weight.
    pub gradient_factor: f64,
    /// What the stages of this rank had to show beside, by stage and micro-batch.
    pub outputs: BTreeMap<Unit, Vec<PlainTensor>>,
    /// What it cost.
    pub report: RunReport,
}

impl PipelineRun {
    /// The mean loss over everything in the batch; NaN if its weight is 0.
    pub fn mean_loss(&self) -> f64 {
        self.loss.sum / self.loss.weight
    }
}
