//! What a rank holds shrinks with the degree.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::graph::{CustomOps, Executor};
use burn_parallel::partition::register_collectives;
use burn_parallel::prelude::*;

use super::harness::{Axis, Case};
use super::vocabulary::{Tokens, VOCABULARY};
use crate::common::models::{Lm, Numbers, device};

/// A block of which everything large is split: the hidden layer is 512 times as wide as its ends.
#[derive(Module, Debug)]
struct Wide {
    first: Linear,
    second: Linear,
}

const WIDE: Case<Wide, (Tensor<2>, Tensor<2>)> = Case {
    make: |d| Wide { first: LinearConfig::new(3, 1536).init(d), second: LinearConfig::new(1536, 3).init(d) },
    batch: |seed| {
        let mut numbers = Numbers(seed);
        (numbers.tensor([96, 3], &device()), numbers.tensor([96, 3], &device()))
    },
    loss: |m, (x, y)| (m.second.forward(activation::gelu(m.first.forward(x))) - y).powi_scalar(2).mean(),
};

fn peak<M: Module, I: burn_parallel::graph::TensorTree + Clone>(case: &Case<M, I>, axis: Axis, fusion: bool) -> usize {
    launch::threads(1)
        .run(|rank| {
            let mut ops = CustomOps::new().with_fusion(fusion);
            register_collectives(&mut ops, axis.name, &rank);
            let (graph, _) = case.split(std::slice::from_ref(&axis), &[0]);
            Ok(Executor::new(graph, ops)?.memory().peak)
        })
        .unwrap()[0]
}

#[test]
fn activations_of_split_layers() {
    let plan = || Plan::new().shard("first.weight", 1).shard("first.bias", 0).shard("second.weight", 0);
    let whole = peak(&WIDE, Axis::new("tp", 1, plan()), true);
    for degree in [2, 3, 4, 8] {
        let part = peak(&WIDE, Axis::new("tp", degree, plan()), true);
        let share = part as f64 / whole as f64 * degree as f64;
        assert!((0.95..1.05).contains(&share), "{degree}: {share}");
    }
}

#[test]
fn activations_along_the_sequence() {
    // A large batch, so that weights and their gradients count for little.
    const LONG: Case<Lm, Tokens> = Case {
        make: |d| Lm::wide(VOCABULARY, 0.0, true, 2, d),
        batch: |seed| {
            let mut numbers = Numbers(seed);
            (numbers.classes([32, 12], 24, &device()), numbers.classes([32, 12], 24, &device()))
        },
        loss: |m, (x, y)| m.loss(x, y),
    };
    let axis = |degree| Axis::new("tp", degree, super::vocabulary::megatron_with_vocabulary());
    // One by one: heads are so narrow here that a sequence in parts sends the weights of attention, which then are in
    // memory, where heads in parts have them in tiles only.
    let whole = peak(&LONG, axis(1), false);
    let plain = peak(&LONG, axis(4), false);
    let sequence = peak(&LONG, axis(4).sequence(1), false);
    assert!(plain < whole && sequence < plain, "{whole} {plain} {sequence}");
}

#[test]
fn parameters() {
    let axis = Axis::new("tp", 4, Plan::megatron());
    let bytes = |graph: &burn_parallel::graph::StepGraph| -> usize {
        let split = graph.params.iter().filter(|param| axis.plan.layout(&param.path) != Layout::Replicated);
        split.map(|param| param.tensor.shape.num_elements()).sum()
    };
    let whole = bytes(&super::vocabulary::TOKENS.capture());
    let (part, _) = super::vocabulary::TOKENS.split(std::slice::from_ref(&axis), &[2]);
    assert_eq!(bytes(&part) * 4, whole);
}
