//! What a backward pass does that cannot be done. burn's `backward()` cannot return an error, so one there fails the
//! world, and zeros are handed on, as in [`layout`](crate::layout).

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;

use crate::Error;
use crate::collective_matmul::{ProductCall, ShardedProducts};

/// A gradient that stands in for one that could not be made.
pub(super) fn zeros_instead<B: ShardedProducts>(shape: Shape, like: &FloatTensor<B>) -> FloatTensor<B> {
    B::float_zeros(shape, &like.device(), like.dtype().into())
}

/// Refuses the gradient of an input of other dims than the input has.
pub(super) fn check_shape(found: &Shape, due: &Shape, call: &ProductCall) -> Result<(), Error> {
    if found == due {
        return Ok(());
    }
    let problem = format!(
        "on rank {} of {} of group `{}` the gradient of an input of {:?} came back as {:?}: every rank must bring tensors of \
         the same logical shape, divided as `comm::part` does",
        call.comm.rank(),
        call.comm.size(),
        call.comm.group(),
        due.as_slice(),
        found.as_slice(),
    );
    Err(Error::invalid(call.name, problem))
}
