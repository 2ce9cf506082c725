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

use self::group::{Group, WorldFailure};
use self::transport::LocalTransport;
use super::backoff::{self, Backoff};
use super::{Communicator, WorldConfig};
use crate::Error;

/// Most ranks of a world in one process: more threads than any system starts.
const MOST_RANKS: usize = 1 << 16;

/// Makes a world of `size` ranks in this process: one communicator for each, to be moved to its thread.
///
/// [`launch::threads`](crate::launch::threads) does this and starts the threads.
///
/// # Errors
/// [`Error::InvalidArgument`] if `size` is 0 or more than 65,536, or the time-out is 0.
///
/// ```
/// use burn_parallel::comm::{WorldConfig, local};
///
/// let world = local::world(2, WorldConfig::from_env()?)?;
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
    let world_failure = Arc::new(WorldFailure::new(size));
    let group = Group::new(config.name, (0..size).collect(), world_failure, config.timeout, backoff);
    Ok((0..size).map(|rank| Communicator::new(LocalTransport::new(group.clone(), rank))).collect())
}
