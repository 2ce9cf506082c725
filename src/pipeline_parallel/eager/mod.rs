//! A pipeline stage of any burn module and a closure, run eagerly.

mod exchange;
mod seed;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;

use burn::backend::{DispatchTensor, GradientCheckpointingStrategy, TensorMetadata};
use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{DType, Device, Gradients, Tensor};

pub use exchange::{Received, Sent};

use self::seed::seed;
use super::schedule::Edge;
use super::{Forwarded, LossSum, MicroBatch, Stage, StageMessage, stage_error};
use crate::Error;
use crate::params::{one_device, scale_gradients, visit_floats, with_autodiff};
use crate::tensor::PlainTensor;

/// A stage that runs a closure with burn's own autodiff. Shapes may differ from one micro-batch to the next, and what
/// the closure does as well.
///
/// The closure gets the module, the input of the micro-batch, and what other stages have sent; it returns what goes to
/// other stages, and on the stage that computes it, the loss. What was received is on the device of the module.
///
/// burn's autodiff runs a backward in one go. When a schedule splits it, the half for the inputs does all the work, and
/// that for the weights only adds up: right, but a zero-bubble schedule gains nothing by it.
pub struct EagerStage<M, F> {
    index: usize,
    edges: Vec<Edge>,
    module: M,
    forward: F,
    saved: HashMap<usize, SavedForward>,
    /// Gradients of micro-batches whose backward is half done.
    halves: HashMap<usize, GradientsParams>,
    gradients: GradientsAccumulator<M>,
}

/// What is kept of a forward for its backward.
struct SavedForward {
    /// Leaves by giving stage; `None` for what has no gradient.
    inputs: Vec<(usize, Vec<Option<Tensor<1>>>)>,
    /// What was given, by taking stage; `None` for what has no gradient.
    outputs: Vec<(usize, Vec<Option<Tensor<1>>>)>,
    loss: Option<Tensor<1>>,
}

impl<M: fmt::Debug, F> fmt::Debug for EagerStage<M, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = &mut f.debug_struct("EagerStage");
        stage
            .field("index", &self.index)
            .field("edges", &self.edges)
            .field("module", &self.module)
            .finish_non_exhaustive()
    }
}

impl<M: Module, F> EagerStage<M, F> {
    /// Stage `index` of `stages`, which receives one tensor from the stage before it and sends one to the next. See
    /// [`with_edges`](Self::with_edges) for others.
    pub fn new<I>(index: usize, stages: usize, module: M, forward: F) -> Self
    where
        F: FnMut(&M, &I, Received) -> Result<Sent, Error>,
    {
        let before = index.checked_sub(1).map(|before| Edge::new(before, index, 1));
        let behind = (index + 1 < stages).then(|| Edge::new(index, index + 1, 1));
        let (saved, halves, gradients) = Default::default();
        Self { index, edges: Vec::new(), module, forward, saved, halves, gradients }
            .with_edges(before.into_iter().chain(behind))
    }

    /// Sets what goes in and out, on the way forward: all edges that end or begin at this stage. Gradients come back
    /// the same ways.
    pub fn with_edges(mut self, edges: impl IntoIterator<Item = Edge>) -> Self {
        self.edges = edges.into_iter().flat_map(|edge| [edge, edge.reversed()]).collect();
        self
    }

    /// The module.
    pub fn module(&self) -> &M {
        &self.module
    }

    /// Gives the module back.
    pub fn into_module(self) -> M {
        self.module
    }

    /// The stage with a changed module, as by an optimizer.
    pub fn update(self, change: impl FnOnce(M) -> M) -> Self {
        Self { module: change(self.module), ..self }
    }

    /// Takes the gradients of all micro-batches since the last time, times `factor`: with
    /// [`PipelineRun::gradient_factor`](super::PipelineRun::gradient_factor) they are those of the mean loss.
    pub fn take_gradients(&mut self, factor: f64) -> GradientsParams {
        let grads = self.gradients.grads();
        scale_gradients(&self.module, grads, factor)
    }
}

