//! Data parallelism: a replica of the model on every rank, each with its share of the batch, and one gradient.
//!
//! [`DataParallel`] is implemented for every burn [`Module`]. Wrapping broadcasts rank 0's parameters and returns a
//! [`Replica`], which dereferences to the model; `backward` on it returns the gradients of the whole batch, and burn's
//! own optimizers do the rest:
//!
//! ```
//! use burn::nn::LinearConfig;
//! use burn::optim::{ModuleOptimizer, SgdConfig};
//! use burn::tensor::Tensor;
//! use burn_parallel::prelude::*;
//!
//! let weights = launch::threads(2).run(|rank| {
//!     let device = rank.device().autodiff();
//!     let mut model = LinearConfig::new(3, 1).init(&device).data_parallel(&rank, DataParallelConfig::new())?;
//!     let mut optim: ModuleOptimizer = SgdConfig::new().init();
//!     for _ in 0..3 {
//!         let input = Tensor::<2>::ones([4, 3], &device) * (rank.rank() as f32 + 1.0);
//!         let loss = model.forward(input).mean();
//!         let grads = model.backward(loss)?;
//!         model = optim.step(0.1, model, grads);
//!     }
//!     Ok(model.weight.val().into_data())
//! })?;
//! assert_eq!(weights[0], weights[1]);
//! # Ok::<(), Error>(())
//! ```
//!
//! The design is that of PyTorch's `DistributedDataParallel` (Li et al. 2020, arXiv:2006.15704): gradients are reduced
//! in buckets, in the order in which backward completes them, while backward goes on. What differs: accumulation is a
//! property of the step and not of a context, averages are weighted by what was really seen
//! ([`Loss`](crate::step::Loss)), and ranks may bring different numbers of batches
//! ([`ParallelModule::join`](crate::train::ParallelModule::join)).
//!
//! What replicas would all hold alike (the state of the optimizer, gradients, parameters) can be divided among them:
//! `DataParallelConfig::with_sharding` (ZeRO), after which steps are taken by `optimize`.
//!
//! # Data
//!
//! Each rank reads its own share of the data. [`DistributedSampler`] says which items these are, without losing or
//! repeating any, and [`DistributedDataset`] makes of them a burn dataset for burn's dataloaders.
//!
//! # Random numbers
//!
//! The order in which a [`DistributedSampler`] shuffles depends on its seed and the epoch only: every rank computes the
//! same one for itself, in every run, whatever else draws random numbers.
//!
//! Ranks that are threads share burn's random generator with each other: `Dropout` and random tensors then draw numbers
//! that depend on which thread comes first, and a run does not repeat itself bit by bit. Parameters are not touched by
//! this: they come from rank 0. What can be drawn outside burn is better drawn from
//! [`Rank::rng`](crate::launch::Rank::rng), which is a stream of its own for each rank.

mod arrivals;
mod batch_norm;
mod bucket_launch;
mod bucket_reduction;
mod buckets;
mod by_rows;
mod changes;
mod comm_hook;
mod config;
mod dataset;
mod each;
mod eager;
mod fingerprint;
mod gathered;
mod hook;
mod join;
mod known_params;
mod lent_params;
mod loss_weight;
mod module_impl;
mod noise_meter;
mod norm_carrier;
mod reducer;
mod reducer_sink;
mod reduction;
mod reduction_state;
mod register;
mod replica;
mod replica_backward;
mod replica_step;
mod replicate;
mod same_settings;
mod sampler;
mod shard_update;
mod structure;

use std::sync::Arc;

use burn::module::Module;

pub use batch_norm::{BatchNormSync, register_sync_batch_norm, sync_batch_norm};
pub use comm_hook::{AllReduceHook, Bucket, CastHook, CommHook};
pub use config::DataParallelConfig;
pub use dataset::DistributedDataset;
pub use eager::Eager;
pub use join::{Join, JoinLoader};
pub use replica::Replica;
pub use sampler::{DistributedSampler, Remainder, Share};

use self::gathered::shard_parameters;
use self::hook::{AttachHooks, HookGroup};
use self::replicate::replicate;
use crate::Error;
use crate::comm::Communicator;
use crate::nesting;
use crate::params::share_ids;
use crate::sharding::Sharding;

/// Makes any burn module a replica of a data-parallel group.
pub trait DataParallel: Module {
    /// Wraps the module. Collective over `group`: every rank wraps the same model. All parameters and buffers take rank
    /// 0's values; quantized ones stay as they are.
    ///
    /// With [`Sharding::Parameters`] each rank keeps its rows of the parameters, which no rank but the first holds
    /// whole meanwhile, one at a time. Then a forward, whoever calls it, is collective: all ranks run the same layers
    /// in the same order, or [say what they need](DataParallelConfig::with_allow_unused_parameters).
    ///
    /// Attach LoRA adapters before wrapping, or after [`Replica::into_inner`]: a parameter takes one
    /// reparameterization, and the replica's hook is one.
    ///
    /// What is trained or put in later, on all ranks alike, takes part from the next step on. The values of new layers
    /// are made equal by steps that run the forward themselves, and demanded to be equal by [`Replica::backward`].
    ///
    /// A model that is split as well is split first: `tensor_parallel`, then `pipeline_parallel`, then `data_parallel`.
    /// The other way round does not compile, or, in code that is generic over the module, is an error.
    ///
    /// # Errors
    ///
    /// [`Error::Nesting`] if the module is wrapped already; [`Error::ModelMismatch`] if the ranks' models differ in
    /// structure; [`Error::InvalidArgument`] if parameters are on several devices, settings do not go together, ranks
    /// bring different ones, or parameters are to be gathered [for a pass](crate::sharding::Keep::Pass) and the model
    /// is not on a device with gradient checkpointing; those of [`Communicator`].
    fn data_parallel(self, group: &Communicator, config: DataParallelConfig) -> Result<Replica<Eager<Self>>, Error> {
        nesting::check(&self, "data_parallel")?;
        let hooks = HookGroup::new();
        let (mut module, reducer, gatherer) = match config.sharding {
            Sharding::Parameters if group.size() > 1 => {
                let (module, reducer, gatherer) = shard_parameters(self, group, config, hooks)?;
                (module, reducer, Some(gatherer))
            }
            _ => {
                let shared = |module, group: &_| share_ids(module, group).map(|(module, _)| module);
                let (module, reducer) = replicate(self, group, config, shared)?;
                (module, Arc::new(reducer), None)
            }
        };
        if group.size() > 1 {
            let mut indices = reducer.indices();
            indices.retain(|id, _| gatherer.as_ref().is_none_or(|gatherer| gatherer.rows(*id).is_none()));
            module = module.apply_reparameterization(AttachHooks::new(&reducer, hooks, &indices));
        }
        let control = reducer.control().clone();
        Ok(Replica::of(Eager::new(module, gatherer, hooks, control), reducer, Some(hooks)))
    }
}

impl<M: Module> DataParallel for M {}
