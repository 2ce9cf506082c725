//! A stage that runs its part of a captured step.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use burn::module::{Module, ParamId};
use burn::tensor::Device;
use burn_ir::TensorIr;

use super::schedule::{Direction, Edge};
use super::{Forwarded, LossSum, MicroBatch, Stage, StageMessage, stage_error};
use crate::Error;
use crate::distribution::RowShards;
use crate::graph::instruction::Instruction;
use crate::graph::{RandomSource, RandomStart, StepParams, graph_error};
use crate::partition::Exchange;
use crate::pipeline_parallel::cut::{StageRun, Tensors};
use crate::tensor::PlainTensor;

/// A stage of a captured step. Micro-batches of different sizes are captured apart; they share parameters and
/// gradients.
#[derive(Debug)]
pub(super) struct GraphStage {
    index: usize,
    /// The stage for each size of micro-batch.
    runs: Vec<StageRun>,
    /// The size of each micro-batch, as an index of `runs`.
    sizes: Vec<usize>,
    /// With as many tensors as the size that sends most: a batch of one row, for example, spares some operations.
    edges: Vec<Edge>,
    gradients: HashMap<ParamId, PlainTensor>,
    /// What random numbers follow from, where those of this step begin, and the rows of each of its micro-batches.
    random: Option<(RandomSource, RandomStart, Vec<Range<usize>>)>,
    /// How replicas divide its parameters, if they do.
    row_shards: Option<RowShards>,
}

impl GraphStage {
    pub(super) fn new(index: usize, runs: Vec<StageRun>, sizes: Vec<usize>) -> Self {
        let mut most: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        for run in &runs {
            for route in run.graph().receives.iter().chain(&run.graph().sends) {
                let tensors = most.entry((route.from, route.to)).or_default();
                *tensors = route.tensors.len().max(*tensors);
            }
        }
        let edges = most.into_iter().map(|((from, to), tensors)| Edge::new(from, to, tensors)).collect();
        Self { index, runs, sizes, edges, gradients: HashMap::new(), random: None, row_shards: None }
    }

    /// The same of parameters that replicas divide, if they do.
    pub(super) fn divided(self, row_shards: Option<RowShards>) -> Self {
        Self { row_shards, ..self }
    }

    /// One message for each edge in a direction, filled up with nothing.
    fn messages(&self, direction: Direction, mut sends: BTreeMap<usize, Tensors>) -> Vec<StageMessage> {
        let edges = self.edges.iter().filter(|edge| edge.from == self.index && edge.direction() == direction);
        let message = |edge: &Edge| {
            let mut tensors: Vec<_> = sends.remove(&edge.to).unwrap_or_default().into_iter().map(Some).collect();
            tensors.resize(edge.tensors, None);
            StageMessage { from: edge.from, to: edge.to, tensors }
        };
        edges.map(message).collect()
    }

    /// What the replicas of this stage exchange in a pass of a micro-batch: 0 is the forward pass, 1 and 2 are the
    /// halves of the backward pass.
    pub(super) fn exchanges(&self, micro_batch: usize, pass: usize) -> Vec<Exchange> {
        let run = self.sizes.get(micro_batch).and_then(|size| self.runs.get(*size));
        run.map(|run| run.exchanges(pass)).unwrap_or_default()
    }

    /// What a pass of a micro-batch runs on a device.
    pub(super) fn program(&self, micro_batch: usize, pass: usize, device: &Device) -> &[Instruction] {
        let run = self.sizes.get(micro_batch).and_then(|size| self.runs.get(*size));
        run.map_or(&[], |run| run.program(pass, device))
    }

    /// What a micro-batch receives in a direction.
    pub(super) fn received(&self, micro_batch: usize, direction: Direction) -> Vec<TensorIr> {
        let run = self.sizes.get(micro_batch).and_then(|size| self.runs.get(*size));
        let routes = run.into_iter().flat_map(|run| &run.graph().receives);
        let forward = direction == Direction::Forward;
        let of_direction = routes.filter(|route| (route.from < route.to) == forward);
        of_direction.flat_map(|route| route.tensors.iter().cloned()).collect()
    }

    /// The bytes of the sums of its gradients.
    pub(super) fn gradient_bytes(&self) -> usize {
        let bytes = |(_, tensor): &(usize, TensorIr)| tensor.shape.num_elements() * tensor.dtype.size();
        self.runs.first().map_or(0, |run| run.graph().gradients.iter().map(bytes).sum())
    }

    /// Has each micro-batch draw numbers of its own.
    pub(super) fn draw_from(&mut self, source: &RandomSource, start: RandomStart, rows: Vec<Range<usize>>) {
        self.random = Some((source.clone(), start, rows));
    }

