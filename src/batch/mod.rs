//! How large a batch is: how it is divided, what fits, how noisy its gradient is, and what that says of larger ones.
//!
//! A *global batch* is all rows that one optimizer step averages over: micro-batch x accumulation x replicas.
//! [`BatchSplit`] divides it. Two numbers bound its size:
//!
//! - **What fits** into the memory of a rank bounds the micro-batch. What a captured step needs is known without
//!   running it, of a whole model ([`step_memory`], [`rows_within`]) and of each rank's part of one that is spread over
//!   ranks ([`RankMemory`], [`rows_within_on_all`]); then it is tried ([`largest_that_fits`], by [`try_step`] on
//!   devices and [`try_in_child`] on CPUs, within the [`MemoryBudget`] of the system). A larger micro-batch keeps a
//!   processor busier; beyond that it makes no difference, since accumulation trains the same.
//! - **The critical batch size** bounds the global batch: beyond it a larger batch costs more data for the same loss,
//!   and saves few steps. [`NoiseScale`] estimates it during training, at almost no cost; [`critical_batch_size`]
//!   measures it.
//!
//! [`GrowBatch`] lets the batch follow the noise scale; [`AdamSettings`], [`sgd_learning_rate`] and [`warm_up`] have
//! the optimizer follow the batch.

mod budget;
mod child;
mod critical;
mod fit;
mod grow;
mod learning_rate;
mod noise_scale;
mod rank_memory;
mod split;

pub use crate::step::{GradientNoise, NoNoise};
pub use budget::MemoryBudget;
pub use child::try_in_child;
pub use critical::{Branch, CriticalBatch, critical_batch_size};
pub use fit::{Fit, Trial, largest_that_fits, model_memory, rows_within, step_memory, try_step};
pub use grow::GrowBatch;
pub use learning_rate::{AdamSettings, sgd_learning_rate, warm_up};
pub use noise_scale::NoiseScale;
pub use rank_memory::{RankMemory, rows_within_on_all};
pub use split::BatchSplit;
