//! Puts a move and its conjugate on burn's autodiff graph.
//!
//! A move is a pair of [`MoveOp`]s: one is taken now, the other, its conjugate, when the gradient comes back. burn's
//! `backward()` cannot return an error, so a step that fails there fails the world instead, and hands on zeros: the
//! backward runs to its end without another wait, and the error is found on the communicator.

#[cfg(feature = "cubecl")]
use burn::backend::Cube;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, Dispatch, DispatchKindConversion, DispatchTensor, ExtensionType, Flex,
    TensorMetadata, backend_extension,
};
use burn::tensor::{Gradients as LossGradients, Shape, Tensor};

use super::moves::MoveOp;
use crate::Error;
use crate::comm::{Communicator, TensorOrigin, host_buffer};
use crate::tensor::{PlainTensor, check_device};

/// A step, the step that its gradient takes, and the function that errors name.
#[derive(Debug, Clone, Copy)]
pub(super) struct MovePair {
    pub name: &'static str,
    pub forward: MoveOp,
    pub backward: MoveOp,
}

impl MovePair {
    /// Moves a tensor over the group. Without autodiff, or for a constant, nothing is recorded.
    pub fn apply<const D: usize>(self, tensor: Tensor<D>, comm: &Communicator) -> Result<Tensor<D>, Error> {
        if comm.size() == 1 {
            return Ok(tensor);
        }
        host_buffer::check_dtype(self.name, tensor.dtype())?;
        if !tensor.is_tracked() {
            if self.forward == MoveOp::Keep {
                return Ok(tensor);
            }
            let origin = TensorOrigin::of(&tensor);
            return Ok(origin.restore(self.forward.take(self.name, tensor.into(), comm)?.float()?));
        }
        let device = tensor.device().inner();
        check_device(&device).map_err(|problem| Error::invalid(self.name, problem))?;
        let moved = <Dispatch as MoveBackend>::run_move(tensor.into_dispatch(), self, comm.clone());
        match moved.error {
            None => Ok(Tensor::from_dispatch(moved.tensor)),
            Some(error) => Err(error),
        }
    }

    /// The pair that the gradient sees.
    fn reversed(self) -> Self {
        Self { name: self.name, forward: self.backward, backward: self.forward }
    }

    /// Whether the forward step of this pair gives this rank nothing, by design.
    fn gives_nothing(&self, comm: &Communicator) -> bool {
        matches!(self.forward, MoveOp::GatherTo { root, .. } if root != comm.rank())
    }
}

/// What a step gives: a tensor that means something only if there is no error.
#[derive(ExtensionType)]
pub(super) struct MoveResult<B: Backend> {
    pub tensor: FloatTensor<B>,
    pub error: Option<Error>,
}

/// The backends that moves run on.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl"), Autodiff)]
pub(super) trait MoveBackend: Backend {
    /// Takes the forward step of a pair; the implementation with autodiff records the other.
    fn run_move(tensor: FloatTensor<Self>, pair: MovePair, comm: Communicator) -> MoveResult<Self>;
}

impl MoveBackend for Flex {
    fn run_move(tensor: FloatTensor<Self>, pair: MovePair, comm: Communicator) -> MoveResult<Self> {
        take(tensor, pair, &comm)
    }
}

#[cfg(feature = "cubecl")]
impl MoveBackend for Cube {
    fn run_move(tensor: FloatTensor<Self>, pair: MovePair, comm: Communicator) -> MoveResult<Self> {
        take(tensor, pair, &comm)
    }
}

/// Takes the forward step now, on this thread: a kernel that runs later on a device must not wait for other ranks.
fn take<B: Backend>(tensor: FloatTensor<B>, pair: MovePair, comm: &Communicator) -> MoveResult<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    let (shape, dtype, device) = (tensor.shape(), tensor.dtype(), tensor.device());
    let moved = pair.forward.take(pair.name, PlainTensor::from_float::<B>(tensor), comm);
    let back = |tensor: PlainTensor| match tensor.into_backend::<B>() {
        Ok(BackendTensor::Float(tensor)) => Ok(tensor),
        _ => Err(Error::invalid(pair.name, "the tensor came back as another kind, or on another device")),
    };
    match moved.and_then(back) {
        Ok(tensor) => MoveResult { tensor, error: None },
        Err(error) => MoveResult { tensor: B::float_zeros(shape, &device, dtype.into()), error: Some(error) },
    }
}

impl<B: MoveBackend, C: CheckpointStrategy> MoveBackend for Autodiff<B, C> {
    fn run_move(tensor: FloatTensor<Self>, pair: MovePair, comm: Communicator) -> MoveResult<Self> {
        let shape = tensor.shape();
        let (tensor, guard) = tensor.into_parts();
        // Compute-bound: checkpointing must never repeat a step, which would be a collective that the peers don't take.
        match MoveGradient.prepare::<C>([guard]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let moved = B::run_move(tensor, pair, comm.clone());
                MoveResult { tensor: prep.finish((pair, comm, shape), moved.tensor), error: moved.error }
            }
            OpsKind::UnTracked(prep) => {
                let moved = B::run_move(tensor, pair, comm);
                MoveResult { tensor: prep.finish(moved.tensor), error: moved.error }
            }
        }
    }
}

/// The step of the gradient.
#[derive(Debug)]
struct MoveGradient;

impl<B: MoveBackend> Backward<B, 1> for MoveGradient {
    /// The pair, its group, and the shape that the input had.
    type State = (MovePair, Communicator, Shape);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (pair, comm, shape) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |grad| {
            let (device, dtype) = (grad.device(), grad.dtype());
            let reversed = pair.reversed();
            let MoveResult { tensor, error } = B::run_move(grad, reversed, comm.clone());
            if error.is_none() && tensor.shape() == shape {
                return tensor;
            }
            if error.is_none() && !reversed.gives_nothing(&comm) {
                let (rank, group, came) = (comm.rank(), comm.group(), tensor.shape());
                let problem = format!(
                    "on rank {rank} of group `{group}` the gradient of an input of {:?} came back as {:?}; every rank must \
                     bring tensors of the same logical shape, divided as `comm::part` does",
                    shape.as_slice(),
                    came.as_slice()
                );
                comm.fail(Error::invalid(pair.name, problem));
            }
            B::float_zeros(shape, &device, dtype.into())
        });
    }
}

/// Runs burn's `backward()` and returns the error of the world, should a collective have failed in it.
///
/// `comm` is any communicator of the world: the first failure anywhere fails them all. The moves of a backward that
/// failed hand on zeros, so its gradients are of no use.
///
/// # Errors
/// [`Error::InvalidArgument`] if the loss needs no gradient; the error with which the world has failed.
pub fn backward<const D: usize>(loss: &Tensor<D>, comm: &Communicator) -> Result<LossGradients, Error> {
    if !loss.is_tracked() {
        return Err(Error::invalid("backward", "no parameter or input that the loss depends on requires a gradient"));
    }
    let grads = loss.backward();
    match comm.failure() {
        None => Ok(grads),
        Some(error) => Err(error),
    }
}
