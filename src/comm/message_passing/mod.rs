//! Collectives over point-to-point messages: the part that all transports between processes share.
//!
//! Such a transport implements [`Endpoint`]: non-blocking messages of bytes between two processes, from and into the
//! tensors themselves. Collectives are made of these, see `collectives/`; so every wait has a time-out, all dtypes and
//! reductions work over any endpoint, and the results are bit for bit those of [`local`](super::local). Groups are
//! lists of ranks with tags of their own: a split needs no support of the endpoint.
//!
//! Any thread of a rank may run any operation. Each world has a *watchdog* thread, which polls every few milliseconds
//! for control messages, and progresses sends while the rank computes.
//!
//! # How ranks agree on a collective
//!
//! Rank 0 of a group is the *group root*. The others send it their call and wait for its commit. When all calls have
//! arrived and match, it *commits* the collective and sends all calls to all ranks, which then know the lengths, roots
//! and factors of the others and move the data.
//!
//! After the commit no rank turns back, unless a rank of the group is lost: all are in the same collective and wait for
//! nothing but data. Before it, no buffer has been touched. All ranks must agree on whether a collective was committed,
//! also while the world fails. So the group root alone decides: it commits under a lock, and when it learns of the
//! failure it *closes* the group under the same lock and tells the others how many collectives were committed. A rank
//! that waits for a commit goes on waiting if its collective is among them, and returns the error if not. While the
//! group root computes, its watchdog thread answers for it.
//!
//! # Shared memory
//!
//! Where all ranks of a group are on one machine, and the endpoint allows it, the calls, the commit and short data do
//! not go through the endpoint but through memory that the ranks share: see `shared_memory/`. The protocol is the same.
//! `control_path.rs` describes how a group chooses between the two.
//!
//! # How a world fails
//!
//! A rank that finds an error proposes it to the *coordinator*, rank 0 of the world or, if that is lost, the next. The
//! coordinator takes the first proposal, queries all ranks for their last calls, puts these into the error and
//! broadcasts it: so all return the same one. A rank that leaves tells its groups, and how many collectives and
//! messages it took part in, so that only those miss it that still need it. A rank whose connection is lost is proposed
//! as lost by the rank that notices first.
//!
//! # Input from peers
//!
//! Whatever a peer sends is read with its lengths checked, and is an error if it is malformed: received numbers are not
//! used as offsets or sizes before they have been compared with what this rank knows.

mod agreement;
mod call_descriptor;
mod codec;
mod collectives;
mod control_path;
mod endpoint;
#[cfg(fuzzing)]
pub(in crate::comm) mod fuzzing;
mod group;
mod inbox;
#[cfg(test)]
pub(in crate::comm) mod message_store;
mod point_to_point;
mod request_table;
mod shared_memory;
#[cfg(test)]
mod tests;
mod transport;
mod wait;
mod world;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

pub(in crate::comm) use self::endpoint::{Clock, Endpoint, EndpointInfo, RecvBytes, Request, SendBytes, Thresholds};
use self::group::Group;
pub(in crate::comm) use self::request_table::RequestTable;
use self::transport::MessagePassingTransport;
use self::world::Membership;
pub(in crate::comm) use self::world::World;
use super::Communicator;
use super::WorldConfig;
use crate::Error;
use crate::lock::lock;

/// Joins a world: a rank's communicator, and the world, whose [`run_watchdog`](World::run_watchdog) a thread of its own
/// must run.
pub(in crate::comm) fn join_world(
    endpoint: Box<dyn Endpoint>,
    config: WorldConfig,
    oversubscribed: bool,
) -> (Communicator, Arc<World>) {
    let (rank, size) = (endpoint.rank(), endpoint.size());
    let world = World::new(endpoint, config.timeout, config.name, oversubscribed);
    let group = Group::new(0, world.name.clone(), (0..size).collect(), rank);
    let membership = Arc::new(Membership(world.clone()));
    (Communicator::new(MessagePassingTransport::new(membership, group)), world)
}

/// The worlds of a session, which outlives them.
#[derive(Debug)]
pub(in crate::comm) struct Worlds {
    watchdogs: Mutex<Vec<(Arc<World>, JoinHandle<()>)>>,
    /// Whether all worlds so far have ended cleanly.
    clean: Arc<AtomicBool>,
}

impl Worlds {
    pub fn new() -> Self {
        Self { watchdogs: Mutex::default(), clean: Arc::new(AtomicBool::new(true)) }
    }

    /// Creates a world of the processes that the endpoint joins, with its watchdog.
    pub fn create(&self, endpoint: Box<dyn Endpoint>, config: WorldConfig) -> Result<Communicator, Error> {
        config.check()?;
        let (rank, size) = (endpoint.rank(), endpoint.size());
        let (comm, world) = join_world(endpoint, config, wait::oversubscribed());
        let (guarded, clean) = (world.clone(), self.clean.clone());
        let watchdog = thread::Builder::new().name(format!("watchdog of rank {rank}")).spawn(move || {
            if !guarded.run_watchdog() {
                clean.store(false, Ordering::Release);
            }
        });
        let watchdog = watchdog.map_err(|problem| Error::Launch { rank, size, problem: problem.to_string() })?;
        lock(&self.watchdogs).push((world, watchdog));
        Ok(comm)
    }

    /// Leaves all worlds, also those that somebody still holds a communicator of, and waits until their ranks have
    /// ended; no longer than their time-out, over an endpoint that can reclaim buffers. Returns whether all ended
    /// cleanly.
    pub fn end(&self) -> bool {
        let watchdogs: Vec<_> = lock(&self.watchdogs).drain(..).collect();
        for (world, _) in &watchdogs {
            world.wait_until_idle();
            world.leave_world();
        }
        for (world, watchdog) in watchdogs {
            let _ = watchdog.join();
            world.close();
        }
        self.clean.load(Ordering::Acquire)
    }
}
