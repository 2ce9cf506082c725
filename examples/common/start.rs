//! How the ranks are started and joined.

use std::env;
use std::time::Duration;

use burn_parallel::comm::WorldConfig;
use burn_parallel::launch::{self, Launcher, ProcessInfo, TransportKind};
use burn_parallel::prelude::*;
use clap::{Args, ValueEnum};

use super::device::Compute;
use super::flags::up_to;
use super::given::{Given, in_words};
use super::program::{Ended, refused};

/// How long ranks have to save a last checkpoint when they are told to end.
#[cfg(unix)]
const GRACE: Duration = Duration::from_secs(30);

/// How long a rank that ends waits for others to tell them so.
const LEAVE: Duration = Duration::from_secs(60);

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
pub enum TransportFlag {
    /// Threads of one process
    Local,
    /// Processes, on one machine or many
    Tcp,
    /// Processes that mpirun or srun have started
    Mpi,
    /// NVIDIA GPUs: tensors go from GPU to GPU, the rest as without it
    Nccl,
}

/// How the ranks are started and joined.
#[derive(Args, Debug)]
pub struct LaunchFlags {
    /// What the ranks are: threads, processes of this program, or what a launcher has started [default: env under
    /// mpirun and torchrun, else threads]
    #[arg(long, value_enum, value_name = "HOW")]
    launch: Option<Launch>,

    /// How many times the ranks are started again when some are lost, with --launch processes: they go on from the last
    /// checkpoint
    #[arg(long, value_name = "K", default_value_t = 0, requires = "resume")]
    restarts: usize,

    /// Takes ranks that are lost for gone, and goes on with fewer replicas, on this many ranks at least: the batch
    /// stays. Also with what torchrun has started [default: as many ranks as before]
    #[arg(long, value_name = "N", value_parser = up_to::<1024>)]
    min_ranks: Option<usize>,

    /// What the ranks compute on
    #[arg(long, value_enum, value_name = "DEVICE", default_value_t = Compute::Flex)]
    device: Compute,

    /// What joins the ranks [default: local for threads; mpi for what mpirun has started, if built in; else tcp]. nccl
    /// comes on top of these
    #[arg(long, value_enum, value_name = "ENGINE")]
    transport: Option<TransportFlag>,
}

/// How to start.
#[derive(Clone, Debug)]
pub struct Start {
    pub launch: Launch,
    /// What the ranks compute on.
    pub device: Compute,
    /// What joins processes, if that has been said.
    pub transport: Option<TransportKind>,
    /// Whether NCCL joins the ranks' GPUs.
    pub nccl: bool,
    /// How many ranks have been started already.
    pub started: Option<usize>,
    /// How many times ranks are started again when some are lost.
    restarts: usize,
    /// On how few ranks the run goes on, if not on all.
    pub min_ranks: Option<usize>,
}

impl Start {
    /// How many of so many ranks are in this process.
    pub fn ranks_here(&self, ranks: usize) -> usize {
        if self.launch == Launch::Threads { ranks } else { 1 }
    }
}

impl LaunchFlags {
    /// How to start; or why the flags do not go together.
    pub fn read(&self) -> Result<Start, String> {
        let Self { launch, restarts, min_ranks, device, transport } = *self;
        // Else it would be found out when ranks have started.
        WorldConfig::from_env().map_err(|why| why.to_string())?;
        let place = ProcessInfo::from_env();
        let launch = match (launch, Launcher::of_env(), &place) {
            (Some(launch), ..) => launch,
            // In a batch script Slurm's variables are set for a single process as well: it must be asked for.
            (None, None | Some(Launcher::Slurm), _) => Launch::Threads,
            (None, Some(_), Ok(place)) if place.size > 1 => Launch::Env,
            (None, Some(_), Ok(_)) => Launch::Threads,
            // As a rank that trains alone the others would miss it.
            (None, Some(_), Err(why)) => {
                let instead = "or give --launch threads, which reads no variables of launchers";
                return Err(format!("{}: set what is missing or wrong, {instead}", problem(why)));
            }
        };
        let without = |flag: &str, feature: &str| {
            Err(format!("{flag}: this program was built without it; build with `--features {feature}`"))
        };
        if let Some(feature) = device.missing() {
            return without(&format!("--device {feature}"), feature);
        }
        let nccl = transport == Some(TransportFlag::Nccl);
        let transport = match (transport, launch) {
            (None, _) | (Some(TransportFlag::Local), Launch::Threads) => None,
            (Some(TransportFlag::Nccl), _) if cfg!(not(feature = "cuda")) => {
                return without("--transport nccl", "cuda");
            }
            (Some(TransportFlag::Nccl), _) if device != Compute::Cuda => {
                return Err("--transport nccl joins NVIDIA GPUs: give --device cuda".into());
            }
            (Some(TransportFlag::Nccl), _) => None,
            (Some(TransportFlag::Mpi), _) if cfg!(not(feature = "mpi")) => return without("--transport mpi", "mpi"),
            (Some(TransportFlag::Tcp | TransportFlag::Mpi), Launch::Threads) => {
                return Err("--transport tcp and mpi join processes: give --launch processes or env".into());
            }
            (Some(TransportFlag::Tcp), _) => Some(TransportKind::Tcp),
            (Some(TransportFlag::Mpi), _) => Some(TransportKind::Mpi),
            (Some(TransportFlag::Local), _) => {
                return Err("--transport local joins threads: give --launch threads".into());
            }
        };
        let started = match (launch, place) {
            (Launch::Env, place) => Some(place.map_err(|why| format!("--launch env: {}", problem(&why)))?.size),
            _ => None,
        };
        if restarts > 0 && launch != Launch::Processes {
            return Err("--restarts is for --launch processes: what other launchers start, they start again".into());
        }
        if min_ranks.is_some() && restarts == 0 && launch != Launch::Env {
            return Err("--min-ranks is for ranks that are started again: give --restarts as well".into());
        }
        Ok(Start { launch, device, transport, nccl, started, restarts, min_ranks })
    }
}

