//! On what the ranks compute, and what carries their tensors.

use burn::tensor::Device;
#[cfg(feature = "wgpu")]
use burn::tensor::DeviceKind;
#[cfg(feature = "cuda")]
use burn::tensor::DeviceType;
use burn_parallel::prelude::*;
#[cfg(feature = "cuda")]
use burn_parallel::{comm::nccl, launch::Place};
use clap::ValueEnum;

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

    /// The device of a rank.
    pub fn of(self, rank: &Rank) -> Result<Device, Error> {
        match self {
            Self::Flex => Ok(rank.device()),
            #[cfg(feature = "cuda")]
            Self::Cuda => gpu(rank).map(Device::cuda),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Ok(Device::wgpu(DeviceKind::DefaultDevice)),
            // Refused when the flags were read.
            #[allow(unreachable_patterns)]
            other => Err(Error::user(format!("--device {other:?}: this program was built without it"))),
        }
    }
}

/// The group of all ranks, in which `nccl` carries what is on their GPUs.
pub fn world(rank: &Rank, nccl: bool) -> Result<Communicator, Error> {
    match nccl {
        #[cfg(feature = "cuda")]
        true => nccl::join(rank, gpu(rank)?),
        _ => Ok(rank.world().clone()),
    }
}

/// The GPU of a rank: those of a machine in turns.
#[cfg(feature = "cuda")]
fn gpu(rank: &Rank) -> Result<usize, Error> {
    let gpus = Device::enumerate(DeviceType::Cuda).into_vec().len();
    let place = Place::from_env().ok().filter(|place| place.size == rank.size());
    let local = place.map_or(rank.rank(), |place| place.local_rank);
    local.checked_rem(gpus).ok_or_else(|| Error::user("--device cuda: no NVIDIA GPU was found"))
}
