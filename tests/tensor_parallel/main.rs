//! Tensor parallelism: the products, the layers, plans, and whole models that a plan splits.

#[path = "../common/mod.rs"]
mod common;

mod bounded;
mod compare;
mod engines;
mod graph;
mod layers;
mod matmul;
mod models;
mod padded;
mod plans;
mod surface;
mod wrap;
