//! Checkpoints: what training needs to go on, written by any mesh and read by any other.
//!
//! A [`Checkpointer`] writes a [`TrainState`] (parameters, moments of optimizers, learning rate schedules, the place in
//! the random numbers, values of your own) into a directory, one for each step that is saved. Every rank writes the
//! slices that it holds, what several hold once, and reads the slices that it needs, whatever the axes were before:
//! replicas, splits, stages, padding. No rank ever holds more than its part and one tensor.
//!
//! A checkpoint is there as a whole or not at all: it is written under another name, brought to the disk and renamed. A
//! run that is killed at any moment leaves the one before untouched, and what it left half written is removed by the
//! next save.
//!
//! `docs/checkpoints.md` has the format.
//!
//! ```
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::{AdamWConfig, ModuleOptimizer};
//! use burn::prelude::*;
//! use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
//! use burn_parallel::prelude::*;
//!
//! # let dir = std::env::temp_dir().join(format!("checkpoint-doc-{}", std::process::id()));
//! let train = |world: Rank| {
//!     let device = world.device().autodiff();
//!     let model: Linear = LinearConfig::new(4, 6).init(&device);
//!     let mut model = model.parallelize(&world, &Strategy::new())?; // or any other strategy, next time
//!     let mut optim: ModuleOptimizer = AdamWConfig::new().init();
//!     let mut checkpoints = Checkpointer::new(&world, &dir, CheckpointConfig::new().with_keep_last(2))?;
//!     let found = checkpoints.restore(TrainState::new(&mut model).with_optimizer("adamw", &mut optim))?;
//!     let first = found.map_or(0, |restored| restored.step);
//!     for step in first..first + 3 {
//!         let x = Tensor::<2>::ones([2, 4], &device);
//!         let gave = model.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?;
//!         model = model.optimize(&mut optim, 0.01, gave)?;
//!         checkpoints.save(step + 1, TrainState::new(&mut model).with_optimizer("adamw", &mut optim))?;
//!     }
//!     checkpoints.latest()
//! };
//! assert_eq!(launch::threads(2).run(train)?, [Some(3); 2]);
//! assert_eq!(launch::threads(3).run(train)?, [Some(6); 3]); // goes on, on more ranks
//! # std::fs::remove_dir_all(&dir).unwrap();
//! # Ok::<(), Error>(())
//! ```

mod agree;
mod assign;
mod background;
mod checkpointer;
mod config;
mod contents;
mod cover;
mod directory;
mod draft_lock;
mod fault;
mod index;
mod job;
mod moments;
mod opened;
mod order;
mod params;
mod plan;
mod position;
mod read;
mod reading;
mod refill;
mod restore;
mod scalar;
mod scheduler;
mod state;
mod value;
mod write;

pub use checkpointer::Checkpointer;
pub use config::CheckpointConfig;
pub use directory::saved_steps;
pub use job::Saved;
pub use position::DataPosition;
pub use restore::Restored;
pub use state::TrainState;

use std::path::Path;

use crate::Error;

/// What is wrong with a checkpoint.
fn checkpoint_error(problem: impl Into<String>) -> Error {
    Error::Checkpoint { problem: problem.into() }
}

/// What is wrong with the state of an optimizer or a schedule of this name.
fn unreadable(name: &str, problem: impl std::fmt::Display) -> Error {
    checkpoint_error(format!("the state of `{name}` cannot be read out of burn's record: {problem}"))
}

/// What is wrong with a file of a checkpoint.
fn file_problem(path: &Path, problem: impl std::fmt::Display) -> Error {
    checkpoint_error(format!("{}: {problem}", path.display()))
}

#[cfg(test)]
mod tests;
