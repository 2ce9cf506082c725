//! Kernels of our own for CubeCL's devices, and how they get on burn's tape.

mod cube;
mod epilogue;
mod losses;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device};

pub(crate) use epilogue::bias_activation;
pub(crate) use losses::vocab_parallel_losses;

/// Whether tensors of this device are CubeCL's.
pub(crate) fn run_on(device: &Device) -> bool {
    matches!(device.clone().inner().as_dispatch(), DispatchDevice::Cube(_))
}

/// Whether the kernels, which compute in `f32`, do for a dtype.
fn compute(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}
