//! Forward passes through a pipeline, for evaluation.

use burn::module::Module;
use burn::tensor::Device;

use super::by_rows::exchanges;
use super::schedule::Unit;
use super::step::bound;
use super::{Pipelined, stage_error};
use crate::Error;
use crate::graph::{StepParams, TensorTree};
use crate::lock::lock;
use crate::params::one_device;
use crate::tensor::PlainTensor;

impl<M: Module> Pipelined<M> {
    /// Captures and cuts a forward pass for inputs of these shapes, without running it: as [`prepare`](Self::prepare),
    /// for a model that is evaluated and not trained. Collective: every rank passes inputs of the same shapes.
    ///
    /// A step that is trained later keeps to this cut.
    ///
    /// Outputs with a row for each row of the batch, or as many for each, are put together along their first dim. One
    /// without rows, as a loss, must be a mean or a sum over what has rows, with nothing but a constant factor behind;
    /// or depend on no input. It is then the mean or the sum over the whole batch, however many micro-batches there
    /// are. For this the forward pass is captured of the whole batch too.
    ///
    /// # Errors
    /// As [`forward_with`](crate::train::ParallelModule::forward_with).
    pub fn prepare_forward<I, F, O>(&mut self, inputs: I, forward: F) -> Result<(), Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        let state = self.state.clone();
        let mut local = Some(self.local.clone());
        lock(&state).prepare_forward(&mut local, inputs, forward)?;
        self.take(local)
    }

    /// Runs a forward pass for evaluation on a batch, divided into micro-batches like that of a step: what `forward`
    /// gives, on every rank, without autodiff: as of the whole batch, without a pipeline.
    ///
    /// # Errors
    /// Those of [`forward_with`](crate::train::ParallelModule::forward_with); [`Error::Pipeline`] if the model is not
    /// cut yet, or an output without rows is something else than a mean or a sum.
    pub(super) fn run_forward<I, F, O>(&self, inputs: I, forward: F) -> Result<O, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        let mut state = lock(&self.state);
        let group = state.group.clone();
        if state.cut.is_none() {
            let advice = "`prepare` or `prepare_forward` it, or run a step, before a forward alone";
            return Err(stage_error(format!("the model is not cut yet: {advice}")));
        }
        let device = one_device(&self.local, "forward_with")?.unwrap_or_else(Device::flex);
        // Only a step can keep what is shared here.
        let settled = state.tied_params.settled(&self.local)?;
        let local = settled.as_ref().unwrap_or(&self.local);
        let shards = state.row_shards.clone();
        let whole = shards.as_ref().map_or(Ok(None), |shards| shards.whole(local, None))?;
        let given = StepParams { whole: whole.as_ref(), ..StepParams::default() };
        let (captured, batch) = state.prepare_forward(&mut Some(self.local.clone()), inputs, forward)?;
        let count = captured.sizes.len();
        let inputs: Vec<Vec<PlainTensor>> = (0..count).map(|micro_batch| batch.micro_batch(micro_batch)).collect();
        let pipeline = &mut captured.pipeline;
        let own = match &shards {
            Some(_) => exchanges(&captured.stages, &pipeline.forwards(count)?.rows()[group.rank()]),
            None => Vec::new(),
        };
        let mut run = || bound(&mut captured.stages, local, given, |stages| pipeline.evaluate(stages, &inputs));
        let mut executed = match &shards {
            Some(shards) => shards.forward(local, &own, run)?,
            None => run()?,
        };
        captured.stages.iter_mut().for_each(|stage| drop(stage.unbind(local)));
        let mut whole = Vec::with_capacity(captured.givers.len());
        for (place, giver) in captured.givers.iter().enumerate() {
            let root = captured.pipeline.timetable().rank_of(*giver).unwrap_or(0);
            // Its place among the outputs of its stage.
            let before = captured.givers[..place].iter().filter(|other| *other == giver).count();
            let mut parts = Vec::with_capacity(count);
            for (micro_batch, size) in captured.sizes.iter().enumerate() {
                let like = &captured.graphs[*size].graph.outputs[place];
                let own = executed
                    .outputs
                    .get_mut(&Unit::new(*giver, micro_batch))
                    .and_then(|given| given.get(before).cloned());
                let nothing = || PlainTensor::zeros(like.shape.clone(), like.dtype, &device);
                parts.push(group.broadcast(own.unwrap_or_else(nothing), root)?);
            }
            whole.push(captured.joined[place].join(parts, &captured.sizes)?);
        }
        captured.graphs[0].outputs(whole)
    }
}
