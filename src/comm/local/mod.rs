//! The transport between threads of one process.
//!
//! Buffers are never copied into the transport. In a collective every rank publishes a descriptor of its buffers,
//! synchronizes with the others (see `barrier.rs` for the protocol), and then does its share of the work directly on
//! the memory of all ranks:
//!
//! - *all-reduce, reduce*: each rank reduces its `1/n` of the elements of all buffers, in rank order, and writes the
//!   result into all of them. `2 (n - 1) / n` of the bytes are moved per rank, the lower bound;
//! - *reduce-scatter*: each rank reduces its part of all inputs into its own output;
//! - *all-gather, gather, scatter, all-to-all, broadcast*: each rank copies its result straight from the owners.
//!
//! Tensors of GPUs stay there (see `device.rs`, feature `cubecl`). A message is the sent tensor itself. Several groups
//! work at the same time; within one group, collectives follow each other.

mod barrier;
mod call_timer;
mod collectives;
#[cfg(feature = "cubecl")]
mod device;
#[cfg(feature = "cubecl")]
mod device_reduce;
mod event_count;
mod group;
mod interrupted;
mod mailbox;
mod sync;
mod transport;

use std::sync::Arc;
use std::time::Duration;

use self::group::{Group, WorldFailure};
use self::transport::LocalTransport;
use super::Communicator;
use super::backoff::{self, Backoff};
use crate::Error;

/// Time-out when `BURN_PARALLEL_TIMEOUT_S` does not say otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

/// Most ranks of a world in one process: more threads than any system starts.
const MOST_RANKS: usize = 1 << 16;
/// A longer time-out is as good as none, and times worked out from it must not overflow.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The time-out, bounded.
pub(in crate::comm) fn bounded(timeout: Duration) -> Duration {
    timeout.min(LONGEST_TIMEOUT)
}

/// The settings of a world, over any transport.
#[derive(Debug, Clone)]
pub struct WorldConfig {
    pub(in crate::comm) timeout: Duration,
    pub(in crate::comm) name: Arc<str>,
}

impl WorldConfig {
    /// The default: group name `world`, and the time-out of the environment variable `BURN_PARALLEL_TIMEOUT_S` (seconds,
    /// fractions allowed), or 300 s.
    ///
    /// # Errors
    /// [`Error::Environment`] if the variable is not a positive number.
    pub fn from_env() -> Result<Self, Error> {
        const VARIABLE: &str = "BURN_PARALLEL_TIMEOUT_S";
        let timeout = match std::env::var_os(VARIABLE) {
            None => DEFAULT_TIMEOUT,
            Some(value) => {
                let value = value.to_string_lossy().into_owned();
                match value.trim().parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
                    Some(timeout) if !timeout.is_zero() => timeout,
                    _ => {
                        let expected = "a positive number of seconds";
                        return Err(Error::Environment { variable: VARIABLE, value, expected });
                    }
                }
            }
        };
        Ok(Self { timeout: bounded(timeout), name: "world".into() })
    }

    /// Sets how long any wait may last before the whole world fails with [`Error::Timeout`]. It must not be 0, which is an
    /// error when the world is made; more than 100 years are 100 years.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = bounded(timeout);
        self
    }

    /// Refuses settings that no world can work with.
    pub(in crate::comm) fn check(&self) -> Result<(), Error> {
        match self.timeout.is_zero() {
            false => Ok(()),
            true => Err(Error::invalid(
                "timeout",
                "0 s is no time-out: no rank could wait for another; give `timeout` or `with_timeout` a positive one, or set \
                 BURN_PARALLEL_TIMEOUT_S",
            )),
        }
    }

    /// How long any wait may last.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Sets the name by which errors call the group.
    pub fn with_name(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }
}

/// Makes a world of `size` ranks in this process: one communicator for each, to be moved to its thread.
///
/// [`launch::threads`](crate::launch::threads) does this and starts the threads.
///
/// # Errors
/// [`Error::InvalidArgument`] if `size` is 0 or more than 65,536, or the time-out is 0.
///
/// ```
/// use burn_parallel::comm::{ReduceOp, local};
///
/// let world = local::world(2, local::WorldConfig::from_env()?)?;
/// std::thread::scope(|scope| {
///     for comm in world {
///         scope.spawn(move || {
///             let ranks = comm.all_gather(vec![comm.rank() as i32]).unwrap();
///             assert_eq!(ranks, [0, 1]);
///         });
///     }
/// });
/// # Ok::<(), burn_parallel::Error>(())
/// ```
pub fn world(size: usize, config: WorldConfig) -> Result<Vec<Communicator>, Error> {
    if size == 0 {
        return Err(Error::invalid("local::world", "a world needs at least 1 rank, not 0"));
    }
    if size > MOST_RANKS {
        let problem = format!("a world of {size} ranks in one process was asked for, {MOST_RANKS} are the most");
        return Err(Error::invalid("local::world", problem));
    }
    config.check()?;
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    // With a core for each rank, spinning a few tens of microseconds saves two context switches a collective.
    let backoff = if size <= cores { Backoff { spins: 2000, yields: 20 } } else { Backoff { spins: 20, yields: 20 } };
    let world_failure = Arc::new(WorldFailure::default());
    let group = Group::new(config.name, (0..size).collect(), world_failure, config.timeout, backoff);
    Ok((0..size).map(|rank| Communicator::new(LocalTransport::new(group.clone(), rank))).collect())
}
