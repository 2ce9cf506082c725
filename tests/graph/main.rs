//! Captured steps against eager burn: the same loss, gradients, running statistics and trained weights.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod capture;
mod errors;
mod execute;
mod forward;
mod fused;
mod parity;
mod products;
mod shard;
mod shared_factors;
mod token_loss;
