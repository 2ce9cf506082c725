//! What NCCL's reductions do not do by themselves, done around them.
//!
//! A reduction means the same on every engine: what has 16 bits is scaled and added in `f32` and rounded once, and a NaN of
//! any rank is in a maximum and a minimum. NCCL adds 16-bit numbers in 16 bits, rounds the factors of
//! [`ReduceOp::PreMulSum`] to 16 bits, and its maxima and minima leave NaN out. So
//!
//! - **sums, means and products of 16 bits** travel as `f32`: twice the bytes, and two kernels that convert;
//! - **maxima and minima of floats** travel with marks beside them that tell which of them are NaN: twice the bytes as well.
//!   Only the reductions of `f32` and `f64` that training is made of (sums, means, sums with factors) go as they are.
//!
//! NCCL folds in an order of its own, the same on all ranks and for all runs on the same machines; so the last bit of a sum may
//! differ from that of other engines.

use burn::tensor::{DType, Float, Tensor};

use super::gpu::Gpu;
use super::lane::{catch_up, settle};
use crate::Error;
use crate::comm::device::{DeviceTensor, flat, from_device, to_device, with_dims};
use crate::comm::marks::{marked, unmarked};
use crate::comm::{Operation, ReduceOp};

/// What must be done around a reduction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Detour {
    /// Nothing.
    None,
    /// It is made in `f32`.
    Wide,
    /// It is made with marks for NaN.
    Marked(ReduceOp),
}

impl Detour {
    /// The same on all ranks, which bring the same dtype and dims.
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

    /// What is given to NCCL in place of a contiguous tensor: its rows, or twice as long ones.
    pub fn go(self, tensor: DeviceTensor, gpu: &Gpu) -> Result<DeviceTensor, Error> {
        if self == Self::None {
            return Ok(tensor);
        }
        catch_up(gpu, &tensor);
        let dims = tensor.meta.shape().to_vec();
        match self {
            Self::Marked(op) => {
                let rows = dims.first().copied().unwrap_or(1);
                let width = dims.iter().skip(1).product();
                to_device(marked(from_device::<2, Float>(with_dims(tensor, vec![rows, width])), op))
            }
            _ => converted(tensor, DType::F32).map(|wide| with_dims(wide, dims)),
        }
    }

    /// What NCCL's result means, of these dims and `dtype`.
    pub fn come(
        self,
        result: DeviceTensor,
        (dims, dtype): (Vec<usize>, DType),
        gpu: &Gpu,
    ) -> Result<DeviceTensor, Error> {
        let meant = match self {
            Self::None => return Ok(result),
            Self::Marked(_) => to_device(unmarked(from_device::<2, Float>(result)))?,
            Self::Wide => converted(result, dtype)?,
        };
        settle(gpu, &meant);
        Ok(with_dims(meant, dims))
    }
}

fn converted(tensor: DeviceTensor, dtype: DType) -> Result<DeviceTensor, Error> {
    let tensor: Tensor<1> = from_device(flat(tensor));
    to_device(tensor.cast(dtype))
}
