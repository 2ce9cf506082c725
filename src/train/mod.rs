//! Training with any mix of strategies: one trait over everything that a model can be wrapped in.
//!
//! [`ParallelModule`] is what all wrappers have in common, so a training loop is written once.
//! [`Parallelize::parallelize`] wraps a model as a [`Strategy`] says, which a file can hold. By hand it is wrapped axis
//! by axis of a [`Mesh`](crate::mesh::Mesh):
//!
//! ```
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::{AdamWConfig, ModuleOptimizer};
//! use burn::prelude::*;
//! use burn_parallel::prelude::*;
//!
//! fn train<P: ParallelModule<Model = Linear>>(mut model: P, device: &Device) -> Result<P, Error> {
//!     let mut optim: ModuleOptimizer = AdamWConfig::new().init();
//!     let (replica, _) = model.replica(); // of two
//!     let rows = 2 + replica; // replicas may bring different numbers of rows
//!     for _ in 0..3 {
//!         let x = Tensor::<2>::ones([rows, 4], device);
//!         let step = model.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?;
//!         assert_eq!(step.weight, 5.0); // the rows of both replicas, over which loss and gradients are averaged
//!         model = model.optimize(&mut optim, 0.01, step)?;
//!     }
//!     Ok(model)
//! }
//!
//! launch::threads(4).run(|world| {
//!     let mesh = Mesh::new(&world, [("dp", 2), ("tp", 2)])?;
//!     let (dp, tp) = (mesh.axis("dp")?, mesh.axis("tp")?);
//!     let device = world.device().autodiff();
//!     let model: Linear = LinearConfig::new(4, 6).init(&device); // an ordinary burn model
//!     let plan = Plan::new().shard("weight", 1).shard("bias", 0);
//!     let model = model.tensor_parallel(&tp, plan)?.data_parallel(&dp, DataParallelConfig::new())?;
//!     train(model, &device)?;
//!     Ok(())
//! })?;
//! # Ok::<(), Error>(())
//! ```

mod clip_step;
mod module;
mod norm;
mod optimize;
mod parallel;
mod report;
mod same_strategy;
mod strategy;
mod unread;
mod unreplicated;
mod wrap;

pub use module::ParallelModule;
pub use norm::{Clip, Clipped, HandSplit, NonFinite, Norm};
pub(crate) use optimize::whole_owners;
pub use parallel::{Parallel, Parallelize};
pub use report::Report;
pub use strategy::{Engine, Strategy};
