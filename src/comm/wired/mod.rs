//! What engines for ranks that are processes have in common: collectives made of messages.
//!
//! An engine of this kind is a [`Wire`]: messages of bytes between two processes, begun now and done later, from and into the
//! tensors themselves. Collectives are made of these, see `work.rs`; so every wait has a time-out, all dtypes and reductions
//! work on any wire, and the results are bit for bit those of [`local`](super::local). Groups are lists of ranks with tags
//! of their own: a split asks nothing of the wire.
//!
//! Any thread of a rank may be in any operation. Each world has a *warden*, a thread that looks every few milliseconds
//! whether there is news, and pushes on what is being sent while the rank computes.
//!
//! # How ranks come to a collective
//!
//! Rank 0 of a group is its *decider*. The others send it their call and wait for its word. When all calls are there and
//! agree, it *commits* the collective and sends all calls to all ranks, which then know the lengths, roots and factors of
//! the others and move the data.
//!
//! After the commit nobody turns back, unless a rank of the group is lost: all are at the same collective and have nothing to
//! wait for but data. Before it, no buffer has been touched. What remains is that all ranks are of one mind whether a
//! collective was committed, also while the world fails. So the decider alone knows: it commits under a lock, and when it
//! hears of the failure it *closes* the group under the same lock and tells the others how many collectives were
//! committed. A rank that waits for a word goes on waiting if its collective is among them, and returns the error if not.
//! A decider that computes is spoken for by its warden.
//!
//! # The board
//!
//! Where all ranks of a group live on one machine, and the wire says that they may, the calls, the word and what is short do
//! not go over the wire but through memory that the ranks share: see `board/`. What is decided, and by whom, is the same. `venue.rs`
//! tells how a group comes to its board.
//!
//! # How a world fails
//!
//! Whoever finds an error proposes it to the *judge*, rank 0 of the world or, if that is lost, the next. The judge takes the
//! first proposal, asks all ranks for their last calls, puts these into the error and tells everybody: so all return
//! the same one. A rank that leaves tells its groups, and how many collectives and messages it took part in, so that nobody
//! misses it who need not. A rank that the wire has lost is proposed as lost by whoever notices first.
//!
//! # What comes from outside
//!
//! Whatever a peer sends is read with its lengths checked, and an error if it makes no sense: numbers are never taken for
//! places or sizes before they have been compared with what this rank knows.

mod agree;
mod board;
mod codec;
#[cfg(fuzzing)]
pub(in crate::comm) mod fuzzing;
mod group;
mod mail;
mod pace;
#[cfg(test)]
mod tests;
mod transport;
mod venue;
mod wire;
mod work;
mod world;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use self::group::Group;
pub(in crate::comm) use self::group::lock;
use self::transport::WiredTransport;
pub(in crate::comm) use self::wire::{Sizes, Ticket, Wire};
use self::world::Presence;
pub(in crate::comm) use self::world::World;
use super::Communicator;
use super::local::WorldConfig;
use crate::Error;

/// A rank's communicator of a world, and the world, whose [`guard`](World::guard) a thread of its own must run.
pub(in crate::comm) fn enter(wire: Box<dyn Wire>, config: WorldConfig, crowded: bool) -> (Communicator, Arc<World>) {
    let (rank, size) = (wire.rank(), wire.size());
    let world = World::new(wire, config.timeout, config.name, crowded);
    let group = Group::new(0, world.name.clone(), (0..size).collect(), rank);
    let presence = Arc::new(Presence(world.clone()));
    (Communicator::new(WiredTransport::new(presence, group)), world)
}

/// The worlds of a session, which outlives them.
#[derive(Debug)]
pub(in crate::comm) struct Worlds {
    wardens: Mutex<Vec<(Arc<World>, JoinHandle<()>)>>,
    /// Whether all worlds so far have ended as they should.
    clean: Arc<AtomicBool>,
}

impl Worlds {
    pub fn new() -> Self {
        Self { wardens: Mutex::default(), clean: Arc::new(AtomicBool::new(true)) }
    }

    /// A world of the processes that the wire joins.
    pub fn found(&self, wire: Box<dyn Wire>, config: WorldConfig) -> Result<Communicator, Error> {
        config.check()?;
        let (rank, size) = (wire.rank(), wire.size());
        let (comm, world) = enter(wire, config, pace::crowded());
        let (guarded, clean) = (world.clone(), self.clean.clone());
        let warden = thread::Builder::new().name(format!("warden of rank {rank}")).spawn(move || {
            if !guarded.guard() {
                clean.store(false, Ordering::Release);
            }
        });
        let warden = warden.map_err(|problem| Error::Launch { rank, size, problem: problem.to_string() })?;
        lock(&self.wardens).push((world, warden));
        Ok(comm)
    }

    /// Leaves all worlds, also those that somebody still holds a communicator of, and waits until their ranks have ended;
    /// no longer than their time-out, on a wire that gives back what it was lent. Returns whether all ended as they should.
    pub fn end(&self) -> bool {
        let wardens: Vec<_> = lock(&self.wardens).drain(..).collect();
        for (world, _) in &wardens {
            world.settle();
            world.depart();
        }
        for (world, warden) in wardens {
            let _ = warden.join();
            world.close();
        }
        self.clean.load(Ordering::Acquire)
    }
}
