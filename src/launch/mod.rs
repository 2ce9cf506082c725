//! Starts the ranks of a world.
//!
//! ```
//! use burn_parallel::prelude::*;
//!
//! fn train(rank: Rank) -> Result<u64, Error> {
//!     rank.all_reduce(vec![rank.rank() as u64], ReduceOp::Sum).map(|sums| sums[0])
//! }
//!
//! let sums = launch::threads(4).run(train)?; // under torchrun, mpirun or srun: launch::from_env()?.run(train)?
//! assert_eq!(sums, [6; 4]);
//! # Ok::<(), Error>(())
//! ```
//!
//! [`threads`] runs every rank as a thread of this process, each with a compute-thread pool of its own. [`processes`]
//! starts this program several times on this machine. [`from_env`] is for programs that a launcher starts, on one
//! machine or many: torchrun, `mpirun`, `srun`. Processes are joined over TCP, or by MPI if its launcher has started
//! them.
//!
//! [`Processes::restarts`] starts lost ranks again; [`StopSignals`] tells all ranks that a cluster is about to end
//! them.

mod bounded;
mod end_with_parent;
mod environment;
mod process;
#[cfg(unix)]
mod processes;
mod rank;
mod reader;
#[cfg(unix)]
mod relay;
mod rendezvous;
#[cfg(unix)]
mod started;
mod stop;
#[cfg(unix)]
mod supervise;
mod threads;

pub(crate) use end_with_parent::end_with_parent;
pub use environment::{Launcher, ProcessInfo, RunNames};
pub use process::{Process, TransportKind, from_env};
#[cfg(unix)]
pub use processes::{Processes, processes};
pub use rank::Rank;
pub(crate) use reader::ended_by;
pub use stop::StopSignals;
pub use threads::{Threads, threads};

pub use crate::comm::tcp::Rendezvous;
pub use crate::error::StopSignal;
