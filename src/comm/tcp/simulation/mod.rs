//! A world of ranks over a network that is simulated, in a time that is simulated, on one thread.
//!
//! The code under test is the real one: collectives, groups, wardens, connections. What is simulated is what it asks of
//! the system: streams of bytes, which of them are ready, rests, the time. All that the system may do as it likes is drawn
//! from a seed: how many bytes a call takes or gives, when they come, which thread runs next, how long one loses its core.
//! So a schedule can be run again by its number, and nothing depends on the machine.
//!
//! Threads are coroutines. They give way where a thread would rest or sleep, and nowhere else, so that locks which are held
//! over calls of the wire are never waited for.
//!
//! Beside the connections there is a wire of whole messages, which may do what MPI may: what the collectives are made of must
//! work over any.
//!
//! Limits and windows are those of the schedule: some hundred bytes instead of some hundred kilobytes, so that thousands of
//! schedules meet all of them.

mod failures;
mod messages;
mod network;
mod schedule;
mod scripts;

use self::network::Plan;
use self::schedule::{Here, Simulation};
