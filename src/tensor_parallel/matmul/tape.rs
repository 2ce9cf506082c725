//! The one operation that puts a sharded product on burn's tape.
//!
//! The collective of a form belongs to one direction, its conjugate to the other. burn's `backward()` cannot return an error,
//! so one there fails the world and hands on zeros, as in [`layout`](crate::layout).

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, ExtensionType, Flex, TensorMetadata, backend_extension};
use burn::tensor::Tensor;

use super::schedule::{Overlap, Schedule, Size};
use crate::Error;
use crate::comm::Communicator;

/// Which factors are split, and so which collective goes with the product and which with the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Columns of the weight; the gradient of the input is summed.
    Column,
    /// As `Column`, of an input whose positions are gathered; the gradient of the input is summed and scattered.
    GatherColumn,
    /// Rows of the weight; the product is summed.
    Row,
    /// As `Row`, with the sum scattered by positions; its gradient is gathered.
    RowScatter,
}

/// A product to be made.
#[derive(Debug, Clone)]
pub(super) struct Job {
    /// The function that errors speak of.
    pub name: &'static str,
    pub form: Form,
    /// Rows of the left factor for each position of the sequence.
    pub unit: usize,
    pub overlap: Overlap,
    pub comm: Communicator,
}

impl Job {
    pub fn schedule(&self, size: Size) -> Schedule {
        self.overlap.plan(size, &self.comm)
    }

    /// Puts the product on the tape.
    pub fn run(self, x: Tensor<2>, weight: Tensor<2>) -> Result<Tensor<2>, Error> {
        let made = <Dispatch as ProductBackend>::sharded_product(x.into_dispatch(), weight.into_dispatch(), self);
        match made.error {
            None => Ok(Tensor::from_dispatch(made.tensor)),
            Some(error) => Err(error),
        }
    }
}

/// Sharded products on the tensors of a backend, without a tape. Factors are matrices of dims that fit.
pub(super) trait Products: Backend {
    /// The product, and what [`gradients`](Self::gradients) needs of the left factor.
    fn product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        job: &Job,
    ) -> Result<(FloatTensor<Self>, FloatTensor<Self>), Error>;

    /// The gradients of the left factor and of the weight, if wanted.
    fn gradients(
        gradient: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        wanted: [bool; 2],
        job: &Job,
    ) -> Result<[Option<FloatTensor<Self>>; 2], Error>;
}

/// A product: a tensor that means something only if there is no error.
#[derive(ExtensionType)]
pub(super) struct Made<B: Backend> {
    pub tensor: FloatTensor<B>,
    pub error: Option<Error>,
}

/// The backends that sharded products run on.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl"), Autodiff)]
pub(super) trait ProductBackend: Backend {
    fn sharded_product(x: FloatTensor<Self>, weight: FloatTensor<Self>, job: Job) -> Made<Self>;
}

fn make<B: Products>(x: FloatTensor<B>, weight: FloatTensor<B>, job: &Job) -> (Made<B>, Option<FloatTensor<B>>) {
    // Given back in place of what could not be made.
    let stand_in = x.clone();
    match B::product(x, weight, job) {
        Ok((tensor, kept)) => (Made { tensor, error: None }, Some(kept)),
        Err(error) => (Made { tensor: stand_in, error: Some(error) }, None),
    }
}

impl ProductBackend for Flex {
    fn sharded_product(x: FloatTensor<Self>, weight: FloatTensor<Self>, job: Job) -> Made<Self> {
        make::<Self>(x, weight, &job).0
    }
}

#[cfg(feature = "cubecl")]
impl ProductBackend for burn_cubecl::Cube {
    fn sharded_product(x: FloatTensor<Self>, weight: FloatTensor<Self>, job: Job) -> Made<Self> {
        make::<Self>(x, weight, &job).0
    }
}

impl<B: Products + ProductBackend, C: CheckpointStrategy> ProductBackend for Autodiff<B, C> {
    fn sharded_product(x: FloatTensor<Self>, weight: FloatTensor<Self>, job: Job) -> Made<Self> {
        let ((x, of_x), (weight, of_weight)) = (x.into_parts(), weight.into_parts());
        // Compute-bound: checkpointing must never repeat a collective, which the peers would not take part in.
        match ProductGradients.prepare::<C>([of_x, of_weight]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (made, kept) = make::<B>(x.clone(), weight.clone(), &job);
                let state = (kept.unwrap_or(x), weight, job);
                Made { tensor: prep.finish(state, made.tensor), error: made.error }
            }
            OpsKind::UnTracked(prep) => {
                let (made, _) = make::<B>(x, weight, &job);
                Made { tensor: prep.finish(made.tensor), error: made.error }
            }
        }
    }
}

/// The gradients of a sharded product.
#[derive(Debug)]
struct ProductGradients;

impl<B: Products + ProductBackend> Backward<B, 2> for ProductGradients {
    /// The left factor as the gradient of the weight needs it, the weight, and what was made of them.
    type State = (FloatTensor<B>, FloatTensor<B>, Job);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, weight, job) = ops.state;
        let gradient = grads.consume::<B>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let (device, dtype) = (gradient.device(), gradient.dtype());
        let dims = [gradient.shape()[0], weight.shape()[0]];
        let (rank, size) = (job.comm.rank(), job.comm.size());
        let own = |positions: usize| crate::comm::part(positions, size, rank).len();
        let rows = match job.form {
            Form::Column | Form::Row => dims[0],
            Form::GatherColumn => own(dims[0] / job.unit) * job.unit,
            Form::RowScatter => x.shape()[0],
        };
        let zeros_of_x = [rows, dims[1]];
        let zeros_of_weight = weight.shape();
        let made = B::gradients(gradient, x, weight, wanted, &job).and_then(|made| {
            let whole = made[0].as_ref().is_none_or(|of_x| of_x.shape().as_slice() == zeros_of_x);
            let brought = || {
                let problem = format!(
                    "on rank {rank} of {size} of group `{}` the gradient of an input of {zeros_of_x:?} came back as {:?}: \
                     every rank must bring tensors of the same logical shape, divided as `comm::part` does",
                    job.comm.group(),
                    made[0].as_ref().map(|of_x| of_x.shape()),
                );
                Error::invalid(job.name, problem)
            };
            if whole { Ok(()) } else { Err(brought()) }.map(|()| made)
        });
        let gradients = made.unwrap_or_else(|error| {
            job.comm.fail(error);
            let zeros = |shape: burn::tensor::Shape| Some(B::float_zeros(shape, &device, dtype.into()));
            [zeros(zeros_of_x.into()), zeros(zeros_of_weight)]
        });
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}