impl<I, M, F> Stage<I> for EagerStage<M, F>
where
    M: Module,
    F: FnMut(&M, &I, Received) -> Result<Sent, Error>,
{
    fn index(&self) -> usize {
        self.index
    }

    fn edges(&self) -> Vec<Edge> {
        self.edges.clone()
    }

    fn forward(&mut self, micro_batch: MicroBatch<'_, I>, received: Vec<StageMessage>) -> Result<Forwarded, Error> {
        let strategy = if micro_batch.trains { Some(strategy_of(&self.module)) } else { None };
        let device = one_device(&self.module, "EagerStage")?.unwrap_or_else(Device::flex);
        let mut inputs = Vec::new();
        let mut tensors = BTreeMap::new();
        for message in received {
            let from = message.from;
            let leaves: Vec<DispatchTensor> =
                message.into_tensors()?.into_iter().map(|tensor| leaf(tensor.moved_to(&device), strategy)).collect();
            inputs.push((from, leaves.iter().map(float).collect()));
            tensors.insert(from, VecDeque::from(leaves));
        }
        let sent = (self.forward)(&self.module, micro_batch.input, Received { stage: self.index, tensors })?;
        if let Some(error) = sent.error {
            return Err(error);
        }
        let mut forwarded = Forwarded::default();
        let mut tape = SavedForward { inputs, outputs: Vec::new(), loss: None };
        for (to, tensors) in sent.tensors {
            let plain = tensors.iter().map(|tensor| PlainTensor::of(tensor.clone(), "a tensor for another stage"));
            forwarded.messages.push(StageMessage::new(self.index, to, plain.collect::<Result<Vec<_>, Error>>()?));
            tape.outputs.push((to, tensors.iter().map(float).collect()));
        }
        if let Some(loss) = sent.loss {
            let sum = loss.sum.clone().inner().into_scalar::<f64>();
            forwarded.loss = Some(LossSum { sum, weight: loss.weight });
            tape.loss = Some(loss.sum);
        }
        for output in sent.outputs {
            forwarded.outputs.push(PlainTensor::of(output, "an output")?);
        }
        if micro_batch.trains {
            self.saved.insert(micro_batch.index, tape);
        }
        Ok(forwarded)
    }

    fn backward_input(
        &mut self,
        micro_batch: MicroBatch<'_, I>,
        received: Vec<StageMessage>,
    ) -> Result<Vec<StageMessage>, Error> {
        let (index, number) = (self.index, micro_batch.index);
        let Some(tape) = self.saved.remove(&number) else {
            return Err(stage_error(format!("stage {index} has no forward of micro-batch {number} to go back from")));
        };
        let SavedForward { inputs, outputs, loss } = tape;
        let mut grads = root(outputs, loss, received, micro_batch.scale)?.map(|root| root.backward());
        let given = inputs.into_iter().map(|(from, leaves)| {
            let gradient = |leaf: Option<Tensor<1>>| match (leaf, &mut grads) {
                (Some(leaf), Some(grads)) => {
                    let gradient = leaf.grad_remove(grads);
                    Ok(gradient.map(PlainTensor::from))
                }
                _ => Ok(None),
            };
            let tensors = leaves.into_iter().map(gradient).collect::<Result<_, Error>>()?;
            Ok(StageMessage { from: index, to: from, tensors })
        });
        let given = given.collect::<Result<_, Error>>()?;
        let gradients = grads
            .map_or_else(GradientsParams::new, |grads: Gradients| GradientsParams::from_grads(grads, &self.module));
        self.halves.insert(number, gradients);
        Ok(given)
    }

    fn backward_weight(&mut self, micro_batch: MicroBatch<'_, I>) -> Result<(), Error> {
        let (index, number) = (self.index, micro_batch.index);
        let Some(gradients) = self.halves.remove(&number) else {
            return Err(stage_error(format!("stage {index} has no gradients of micro-batch {number} to add")));
        };
        self.gradients.accumulate(&self.module, gradients);
        Ok(())
    }

    fn live(&self) -> usize {
        self.saved.len() + self.halves.len()
    }

    fn discard(&mut self) {
        (self.saved, self.halves, self.gradients) = Default::default();
    }
}

/// Where a backward begins: one number whose gradient reaches everything that the stage has given.
fn root(
    outputs: Vec<(usize, Vec<Option<Tensor<1>>>)>,
    loss: Option<Tensor<1>>,
    received: Vec<StageMessage>,
    scale: f64,
) -> Result<Option<Tensor<1>>, Error> {
    let loss = loss.filter(Tensor::is_tracked);
    let dtype = loss.as_ref().map_or(DType::F32, Tensor::dtype);
    let mut root = loss.map(|loss| if scale == 1.0 { loss } else { loss.mul_scalar(scale) });
    for message in received {
        let sent = outputs.iter().find(|(to, _)| *to == message.from).map_or(&[][..], |(_, tensors)| tensors);
        for (output, gradient) in sent.iter().zip(message.tensors) {
            let (Some(output), Some(gradient)) = (output, gradient) else { continue };
            let gradient = gradient.moved_to(&output.device().inner());
            let (expected, came) = (output.clone().into_dispatch().shape(), gradient.shape());
            if expected != came || output.dtype() != gradient.dtype() {
                let (from, to) = (output.dtype(), gradient.dtype());
                return Err(stage_error(format!(
                    "the gradient from stage {} is {to:?} {:?}, and what it is of is {from:?} {:?}",
                    message.from,
                    came.as_slice(),
                    expected.as_slice()
                )));
            }
            if let Some(seed) = seed(output.clone(), gradient, dtype) {
                root = Some(match root {
                    Some(root) => root + seed,
                    None => seed,
                });
            }
        }
    }
    Ok(root)
}

/// A received tensor for the closure: in training, a float tensor is a leaf.
fn leaf(tensor: PlainTensor, strategy: Option<GradientCheckpointingStrategy>) -> DispatchTensor {
    match strategy {
        Some(strategy) if tensor.dtype().is_float() => {
            let tensor = Tensor::<1>::from_dispatch(tensor.into_dispatch());
            with_autodiff(tensor, strategy).require_grad().into_dispatch()
        }
        _ => tensor.into_dispatch(),
    }
}

/// The tensor if it is one of floats, on its tape.
fn float(tensor: &DispatchTensor) -> Option<Tensor<1>> {
    tensor.dtype().is_float().then(|| Tensor::from_dispatch(tensor.clone()))
}

/// How the module's parameters take part in gradient checkpointing: all tensors of one operation must have the same
/// strategy.
fn strategy_of<M: Module>(module: &M) -> GradientCheckpointingStrategy {
    let mut strategy = None;
    visit_floats(module, &mut |param| strategy = strategy.or_else(|| param.checkpointing()));
    strategy.unwrap_or(GradientCheckpointingStrategy::Disabled)
}
