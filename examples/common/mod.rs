//! What programs share that train a model on ranks: flags, the start of the ranks, how large the batch is, what is
//! saved, what they tell.

pub mod attention;
pub mod batch;
pub mod command_line;
pub mod device;
pub mod figures;
pub mod fit;
pub mod flags;
pub mod given;
pub mod memory;
pub mod mesh;
pub mod program;
pub mod progress;
pub mod resume;
pub mod saving;
pub mod start;
pub mod usage;
