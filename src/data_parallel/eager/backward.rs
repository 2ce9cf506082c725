//! Backward of a micro-batch: what its loss must be, by what it is scaled, and who is told of its gradients.

use burn::module::Module;

use super::Eager;
use crate::Error;
use crate::data_parallel::hook::listening;
use crate::graph::{GradientSink, MicroBatchResult};
use crate::params::FoundParams;
use crate::step::{Loss, LossParts, Weight};
use crate::tensor::PlainTensor;

impl<M: Module> Eager<M> {
    /// Backward of a micro-batch whose inputs have this many rows.
    pub(in crate::data_parallel) fn backward(
        &self,
        params: &FoundParams,
        loss: Loss,
        rows: Option<usize>,
        unit: Option<f64>,
        sink: &mut dyn GradientSink,
    ) -> Result<MicroBatchResult, Error> {
        let LossParts { value, weight, outputs } = loss.into_parts()?;
        let elements = value.dims()[0];
        if elements != 1 {
            let problem =
                format!("it must have one element, but it has {elements}: reduce it with `.mean()` or `.sum()`");
            return Err(self.refuse(problem));
        }
        let (weight, summed) = match weight {
            Weight::Plain => (rows.unwrap_or(1) as f64, false),
            Weight::Mean(items) => (items, false),
            Weight::Sum(items) => (items, true),
            Weight::Counted(items) if items.dims() != [1] => {
                let elements = items.dims()[0];
                let problem = format!("its number of items must have one element, but it has {elements}: reduce it");
                return Err(self.refuse(problem));
            }
            Weight::Counted(items) => (items.into_scalar::<f64>(), true),
        };
        if !weight.is_finite() || weight < 0.0 {
            let problem = format!("its weight is {weight}, it must be finite and not negative");
            return Err(self.refuse(problem));
        }
        if weight > 0.0 && !value.is_tracked() {
            let problem = "it depends on no parameter that is trained: was its model made on a device without autodiff (`fork` keeps what it was \
                           made with: make it on `device.autodiff()`), or is every parameter frozen?";
            return Err(self.refuse(problem.into()));
        }
        let outputs = outputs.into_iter().map(|(path, output)| PlainTensor::of(output, &format!("output `{path}`")));
        let outputs = vec![outputs.collect::<Result<Vec<_>, _>>()?];
        let unit = unit.unwrap_or(weight);
        sink.weight(weight, unit)?;
        if weight == 0.0 {
            if let Some(gatherer) = &self.gatherer {
                // For the gathers of the others; nobody listens to its gradients. One that depends on no parameter has
                // none: then the end of the micro-batch gathers what its forward has used.
                gatherer.begin_backward();
                if value.is_tracked() {
                    drop(value.backward());
                }
                self.end_micro_batch()?;
            }
            return Ok(MicroBatchResult { loss: None, outputs, run: None });
        }
        let loss = Some((value.clone().inner(), if summed { 1.0 } else { weight }));
        let factor = if summed { 1.0 / unit } else { weight / unit };
        let scaled = if factor == 1.0 { value } else { value.mul_scalar(factor) };
        self.gatherer.iter().for_each(|gatherer| gatherer.begin_backward());
        let mut grads = listening(self.hooks, || scaled.backward());
        self.end_micro_batch()?;
        // Some stayed with burn: of parameters without a hook, or on a device that is not known here.
        for param in params.floats() {
            if let Some(gradient) = param.take_gradient(&mut grads) {
                sink.gradient(param.id(), gradient)?;
            }
        }
        Ok(MicroBatchResult { loss, outputs, run: None })
    }

    /// Ends the backward of a micro-batch, and drops the parameters that were gathered for it.
    ///
    /// # Errors
    /// What went wrong in the middle of it, from where no error can be returned; those of gathers that others need.
    fn end_micro_batch(&self) -> Result<(), Error> {
        let Some(gatherer) = &self.gatherer else { return Ok(()) };
        let ended = gatherer.end_backward();
        gatherer.end_micro_batch();
        ended
    }

    /// Fails the world because of a loss that this rank was given.
    fn refuse(&self, problem: String) -> Error {
        self.fail(Error::invalid("Loss", problem))
    }
}
