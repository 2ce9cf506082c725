//! What all strategies have in common: settings and configs, what fits, the gradient norm, sharded replicas, running
//! statistics, and how often a step walks the model.

#[path = "../common/mod.rs"]
mod common;

mod alike;
mod configs;
mod fits;
mod fused;
mod grad_norm;
mod noise;
mod noise_every;
mod optimizers;
mod others_moments;
mod panicking;
mod settings;
mod statistics;
mod walks;
mod zero;
mod zero_captured;
