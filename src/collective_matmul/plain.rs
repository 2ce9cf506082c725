//! Sharded products of tensors whose backend is known at run time only.

use burn::backend::tensor::FloatTensor;
use burn::backend::{BackendTensor, DispatchKindConversion, DispatchTensor};

use super::{Job, PendingProduct, Products};
use crate::Error;
use crate::tensor::{PlainTensor, with_backend};

/// [`Products::sum`].
///
/// # Errors
/// [`Error::InvalidArgument`] for tensors of different devices, or of one without sharded products; those of the collectives.
pub(crate) fn sum(terms: Vec<[PlainTensor; 2]>, job: &Job, beside: bool) -> Result<PendingProduct<PlainTensor>, Error> {
    let first = terms.first().ok_or_else(|| job.no_terms())?[0].clone();
    with_backend!(first.device(), B => {
        let sum = <B as Products>::sum(pairs::<B>(terms, job)?, job, beside)?;
        Ok(sum.map(PlainTensor::from_float::<B>))
    }, otherwise Err(nowhere(&first, job)))
}

/// [`Products::scatter`].
///
/// # Errors
/// As [`sum`].
pub(crate) fn scatter(
    terms: Vec<[PlainTensor; 2]>,
    job: &Job,
    beside: bool,
) -> Result<PendingProduct<PlainTensor>, Error> {
    let first = terms.first().ok_or_else(|| job.no_terms())?[0].clone();
    with_backend!(first.device(), B => {
        let sum = <B as Products>::scatter(pairs::<B>(terms, job)?, job, beside)?;
        Ok(sum.map(PlainTensor::from_float::<B>))
    }, otherwise Err(nowhere(&first, job)))
}

/// [`Products::gather`].
///
/// # Errors
/// As [`sum`].
pub(crate) fn gather(
    left: PlainTensor,
    rights: Vec<PlainTensor>,
    job: &Job,
) -> Result<(Vec<PlainTensor>, PlainTensor), Error> {
    with_backend!(left.device(), B => {
        let rights = rights.into_iter().map(|right| primitive::<B>(right, job)).collect::<Result<_, _>>()?;
        let (made, whole) = <B as Products>::gather(primitive::<B>(left, job)?, rights, job)?;
        Ok((made.into_iter().map(PlainTensor::from_float::<B>).collect(), PlainTensor::from_float::<B>(whole)))
    }, otherwise Err(nowhere(&left, job)))
}

fn pairs<B: Products>(terms: Vec<[PlainTensor; 2]>, job: &Job) -> Result<Vec<[FloatTensor<B>; 2]>, Error>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    terms.into_iter().map(|[left, right]| Ok([primitive::<B>(left, job)?, primitive::<B>(right, job)?])).collect()
}

fn primitive<B: Products>(tensor: PlainTensor, job: &Job) -> Result<FloatTensor<B>, Error>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    match tensor.into_backend::<B>() {
        Ok(BackendTensor::Float(tensor)) => Ok(tensor),
        Ok(other) => Err(Error::invalid(job.name, format!("a {} tensor is no factor", other.name()))),
        Err(problem) => Err(Error::invalid(job.name, format!("the factors are on different devices: {problem}"))),
    }
}

fn nowhere(tensor: &PlainTensor, job: &Job) -> Error {
    Error::invalid(job.name, format!("there are no sharded products on {:?}", tensor.device()))
}
