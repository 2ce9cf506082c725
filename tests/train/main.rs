//! What all strategies have in common: settings, the gradient norm, sharded replicas.

#[path = "../common/mod.rs"]
mod common;

mod grad_norm;
mod settings;
mod zero;
mod zero_captured;
