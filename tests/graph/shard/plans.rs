//! Random plans on random small models, over one axis and over two.

use burn::module::Module;
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::prelude::*;
use proptest::prelude::*;

use super::harness::{Axis, Case};
use super::vocabulary::{POST, TOKENS, VOCABULARY};
use crate::common::models::{Cnn, Numbers, cross_entropy, device, images};

/// Layers of which each run does some, as the second input says.
#[derive(Module, Debug)]
struct Chain {
    layers: Vec<Linear>,
    norms: Vec<LayerNorm>,
}

const WIDTH: usize = 12;

impl Chain {
    fn new(device: &Device) -> Self {
        Self {
            layers: (0..4).map(|_| LinearConfig::new(WIDTH, WIDTH).init(device)).collect(),
            norms: (0..2).map(|_| LayerNormConfig::new(WIDTH).init(device)).collect(),
        }
    }
}

type RowBatch = (Tensor<2>, Tensor<1, Int>);

fn rows(seed: u64) -> RowBatch {
    let mut numbers = Numbers(seed + 8);
    (numbers.tensor([12, WIDTH], &device()), numbers.classes([12], WIDTH, &device()))
}

/// One of 5^4 models: what is done at each of four places.
fn chain<const A: u8, const B: u8>(model: &Chain, (x, targets): RowBatch) -> Tensor<1> {
    let mut x = x;
    let mut kept = x.clone();
    for (place, what) in [A, B, A.wrapping_mul(3) % 5, B.wrapping_mul(2) % 5].into_iter().enumerate() {
        let h = model.layers[place].forward(x.clone());
        x = match what {
            0 => activation::gelu(h),
            1 => model.norms[place % 2].forward(h + x),
            2 => activation::softmax(h, 1) * kept.clone() + x,
            3 => h.clone().matmul(activation::tanh(h).transpose()).matmul(kept.clone()),
            _ => h.reshape([6, 2, WIDTH]).swap_dims(0, 1).sum_dim(0).expand([2, 6, WIDTH]).reshape([12, WIDTH]) + x,
        };
        kept = kept.tanh() + x.clone().mean_dim(0);
    }
    cross_entropy(x, targets)
}

const CHAINS: [Case<Chain, RowBatch>; 10] = [
    Case { make: Chain::new, batch: rows, loss: chain::<0, 1> },
    Case { make: Chain::new, batch: rows, loss: chain::<1, 2> },
    Case { make: Chain::new, batch: rows, loss: chain::<2, 3> },
    Case { make: Chain::new, batch: rows, loss: chain::<3, 4> },
    Case { make: Chain::new, batch: rows, loss: chain::<4, 0> },
    Case { make: Chain::new, batch: rows, loss: chain::<1, 4> },
    Case { make: Chain::new, batch: rows, loss: chain::<2, 0> },
    Case { make: Chain::new, batch: rows, loss: chain::<3, 1> },
    Case { make: Chain::new, batch: rows, loss: chain::<4, 2> },
    Case { make: Chain::new, batch: rows, loss: chain::<0, 3> },
];

/// A plan from random numbers: which parameters are split and along which dims, which inputs, and whether the sequence
/// is.
fn axis<M: Module, I: burn_parallel::graph::TensorTree + Clone>(
    case: &Case<M, I>,
    name: &'static str,
    degree: usize,
    divisor: usize,
    choices: &[u8],
) -> Axis {
    let graph = case.capture();
    let mut draw = choices.iter().copied().cycle();
    let mut draw = |n: usize| draw.next().unwrap_or(0) as usize % n;
    let mut plan = Plan::new();
    for param in graph.params.iter().filter(|param| !param.path.contains("running")) {
        let dims: Vec<usize> =
            (0..param.tensor.shape.num_dims()).filter(|dim| param.tensor.shape[*dim] % divisor == 0).collect();
        if draw(3) > 0 && !dims.is_empty() {
            plan = plan.shard(param.path.clone(), dims[draw(dims.len())]);
        }
    }
    let inputs = graph.inputs.iter().map(|input| match draw(3) == 0 && input.tensor.shape[0] % divisor == 0 {
        true => Layout::Sharded(0),
        false => Layout::Replicated,
    });
    let inputs = inputs.collect();
    Axis { inputs, sequence: [None, Some(0), Some(1)][draw(3)], ..Axis::new(name, degree, plan) }
}

fn one_axis<M: Module, I: burn_parallel::graph::TensorTree + Clone>(case: &Case<M, I>, degrees: &[usize], cases: u32) {
    let references = case.alone(1);
    let plan = (0..degrees.len(), proptest::collection::vec(any::<u8>(), 97));
    proptest!(ProptestConfig { failure_persistence: None, max_shrink_iters: 8, ..ProptestConfig::with_cases(cases) },
    |((degree, choices) in plan)| {
        let axes = [axis(case, "tp", degrees[degree], degrees[degree], &choices)];
        case.compare(&axes, &references).unwrap();
    });
}

fn two_axes<M: Module, I: burn_parallel::graph::TensorTree + Clone>(
    case: &Case<M, I>,
    degrees: &[[usize; 2]],
    cases: u32,
) {
    let references = case.alone(1);
    let choices = || proptest::collection::vec(any::<u8>(), 97);
    let plan = (0..degrees.len(), choices(), choices());
    proptest!(ProptestConfig { failure_persistence: None, max_shrink_iters: 8, ..ProptestConfig::with_cases(cases) },
    |((degree, a, b) in plan)| {
        // A dim may be split by both, so both must divide it.
        let [outer, inner] = degrees[degree];
        let axes = [axis(case, "a", outer, outer * inner, &a), axis(case, "b", inner, outer * inner, &b)];
        case.compare_rewritten(&axes, &references, |graph| {
            burn_parallel::partition::bucket_reductions(graph, 1000);
            burn_parallel::partition::overlap(graph);
        }).unwrap();
    });
}

#[test]
fn random_plans_of_random_chains() {
    for case in &CHAINS {
        one_axis(case, &[2, 3, 4], 16);
        two_axes(case, &[[2, 2], [2, 3], [3, 2]], 8);
    }
}

#[test]
fn random_plans_of_transformers() {
    for case in [&TOKENS, &POST] {
        one_axis(case, &[2, 3, 4], 24);
        two_axes(case, &[[2, 2], [2, 3], [3, 2]], 16);
    }
    assert_eq!(VOCABULARY % 12, 0, "every degree here divides the vocabulary");
}

#[test]
fn random_plans_of_a_convolutional_net() {
    let case: Case<Cnn, (Tensor<4>, Tensor<1, Int>)> =
        Case { make: Cnn::new, batch: |seed| images(4, seed, &device()), loss: |m, (x, t)| m.loss(x, t) };
    one_axis(&case, &[2, 4], 20);
    two_axes(&case, &[[2, 2]], 12);
}
