//! Parallel training for [burn](https://burn.dev): wrap the module that you have, without editing it, and train it on
//! many ranks.
//!
//! ```
//! use burn::nn::LinearConfig;
//! use burn::optim::{AdamWConfig, ModuleOptimizer};
//! use burn::tensor::Tensor;
//! use burn_parallel::prelude::*;
//!
//! // Two ranks: threads of this process, each with a compute pool of its own.
//! let losses = launch::threads(2).run(|rank| {
//!     let device = rank.device().autodiff();
//!     let model = LinearConfig::new(4, 1).init(&device); // any burn module
//!     let mut model = model.data_parallel(&rank, DataParallelConfig::new())?;
//!     let mut optim: ModuleOptimizer = AdamWConfig::new().init();
//!     let mut losses = Vec::new();
//!     for _ in 0..5 {
//!         let rows = Tensor::<2>::ones([8, 4], &device); // this rank's share of the batch
//!         let step = model.step(rows, |model, rows| model.forward(rows).powf_scalar(2.0).mean())?;
//!         model = optim.step(1e-2, model, step.grads);
//!         losses.push(step.loss.item()); // the mean over all ranks
//!     }
//!     Ok(losses)
//! })?;
//! assert_eq!(losses[0], losses[1]);
//! assert!(losses[0][4] < losses[0][0]);
//! # Ok::<(), Error>(())
//! ```
//!
//! # Modules
//!
//! | module | what is in it |
//! |---|---|
//! | [`launch`] | starting the ranks of a world |
//! | [`mesh`] | ranks arranged along named axes |
//! | [`comm`] | the communicator: collectives and messages, and the trait for transports |
//! | [`layout`] | differentiable moves between layouts, for models written by hand |
//! | [`data_parallel`] | replicas: gradient buckets, accumulation, uneven data, synchronised batch norm, sampler |
//! | [`tensor`] | tensors whose kind, rank and device are known at run time only |
//! | [`params`] | parameters read from a store a part at a time |
//! | [`plan`] | which parameters are split, by path |
//! | [`tensor_parallel`] | any module split over ranks by a plan; explicit layers for models written with that in mind |
//! | [`pipeline_parallel`] | any module cut into stages; schedules as data, their validator and simulator, one executor for all |
//! | [`sharding`] | what replicas divide among themselves (ZeRO), by rows |
//! | [`optim`] | burn's SGD, Adam and AdamW in one pass over memory |
//! | [`step`] | what a training step takes and gives, with every strategy |
//! | [`train`] | where strategies meet: replicas of models that are split |
//! | [`batch`] | how large a batch is: its split, the noise of its gradient |
//! | [`checkpoint`] | what training needs to go on, written by any mesh and read by any other |
//! | [`hf`] | Hugging Face directories: opened, mapped onto a model, loaded by slices, written from any mesh |
//! | [`graph`] | a training step of any module as data: captured, rewritten, executed |
//! | [`partition`] | sharding propagation: a captured step split over the ranks of an axis, with the collectives it needs |
//!
//! # Words
//!
//! A *rank* is one worker, the *world* is all of them, a *group* is the ranks that one communicator joins. A *mesh* has
//! *axes*; tensors have *dims*. A *micro-batch* goes through the model at once; several make a step.
//!
//! # Failure
//!
//! Nothing waits for ever: a rank that panics, returns an error, leaves, or calls something
//! else than its peers fails the world, and all ranks return the same [`Error`], which says who did what.
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
// An example that is copied brings no import that it does not use.
#![doc(test(attr(deny(unused_imports))))]

pub mod batch;
pub mod checkpoint;
mod collective_matmul;
pub mod comm;
pub mod data_parallel;
mod delegate;
mod distribution;
mod error;
mod forms;
pub mod graph;
pub mod hf;
pub mod launch;
pub mod layout;
mod lock;
pub mod mesh;
mod nesting;
pub mod optim;
mod optimizer_mapper;
pub mod params;
pub mod partition;
pub mod pipeline_parallel;
pub mod plan;
pub mod sharding;
#[cfg(test)]
mod sources;
pub mod step;
pub mod tensor;
mod tensor_file;
pub mod tensor_parallel;
pub mod train;

pub use error::Error;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// What a training program needs.
pub mod prelude {
    pub use crate::Error;
    pub use crate::batch::NoiseScale;
    pub use crate::checkpoint::{CheckpointConfig, Checkpointer, DataPosition, TrainState};
    pub use crate::comm::{Communicator, ReduceOp};
    pub use crate::data_parallel::{DataParallel, DataParallelConfig};
    pub use crate::data_parallel::{DistributedDataset, DistributedSampler, Remainder};
    pub use crate::launch::{self, Rank};
    pub use crate::layout::{self, Layout};
    pub use crate::mesh::Mesh;
    pub use crate::optim::{FusedOptimizer, LoadOnHost};
    pub use crate::pipeline_parallel::cut::Cut;
    pub use crate::pipeline_parallel::{PipelineConfig, PipelineParallel, schedule::Schedule};
    pub use crate::plan::Plan;
    pub use crate::sharding::{Keep, Sharding};
    pub use crate::step::{Loss, Step};
    pub use crate::tensor_parallel::{TensorParallel, TensorParallelConfig};
    pub use crate::train::{Clip, Engine, Parallel, ParallelModule, Parallelize, Strategy};
}
