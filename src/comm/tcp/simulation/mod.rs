//! A deterministic simulation of a world: a simulated network and clock, on one thread.
//!
//! The code under test is the real one: collectives, groups, watchdogs, connections. Only the system calls are
//! simulated: byte streams, which of them are ready, blocking, the clock. All that the system may choose is drawn from
//! a seed: how many bytes a call reads or writes, when they arrive, which thread runs next, how long one loses its
//! core. So a schedule can be run again by its number, and nothing depends on the machine.
//!
//! Threads are coroutines. They yield where a thread would park or sleep, and nowhere else, so that locks which are
//! held over calls of the endpoint are never waited for.
//!
//! Beside the connections there is an endpoint of messages, which may do what MPI may: collectives must work over any.
//!
//! The limits and windows are those of the schedule: some hundred bytes instead of some hundred kilobytes, so that
//! thousands of schedules reach all of them.

mod failures;
mod message_endpoint;
mod network;
mod operations;
mod schedule;
mod scripts;
mod wakes;

use self::network::Conditions;
use self::schedule::{RankContext, SimulatedWorld};
