//! Ranks as processes of an MPI cluster, on the MPI that the cluster has (feature `mpi`).
//!
//! ```no_run
//! use burn_parallel::comm::{ReduceOp, local::WorldConfig, mpi::Session};
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
//! Messages of bytes between two processes, begun by `MPI_Isend` and `MPI_Irecv` from and into the tensors themselves and
//! watched by `MPI_Test`. Collectives are made of these, see `work.rs`. MPI's own collectives would block a thread
//! inside MPI for as long as a peer does not come, cannot be taken back when one never does, add floats in an order of
//! their own, and know no `bf16`. Made of messages, every wait has a time-out, all dtypes and reductions work, and the
//! results are bit for bit those of [`local`](super::local). Groups are lists of ranks with tags of their own: a split
//! asks nothing of MPI.
//!
//! Every call of MPI is short and made under one lock of the process, so any thread of a rank may be in any operation:
//! this needs `MPI_THREAD_SERIALIZED`, no more. Each world has a *warden*, a thread that looks every few milliseconds
//! whether there is news, and pushes on what is being sent while the rank computes.
//!
//! # How ranks come to a collective
//!
//! Rank 0 of a group is its *decider*. The others send it their call and wait for its word. When all calls are there and
//! agree, it *commits* the collective and sends all calls to all ranks, which then know the lengths, roots and factors of
//! the others and move the data.
//!
//! After the commit nobody turns back: MPI holds the buffers, but all ranks are at the same collective and have nothing to
//! wait for but data. Before it, no buffer has been touched. What remains is that all ranks are of one mind whether a
//! collective was committed, also while the world fails. So the decider alone knows: it commits under a lock, and when it
//! hears of the failure it *closes* the group under the same lock and tells the others how many collectives were
//! committed. A rank that waits for a word goes on waiting if its collective is among them, and returns the error if not.
//! A decider that computes is spoken for by its warden.
//!
//! # How a world fails
//!
//! Whoever finds an error proposes it to rank 0 of the world. Rank 0 takes the first proposal, asks all ranks for their last
//! calls, puts these into the error and tells everybody: so all return the same one. A rank that leaves tells its
//! groups, and how many collectives and messages it took part in, so that nobody misses it who need not.
//!
//! | what happens to a rank | what the others do |
//! |---|---|
//! | error, panic, abort, other call, leaves early | return the same [`Error`], at once |
//! | computes or hangs for too long | return [`Error::Timeout`], which names it |
//! | killed | the launcher ends the others and names it (mpirun, srun with `--kill-on-bad-exit`); else as above |
//! | killed or cut off while data moves | `MPI_Abort`, after the time-out and with the error printed: MPI can't give buffers back |

mod agree;
mod codec;
mod group;
mod mail;
mod pace;
mod transport;
mod wire;
mod work;
mod world;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use self::group::{Group, lock};
use self::transport::MpiTransport;
use self::wire::{Mpi, Wire};
use self::world::{Presence, World};
use super::Communicator;
use super::local::WorldConfig;
use crate::Error;

/// MPI in this process, from its initialisation to its end.
///
/// There is one for the process: MPI can't be initialised twice. Drop it after all communicators, on the thread that
/// started it: dropping it waits for all ranks.
#[derive(Debug)]
pub struct Session {
    mpi: Arc<Mpi>,
    wardens: Mutex<Vec<JoinHandle<()>>>,
    /// Whether all worlds so far have ended as they should.
    clean: Arc<AtomicBool>,
}

impl Session {
    /// Initialises MPI, unless somebody has already.
    ///
    /// # Errors
    /// [`Error::Engine`] if MPI can't be initialised, has been finalised, or allows one thread only.
    pub fn start() -> Result<Self, Error> {
        Ok(Self { mpi: Mpi::init()?, wardens: Mutex::default(), clean: Arc::new(AtomicBool::new(true)) })
    }

    /// Makes a world of all processes that were started together; all of them come to this call. There may be several
    /// worlds, one after the other or at the same time.
    ///
    /// # Errors
    /// [`Error::Engine`] if a rank does not come within the time-out.
    pub fn world(&self, config: WorldConfig) -> Result<Communicator, Error> {
        let wire = Wire::new(self.mpi.clone(), config.timeout)?;
        let (rank, size) = (wire.rank, wire.size);
        let world = World::new(wire, config.timeout, config.name, crowded());
        let group = Group::new(0, world.name.clone(), (0..size).collect(), rank);
        let (guarded, clean) = (world.clone(), self.clean.clone());
        let warden = thread::Builder::new().name(format!("warden of rank {rank}")).spawn(move || {
            if !guarded.guard() {
                clean.store(false, Ordering::Release);
            }
        });
        let warden = warden.map_err(|problem| Error::Launch { rank, size, problem: problem.to_string() })?;
        lock(&self.wardens).push(warden);
        let presence = Arc::new(Presence(world));
        Ok(Communicator::new(MpiTransport::new(presence, group)))
    }

    /// Runs `f` while no other thread of this process calls MPI through a world of this session: for code that calls MPI
    /// itself.
    pub fn exclusive<R>(&self, f: impl FnOnce() -> R) -> R {
        let _turn = self.mpi.turn();
        f()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for warden in lock(&self.wardens).drain(..) {
            let _ = warden.join();
        }
        // With a rank that is dead, the end of MPI would wait for ever: the launcher ends the others.
        if self.clean.load(Ordering::Acquire) {
            self.mpi.finalize();
        }
    }
}

/// Whether this machine runs more ranks than it has cores, as far as the launcher says.
fn crowded() -> bool {
    const VARIABLES: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE"];
    let ranks = VARIABLES.iter().find_map(|variable| std::env::var(variable).ok()?.parse::<usize>().ok());
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    ranks.is_some_and(|ranks| ranks > cores)
}
