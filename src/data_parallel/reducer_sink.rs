//! Hands the gradients of a micro-batch to the reducer.

use burn::module::ParamId;

use super::hook::GradientListener;
use super::loss_weight::LossWeight;
use super::reducer::Reducer;
use crate::Error;
use crate::graph::GradientSink;
use crate::tensor::PlainTensor;

/// Hands what a micro-batch gives to the reducer.
pub(super) struct ReducerSink<'a> {
    pub reducer: &'a Reducer,
    pub loss_weight: &'a mut LossWeight,
    /// Whether the reduction begins with this micro-batch.
    pub last: bool,
}

impl ReducerSink<'_> {
    /// The unit of the gradients so far.
    pub fn unit(&self) -> Option<f64> {
        (self.loss_weight.unit > 0.0).then_some(self.loss_weight.unit)
    }
}

impl GradientSink for ReducerSink<'_> {
    fn expect(&mut self, gradients: &[ParamId]) -> Result<(), Error> {
        self.reducer.forget_uses();
        for param in gradients.iter().filter_map(|id| self.reducer.index_of(*id)) {
            self.reducer.used(param);
        }
        Ok(())
    }

    fn weight(&mut self, weight: f64, unit: f64) -> Result<(), Error> {
        if weight > 0.0 {
            self.loss_weight.add(weight, unit);
        }
        self.reducer.weigh(weight, unit);
        if self.last {
            self.reducer.begin(*self.loss_weight);
        }
        Ok(())
    }

    fn gradient(&mut self, id: ParamId, gradient: PlainTensor) -> Result<(), Error> {
        match self.reducer.index_of(id) {
            Some(param) => self.reducer.arrived(param, gradient),
            None => self.reducer.add_unindexed(id, gradient),
        }
        Ok(())
    }
}
