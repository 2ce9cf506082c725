//! What all strategies have in common: the gradient norm.

#[path = "../common/mod.rs"]
mod common;

mod grad_norm;
