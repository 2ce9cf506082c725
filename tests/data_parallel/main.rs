//! Data parallelism: replicas train like one device, alone and together with split models.

#[path = "../common/mod.rs"]
mod common;

mod batch_norm;
mod changes;
mod drift;
mod parity;
mod rules;
mod sampler;
mod split_replicas;
mod surface;
