//! What programs share that train a model on ranks: flags, the start of the ranks, what they tell.

pub mod device;
pub mod figures;
pub mod flags;
pub mod memory;
pub mod progress;
pub mod start;
pub mod usage;
