//! What all strategies have in common: the gradient norm, sharded replicas, and how often a step walks the model.

#[path = "../common/mod.rs"]
mod common;

mod grad_norm;
mod walks;
mod zero;
