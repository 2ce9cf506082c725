//! Ranks as processes, on one machine or many, over TCP: nothing to install.
//!
//! ```no_run
//! use std::time::Duration;
//! use burn_parallel::comm::{ReduceOp, WorldConfig, tcp::{Rendezvous, Session}};
//!
//! // Rank 1 of 2; the other is on the machine 10.0.0.1.
//! let rendezvous = Rendezvous::new(1, 2, "10.0.0.1", 29500, b"a secret", Duration::from_secs(60));
//! let session = Session::new();
//! let world = session.world(&rendezvous, WorldConfig::from_env()?)?;
//! let sum = world.all_reduce(vec![1.0f32; 8], ReduceOp::Sum)?;
//! # Ok::<(), burn_parallel::Error>(())
//! ```
//!
//! [`launch::from_env`](crate::launch::from_env) does this with what a launcher says, and runs a function on the rank.
//!
//! Every rank has a connection to every other. Large tensors go from the sender's memory to the kernel and from there
//! into the receiver's tensor; a message of up to 256 KiB is sent before it is asked for and copied once more if it
//! comes too early, at most 8 MiB of these from each rank. Whoever waits progresses the connections; a thread for each
//! world does when nobody waits.
//!
//! The ranks show each other that they know a secret (see [`Rendezvous`]). What they send afterwards is neither
//! encrypted nor signed: across machines, use a network that you trust.
//!
//! # Failure
//!
//! | what happens to a rank | what the others do |
//! |---|---|
//! | error, panic, abort, other call, leaves early | return the same [`Error`], at once |
//! | computes, hangs or is stopped for too long | return [`Error::Timeout`], which names it, after 1.5 times the time-out at most |
//! | killed, or its process ends | return [`Error::RankLost`], which names it, as soon as the connection closes |
//! | its machine or the network stops without a word | the same after half a minute of silence, or the time-out |
//! | sends what makes no sense | return [`Error::RankLost`]; the log says what came |
//!
//! Rank 0 says which of several errors it is; if it does not answer, the next rank does. A rank that was stopped and
//! goes on returns the error of the others; but if it was stopped while its connections were full of data, that error
//! waits behind the data, and does not come through before the others end: it returns a time-out of its own, which
//! names itself. Where the time-out is shorter than 4 s, each step of this takes up to 0.4 s all the same.
//!
//! A rank that is lost while data moves leaves the buffers of that collective half written.

mod connect;
mod connection;
pub(crate) mod descriptors;
mod endpoint;
mod frame;
#[cfg(fuzzing)]
pub(in crate::comm) mod fuzzing;
mod network;
mod poll;
mod read_uninit;
mod reading;
mod rendezvous;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod transfers;
mod writing;

pub use rendezvous::Rendezvous;
pub(crate) use rendezvous::nonce;

use self::endpoint::TcpEndpoint;
use self::rendezvous::{MAX_UNKNOWN, rendezvous_error};
use super::Communicator;
use super::WorldConfig;
use super::message_passing::Worlds;
use crate::Error;

/// Descriptors beside those of connections: the listener, and the waker.
const OWN_DESCRIPTORS: usize = 4;

/// The worlds of this process over TCP.
///
/// Drop it after all communicators: dropping it waits for the ranks of its worlds to end, so that nobody misses this
/// one, and so that its last messages arrive. It waits for the time-out at most, then leaves ranks that go on. A
/// communicator that still exists, in the tape of a tensor for instance, gives errors from then on.
#[derive(Debug)]
pub struct Session(Worlds);

impl Session {
    /// A session without a world.
    pub fn new() -> Self {
        Self(Worlds::new())
    }

    /// Makes a world of the ranks at a rendezvous; all of them make this call. There may be several worlds, one after
    /// the other or, at rendezvous with different ports, at the same time.
    ///
    /// # Errors
    /// [`Error::Transport`], if the rendezvous fails (see [`Rendezvous::all_gather`]), if the ranks cannot connect to
    /// each other, or if the system does not let this process open as many connections; [`Error::InvalidArgument`], if
    /// what the ranks were given is wrong, as an address of rank 0 that nobody knows; [`Error::Environment`] if the
    /// variable `BURN_PARALLEL_ADDRESS` is set and no IP address.
    pub fn world(&self, rendezvous: &Rendezvous, config: WorldConfig) -> Result<Communicator, Error> {
        config.check()?;
        let size = rendezvous.size();
        if size > 1 {
            // Two are kept for each connection; until all ranks are connected, others may connect as well.
            let count = size.saturating_mul(2).max(size.saturating_add(MAX_UNKNOWN)).saturating_add(OWN_DESCRIPTORS);
            descriptors::reserve(count, &format!("a world of {size} ranks over TCP")).map_err(rendezvous_error)?;
        }
        let endpoint = TcpEndpoint::new(rendezvous.rank(), connect::connect(rendezvous)?)?;
        self.0.create(Box::new(endpoint), config)
    }
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.0.end();
    }
}
