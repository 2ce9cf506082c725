//! Reduces the gradients of a bucket to rows of their average, and makes flat tensors of gradients and back.

use std::sync::Arc;

use burn::tensor::{DType, FloatDType, Shape, Tensor};

use crate::Error;
use crate::comm::ReduceOp;
use crate::sharding::{Pack, Rows, ShardComms};
use crate::tensor::{PlainTensor, Pool};

/// Reduces gradients to this rank's rows of the average, in memory of a pool: in `dtype`, if there is one.
///
/// # Errors
/// [`Error::InvalidArgument`] if one has no dims; those of
/// [`Communicator::reduce_scatter`](crate::comm::Communicator::reduce_scatter).
pub(super) fn reduce_scatter(
    gradients: Vec<PlainTensor>,
    factor: f64,
    dtype: Option<FloatDType>,
    (shards, pool): (&ShardComms, &Arc<Pool>),
) -> Result<Vec<PlainTensor>, Error> {
    let own = gradients.first().map(|gradient| FloatDType::from(gradient.dtype()));
    let cast = |gradients: Vec<PlainTensor>, dtype: Option<FloatDType>| -> Vec<PlainTensor> {
        match dtype {
            Some(dtype) => gradients.into_iter().map(|gradient| gradient.cast(dtype)).collect(),
            None => gradients,
        }
    };
    let rows = |gradient: &PlainTensor| {
        Rows::new(gradient.shape().as_slice(), shards.ranks())
            .ok_or_else(|| Error::invalid("data_parallel", "a trained parameter of no dims has no rows to be divided"))
    };
    let pack = Pack::new(gradients.iter().map(rows).collect::<Result<_, _>>()?);
    let narrow = cast(gradients, dtype);
    let op = ReduceOp::PreMulSum(factor);
    let mut reduced = pack.reduce_scatter_in(Some(pool), narrow, op, shards.gradients(), 0)?;
    if let Some(copies) = shards.copies() {
        reduced = copies.all_reduce_coalesced(reduced, ReduceOp::Sum)?;
    }
    Ok(cast(reduced, dtype.and(own)))
}

/// A gradient as a flat tensor over the same memory.
pub(super) fn flatten(gradient: PlainTensor) -> Result<Tensor<1>, Error> {
    let elements = gradient.elements();
    gradient.reshape([elements]).float()
}

/// Flat tensors as gradients of their shapes again.
pub(super) fn restore(
    reduced: Vec<Tensor<1>>,
    shapes: Vec<Shape>,
    dtypes: &[DType],
) -> Result<Vec<PlainTensor>, Error> {
    let lens = |gradients: &[Tensor<1>]| gradients.iter().map(|gradient| gradient.dims()[0]).collect::<Vec<_>>();
    let (expected, found) = (shapes.iter().map(Shape::num_elements).collect::<Vec<_>>(), lens(&reduced));
    if expected != found {
        let problem = format!("a bucket of gradients of lengths {expected:?} came back with lengths {found:?}");
        return Err(Error::invalid("CommHook::reduce", problem));
    }
    if let Some((gradient, dtype)) = reduced.iter().zip(dtypes).find(|(gradient, dtype)| gradient.dtype() != **dtype) {
        let problem = format!("a gradient of {dtype:?} came back as {:?}: cast it back", gradient.dtype());
        return Err(Error::invalid("CommHook::reduce", problem));
    }
    Ok(reduced.into_iter().zip(shapes).map(|(gradient, shape)| PlainTensor::from(gradient).reshape(shape)).collect())
}
