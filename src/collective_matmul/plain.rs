//! Sharded products of tensors whose backend is known at run time only, by dispatch to [`ShardedProducts`].

use burn::backend::tensor::FloatTensor;
use burn::backend::{BackendTensor, DispatchKindConversion, DispatchTensor};

use super::{PendingProduct, ProductCall, ShardedProducts};
use crate::Error;
use crate::tensor::{PlainTensor, with_backend};

/// [`ShardedProducts::sum`].
///
/// # Errors
/// [`Error::InvalidArgument`] for tensors of different devices, or of one without sharded products; those of the
/// collectives.
pub(crate) fn sum(
    terms: Vec<[PlainTensor; 2]>,
    call: &ProductCall,
    beside: bool,
) -> Result<PendingProduct<PlainTensor>, Error> {
    let first = terms.first().ok_or_else(|| call.no_terms())?[0].clone();
    with_backend!(first.device(), B => {
        let sum = <B as ShardedProducts>::sum(pairs::<B>(terms, call)?, call, beside)?;
        Ok(sum.map(PlainTensor::from_float::<B>))
    }, otherwise Err(nowhere(&first, call)))
}

/// [`ShardedProducts::scatter`].
///
/// # Errors
/// As [`sum`].
pub(crate) fn scatter(
    terms: Vec<[PlainTensor; 2]>,
    call: &ProductCall,
    beside: bool,
) -> Result<PendingProduct<PlainTensor>, Error> {
    let first = terms.first().ok_or_else(|| call.no_terms())?[0].clone();
    with_backend!(first.device(), B => {
        let sum = <B as ShardedProducts>::scatter(pairs::<B>(terms, call)?, call, beside)?;
        Ok(sum.map(PlainTensor::from_float::<B>))
    }, otherwise Err(nowhere(&first, call)))
}

/// [`ShardedProducts::gather`].
///
/// # Errors
/// As [`sum`].
pub(crate) fn gather(
    left: PlainTensor,
    rights: Vec<PlainTensor>,
    call: &ProductCall,
) -> Result<(Vec<PlainTensor>, PlainTensor), Error> {
    with_backend!(left.device(), B => {
        let rights = rights.into_iter().map(|right| primitive::<B>(right, call)).collect::<Result<_, _>>()?;
        let (made, whole) = <B as ShardedProducts>::gather(primitive::<B>(left, call)?, rights, call)?;
        Ok((made.into_iter().map(PlainTensor::from_float::<B>).collect(), PlainTensor::from_float::<B>(whole)))
    }, otherwise Err(nowhere(&left, call)))
}

fn pairs<B: ShardedProducts>(
    terms: Vec<[PlainTensor; 2]>,
    call: &ProductCall,
) -> Result<Vec<[FloatTensor<B>; 2]>, Error>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    terms.into_iter().map(|[left, right]| Ok([primitive::<B>(left, call)?, primitive::<B>(right, call)?])).collect()
}

fn primitive<B: ShardedProducts>(tensor: PlainTensor, call: &ProductCall) -> Result<FloatTensor<B>, Error>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    match tensor.into_backend::<B>() {
        Ok(BackendTensor::Float(tensor)) => Ok(tensor),
        Ok(other) => Err(Error::invalid(call.name, format!("a {} tensor is no factor", other.name()))),
        Err(problem) => Err(Error::invalid(call.name, format!("the factors are on different devices: {problem}"))),
    }
}

fn nowhere(tensor: &PlainTensor, call: &ProductCall) -> Error {
    Error::invalid(call.name, format!("there are no sharded products on {:?}", tensor.device()))
}
