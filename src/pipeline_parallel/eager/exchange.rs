//! What the forward of a hand-written stage receives and sends.

use std::collections::{BTreeMap, VecDeque};

use burn::backend::{DispatchTensor, TensorMetadata};
use burn::tensor::{Bool, Int, Tensor};

use super::super::stage_error;
use crate::Error;
use crate::graph::{TensorMapper, TensorTree};

/// The tensors that a stage has received from others for a micro-batch. Float tensors are leaves of a tape of their
/// own.
#[derive(Debug)]
pub struct Received {
    pub(super) stage: usize,
    /// By giving stage. Of no static rank: `1` is not looked at.
    pub(super) tensors: BTreeMap<usize, VecDeque<DispatchTensor>>,
}

impl Received {
    /// The stage that has received them.
    pub fn stage(&self) -> usize {
        self.stage
    }

    /// The next tensor from a stage, in the order in which that one sent them: a float tensor of rank `D`.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if there is none, or it is of another kind or rank.
    pub fn float<const D: usize>(&mut self, from: usize) -> Result<Tensor<D>, Error> {
        let is_float = |tensor: &DispatchTensor| tensor.dtype().is_float();
        Ok(Tensor::from_dispatch(self.next(from, "float", D, is_float)?))
    }

    /// [`float`](Self::float) for an int tensor.
    ///
    /// # Errors
    /// The same.
    pub fn int<const D: usize>(&mut self, from: usize) -> Result<Tensor<D, Int>, Error> {
        let is_int = |tensor: &DispatchTensor| tensor.dtype().is_int() || tensor.dtype().is_uint();
        Ok(Tensor::from_dispatch(self.next(from, "int", D, is_int)?))
    }

    /// [`float`](Self::float) for a bool tensor.
    ///
    /// # Errors
    /// The same.
    pub fn bool<const D: usize>(&mut self, from: usize) -> Result<Tensor<D, Bool>, Error> {
        let is_bool = |tensor: &DispatchTensor| tensor.dtype().is_bool();
        Ok(Tensor::from_dispatch(self.next(from, "bool", D, is_bool)?))
    }

    fn next(
        &mut self,
        from: usize,
        kind: &str,
        rank: usize,
        fits: impl Fn(&DispatchTensor) -> bool,
    ) -> Result<DispatchTensor, Error> {
        let stage = self.stage;
        let next = self.tensors.get_mut(&from).and_then(VecDeque::pop_front);
        let wanted = format!("stage {stage} asked for a {kind} tensor of rank {rank} from stage {from}");
        match next {
            None => Err(stage_error(format!("{wanted}, and no tensor of it is left"))),
            Some(tensor) if fits(&tensor) && tensor.shape().num_dims() == rank => Ok(tensor),
            Some(tensor) => {
                let (dtype, shape) = (tensor.dtype(), tensor.shape());
                Err(stage_error(format!("{wanted}, and the next one is {dtype:?} {:?}", shape.as_slice())))
            }
        }
    }
}

/// What the forward of a stage gives: tensors for other stages, a loss, outputs.
#[derive(Debug, Default)]
pub struct Sent {
    pub(super) tensors: BTreeMap<usize, Vec<DispatchTensor>>,
    pub(super) loss: Option<SentLoss>,
    pub(super) outputs: Vec<DispatchTensor>,
    /// What went wrong while it was put together.
    pub(super) error: Option<Error>,
}

/// A loss on the tape.
#[derive(Debug)]
pub(super) struct SentLoss {
    pub sum: Tensor<1>,
    pub weight: f64,
}

impl Sent {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds tensors for a later stage, of any kind, in the order in which it will take them.
    pub fn to(mut self, stage: usize, tensors: impl TensorTree) -> Self {
        let collected = collect(tensors, &mut self.error);
        self.tensors.entry(stage).or_default().extend(collected);
        self
    }

    /// Sets the loss of the micro-batch: its sum over items that weigh `weight` together.
    pub fn loss_sum(mut self, sum: Tensor<1>, weight: f64) -> Self {
        self.loss = Some(SentLoss { sum, weight });
        self
    }

    /// Sets the loss of the micro-batch: its mean over items that weigh `weight` together.
    pub fn loss_mean(self, mean: Tensor<1>, weight: f64) -> Self {
        self.loss_sum(mean.mul_scalar(weight), weight)
    }

    /// Adds tensors that the run returns on the rank of this stage.
    pub fn output(mut self, tensors: impl TensorTree) -> Self {
        let collected = collect(tensors, &mut self.error);
        self.outputs.extend(collected);
        self
    }
}

fn collect(tensors: impl TensorTree, error: &mut Option<Error>) -> Vec<DispatchTensor> {
    let mut collect = CollectTensors(Vec::new());
    if let Err(problem) = tensors.map_tensors(&mut collect) {
        error.get_or_insert(problem);
    }
    collect.0
}

/// Notes every tensor, and leaves it as it is.
struct CollectTensors(Vec<DispatchTensor>);

impl TensorMapper for CollectTensors {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        self.0.push(tensor.clone());
        Ok(tensor)
    }

    fn enter(&mut self, _: usize) {}

    fn exit(&mut self) {}
}
