//! The transport over MPI: ranks are processes of a cluster (feature `mpi`).
//!
//! ```no_run
//! use burn_parallel::comm::{ReduceOp, WorldConfig, mpi::Session};
//!
//! let session = Session::start()?; // under mpirun or srun
//! let world = session.world(WorldConfig::from_env()?)?;
//! let sum = world.all_reduce(vec![1.0f32; 8], ReduceOp::Sum)?;
//! # Ok::<(), burn_parallel::Error>(())
//! ```
//!
//! [`launch::from_env`](crate::launch::from_env) does this, and runs a function on the rank.
//!
//! # What MPI is used for
//!
//! Messages of bytes between two processes, started by `MPI_Isend` and `MPI_Irecv` from and into the tensors themselves
//! and polled by `MPI_Test`. Collectives are made of these. MPI's own collectives would block a thread inside MPI for
//! as long as a peer does not call, cannot be cancelled when one never does, add floats in an order of their own, and
//! know no `bf16`.
//!
//! Ranks of a group that are all on one machine (Linux) agree on collectives and exchange short data in memory that
//! they share, and leave long data to MPI. The memory is freed with the last of them, however they end; where it cannot
//! be had, everything goes over MPI.
//!
//! Every call of MPI is short and made under one lock of the process, so any thread of a rank may run any operation:
//! this needs `MPI_THREAD_SERIALIZED`, no more.
//!
//! # Failure
//!
//! | what happens to a rank | what the others do |
//! |---|---|
//! | error, panic, abort, other call, leaves early | return the same [`Error`], at once |
//! | computes or hangs for too long | return [`Error::Timeout`], which names it |
//! | killed | the launcher ends the others and names it (mpirun, srun with `--kill-on-bad-exit`); else as above |
//! | killed or cut off while data moves | `MPI_Abort`, after the time-out and with the error printed: MPI can't give buffers back |

mod endpoint;
mod process;

use std::sync::Arc;

use self::endpoint::MpiEndpoint;
use self::process::Mpi;
use super::Communicator;
use super::WorldConfig;
use super::message_passing::Worlds;
use crate::Error;

/// MPI in this process, from its initialisation to its end.
///
/// There is one for the process: MPI can't be initialised twice. Drop it after all communicators, on the thread that
/// started it: dropping it waits for all ranks.
#[derive(Debug)]
pub struct Session {
    mpi: Arc<Mpi>,
    worlds: Worlds,
}

impl Session {
    /// Initialises MPI, unless somebody has already.
    ///
    /// # Errors
    /// [`Error::Transport`] if MPI can't be initialised, has been finalised, or allows one thread only.
    pub fn start() -> Result<Self, Error> {
        Ok(Self { mpi: Mpi::init()?, worlds: Worlds::new() })
    }

    /// Makes a world of all processes that were started together; all of them come to this call. There may be several
    /// worlds, one after the other or at the same time.
    ///
    /// # Errors
    /// [`Error::Transport`] if a rank does not come within the time-out.
    pub fn world(&self, config: WorldConfig) -> Result<Communicator, Error> {
        config.check()?;
        let endpoint = MpiEndpoint::new(self.mpi.clone(), config.timeout)?;
        self.worlds.create(Box::new(endpoint), config)
    }

    /// Runs `f` while no other thread of this process calls MPI through a world of this session: for code that calls
    /// MPI itself.
    pub fn exclusive<R>(&self, f: impl FnOnce() -> R) -> R {
        let _locked = self.mpi.lock();
        f()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // With a rank that is dead, the end of MPI would wait for ever: the launcher ends the others.
        if self.worlds.end() {
            self.mpi.finalize();
        }
    }
}
