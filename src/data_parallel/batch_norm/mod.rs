//! Synchronised batch norm: statistics over the rows of all ranks, as PyTorch's `SyncBatchNorm` computes them.
//!
//! [`sync_batch_norm`] rewrites a captured step so that every batch statistic passes a custom operation;
//! [`register_sync_batch_norm`] says what that operation computes. [`SyncBatchNorm`] captures and runs such steps for a
//! replica.

mod rewrite;
mod statistics;
mod steps;

pub use rewrite::{BatchNormSync, sync_batch_norm};
pub use statistics::register_sync_batch_norm;
pub(in crate::data_parallel) use steps::SyncBatchNorm;
