//! Converts tensors around NCCL's reductions, so that the results are those of every other transport.
//!
//! Floats of 16 bits are scaled and added in `f32` and rounded once, and a NaN of any rank is in a maximum and a
//! minimum. NCCL adds 16-bit numbers in 16 bits, rounds the factors of [`ReduceOp::PreMulSum`] to 16 bits, and its
//! maxima and minima ignore NaN. So
//!
//! - **sums, means and products of 16 bits** are reduced as `f32`: twice the bytes, and two kernels that convert;
//! - **maxima and minima of floats** are reduced with a NaN mask beside them: twice the bytes as well. Only the
//!   reductions of `f32` and `f64` that training is made of (sums, means, sums with factors) need no conversion.
//!
//! NCCL reduces in an order of its own, the same on all ranks and for all runs on the same machines; so the last bit of
//! a sum may differ from that of other transports.

use burn::tensor::{DType, Float, Tensor};

use super::gpu::Gpu;
use super::stream::{record_for_waiter, wait_for_origin};
use crate::Error;
use crate::comm::device::{DeviceTensor, flat, from_device, to_device, with_dims};
use crate::comm::nan_mask::{append_nan_mask, apply_nan_mask};
use crate::comm::{Operation, ReduceOp};

/// How a reduction is converted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Conversion {
    /// Nothing.
    None,
    /// Reduced in `f32`.
    Wide,
    /// Reduced with a NaN mask.
    Marked(ReduceOp),
}

impl Conversion {
    /// The same on all ranks, which pass the same dtype and dims.
    pub fn of(operation: &Operation, tensor: &DeviceTensor) -> Self {
        let (Operation::AllReduce(op) | Operation::ReduceScatter(op) | Operation::Reduce { op, .. }) = *operation
        else {
            return Self::None;
        };
        match (op, tensor.dtype) {
            _ if tensor.meta.shape().iter().any(|dim| *dim == 0) => Self::None,
            (ReduceOp::Max | ReduceOp::Min, dtype) if dtype.is_float() => Self::Marked(op),
            (_, DType::F16 | DType::BF16) => Self::Wide,
            _ => Self::None,
        }
    }

    /// The input of NCCL in place of a contiguous tensor: its rows, or twice as long ones.
    pub fn before(self, tensor: DeviceTensor, gpu: &Gpu) -> Result<DeviceTensor, Error> {
        if self == Self::None {
            return Ok(tensor);
        }
        wait_for_origin(gpu, &tensor);
        let dims = tensor.meta.shape().to_vec();
        match self {
            Self::Marked(op) => {
                let rows = dims.first().copied().unwrap_or(1);
                let width = dims.iter().skip(1).product();
                to_device(append_nan_mask(from_device::<2, Float>(with_dims(tensor, vec![rows, width])), op))
            }
            _ => converted(tensor, DType::F32).map(|wide| with_dims(wide, dims)),
        }
    }

    /// The result of the reduction, of these dims and `dtype`, from that of NCCL.
    pub fn after(
        self,
        result: DeviceTensor,
        (dims, dtype): (Vec<usize>, DType),
        gpu: &Gpu,
    ) -> Result<DeviceTensor, Error> {
        let meant = match self {
            Self::None => return Ok(result),
            Self::Marked(_) => to_device(apply_nan_mask(from_device::<2, Float>(result)))?,
            Self::Wide => converted(result, dtype)?,
        };
        record_for_waiter(gpu, &meant);
        Ok(with_dims(meant, dims))
    }
}

fn converted(tensor: DeviceTensor, dtype: DType) -> Result<DeviceTensor, Error> {
    let tensor: Tensor<1> = from_device(flat(tensor));
    to_device(tensor.cast(dtype))
}
