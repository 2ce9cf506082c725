//! Tensor parallelism: the products, the layers, plans, and whole models that a plan splits.

#[path = "../common/mod.rs"]
mod common;

mod engines;
mod graph;
mod layers;
mod matmul;
mod padded;
mod plans;
mod surface;
mod wrap;
