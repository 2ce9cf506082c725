//! What all strategies have in common: the gradient norm, sharded replicas.

#[path = "../common/mod.rs"]
mod common;

mod grad_norm;
mod zero;
mod zero_captured;
