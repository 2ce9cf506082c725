//! How the ranks are started and joined.

use burn_parallel::launch::{self, Launcher, ProcessInfo, TransportKind};
use burn_parallel::prelude::*;
use clap::ValueEnum;

use super::device::Compute;

/// How long ranks have to save a last checkpoint when they are told to end.
#[cfg(unix)]
const GRACE: std::time::Duration = std::time::Duration::from_secs(30);

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

/// What joins the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Threads of one process
    Local,
    /// Processes, on one machine or many
    Tcp,
    /// Processes that mpirun or srun have started
    Mpi,
    /// NVIDIA GPUs: tensors go from GPU to GPU, the rest as without it
    Nccl,
}

/// How to start.
#[derive(Clone, Debug)]
pub struct Start {
    pub launch: Launch,
    /// What joins processes, if that has been said.
    pub transport: Option<TransportKind>,
    /// Whether NCCL joins the ranks' GPUs.
    pub nccl: bool,
    /// How many ranks have been started already.
    pub started: Option<usize>,
}

impl Start {
    /// How many of so many ranks are in this process.
    pub fn ranks_here(&self, ranks: usize) -> usize {
        if self.launch == Launch::Threads { ranks } else { 1 }
    }
}

/// How to start; or why the flags do not go together.
pub fn choose(launch: Option<Launch>, device: Compute, transport: Option<Transport>) -> Result<Start, String> {
    // In a batch script Slurm's variables are set for a single process as well: it must be asked for.
    let place = ProcessInfo::from_env();
    let started = place.as_ref().is_ok_and(|place| place.launcher != Launcher::Slurm && place.size > 1);
    let default = if started { Launch::Env } else { Launch::Threads };
    let launch = launch.unwrap_or(default);
    let without = |flag: &str, feature: &str| {
        Err(format!("{flag}: this program was built without it; build with `--features {feature}`"))
    };
    if let Some(feature) = device.missing() {
        return without(&format!("--device {feature}"), feature);
    }
    let nccl = transport == Some(Transport::Nccl);
    let transport = match (transport, launch) {
        (None, _) | (Some(Transport::Local), Launch::Threads) => None,
        (Some(Transport::Nccl), _) if cfg!(not(feature = "cuda")) => return without("--transport nccl", "cuda"),
        (Some(Transport::Nccl), _) if device != Compute::Cuda => {
            return Err("--transport nccl joins NVIDIA GPUs: give --device cuda".into());
        }
        (Some(Transport::Nccl), _) => None,
        (Some(Transport::Mpi), _) if cfg!(not(feature = "mpi")) => return without("--transport mpi", "mpi"),
        (Some(Transport::Tcp | Transport::Mpi), Launch::Threads) => {
            return Err("--transport tcp and mpi join processes: give --launch processes or env".into());
        }
        (Some(Transport::Tcp), _) => Some(TransportKind::Tcp),
        (Some(Transport::Mpi), _) => Some(TransportKind::Mpi),
        (Some(Transport::Local), _) => return Err("--transport local joins threads: give --launch threads".into()),
    };
    let started = match (launch, place) {
        (Launch::Env, place) => Some(place.map_err(|why| why.to_string())?.size),
        _ => None,
    };
    Ok(Start { launch, transport, nccl, started })
}

/// Whether ranks are started again when some are lost.
#[derive(Clone, Debug, Default)]
pub struct Restarts {
    /// How many times.
    pub times: usize,
    /// The numbers of ranks that the run can go on with; none: as many as before.
    pub sizes: Vec<usize>,
}

/// Runs `f` on every rank. Returns what it returns on the first, in the process that has the first.
pub fn run<T: Send>(
    start: &Start,
    (ranks, restarts): (usize, Restarts),
    seed: u64,
    f: impl Fn(Rank) -> Result<T, Error> + Sync,
) -> Result<Option<T>, Error> {
    let first = |rank: Rank| {
        let first = rank.rank() == 0;
        f(rank).map(|outcome| first.then_some(outcome))
    };
    let transport = start.transport;
    match start.launch {
        Launch::Threads => launch::threads(ranks).seed(seed).run(f).map(|mut all| Some(all.swap_remove(0))),
        Launch::Env => {
            let process = launch::from_env()?.seed(seed);
            transport.into_iter().fold(process, |process, transport| process.transport(transport)).run(first)
        }
        #[cfg(unix)]
        Launch::Processes => {
            let processes = launch::processes(ranks).transport(transport.unwrap_or(TransportKind::Tcp));
            let processes = processes.restarts(restarts.times).restart_sizes(restarts.sizes).grace(GRACE);
            processes.run(|process| process.seed(seed), first).map(Option::flatten)
        }
        #[cfg(not(unix))]
        Launch::Processes => Err(Error::user("--launch processes: not on this system")),
    }
}
