//! What all strategies have in common: the gradient norm, and how often a step walks the model.

#[path = "../common/mod.rs"]
mod common;

mod grad_norm;
mod walks;
