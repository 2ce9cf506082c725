//! Starts the collective of a bucket as soon as its gradients are there, and divides gradients into buckets in the
//! order in which backward completes them.

use burn::tensor::{DType, Shape, Tensor};

use super::bucket_reduction::{flatten, reduce_scatter, restore};
use super::buckets;
use super::comm_hook::Bucket;
use super::reducer::Reducer;
use super::reduction_state::ReductionState;
use crate::Error;
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
            let (shards, sums, dtype) = (self.shards.clone(), self.sums.clone(), self.config.reduce_dtype);
            pending.buckets.push(self.data.start(move |comm| {
                // The head ran before, on the same thread; if it failed, so does everything after it.
                let factor = factor.get().copied().unwrap_or_default();
                if let Some(shards) = shards {
                    return reduce_scatter(gradients, factor, dtype, (&shards, &sums));
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
