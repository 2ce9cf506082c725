//! On what the ranks compute, and what carries their tensors.

use burn::tensor::Device;
#[cfg(feature = "wgpu")]
use burn::tensor::DeviceKind;
#[cfg(feature = "cuda")]
use burn_parallel::comm::nccl;
#[cfg(feature = "cuda")]
use burn_parallel::launch::ProcessInfo;
use burn_parallel::prelude::*;
use clap::ValueEnum;

use super::start::Launch;

/// What the ranks compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compute {
    /// The CPU
    Flex,
    /// NVIDIA GPUs, shared out among the ranks of a machine
    Cuda,
    /// The first GPU that Vulkan, Metal or DirectX finds, for all ranks
    Wgpu,
}

impl Compute {
    /// The feature that this program would have to be built with.
    pub fn missing(self) -> Option<&'static str> {
        match self {
            Self::Cuda if cfg!(not(feature = "cuda")) => Some("cuda"),
            Self::Wgpu if cfg!(not(feature = "wgpu")) => Some("wgpu"),
            _ => None,
        }
    }

    /// The device of a rank that was started so.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, reason = "only GPUs are shared out"))]
    pub fn of(self, rank: &Rank, launch: Launch) -> Result<Device, Error> {
        match self {
            Self::Flex => Ok(rank.device()),
            #[cfg(feature = "cuda")]
            Self::Cuda => gpu(rank, launch).map(Device::cuda),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Ok(Device::wgpu(DeviceKind::DefaultDevice)),
            // Refused when the flags were read.
            #[allow(unreachable_patterns)]
            other => Err(Error::user(format!("--device {other:?}: this program was built without it"))),
        }
    }
}

/// The group of all ranks, in which `nccl` carries what is on their GPUs.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables, reason = "only GPUs are shared out"))]
pub fn world(rank: &Rank, launch: Launch, nccl: bool) -> Result<Communicator, Error> {
    match nccl {
        // One that has no GPU must join as well: so the others are told.
        #[cfg(feature = "cuda")]
        true => nccl::join(rank, gpu(rank, launch).unwrap_or(0)),
        _ => Ok(rank.world().clone()),
    }
}

/// The GPU of a rank: those of a machine in turns.
#[cfg(feature = "cuda")]
fn gpu(rank: &Rank, launch: Launch) -> Result<usize, Error> {
    // Asked before burn is: it panics where there is none.
    let gpus = nccl::devices()?;
    let local = match launch {
        // The launcher's variables are about other processes, if there are any.
        Launch::Threads | Launch::Processes => rank.rank(),
        Launch::Env => ProcessInfo::from_env()?.local_rank,
    };
    Ok(local % gpus)
}