    /// Has stages take the parameters of a step, with what is known of them.
    ///
    /// # Errors
    /// Those of [`StageRun::bind`].
    pub(super) fn bind<M: Module>(stages: &mut [Self], model: &M, params: StepParams<'_>) -> Result<(), Error> {
        let mut runs: Vec<&mut StageRun> = stages.iter_mut().flat_map(|stage| &mut stage.runs).collect();
        StageRun::bind_all(&mut runs, model, params)
    }

    /// Whether it gives running statistics new values.
    pub(super) fn moves_statistics(&self) -> bool {
        self.runs.iter().any(StageRun::moves_statistics)
    }

    /// Lets go of the parameters, and takes the gradients that have come together.
    pub(super) fn unbind<M: Module>(&mut self, model: &M) -> HashMap<ParamId, PlainTensor> {
        self.runs.iter_mut().for_each(|run| run.unbind(model));
        std::mem::take(&mut self.gradients)
    }

    fn run(&mut self, micro_batch: usize) -> Result<(&mut StageRun, &mut HashMap<ParamId, PlainTensor>), Error> {
        let run = self.sizes.get(micro_batch).and_then(|size| self.runs.get_mut(*size));
        self.row_shards.iter().for_each(|shards| shards.run_micro_batch(micro_batch));
        let (index, known) = (self.index, self.sizes.len());
        let unknown = || stage_error(format!("stage {index} knows {known} micro-batches, not number {micro_batch}"));
        Ok((run.ok_or_else(unknown)?, &mut self.gradients))
    }
}

/// Adds a gradient to the sum of those before.
pub(super) fn accumulate(sums: &mut HashMap<ParamId, PlainTensor>, id: ParamId, gradient: PlainTensor) {
    let sum = match sums.remove(&id) {
        Some(sum) => sum.add(gradient),
        None => gradient,
    };
    sums.insert(id, sum);
}

fn received(messages: Vec<StageMessage>) -> BTreeMap<usize, Tensors> {
    messages.into_iter().map(|message| (message.from, message.tensors.into_iter().flatten().collect())).collect()
}

fn number(tensor: PlainTensor) -> Result<f64, Error> {
    Ok(tensor.float::<1>()?.into_scalar::<f64>())
}

impl Stage<Vec<PlainTensor>> for GraphStage {
    fn index(&self) -> usize {
        self.index
    }

    fn edges(&self) -> Vec<Edge> {
        self.edges.clone()
    }

    fn forward(
        &mut self,
        micro_batch: MicroBatch<'_, Vec<PlainTensor>>,
        messages: Vec<StageMessage>,
    ) -> Result<Forwarded, Error> {
        if let Some((source, start, rows)) = &self.random {
            let rows = rows.get(micro_batch.index).cloned().unwrap_or_default();
            source.go_to(*start, micro_batch.index, rows.start);
            source.set_rows(rows.len());
        }
        let (run, _) = self.run(micro_batch.index)?;
        let given = run.forward(micro_batch.index, micro_batch.input, received(messages))?;
        if !micro_batch.trains {
            run.finish(micro_batch.index);
        }
        if !given.updates.is_empty() {
            self.runs.iter_mut().for_each(|run| run.carry(&given.updates));
        }
        let weight = given.weight.map(number).transpose()?.unwrap_or(1.0);
        if !(weight.is_finite() && weight >= 0.0) {
            let must = "it must be finite and not negative";
            return Err(graph_error(format!("the number of items of the loss is {weight}, {must}")));
        }
        let loss = given.loss.map(number).transpose()?.map(|sum| LossSum { sum, weight });
        let messages = self.messages(Direction::Forward, given.sends);
        Ok(Forwarded { messages, loss, outputs: given.outputs.into_values().collect() })
    }

    fn backward_input(
        &mut self,
        micro_batch: MicroBatch<'_, Vec<PlainTensor>>,
        messages: Vec<StageMessage>,
    ) -> Result<Vec<StageMessage>, Error> {
        let (run, gradients) = self.run(micro_batch.index)?;
        let sends = run.backward_input(micro_batch.index, received(messages), &mut |id, gradient| {
            accumulate(gradients, id, gradient.scale(micro_batch.scale));
            Ok(())
        })?;
        Ok(self.messages(Direction::Backward, sends))
    }

    fn backward_weight(&mut self, micro_batch: MicroBatch<'_, Vec<PlainTensor>>) -> Result<(), Error> {
        let (run, gradients) = self.run(micro_batch.index)?;
        run.backward_weight(micro_batch.index, &mut |id, gradient| {
            accumulate(gradients, id, gradient.scale(micro_batch.scale));
            Ok(())
        })
    }

    fn live(&self) -> usize {
        self.runs.iter().map(StageRun::under_way).sum()
    }

    fn discard(&mut self) {
        self.runs.iter_mut().for_each(StageRun::discard);
        self.gradients.clear();
    }
}

#[cfg(test)]
mod tests;
