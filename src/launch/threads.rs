//! Runs ranks as threads of this process.

use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use burn::tensor::Device;

use super::Rank;
use crate::Error;
use crate::comm::{Communicator, panic_message};
use crate::comm::{WorldConfig, local};
use crate::error::{catch_quietly, caught, is_thrown};

/// Prepares a world of `size` ranks that are threads of this process. [`Threads::run`] starts it.
///
/// ```
/// use burn_parallel::prelude::*;
///
/// let sizes = launch::threads(4).run(|rank| Ok(rank.size()))?;
/// assert_eq!(sizes, [4, 4, 4, 4]);
/// # Ok::<(), Error>(())
/// ```
pub fn threads(size: usize) -> Threads {
    Threads { size, threads_per_rank: None, seed: 0, device: Device::flex(), timeout: None }
}

/// A world of threads to be started.
#[derive(Debug, Clone)]
#[must_use = "nothing runs before `run`"]
pub struct Threads {
    size: usize,
    threads_per_rank: Option<usize>,
    seed: u64,
    device: Device,
    timeout: Option<Duration>,
}

impl Threads {
    /// Sets how many threads compute for each rank. By default the cores are divided, at least one for each.
    ///
    /// Each rank has a rayon pool of its own: burn's CPU backend computes on the pool that it is called from, and ranks
    /// that share one wait for each other's work.
    pub fn threads_per_rank(mut self, threads: usize) -> Self {
        self.threads_per_rank = Some(threads);
        self
    }

    /// Sets the seed of the run, see [`Rank::seed`] and [`Rank::rng`]. Default 0.
    ///
    /// It does not seed burn's own generator, from which the initial values of layers and eager dropout are drawn: that
    /// is one for the process and device, which `Device::seed` seeds, before the ranks start.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the device of all ranks. Default [`Device::flex`].
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Sets the longest time a rank waits for its peers, in place of `BURN_PARALLEL_TIMEOUT_S` (default 300 s).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Runs `f` on every rank, each on a thread of its own, and returns their results in rank order.
    ///
    /// # Errors
    ///
    /// The first error of any rank, after all of them have ended: an error or a panic of one rank fails the world, and
    /// the others return from whatever they wait in. What `f` returned, if that was the same error on all ranks.
    /// [`Error::InvalidArgument`] and [`Error::Launch`] before anything runs.
    pub fn run<T, F>(self, f: F) -> Result<Vec<T>, Error>
    where
        T: Send,
        F: Fn(Rank) -> Result<T, Error> + Sync,
    {
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        let threads = self.threads_per_rank.unwrap_or((cores / self.size.max(1)).max(1));
        if threads == 0 {
            return Err(Error::invalid("threads_per_rank", "a rank needs at least 1 thread, not 0"));
        }
        let mut config = WorldConfig::from_env()?;
        if let Some(timeout) = self.timeout {
            config = config.with_timeout(timeout);
        }
        let world = local::world(self.size, config)?;
        let mut not_started = None;
        let own: Vec<OnceLock<Error>> = (0..self.size).map(|_| OnceLock::new()).collect();
        let ended: Vec<RankResult<T>> = thread::scope(|scope| {
            let mut handles = Vec::with_capacity(self.size);
            for comm in world {
                let index = comm.rank();
                let rank = Rank::new(comm.clone(), self.device.clone(), threads, self.seed);
                let (f, own) = (&f, &own[index]);
                let body = move || {
                    run_rank(rank, comm, threads, &|rank| {
                        f(rank).inspect_err(|cause| {
                            let _ = own.set(cause.clone());
                        })
                    })
                };
                match thread::Builder::new().name(format!("rank {index}")).spawn_scoped(scope, body) {
                    Ok(handle) => handles.push(handle),
                    Err(problem) => {
                        // Its communicator is gone with it, and the others find that out by themselves.
                        let problem = problem.to_string();
                        not_started = Some(Error::Launch { rank: index, size: self.size, problem });
                    }
                }
            }
            let lost = |_| Err(Error::invalid("launch::threads", "a rank's thread ended before its function"));
            handles.into_iter().map(|handle| handle.join().unwrap_or_else(lost)).collect()
        });
        match not_started {
            Some(error) => Err(error),
            None => ended.into_iter().collect::<Result<_, _>>().map_err(|error| of_all(&own).unwrap_or(error)),
        }
    }
}

/// The error that each rank returned, if it was the same on all.
fn of_all(own: &[OnceLock<Error>]) -> Option<Error> {
    let first = own.first()?.get()?;
    own.iter().all(|other| other.get() == Some(first)).then(|| first.clone())
}

/// A rank's result, or the error of the world.
type RankResult<T> = Result<T, Error>;

/// Runs one rank on its pool. A failure is told to the world, which keeps the first.
pub(super) fn run_rank<T, F>(rank: Rank, comm: Communicator, threads: usize, f: &F) -> RankResult<T>
where
    T: Send,
    F: Fn(Rank) -> Result<T, Error> + Sync,
{
    let index = comm.rank();
    // `comm` is kept to the end, so that peers learn that this rank is gone only after they can learn why.
    let fail = |error: Error| Err(comm.fail_with(error));
    let thread_name = move |thread| format!("rank {index} compute {thread}");
    let pool = match rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(thread_name).build() {
        Ok(pool) => pool,
        Err(problem) => return fail(Error::Launch { rank: index, size: comm.size(), problem: problem.to_string() }),
    };
    // Caught on the thread that it happens on, which knows the error of a panic that stands for one.
    let run = || catch_quietly(is_thrown, || f(rank)).or_else(|panic| caught(&*panic).map(Err).ok_or(panic));
    match pool.install(run) {
        Ok(Ok(result)) => {
            // Said outright: a tape that burn has not cleared away yet may keep communicators alive.
            comm.leave();
            Ok(result)
        }
        // An error that came from the world is not this rank's own.
        Ok(Err(cause)) if comm.failure().as_ref() == Some(&cause) => Err(cause),
        Ok(Err(cause)) => fail(Error::RankFailed { rank: index, cause: Box::new(cause), log: comm.log() }),
        Err(panic) => fail(Error::RankPanicked { rank: index, message: panic_message(&*panic), log: comm.log() }),
    }
}
