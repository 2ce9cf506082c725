//! The part of a parameter that a rank of an axis holds, and how it comes from rank 0.

use burn::tensor::{DType, Tensor};

use crate::Error;
use crate::comm::Communicator;
use crate::layout::{Layout, scatter_from_root};

/// What of a parameter is spread over the ranks of an axis.
#[derive(Clone)]
pub(super) struct ParamPart {
    pub layout: Layout,
    pub dtype: DType,
    /// Before and after.
    pub dims: Vec<usize>,
    pub local_dims: Vec<usize>,
    /// Its dims without padding, if it is as the model has made it, split along no axis yet.
    pub fresh: Option<Vec<usize>>,
}

/// This rank's share of rank 0's value. Of the `value` of the other ranks only rank and dtype count, and its dims if it
/// is not split.
pub(super) fn receive<const D: usize>(
    value: Tensor<D>,
    layout: Layout,
    group: &Communicator,
) -> Result<Tensor<D>, Error> {
    match layout {
        Layout::Sharded(dim) => scatter_from_root(value, dim, 0, group),
        _ => group.broadcast(value, 0),
    }
}

/// What a rank that is not the first brings to [`receive`].
pub(super) fn nothing<const D: usize>(part: &ParamPart, like: &Tensor<D>) -> Tensor<D> {
    let dims = match (part.layout, <[usize; D]>::try_from(part.dims.as_slice())) {
        (Layout::Replicated, Ok(dims)) => dims,
        _ => [0; D],
    };
    Tensor::zeros(dims, (&like.device(), part.dtype))
}
