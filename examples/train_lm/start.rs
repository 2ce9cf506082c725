//! How the ranks are started, and on what they compute.

use burn::tensor::Device;
#[cfg(feature = "wgpu")]
use burn::tensor::DeviceKind;
#[cfg(feature = "cuda")]
use burn::tensor::DeviceType;
use burn_parallel::launch::{self, Engine, Launcher, Place};
use burn_parallel::prelude::*;
use clap::ValueEnum;

use crate::args::Args;

/// What the ranks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Launch {
    /// Threads of this process
    Threads,
    /// Processes of this program on this machine
    Processes,
    /// What torchrun, mpirun or srun have started
    Env,
}

/// What the ranks compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compute {
    /// The CPU
    Flex,
    /// NVIDIA GPUs, shared out among the ranks
    Cuda,
    /// The first GPU that Vulkan, Metal or DirectX finds, for all ranks
    Wgpu,
}

impl Compute {
    /// The device of a rank.
    pub fn of(self, rank: &Rank) -> Result<Device, Error> {
        match self {
            Self::Flex => Ok(rank.device()),
            #[cfg(feature = "cuda")]
            Self::Cuda => {
                let gpus = Device::enumerate(DeviceType::Cuda).into_vec();
                let own = gpus.get(rank.rank() % gpus.len().max(1)).cloned();
                own.ok_or_else(|| Error::user("--device cuda: no NVIDIA GPU was found"))
            }
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Ok(Device::wgpu(DeviceKind::DefaultDevice)),
            // Refused when the flags were read.
            #[allow(unreachable_patterns)]
            other => Err(Error::user(format!("--device {other:?}: this program was built without it"))),
        }
    }
}

/// What joins the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Threads of one process
    Local,
    /// Processes, on one machine or many
    Tcp,
    /// Processes that mpirun or srun have started
    Mpi,
    /// GPUs
    Nccl,
}

/// How to start.
#[derive(Clone, Debug)]
pub struct Start {
    pub launch: Launch,
    /// What joins processes, if that has been said.
    pub engine: Option<Engine>,
    /// How many ranks have been started already.
    pub started: Option<usize>,
}

/// How to start; or why the flags do not go together.
pub fn choose(launch: Option<Launch>, device: Compute, transport: Option<Transport>) -> Result<Start, String> {
    // In a batch script Slurm's variables are set for a single process as well: it must be asked for.
    let place = Place::from_env();
    let started = place.as_ref().is_ok_and(|place| place.launcher != Launcher::Slurm && place.size > 1);
    let default = if started { Launch::Env } else { Launch::Threads };
    let launch = launch.unwrap_or(default);
    let without = |flag: &str, feature: &str| {
        Err(format!("{flag} {feature}: this program was built without it; build with `--features {feature}`"))
    };
    match device {
        Compute::Cuda if cfg!(feature = "cuda") => {}
        Compute::Wgpu if cfg!(feature = "wgpu") => {}
        Compute::Flex => {}
        Compute::Cuda => return without("--device", "cuda"),
        Compute::Wgpu => return without("--device", "wgpu"),
    }
    let engine = match (transport, launch) {
        (None, _) | (Some(Transport::Local), Launch::Threads) => None,
        (Some(Transport::Nccl), _) => return without("--transport", "cuda"),
        (Some(Transport::Mpi), _) if cfg!(not(feature = "mpi")) => return without("--transport", "mpi"),
        (Some(Transport::Tcp | Transport::Mpi), Launch::Threads) => {
            return Err("--transport tcp and mpi join processes: give --launch processes or env".into());
        }
        (Some(Transport::Tcp), _) => Some(Engine::Tcp),
        (Some(Transport::Mpi), _) => Some(Engine::Mpi),
        (Some(Transport::Local), _) => return Err("--transport local joins threads: give --launch threads".into()),
    };
    let started = match (launch, place) {
        (Launch::Env, place) => Some(place.map_err(|why| why.to_string())?.size),
        _ => None,
    };
    Ok(Start { launch, engine, started })
}

/// Runs `f` on every rank. Returns what it returns on the first, in the process that has the first.
pub fn run<T: Send>(args: &Args, f: impl Fn(Rank) -> Result<T, Error> + Sync) -> Result<Option<T>, Error> {
    let first = |rank: Rank| {
        let first = rank.rank() == 0;
        f(rank).map(|outcome| first.then_some(outcome))
    };
    let engine = args.start.engine;
    match args.start.launch {
        Launch::Threads => launch::threads(args.ranks).seed(args.seed).run(f).map(|mut all| Some(all.swap_remove(0))),
        Launch::Env => {
            let process = launch::from_env()?.seed(args.seed);
            engine.into_iter().fold(process, |process, engine| process.engine(engine)).run(first)
        }
        #[cfg(unix)]
        Launch::Processes => {
            let processes = launch::processes(args.ranks).engine(engine.unwrap_or(Engine::Tcp));
            processes.run(|process| process.seed(args.seed), first).map(Option::flatten)
        }
        #[cfg(not(unix))]
        Launch::Processes => Err(Error::user("--launch processes: not on this system")),
    }
}
