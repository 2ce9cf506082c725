//! Sharded replicas (ZeRO; Rajbhandari et al. 2020, arXiv:1910.02054): replicas that divide among themselves what each
//! of them would otherwise hold whole.
//!
//! [`Sharding`] says what is divided. How is the same everywhere, whatever runs the model: a parameter, its gradient
//! and the state of its optimizer are divided by rows ([`Rows`]), and never flattened. A shard has the rank of its
//! parameter, so norms, optimizers and checkpoints see rows of a matrix. Collectives carry the shards of several
//! parameters together: those of a block, of one dtype (`groups`).
//!
//! ```
//! use burn::nn::LinearConfig;
//! use burn::optim::{AdamWConfig, ModuleOptimizer};
//! use burn::prelude::*;
//! use burn_parallel::prelude::*;
//!
//! let config = DataParallelConfig::new().with_sharding(Sharding::Gradients); // ZeRO 2
//! launch::threads(2).run(|rank| {
//!     let device = rank.device().autodiff();
//!     let mut model = LinearConfig::new(4, 6).init(&device).data_parallel(&rank, config.clone())?;
//!     let mut optim: ModuleOptimizer = AdamWConfig::new().init(); // its state: of this rank's rows alone
//!     let step = model.step(Tensor::<2>::ones([8, 4], &device), |model, x| model.forward(x).mean())?;
//!     model.optimize(&mut optim, 1e-2, step)?;
//!     Ok(())
//! })?;
//! # Ok::<(), Error>(())
//! ```

mod brought;
mod comms;
mod keep;
mod level;
mod owner;
mod pack;
mod param_groups;
mod params;
mod ranked;
mod rows;

pub use keep::Keep;
pub use level::Sharding;
pub use rows::Rows;

pub(crate) use brought::Brought;
pub(crate) use comms::ShardComms;
pub(crate) use owner::owners;
pub(crate) use pack::Pack;
pub(crate) use param_groups::{Member, groups};
pub(crate) use params::{ShardParam, ShardParams, UpdatedShards};
pub(crate) use ranked::RankedParam;
