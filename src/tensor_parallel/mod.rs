//! Tensor parallelism: models whose layers are split over the ranks of a group.
//!
//! Any [`Module`](burn::module::Module), unedited: [`TensorParallel::tensor_parallel`] with a
//! [`Plan`](crate::plan::Plan) leaves each rank its parts of the parameters, and
//! [`ParallelModule::step`](crate::train::ParallelModule::step) runs a training step on them with the collectives that
//! it takes. [`Plan::suggest_for`](crate::plan::Plan::suggest_for) finds a plan for a model that it has never seen, and
//! [`ParallelModule::load`](crate::train::ParallelModule::load) reads each rank's parts only. For models that are
//! written with tensor parallelism in mind there are explicit [`layers`].
//!
//! ```
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::{AdamWConfig, ModuleOptimizer};
//! use burn::prelude::*;
//! use burn_parallel::prelude::*;
//!
//! launch::threads(2).run(|rank| {
//!     let device = rank.device().autodiff();
//!     let model: Linear = LinearConfig::new(4, 6).init(&device); // an ordinary burn model
//!     let plan = Plan::new().shard("weight", 1).shard("bias", 0);
//!     let mut model = model.tensor_parallel(&rank, &plan)?;
//!     let mut optim: ModuleOptimizer = AdamWConfig::new().init();
//!     for _ in 0..3 {
//!         let x = Tensor::<2>::ones([3, 4], &device);
//!         let step = model.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?;
//!         model = optim.step(0.01, model, step.grads);
//!     }
//!     assert_eq!(model.local().weight.dims(), [4, 3]);
//!     Ok(())
//! })?;
//! # Ok::<(), Error>(())
//! ```

mod activation;
mod config;
mod cost;
mod feeds;
pub mod functional;
#[cfg(feature = "cubecl")]
mod kernels;
pub mod layers;
mod sharded;
mod suggest;
mod wrap;

pub use config::TensorParallelConfig;
pub use sharded::Sharded;
pub use wrap::TensorParallel;