/// What is wrong with the variables of a launcher.
fn problem(why: &Error) -> String {
    match why {
        Error::InvalidArgument { problem, .. } => problem.clone(),
        why => why.to_string(),
    }
}

/// What a launcher's variables, or the flags beside them, say of the ranks is wrong, as these find when they meet.
fn wrongly_started(why: Error) -> Error {
    match why {
        Error::InvalidArgument { operation: "rendezvous" | "mpi", .. } | Error::Environment { .. } => refused(why),
        why => in_words(why),
    }
}

/// Tells the ranks that were started beside this one, by hand, that it has found its own flags or files wrong: they
/// would wait for it. Launchers end by themselves what they have started.
pub fn tell_others(wrong: &str) {
    let launched = ["TORCHELASTIC_RUN_ID", "BURN_PARALLEL_RUN"].iter().any(|name| env::var_os(name).is_some());
    let threads = env::args().any(|word| word == "threads" || word == "--launch=threads");
    let Ok(process) = launch::from_env() else { return };
    let info = process.info();
    if launched || threads || info.launcher != Launcher::Torchrun || info.size == 1 || info.under_mpi {
        return;
    }
    let timeout = WorldConfig::from_env().map_or(LEAVE, |config| config.timeout().min(LEAVE));
    // If nobody comes there is nobody to be told.
    let _ = process.timeout(timeout).run(|rank| Given::wrong(wrong).agree(&rank));
}

/// Runs `f` on so many ranks, once these have found that they were `given` the same. If some are lost, it is run again,
/// if the flags say so: on all, or on as many as `goes_on` says that it can. Returns what it returns on the first, in
/// the process that has the first; in all, that a signal has ended it.
pub fn run<T: Send>(
    start: &Start,
    ranks: usize,
    goes_on: impl Fn(usize) -> bool,
    (seed, given): (u64, &Given),
    f: impl Fn(Rank) -> Result<Ended<T>, Error> + Sync,
) -> Result<Option<Ended<T>>, Error> {
    let first = |rank: Rank| {
        let first = rank.rank() == 0;
        given.agree(&rank)?;
        f(rank).map(|ended| Some(ended).filter(|ended| first || matches!(ended, Ended::Stopped(_))))
    };
    let transport = start.transport;
    match start.launch {
        // They have one command line.
        Launch::Threads => launch::threads(ranks).seed(seed).run(f).map(|mut all| Some(all.swap_remove(0))),
        Launch::Env => {
            let process = launch::from_env()?.seed(seed);
            let process = transport.into_iter().fold(process, |process, transport| process.transport(transport));
            process.run(first).map_err(wrongly_started)
        }
        #[cfg(unix)]
        Launch::Processes => {
            let processes = launch::processes(ranks).transport(transport.unwrap_or(TransportKind::Tcp));
            let sizes =
                start.min_ranks.map_or(ranks..ranks, |fewest| fewest..ranks + 1).filter(|ranks| goes_on(*ranks));
            let processes = processes.restarts(start.restarts).restart_sizes(sizes).grace(GRACE);
            processes.run(|process| process.seed(seed), first).map(Option::flatten)
        }
        #[cfg(not(unix))]
        Launch::Processes => Err(Error::user("--launch processes: not on this system")),
    }
}
