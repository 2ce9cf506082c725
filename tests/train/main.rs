//! What all strategies have in common: settings, the gradient norm.

#[path = "../common/mod.rs"]
mod common;

mod grad_norm;
mod settings;
