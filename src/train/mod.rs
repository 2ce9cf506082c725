//! Where strategies meet: replicas of models that are split themselves.
//!
//! A strategy that runs a model through its captured step is a [`GraphEngine`]; [`Replicas`] joins several of one kind along
//! another axis of the [`Mesh`](crate::mesh::Mesh):
//!
//! ```
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::{AdamWConfig, ModuleOptimizer};
//! use burn::prelude::*;
//! use burn_parallel::graph::TokenLoss;
//! use burn_parallel::prelude::*;
//!
//! launch::threads(4).run(|world| {
//!     let mesh = Mesh::new(&world, [("dp", 2), ("tp", 2)])?;
//!     let (dp, tp) = (mesh.axis("dp")?, mesh.axis("tp")?);
//!     let device = world.device().autodiff();
//!     let model: Linear = LinearConfig::new(4, 6).init(&device); // an ordinary burn model
//!     let plan = Plan::new().shard("weight", 1).shard("bias", 0);
//!     let mut model = model.tensor_parallel(&tp, &plan)?.data_parallel(&dp, DataParallelConfig::new())?;
//!     let mut optim: ModuleOptimizer = AdamWConfig::new().init();
//!     for _ in 0..3 {
//!         let rows = 2 + dp.rank(); // replicas may bring different numbers of rows
//!         let x = Tensor::<2>::ones([rows, 4], &device);
//!         let step = model.step(x, |model, x| {
//!             let rows = x.dims()[0];
//!             TokenLoss::of(model.forward(x).powi_scalar(2).sum(), rows)
//!         })?;
//!         model = optim.step(0.01, model, step.grads);
//!         assert_eq!(step.weight, 5.0); // the rows of both replicas, over which loss and gradients are averaged
//!     }
//!     Ok(())
//! })?;
//! # Ok::<(), Error>(())
//! ```

mod engine;
mod module;
mod replicas;

pub use engine::GraphEngine;
pub use replicas::{Replicas, Step};
