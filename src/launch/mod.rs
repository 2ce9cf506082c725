//! Starting the ranks of a world.
//!
//! [`threads`] runs every rank as a thread of this process, each with a compute-thread pool of its own.

mod rank;
mod threads;

pub use rank::Rank;
pub use threads::{Threads, threads};
