//! The devices that can be checked, and what is missing of them.

use std::fmt;
use std::panic::catch_unwind;

use burn::tensor::{DType, Device, Tensor};
use burn_parallel::comm::nccl;
use clap::ValueEnum;

use crate::report::Shortfall;

/// The kind of device to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// NVIDIA GPUs, with NCCL.
    Cuda,
    /// Whatever Vulkan, Metal or DirectX offers.
    Wgpu,
    /// The CPU.
    Flex,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
            Self::Flex => "flex",
        })
    }
}

impl Choice {
    /// The device with this number, or why there is none.
    pub fn open(self, index: usize) -> Result<Device, Shortfall> {
        let device = match self {
            Self::Flex => return Ok(Device::flex()),
            Self::Cuda => {
                // Asked first: burn panics on threads of its own where there is none.
                nccl::devices().map_err(|error| Shortfall::Skipped(error.to_string()))?;
                Device::cuda(index)
            }
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
            #[cfg(not(feature = "wgpu"))]
            Self::Wgpu => return Err(Shortfall::Skipped("built without the feature `wgpu`".into())),
        };
        let works = catch_unwind(|| {
            let two = Tensor::<1>::ones([8], &device).add_scalar(1.0).into_data();
            two.iter::<f32>().all(|x| x == 2.0)
        });
        match works {
            Ok(true) => Ok(device),
            Ok(false) => Err(Shortfall::Failed("1 + 1 is not 2 on it".into())),
            Err(_) if self == Self::Cuda => Err(Shortfall::Failed(
                "burn cannot compute on it, though the driver sees it: is NVRTC there (CUDA_PATH)? Its messages are above"
                    .into(),
            )),
            Err(_) => Err(Shortfall::Skipped("burn finds no such device".into())),
        }
    }

    /// How many devices of the kind ranks can be spread over.
    pub fn count(self) -> usize {
        match self {
            Self::Cuda => nccl::devices().unwrap_or(1).max(1),
            _ => 1,
        }
    }

    /// The dtypes to check on it.
    pub fn dtypes(self) -> &'static [DType] {
        match self {
            Self::Cuda => {
                &[DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64, DType::U8, DType::U32]
            }
            // What WGSL has.
            Self::Wgpu => &[DType::F32, DType::I32, DType::U32],
            Self::Flex => &[DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64],
        }
    }

    /// What there is of the kind, in words.
    pub fn describe(self) -> Vec<String> {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let mut lines = vec![format!("CPU cores: {cores}")];
        if self == Self::Cuda {
            lines.push(match nccl::library() {
                Ok(library) => format!("CUDA devices: {}, NCCL {}", library.devices, library.nccl),
                Err(error) => error.to_string(),
            });
        }
        lines
    }
}

/// NCCL for this many ranks on the GPUs of this machine, or why not. Returns the number of GPUs.
pub fn nccl_for(choice: Choice, ranks: usize) -> Result<usize, Shortfall> {
    if choice != Choice::Cuda {
        return Err(Shortfall::Skipped(format!("NCCL has no part in {choice}")));
    }
    let library = nccl::library().map_err(|error| Shortfall::Skipped(error.to_string()))?;
    if ranks > library.devices && !library.shares_devices() {
        return Err(Shortfall::Skipped(format!(
            "{ranks} ranks, {} GPU(s): ranks share one from NCCL 2.30 on with NCCL_MULTI_RANK_GPU_ENABLE=1; this is {}",
            library.devices, library.nccl
        )));
    }
    Ok(library.devices)
}
