//! Starts the collective of a bucket as soon as its gradients are there, and divides gradients into buckets in the order in
//! which backward completes them.

use burn::tensor::{DType, FloatDType, Shape, Tensor};

use super::buckets;
use super::comm_hook::Bucket;
use super::reducer::Reducer;
use super::reduction_state::ReductionState;
use crate::Error;
use crate::comm::ReduceOp;
use crate::sharding::{Pack, Rows, ShardComms};
use crate::tensor::PlainTensor;

impl Reducer {
    /// Divides the buckets anew by the order in which rank 0 has seen gradients complete.
    pub(super) fn follow(&self, completed: Vec<usize>) -> Result<(), Error> {
        let mut order: Vec<u64> = completed.into_iter().map(|param| param as u64).collect();
        let mut seen: Vec<bool> = vec![false; self.known().params.len()];
        order.retain(|param| !std::mem::replace(&mut seen[*param as usize], true));
        order.extend((0..seen.len()).rev().filter(|param| !seen[*param]).map(|param| param as u64));
        let order = self.control.broadcast(order, 0)?;
        let order: Vec<usize> = order.into_iter().map(|param| param as usize).collect();
        let divided = self.divide(&order);
        self.lock().buckets = divided;
        Ok(())
    }

    pub(super) fn divide(&self, order: &[usize]) -> Vec<Vec<usize>> {
        let known = self.known();
        let dtypes: Vec<DType> = known.params.iter().map(|param| param.dtype).collect();
        let sizes: Vec<usize> = known.params.iter().map(|param| param.elements * param.dtype.size()).collect();
        let order: Vec<usize> = order.iter().copied().filter(|param| known.reduced[*param]).collect();
        buckets::divide(&order, &sizes, &dtypes, self.config.first_bucket_bytes, self.config.bucket_bytes)
    }

    /// Starts the buckets whose turn it is and whose gradients are all there.
    pub(super) fn start_complete(&self) {
        let mut step = self.lock();
        while self.start_next(&mut step, false) {}
    }

    /// Starts the next bucket if it is complete, or in any case if `all`. Returns whether it did.
    pub(super) fn start_next(&self, step: &mut ReductionState, all: bool) -> bool {
        let Some(index) = step.pending.as_ref().map(|pending| pending.buckets.len()) else { return false };
        let Some(params) = step.buckets.get(index) else { return false };
        let there = |param: &usize| {
            let progress = &step.params[*param];
            progress.gradient.is_some() && progress.uses > 0 && progress.arrived >= progress.uses
        };
        if !all && !params.iter().all(there) {
            return false;
        }
        let (params, device) = (params.clone(), self.device(step));
        let gradients: Vec<PlainTensor> = params
            .iter()
            .map(|param| {
                let progress = &mut step.params[*param];
                progress.started = true;
                progress.gradient.take().unwrap_or_else(|| self.zeros(*param, &device))
            })
            .collect();
        let paths = {
            let known = self.known();
            params.iter().map(|param| known.params[*param].path.clone()).collect()
        };
        if let Some(pending) = &mut step.pending {
            let (hook, factor) = (self.config.hook(), pending.factor.clone());
            let (shards, dtype) = (self.shards.clone(), self.config.reduce_dtype);
            pending.buckets.push(self.data.start(move |comm| {
                // The head ran before, on the same thread; if it failed, so does everything after it.
                let factor = factor.get().copied().unwrap_or_default();
                if let Some(shards) = shards {
                    return reduce_scatter(gradients, factor, dtype, &shards);
                }
                let shapes: Vec<Shape> = gradients.iter().map(PlainTensor::shape).collect();
                let gradients: Vec<_> = gradients.into_iter().map(flatten).collect::<Result<_, Error>>()?;
                let dtypes: Vec<DType> = gradients.iter().map(Tensor::dtype).collect();
                let reduced = hook.reduce(Bucket { index, paths, gradients, factor }, comm)?;
                restore(reduced, shapes, &dtypes)
            }));
        }
        true
    }
}

/// Reduces gradients to this rank's rows of the average: in `dtype`, if there is one.
///
/// # Errors
/// [`Error::InvalidArgument`] if one has no dims; those of [`Communicator::reduce_scatter`](crate::comm::Communicator::reduce_scatter).
pub(super) fn reduce_scatter(
    gradients: Vec<PlainTensor>,
    factor: f64,
    dtype: Option<FloatDType>,
    shards: &ShardComms,
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
    let mut reduced = pack.reduce_scatter(narrow, ReduceOp::PreMulSum(factor), shards.gradients())?;
    if let Some(copies) = shards.copies() {
        reduced = copies.all_reduce_coalesced(reduced, ReduceOp::Sum)?;
    }
    Ok(cast(reduced, dtype.and(own)))
}

/// A gradient as a flat tensor over the same memory.
fn flatten(gradient: PlainTensor) -> Result<Tensor<1>, Error> {
    let elements = gradient.elements();
    gradient.reshape([elements]).float()
}

/// Flat tensors as gradients of their shapes again.
fn restore(reduced: Vec<Tensor<1>>, shapes: Vec<Shape>, dtypes: &[DType]) -> Result<Vec<PlainTensor>, Error> {
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
