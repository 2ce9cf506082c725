//! The synchronised statistics of batch norm over any all-reduce.

use burn::tensor::{DType, FloatDType, Tensor};
use burn_ir::CustomOpIr;

use super::rewrite::{SYNC_BATCH_NORM_GRAD, SYNC_BATCH_NORM_MEAN};
use crate::Error;
use crate::graph::{CustomOps, graph_error};
use crate::tensor::PlainTensor;

/// Registers both operations that [`sync_batch_norm`](super::sync_batch_norm) puts into a graph.
///
/// `all_reduce_sum` gives the element-wise sum over the ranks of the group; it is called once per operation with
/// `channels + 1` elements on the device of the step, in the same order on every rank. They are `f64` where the device
/// has it, so that a group of one rank leaves an `f32` statistic as it is to the last bit, else `f32`. `loss_weight` is
/// the weight of this rank's loss in the group's loss (see the contract at
/// [`sync_batch_norm`](super::sync_batch_norm)): the local number of samples if the loss is a mean over them, any
/// constant if ranks count equally. It is asked once per backward operation, must be positive, and may change between
/// steps.
pub fn register_sync_batch_norm<R, W>(ops: &mut CustomOps, all_reduce_sum: R, loss_weight: W)
where
    R: Fn(Tensor<1>) -> Result<Tensor<1>, Error> + Clone + Send + Sync + 'static,
    W: Fn() -> f64 + Send + Sync + 'static,
{
    let reduce = all_reduce_sum.clone();
    ops.register(SYNC_BATCH_NORM_MEAN, move |op, inputs| group_mean(op, inputs, 1.0, &reduce));
    ops.register(SYNC_BATCH_NORM_GRAD, move |op, inputs| {
        let weight = loss_weight();
        if !(weight.is_finite() && weight > 0.0) {
            return Err(graph_error(format!("the loss weight of a rank must be positive, but it is {weight}")));
        }
        group_mean(op, inputs, weight, &all_reduce_sum)
    });
}

fn group_mean(
    op: &CustomOpIr,
    mut inputs: Vec<PlainTensor>,
    weight: f64,
    all_reduce_sum: &dyn Fn(Tensor<1>) -> Result<Tensor<1>, Error>,
) -> Result<Vec<PlainTensor>, Error> {
    let (Some(local), Some(samples)) = (inputs.pop(), op.scalars.last()) else {
        return Err(graph_error(format!("custom operation `{}` needs an input and the number of samples", op.id)));
    };
    let samples = samples.elem::<f64>();
    let (shape, dtype, device, channels) = (local.shape(), local.dtype(), local.device(), local.elements());
    let wide = if device.supports_dtype(DType::F64) { FloatDType::F64 } else { FloatDType::F32 };
    let sums = local.reshape([channels]).float::<1>()?.cast(wide).mul_scalar(weight * samples);
    let samples = Tensor::full([1], samples, (&device, DType::from(wide)));
    let sums = all_reduce_sum(Tensor::cat(vec![sums, samples], 0))?;
    let [length] = sums.dims();
    if length != channels + 1 {
        let given = channels + 1;
        return Err(graph_error(format!("the all-reduce was given {given} elements but returned {length}")));
    }
    let total = sums.clone().narrow(0, channels, 1).mul_scalar(weight);
    let means = sums.narrow(0, 0, channels).div(total).cast(FloatDType::from(dtype));
    Ok(vec![PlainTensor::from(means).reshape(shape)])
}
