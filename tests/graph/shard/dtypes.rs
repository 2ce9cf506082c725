//! Steps in other float types than `f32`.

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::{DType, activation};
use burn_parallel::partition::{bucket_reductions, fuse_products, overlap};
use burn_parallel::prelude::*;

use super::harness::{Axis, Case};
use crate::common::fill::cast;
use crate::common::models::{Numbers, device};

#[derive(Module, Debug)]
struct Block {
    first: Linear,
    dropout: Dropout,
    second: Linear,
    norm: LayerNorm,
}

fn block(dtype: DType, device: &Device) -> Block {
    let block = Block {
        first: LinearConfig::new(12, 24).init(device),
        dropout: DropoutConfig::new(0.2).init(),
        second: LinearConfig::new(24, 12).init(device),
        norm: LayerNormConfig::new(12).init(device),
    };
    cast(block, dtype)
}

fn batch(dtype: DType, seed: u64) -> (Tensor<3>, Tensor<3>) {
    let mut numbers = Numbers(seed);
    let mut draw = || numbers.tensor([6, 12, 12], &device()).cast(dtype);
    (draw(), draw())
}

fn loss(block: &Block, (x, y): (Tensor<3>, Tensor<3>)) -> Tensor<1> {
    let h = block.dropout.forward(activation::gelu(block.first.forward(x.clone())));
    (block.norm.forward(block.second.forward(h) + x) - y).powi_scalar(2).mean()
}

fn parity(case: &Case<Block, (Tensor<3>, Tensor<3>)>, tolerance: f32) {
    let references = case.alone(2);
    let plan = || Plan::new().shard("first.weight", 1).shard("first.bias", 0).shard("second.weight", 0);
    for axes in [
        vec![Axis::new("tp", 2, plan())],
        vec![Axis::new("tp", 3, plan()).sequence(1)],
        vec![Axis::new("tp", 2, plan()).sequence(1), Axis::batch(2)],
    ] {
        let rewrite = |graph: &mut _| {
            assert!(!fuse_products(graph).is_empty());
            bucket_reductions(graph, 1 << 20);
            overlap(graph);
        };
        case.compare_within(&axes, &references, rewrite, tolerance).unwrap();
    }
}

#[test]
fn f64() {
    parity(&Case { make: |d| block(DType::F64, d), batch: |seed| batch(DType::F64, seed), loss }, 1e-6);
}

#[test]
fn bf16() {
    parity(&Case { make: |d| block(DType::BF16, d), batch: |seed| batch(DType::BF16, seed), loss }, 0.1);
}

#[test]
fn f16() {
    parity(&Case { make: |d| block(DType::F16, d), batch: |seed| batch(DType::F16, seed), loss }, 0.02);
}
