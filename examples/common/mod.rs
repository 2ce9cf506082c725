//! What programs share that train a model on ranks: flags, the start of the ranks, what they tell.

#[allow(dead_code, reason = "not every program finds out about its batch")]
pub mod batch;
pub mod device;
pub mod figures;
pub mod flags;
pub mod memory;
pub mod progress;
pub mod start;
pub mod usage;
