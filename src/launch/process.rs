//! Runs this process as one rank.

use std::time::Duration;
use std::{fmt, thread};

use burn::tensor::Device;

use super::threads::run_rank;
use super::{ProcessInfo, Rank, Rendezvous};
use crate::Error;
use crate::comm::Communicator;
use crate::comm::tcp::Session;
use crate::comm::{WorldConfig, local};

/// What joins processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransportKind {
    /// TCP, on one machine or many: nothing to install.
    Tcp,
    /// MPI (feature `mpi`), for processes that its launcher has started.
    Mpi,
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Mpi => "mpi",
        })
    }
}

impl TransportKind {
    /// The one that fits how a process was started: MPI if it is built in and its launcher was at work, else TCP.
    pub fn of(info: &ProcessInfo) -> Self {
        if cfg!(feature = "mpi") && info.under_mpi { Self::Mpi } else { Self::Tcp }
    }

    /// Whether this program was built with it.
    ///
    /// # Errors
    /// [`Error::Transport`], which names the feature to build with.
    pub fn check(self) -> Result<(), Error> {
        match self == Self::Tcp || cfg!(feature = "mpi") {
            true => Ok(()),
            false => Err(Error::Transport {
                transport: "mpi",
                problem: "this program was built without it; build with `--features mpi`, which needs an MPI on the \
                          system (Debian: libopenmpi-dev, libclang-dev)"
                    .into(),
            }),
        }
    }
}

/// Finds out which rank this process is from the variables of torchrun, Slurm, Open MPI or MPICH. [`Process::run`]
/// joins the others.
///
/// ```no_run
/// use burn_parallel::prelude::*;
///
/// let process = launch::from_env()?;
/// eprintln!("{}", process.info()); // rank 3 of 8, number 1 on this machine, says Open MPI (OMPI_COMM_WORLD_*)
/// process.run(|rank| rank.barrier())?;
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// Those of [`ProcessInfo::from_variables`].
pub fn from_env() -> Result<Process, Error> {
    let info = ProcessInfo::from_env()?;
    log::info!("{info}");
    let transport = TransportKind::of(&info);
    Ok(Process { info, transport, threads: None, seed: 0, device: Device::flex(), timeout: None })
}

/// A rank to be run by this process.
#[derive(Debug, Clone)]
#[must_use = "nothing runs before `run`"]
pub struct Process {
    info: ProcessInfo,
    transport: TransportKind,
    threads: Option<usize>,
    seed: u64,
    device: Device,
    timeout: Option<Duration>,
}

impl Process {
    /// Which rank this is, and who said so.
    pub fn info(&self) -> &ProcessInfo {
        &self.info
    }

    /// Sets what joins the processes. Default [`TransportKind::of`] the process.
    pub fn transport(mut self, transport: TransportKind) -> Self {
        self.transport = transport;
        self
    }

    /// Sets how many threads compute. By default the cores are divided among the processes on this machine.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Sets the seed of the run, see [`Rank::seed`] and [`Rank::rng`]. Default 0. It does not seed burn's own
    /// generator, from which the initial values of layers and eager dropout are drawn: `Device::seed` does.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the device. Default [`Device::flex`].
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Sets the longest time this rank waits for its peers, in place of `BURN_PARALLEL_TIMEOUT_S` (default 300 s).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Runs `f` on this rank and returns its result, once all ranks have ended.
    ///
    /// # Errors
    /// The first error of any rank, the same in all processes. A world of one rank needs no transport; for more,
    /// [`Error::Transport`] if it is not built in; [`Error::InvalidArgument`] if the launcher's variables are not those
    /// of the other ranks, or the transport knows the ranks otherwise.
    pub fn run<T, F>(self, f: F) -> Result<T, Error>
    where
        T: Send,
        F: Fn(Rank) -> Result<T, Error> + Sync,
    {
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        let threads = self.threads.unwrap_or((cores / self.info.local_size.unwrap_or(self.info.size)).max(1));
        if threads == 0 {
            return Err(Error::invalid("threads", "a rank needs at least 1 thread, not 0"));
        }
        let mut config = WorldConfig::from_env()?;
        if let Some(timeout) = self.timeout {
            config = config.with_timeout(timeout);
        }
        let run = |comm: Communicator| {
            let rank = Rank::new(comm.clone(), self.device.clone(), threads, self.seed);
            let outcome = run_rank(rank, comm.clone(), threads, &f);
            // Said outright: a tape that burn has not cleared away yet may keep communicators alive.
            comm.leave();
            outcome
        };
        if self.info.size == 1 {
            return local::world(1, config)?.into_iter().map(run).next().unwrap_or_else(|| unreachable!());
        }
        self.transport.check()?;
        match self.transport {
            TransportKind::Tcp => self.over_tcp(config, run),
            TransportKind::Mpi => self.over_mpi(config, run),
        }
    }

    fn over_tcp<T>(&self, config: WorldConfig, run: impl Fn(Communicator) -> Result<T, Error>) -> Result<T, Error> {
        let rendezvous = Rendezvous::at(&self.info, config.timeout())?;
        // Dropped last, when the rank has dropped all communicators: it waits for the other processes.
        let session = Session::new();
        run(session.world(&rendezvous, config)?)
    }

    #[cfg(feature = "mpi")]
    fn over_mpi<T>(&self, config: WorldConfig, run: impl Fn(Communicator) -> Result<T, Error>) -> Result<T, Error> {
        // Dropped last, when the rank has dropped all communicators: it waits for the other processes.
        let session = crate::comm::mpi::Session::start()?;
        let comm = session.world(config)?;
        let ProcessInfo { rank, size, launcher, .. } = self.info;
        if (comm.rank(), comm.size()) != (rank, size) {
            let problem = format!(
                "MPI takes this process for rank {} of {}, {launcher} for rank {rank} of {size}; start it with mpirun, or \
                 with srun --mpi=pmix",
                comm.rank(),
                comm.size()
            );
            return Err(Error::invalid("mpi", problem));
        }
        run(comm)
    }

    #[cfg(not(feature = "mpi"))]
    fn over_mpi<T>(&self, _: WorldConfig, _: impl Fn(Communicator) -> Result<T, Error>) -> Result<T, Error> {
        unreachable!("the transport was checked to be built in")
    }
}
