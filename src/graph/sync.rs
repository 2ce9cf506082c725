//! The synchronised statistics of batch norm over any all-reduce.

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, bf16, f16};
use burn_ir::CustomOpIr;

use super::batch_norm::{SYNC_BATCH_NORM_GRAD, SYNC_BATCH_NORM_MEAN};
use super::custom::CustomOps;
use super::graph_error;
use crate::error::Error;

/// Registers both operations that [`sync_batch_norm`](super::sync_batch_norm) puts into a graph.
///
/// `all_reduce_sum` gives the element-wise sum over the ranks of the group; it is called once per operation with
/// `channels + 1` elements, in the same order on every rank. They are `f64`, so that a group of one rank leaves an `f32`
/// statistic as it is to the last bit. `loss_weight` is the weight of this rank's loss in the group's loss (see the
/// contract at [`sync_batch_norm`](super::sync_batch_norm)): the local number of samples if the loss is a mean over them, any constant if
/// ranks count equally. It is asked once per backward operation, must be positive, and may change between steps.
pub fn register_sync_batch_norm<R, W>(ops: &mut CustomOps, all_reduce_sum: R, loss_weight: W)
where
    R: Fn(Vec<f64>) -> Result<Vec<f64>, Error> + Clone + Send + Sync + 'static,
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
    mut inputs: Vec<FlexTensor>,
    weight: f64,
    all_reduce_sum: &dyn Fn(Vec<f64>) -> Result<Vec<f64>, Error>,
) -> Result<Vec<FlexTensor>, Error> {
    let (Some(local), Some(samples)) = (inputs.pop(), op.scalars.last()) else {
        return Err(graph_error(format!("custom operation `{}` needs an input and the number of samples", op.id)));
    };
    let samples = samples.elem::<f64>();
    let mut sums: Vec<f64> = to_f64(&local)?.into_iter().map(|mean| weight * samples * mean).collect();
    sums.push(samples);
    let length = sums.len();
    let mut sums = all_reduce_sum(sums)?;
    if sums.len() != length {
        return Err(graph_error(format!("the all-reduce was given {length} elements but returned {}", sums.len())));
    }
    let total = sums.pop().unwrap_or(samples);
    let means = sums.into_iter().map(|sum| sum / (weight * total)).collect();
    Ok(vec![from_f64(means, &local)])
}

fn to_f64(tensor: &FlexTensor) -> Result<Vec<f64>, Error> {
    let tensor = tensor.to_contiguous();
    let elements = match tensor.dtype() {
        DType::F64 => tensor.as_slice::<f64>().map(<[f64]>::to_vec),
        DType::F32 => tensor.as_slice::<f32>().map(|v| v.iter().map(|x| f64::from(*x)).collect()),
        DType::F16 => tensor.as_slice::<f16>().map(|v| v.iter().map(|x| x.to_f64()).collect()),
        DType::BF16 => tensor.as_slice::<bf16>().map(|v| v.iter().map(|x| x.to_f64()).collect()),
        _ => None,
    };
    elements.ok_or_else(|| graph_error(format!("batch statistics of {:?} cannot be synchronised", tensor.dtype())))
}

fn from_f64(values: Vec<f64>, like: &FlexTensor) -> FlexTensor {
    let bytes = match like.dtype() {
        DType::F64 => Bytes::from_elems(values),
        DType::F16 => Bytes::from_elems(values.into_iter().map(f16::from_f64).collect()),
        DType::BF16 => Bytes::from_elems(values.into_iter().map(bf16::from_f64).collect()),
        _ => Bytes::from_elems(values.into_iter().map(|x| x as f32).collect()),
    };
    FlexTensor::new(bytes, Layout::contiguous(like.layout().shape().clone()), like.dtype())
}
